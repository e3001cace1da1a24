"""Measures of score and rank changes, by hand and inside pt.Experiment."""

import warnings

import ir_measures
import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from toys import QUERIES, TEXTS, toy_cross_encoder

from pyterrier_mech import PatchHeads, Perturb
from pyterrier_mech.measures import AxiomAgreement, KendallTau, RankChange, ScoreChange

NAN = float('nan')


def results():
    """Query 1 has three documents, query 2 one with two scores, query 3 none; query 4 has no results."""
    return pd.DataFrame(
        {
            'qid': ['1', '1', '1', '2', '2', '3'],
            'docno': list('abcdef'),
            'score': [3.0, 2, 1, 2, 1, 1],
            'rank': [0, 1, 2, 0, 1, 0],
            'score_original': [1.0, 2, 3, 0, NAN, NAN],
            'score_perturbed': [2.0, 1, 4, 1, 1, float('inf')],
        }
    )


TOPICS = pd.DataFrame({'qid': ['1', '2', '3', '4'], 'query': ['a', 'b', 'c', 'd']})
QRELS = pd.DataFrame({'qid': ['1', '2', '3', '4'], 'docno': list('adfx'), 'label': 1})


def per_query(measure, frame):
    """{qid: value} of the four queries, as pt.Experiment gives it."""
    res = pt.Experiment([pt.Transformer.from_df(frame)], TOPICS, QRELS, [measure], perquery=True)
    assert set(res.measure) == {str(measure)}
    return dict(zip(res.qid, res.value))


@pytest.mark.parametrize(
    ('measure', 'first', 'second'),
    [
        (ScoreChange, 1 / 3, 1),
        (AxiomAgreement(), 2 / 3, 1),
        (AxiomAgreement(expected=-1), 1 / 3, 0),
        (RankChange, 2 / 3, 0),
        (KendallTau, 1 / 3, NAN),
        (ScoreChange @ 1, 1, 1),
        (AxiomAgreement(-1) @ 2, 1 / 2, 0),
        (RankChange @ 2, 1, 0),
    ],
)
def test_values_by_hand(measure, first, second):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        values = per_query(measure, results())
    assert values['1'] == pytest.approx(first)
    assert values['2'] == pytest.approx(second, nan_ok=True)
    assert np.isnan(values['3']) and np.isnan(values['4'])


def test_row_order_does_not_matter():
    for measure in (ScoreChange, AxiomAgreement(), RankChange, KendallTau, ScoreChange @ 2):
        values, shuffled = (
            per_query(measure, frame) for frame in (results(), results().sample(frac=1, random_state=1))
        )
        np.testing.assert_array_equal(list(values.values()), [shuffled[qid] for qid in values])


def test_equal_scores_share_their_rank_and_a_score_that_stays_is_no_agreement():
    frame = results().assign(score_original=[1.0, 1, 1, 2, 2, 0], score_perturbed=[1.0, 2, 3, 2, 2, 0])
    assert per_query(RankChange, frame)['1'] == pytest.approx(2 / 3)
    assert per_query(AxiomAgreement(1), frame)['1'] == pytest.approx(2 / 3)
    assert per_query(AxiomAgreement(-1), frame)['2'] == 0
    assert np.isnan(per_query(KendallTau, frame)['2'])


def test_documents_that_the_edit_did_not_reach_do_not_enter_the_agreement():
    patchable = ['yes', 'edit truncated away', 'no alignment', 'nothing changed', 'yes', 'yes']
    frame = results().assign(patchable=patchable)
    values = per_query(AxiomAgreement(1), frame)
    assert values['1'] == 1 and np.isnan(values['2'])
    assert per_query(ScoreChange, frame)['1'] == pytest.approx(1 / 3)


def test_the_mean_is_nan_where_a_query_has_no_value():
    measures = [ScoreChange, 'recip_rank']
    everything = pt.Experiment([pt.Transformer.from_df(results())], TOPICS, QRELS, measures)
    assert np.isnan(everything.ScoreChange[0]) and everything.recip_rank[0] == 0.75
    some = pt.Experiment([pt.Transformer.from_df(results())], TOPICS[:2], QRELS[:2], measures)
    assert some.ScoreChange[0] == pytest.approx(2 / 3)
    values = pt.Experiment([pt.Transformer.from_df(results())], TOPICS, QRELS, measures, perquery=True)
    table = values.groupby('measure')['value'].agg(['mean', 'count']).loc['ScoreChange']
    assert table['mean'] == pytest.approx(2 / 3) and table['count'] == 2


def test_baselines_tests_and_plans():
    systems = [
        pt.Transformer.from_df(results().assign(score_perturbed=change)) for change in ([2.0, 1, 4, 1, 1, 1], 5.0)
    ]
    for plan in ('linear', 'tree'):
        res = pt.Experiment(
            systems, TOPICS[:2], QRELS[:2], [ScoreChange, KendallTau], names=['a', 'b'], baseline=0, plan=plan
        )
        assert list(res.ScoreChange) == pytest.approx([2 / 3, 4]) and 'ScoreChange p-value' in res.columns


def test_names_are_values():
    assert [str(m) for m in (ScoreChange, RankChange @ 5, KendallTau)] == ['ScoreChange', 'RankChange@5', 'KendallTau']
    assert AxiomAgreement() == AxiomAgreement(expected=1) != AxiomAgreement(-1)
    assert str(AxiomAgreement(-1)) == 'AxiomAgreement(-1)'
    assert set(ir_measures.run_inputs([ScoreChange])) == {
        'query_id',
        'doc_id',
        'score',
        'score_original',
        'score_perturbed',
    }
    assert ir_measures.qrel_inputs([ScoreChange]) == ['query_id']


@pytest.mark.parametrize('expected', [0, 2, '+', None])
def test_a_sign_that_is_none(expected):
    with pytest.raises(ValueError, match='expected must be 1 .* or -1 .*; got expected='):
        AxiomAgreement(expected)


def test_results_without_the_columns_say_what_to_put_before():
    frame = results().drop(columns='score_perturbed')
    with pytest.raises(
        ValueError, match=r"lack \['score_perturbed'\]: put PatchHeads\(model, heads=\[\]\) behind Perturb"
    ):
        pt.Experiment([pt.Transformer.from_df(frame)], TOPICS, QRELS, [ScoreChange], validate='ignore')
    with pytest.raises(ValueError, match='do not produce the required outputs'):
        pt.Experiment([pt.Transformer.from_df(frame)], TOPICS, QRELS, [ScoreChange], validate='error')


def test_a_real_pipeline():
    """Two documents a query, an appended word, a ranker that reads both versions."""
    model = toy_cross_encoder('bert')
    first = pd.DataFrame(
        {
            'qid': ['0', '0', '1', '1'],
            'query': [QUERIES[0]] * 2 + [QUERIES[1]] * 2,
            'docno': list('abcd'),
            'text': TEXTS,
            'score': [2.0, 1, 2, 1],
            'rank': [0, 1, 0, 1],
        }
    )
    topics = first[['qid', 'query']].drop_duplicates()
    qrels = pd.DataFrame({'qid': ['0', '1'], 'docno': ['a', 'c'], 'label': 1})
    pipeline = (
        pt.Transformer.from_df(first)
        >> Perturb(lambda query, text: f'{text} bread')
        >> PatchHeads(model, heads=[], filler='mask')
    )
    measures = [ScoreChange, AxiomAgreement(1), RankChange, 'recip_rank']
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        res = pt.Experiment([pipeline], topics, qrels, measures, perquery=True, validate='error')
    change = model.score(list(first['query']), [f'{text} bread' for text in TEXTS])
    change = change - model.score(list(first['query']), TEXTS)
    found = res.pivot(index='qid', columns='measure', values='value')
    np.testing.assert_allclose(found.ScoreChange, change.reshape(2, 2).mean(1), atol=1e-12)
    np.testing.assert_allclose(found['AxiomAgreement(+1)'], (change > 0).reshape(2, 2).mean(1))
