"""The estimator: fitted in a pipeline, judged on other queries, and checked before any work."""

import ir_measures
import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from fits import close_weights, ticking
from toys import (
    assets,
    real_cross_encoder,
    same_weights,
    toy_bi_encoder,
    toy_cross_encoder,
    training_frame,
    weights,
)

from pyterrier_mech import Circuit, CrossEncoder, PatchHeads, PrunedReranker, stats
from pyterrier_mech.prune import (
    SMA,
    Distillation,
    FineTuning,
    Fisher,
    Movement,
    Patching,
    Plan,
    Random,
    Rescaling,
    prune_units,
)

FRAME = training_frame()

QRELS = FRAME[['qid', 'docno']].assign(label=[(7 * i) % 3 for i in range(len(FRAME))])
TRAIN, OTHER = FRAME[FRAME['qid'] < 'q2'], FRAME[FRAME['qid'] >= 'q2']
SMALL = {'multiple': 8}


class Refusing:
    """A criterion that must not be asked."""

    needs = frozenset({'text'})

    def scores(self, model, data):
        raise AssertionError('there was work')


def fitted(model=None, criterion=None, frame=TRAIN, qrels=QRELS, validation=None, **options):
    stage = PrunedReranker(model or toy_cross_encoder('bert'), criterion, **{**SMALL, **options})
    stage.fit(frame, qrels, validation, None if validation is None else QRELS)
    return stage


# -- fitting


@pytest.mark.parametrize('make', [toy_cross_encoder, toy_bi_encoder])
def test_fit_leaves_model_and_frame_and_makes_a_smaller_ranker(make):
    model, frame = make('bert'), TRAIN.copy()
    before = weights(model)
    stage = PrunedReranker(model, **SMALL)
    assert not stage.fitted and stage.fit(frame, QRELS, None, None) is None
    assert same_weights(weights(model), before) and frame.equals(TRAIN)
    plan = stage.plan_
    assert plan.check(model) is plan and 0 < len(plan.removed)
    assert stage.model_.head_counts == list(map(len, plan.heads))
    assert type(stage.model_) is type(model) and stage.model_ is not model
    assert plan.settings['kept_share'] <= 0.5 and plan.settings['criterion'] == repr(Fisher())
    assert stage.qids_ == plan.settings['qids'] == ['q0', 'q1'] and stage.scores_.joint
    assert list(stage.history_) == ['recovery', 'step', 'loss', 'validation'] and not len(stage.history_)
    scores = stage.model_.score(OTHER['query'].tolist(), OTHER['text'].tolist())
    np.testing.assert_allclose(stage(OTHER)['score'], scores, atol=1e-12)


def test_nothing_depends_on_the_order_of_rows():
    recovery = (Rescaling(), Distillation(epochs=1))
    one, other = (
        fitted(frame=frame, validation=OTHER, recovery=recovery)
        for frame in (TRAIN, TRAIN.sample(frac=1, random_state=3).set_axis(list('abcdefgh')))
    )
    assert one.plan_ == other.plan_ and close_weights(weights(one.model_), weights(other.model_))
    pd.testing.assert_frame_equal(one.history_, other.history_, rtol=1e-7)
    assert set(one.history_['recovery']) == {'Distillation'} and one.history_['validation'].notna().all()
    assert one.qids_ == ['q0', 'q1', 'q2', 'q3']


def test_recoveries_follow_each_other_and_one_needs_no_tuple():
    plain = fitted(recovery=())
    assert same_weights(
        weights(plain.model_), weights(prune_units(toy_cross_encoder('bert'), plain.plan_.heads, plain.plan_.neurons))
    )
    one, two = fitted(recovery=Rescaling()), fitted(recovery=(Rescaling(), FineTuning(epochs=1)))
    assert one.plan_ == plain.plan_ == two.plan_
    scores = [stage(OTHER)['score'].to_numpy() for stage in (plain, one, two)]
    assert all(np.abs(a - b).max() > 1e-6 for a, b in zip(scores, scores[1:], strict=False))


def test_a_given_plan():
    plan = Plan.removing(toy_cross_encoder('bert'), ['L0H1', 'L1N3'])
    stage = PrunedReranker(toy_cross_encoder('bert'), plan=plan, recovery=())
    stage.fit(TRAIN)
    assert stage.plan_ is plan and stage.scores_ is None
    expected = prune_units(toy_cross_encoder('bert'), plan.heads, plan.neurons)(OTHER)
    np.testing.assert_allclose(stage(OTHER)['score'], expected['score'], atol=1e-12)
    again = PrunedReranker(toy_cross_encoder('bert'), plan=fitted().plan_)
    again.fit(FRAME[FRAME['qid'] == 'q2'])
    assert again.qids_ == ['q0', 'q1', 'q2']


@pytest.mark.parametrize('settings', [{'speedup': 1.5}, {'sparsity': 1 / 3}])
def test_latency_is_measured_and_corrected(tmp_path, monkeypatch, settings):
    monkeypatch.setenv('PYTERRIER_HOME', str(tmp_path))

    def seconds(widths):
        # Parts do not add up: the table alone would miss what is asked.
        return 1 + (sum(2 * heads + neurons / 12 for heads, neurons in widths)) ** 1.5

    ticking(monkeypatch, seconds)
    stage = fitted(criterion=Random(), budget='latency', multiple=1, **settings)
    assert list(tmp_path.rglob('*.json'))
    kept = list(zip(map(len, stage.plan_.heads), map(len, stage.plan_.neurons), strict=True))
    whole = list(zip(stage.plan_.of_heads, stage.plan_.of_neurons, strict=True))
    measured = stage.plan_.settings['measured_speedup']
    assert measured == pytest.approx(seconds(whole) / seconds(kept))
    assert measured == pytest.approx(1.5, rel=0.06)
    assert {name: stage.plan_.settings[name] for name in settings} == settings


def test_text_field():
    frame = TRAIN.rename(columns={'text': 'body'})
    stage = fitted(frame=frame, text_field='body')
    assert stage.plan_ == fitted().plan_ and stage.model_.text_field == 'body'
    res = stage(OTHER.rename(columns={'text': 'body'}))
    np.testing.assert_allclose(res['score'], fitted()(OTHER)['score'], atol=1e-12)


# -- the stage


def test_before_fit():
    stage = PrunedReranker(toy_cross_encoder('bert'))
    with pytest.raises(ValueError, match=r'has not been fitted: call fit\(res, qrels'):
        stage(OTHER)
    with pytest.raises(ValueError, match='has not been fitted'):
        stage.save('nowhere')


@pytest.mark.parametrize(
    'make', [lambda: PrunedReranker(toy_cross_encoder('bert')), fitted], ids=['unfitted', 'fitted']
)
def test_conventions(make):
    stage = make()
    assert pt.inspect.transformer_inputs(stage) == [['qid', 'docno', 'query', 'text']]
    outputs = pt.inspect.transformer_outputs(stage, ['qid', 'query', 'docno', 'text'])
    assert outputs == ['qid', 'query', 'docno', 'text', 'score', 'rank']
    empty = stage(FRAME.head(0))
    assert list(empty) == outputs and not len(empty)
    with pytest.raises(pt.validate.InputValidationError, match='text loader'):
        stage(FRAME.drop(columns='text'))


def test_repr_tells_what_differs():
    stage = PrunedReranker(toy_cross_encoder('bert'), Random(seed=3), 0.4, protect=['L0H1'], recovery=())
    options = "criterion=Random(seed=3), sparsity=0.4, protect=['L0H1'], recovery=()"
    assert repr(stage) == f'PrunedReranker({toy_cross_encoder("bert")!r}, {options})'


def test_experiment_and_analysis():
    pruned, model = fitted(), toy_cross_encoder('bert')
    given = pt.Transformer.from_df(OTHER.assign(score=0.0, rank=0))
    table = pt.Experiment(
        [given, given >> model, given >> pruned],
        OTHER[['qid', 'query']].drop_duplicates(),
        QRELS,
        ['ndcg_cut_10'],
        baseline=1,
    )
    assert len(table) == 3 and np.isfinite(table['ndcg_cut_10']).all()
    pairs = OTHER.assign(text_0=OTHER['text'], text=OTHER['text'] + ' rust')
    heads = [c for c in PatchHeads(pruned.model_)(pairs).columns if c.startswith('L') and 'H' in c]
    assert len(heads) == sum(map(len, pruned.plan_.heads)) > 0


# -- queries that had a say do not judge


def test_judging():
    stage = fitted(validation=FRAME[FRAME['qid'] == 'q2'])
    last = FRAME[FRAME['qid'] == 'q3']
    found = stage.compare(last, QRELS, ['ndcg_cut_10', ir_measures.RR])
    assert found.table['n_queries'].tolist() == [1, 1]
    runs = toy_cross_encoder('bert')(last), {'pruned': stage(last)}
    pd.testing.assert_frame_equal(
        found.per_query, stats.compare(*runs, QRELS, ['ndcg_cut_10', ir_measures.RR]).per_query
    )
    for seen in ('q0', 'q2'):
        frame = FRAME[FRAME['qid'].isin([seen, 'q3'])]
        with pytest.raises(ValueError, match=f"queries that would judge .*'{seen}'"):
            stage.compare(frame, QRELS, ['ndcg_cut_10'])
        with pytest.raises(ValueError, match=f"queries that would judge .*'{seen}'"):
            stats.compare(toy_cross_encoder('bert')(frame), stage(frame), QRELS, ['ndcg_cut_10'])


def test_queries_of_circuits_and_of_rankers_before():
    circuit = Circuit.from_units(['L0H1'], qids=['q3'])
    assert fitted(protect=circuit).qids_ == ['q0', 'q1', 'q3']

    class Informed(Refusing):
        def scores(self, model, data):
            return Random().scores(model, data)

    criterion = Informed()
    criterion.circuit = circuit
    assert fitted(criterion=criterion).qids_ == ['q0', 'q1', 'q3']
    one, two = fitted(), fitted(frame=FRAME[FRAME['qid'] == 'q2'])
    assert (one >> two)(OTHER).attrs['pyterrier_mech.fitted_on'] == ['q0', 'q1', 'q2']


def test_queries_of_the_circuit_of_sma():
    assert fitted(criterion=SMA(circuit=Circuit.from_units(['L0H1'], qids=['q3']))).qids_ == ['q0', 'q1', 'q3']


def test_pruned_twice_remembers_both_fits(tmp_path):
    once = fitted()
    assert not hasattr(toy_cross_encoder('bert').model.config, 'fitted_on')
    once.save(tmp_path / 'once')
    for model in (once.model_, CrossEncoder(str(tmp_path / 'once' / 'ranker'), dtype='float64')):
        again = fitted(model, frame=FRAME[FRAME['qid'] == 'q2'])
        assert again.qids_ == ['q0', 'q1', 'q2']
        with pytest.raises(ValueError, match='q0'):
            again.compare(TRAIN, QRELS, [ir_measures.nDCG @ 10])


def test_a_plan_does_not_remove_what_is_protected():
    stage = PrunedReranker(
        toy_cross_encoder('bert'),
        plan=Plan.removing(toy_cross_encoder('bert'), ['L0H1']),
        protect=['L0H1'],
        recovery=(),
    )
    with pytest.raises(ValueError, match='the plan removes L0H1, which is protected'):
        stage.fit(TRAIN)


# -- the real one


@pytest.mark.real
def test_the_real_cross_encoder_in_a_pipeline():
    folder = assets()
    text = {'qid': str, 'docno': str}
    topics = pd.read_csv(folder / 'dl' / 'topics.tsv', sep='\t', dtype=text)
    qrels = pd.read_csv(folder / 'dl' / 'qrels.tsv', sep='\t', dtype=text)
    docs = pd.read_json(folder / 'dl' / 'docs.jsonl.gz', lines=True, dtype=text)
    chosen = [topics[topics['split'] == split].head(2) for split in ('train', 'dev')]
    judged = qrels.groupby('qid').head(6).merge(docs, on='docno')
    judged['text'] = judged['text'].str[:200]
    res = pd.concat(chosen).merge(judged, on='qid').drop(columns=['split', 'label'])
    res = pt.model.add_ranks(res.assign(score=0.0))
    model = real_cross_encoder()
    pruned = PrunedReranker(model, sparsity=0.3)
    pipeline = pt.Transformer.from_df(res) >> pruned
    pipeline.fit(chosen[0][['qid', 'query']], qrels, None, None)
    assert pruned.plan_.check(model) and 0.69 < pruned.plan_.settings['kept_share'] <= 0.7
    assert all(len(layer) % 32 == 0 for layer in pruned.plan_.neurons)
    found = pruned.compare(res[res['qid'].isin(chosen[1]['qid'])], qrels, ['ndcg_cut_10'])
    assert found.scores['pearson'].iloc[0] > 0.5
    dev = pipeline(chosen[1][['qid', 'query']])
    assert len(dev) == 12 and dev['score'].dtype == np.float32
    with pytest.raises(ValueError, match='would judge'):
        stats.compare(model(res), pipeline(pd.concat(chosen)[['qid', 'query']]), qrels, ['ndcg_cut_10'])


def test_edited_texts_are_for_those_who_compare():
    edited = TRAIN.assign(text_0=TRAIN['text'], text=TRAIN['text'] + ' ' + TRAIN['query'])
    for criterion in (Fisher(), SMA(protection=1.0), Movement(steps=2)):
        plain, paired = (fitted(criterion=criterion, frame=frame) for frame in (TRAIN, edited))
        assert plain.plan_ == paired.plan_
        np.testing.assert_allclose(paired(OTHER)['score'], plain(OTHER)['score'], atol=1e-9)
    assert fitted(criterion=Patching(), frame=edited).plan_ != fitted(frame=edited).plan_
