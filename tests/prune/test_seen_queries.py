"""Queries that chose or trained a pruned ranker judge it in no way; and what the rows to fit on are."""

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from toys import toy_cross_encoder, training_frame

from pyterrier_mech import AblatedReranker, CrossEncoder, Perturb, PrunedReranker, stats
from pyterrier_mech.prune import Fisher, FitData, Random, Taylor
from pyterrier_mech.results import Circuit

NUMBERS = {'q0': '1', 'q1': '2', 'q2': '3', 'q3': '4'}
FRAME = training_frame().assign(qid=lambda rows: rows['qid'].map(NUMBERS))
QRELS = FRAME[['qid', 'docno']].assign(label=[(7 * i) % 3 for i in range(len(FRAME))])
TRAIN, OTHER = FRAME[FRAME['qid'] < '3'], FRAME[FRAME['qid'] >= '3']


def fitted(frame=TRAIN, model=None, **settings):
    stage = PrunedReranker(model or toy_cross_encoder(), Random(), **{'multiple': 8, 'recovery': (), **settings})
    stage.fit(frame)
    return stage


@pytest.mark.parametrize('kind', [str, int, float])
def test_the_pruned_ranker_carries_its_queries_wherever_it_goes(kind, tmp_path):
    stage = fitted(TRAIN.astype({'qid': kind}))
    assert stage.qids_ == ['1', '2']
    stage.save(tmp_path / 'small')
    ranker = CrossEncoder(str(tmp_path / 'small' / 'ranker'), dtype='float64')
    seen = TRAIN.astype({'qid': kind})
    stages = [stage, stage.model_, ranker, AblatedReranker(stage.model_, ['L1H0']), PrunedReranker.load(stage.path)]
    for number, one in enumerate(stages):
        with pytest.raises(ValueError, match='would judge'):
            stats.compare(toy_cross_encoder()(seen), one(seen), QRELS.astype({'qid': kind}), ['ndcg_cut_10'])
        assert one(OTHER).attrs['pyterrier_mech.fitted_on'] == ['1', '2'], number
    with pytest.raises(ValueError, match='would judge'):
        stage.compare(seen.astype({'qid': float}), QRELS.astype({'qid': float}), ['ndcg_cut_10'])


def test_pruned_again_it_carries_both():
    again = fitted(OTHER[OTHER['qid'] == '3'].astype({'qid': float}), model=fitted().model_, sparsity=0.3)
    assert again.qids_ == ['1', '2', '3'] == again.model_(OTHER).attrs['pyterrier_mech.fitted_on']


def test_queries_of_circuits_and_plans_count_as_text():
    circuit = Circuit.from_units(['L0H1'], qids=['4'])
    assert fitted(TRAIN.astype({'qid': float}), protect=circuit).qids_ == ['1', '2', '4']
    plan = fitted().plan_
    stage = PrunedReranker(toy_cross_encoder(), plan=plan, recovery=())
    stage.fit(OTHER[OTHER['qid'] == '4'].astype({'qid': float}))
    assert stage.qids_ == ['1', '2', '4']


def test_training_and_validation_overlap_whatever_their_type():
    stage = PrunedReranker(toy_cross_encoder(), Random(), multiple=8, recovery=())
    with pytest.raises(ValueError, match='in both training and validation'):
        stage.fit(TRAIN.astype({'qid': float}), None, TRAIN.astype({'qid': int}))


def test_measures_are_checked_before_anything_is_scored(monkeypatch):
    stage = fitted()

    def refuse(*args, **settings):
        raise AssertionError('there was work')

    monkeypatch.setattr(CrossEncoder, 'score', refuse)
    with pytest.raises(ValueError, match='no_such_measure'):
        stage.compare(OTHER, QRELS, ['no_such_measure'])
    with pytest.raises(AssertionError):
        stage.compare(OTHER, QRELS, ['ndcg_cut_10'])


# -- rows


def test_judgements_that_contradict_each_other_are_refused():
    both = pd.concat([QRELS, QRELS.head(1).assign(label=2)])
    with pytest.raises(ValueError, match='two labels'):
        PrunedReranker(toy_cross_encoder(), Fisher('labels')).fit(TRAIN, both)
    with pytest.raises(ValueError, match='two labels'):
        FitData(TRAIN, both).labels()
    labels = [FitData(TRAIN.astype({'qid': kind}), QRELS).labels().tolist() for kind in (str, int, float)]
    assert labels[0] == labels[1] == labels[2]


def test_an_edited_query_is_restored_and_a_rewritten_one_is_not():
    model = toy_cross_encoder()
    expected = Taylor().scores(model, FitData(TRAIN)).neurons
    edited = Perturb(lambda query, text: f'{query} rust', field='query')(TRAIN)
    rewritten = pt.apply.query(lambda row: row['query'])(TRAIN.assign(query_0='something else'))
    for frame in (edited, rewritten):
        stage = PrunedReranker(model, Taylor(), multiple=8, recovery=())
        stage.fit(frame)
        for found, wanted in zip(stage.scores_.neurons, expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_an_unclear_edit_is_refused():
    unclear = TRAIN.assign(text_0=TRAIN['text'], query_0=TRAIN['query'])
    with pytest.raises(ValueError, match='unknown whether an edit'):
        fitted(unclear)
