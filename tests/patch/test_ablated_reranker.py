"""AblatedReranker against hooks on the unmodified module, one unpadded row at a time."""

import pickle

import numpy as np
import oracles
import pandas as pd
import pyterrier as pt
import pytest
import torch
from toys import (
    FAMILIES,
    effects_of,
    frame_of,
    minilm_path,
    reference,
    toy_bi_encoder,
    toy_cross_encoder,
)

from pyterrier_mech import AblatedReranker, AblateHeads, BiEncoder, PatchedReranker, Units

pytestmark = pytest.mark.numeric

UNITS = ['L0H1', 'L1H0', 'L1H3', 'L0N3', 'L0N40', 'L1N7']
PLACES = {
    ('heads', 0): [*range(8, 16)],
    ('heads', 1): [*range(8), *range(24, 32)],
    ('neurons', 0): [3, 40],
    ('neurons', 1): [7],
}
VALUES = ['zero', 'mean', 'resample']


def ranker(family, pooling=None, **settings):
    return toy_bi_encoder(family, pooling, **settings) if pooling else toy_cross_encoder(family, **settings)


def cases(model):
    """For every value, what the stage is given and the values by the oracle."""
    plain = oracles.plain(model)
    return {
        'zero': (None, oracles.zero_values),
        'mean': (reference(), oracles.mean_values(plain, reference())),
        'resample': (reference().iloc[1:2], oracles.other_values(plain, *reference().iloc[1])),
    }


@pytest.mark.parametrize(
    ('family', 'pooling'),
    [(family, None) for family in FAMILIES]
    + [
        (family, pooling)
        for family in ('bert', 'distilbert', 'modernbert', 'deberta-v2')
        for pooling in ('cls', 'mean')
    ],
)
def test_scores_equal_the_oracle_in_every_family(family, pooling):
    model, frame = ranker(family, pooling), frame_of(8).iloc[::2]
    before = model.score(list(frame['query']), list(frame['text']))
    for value, (given, values_of) in cases(model).items():
        res = AblatedReranker(model, UNITS, value=value, reference=given)(frame)
        assert np.abs(res.score - before).max() > (1e-3 if pooling is None else 1e-5)
        expected = oracles.ablated(oracles.plain(model), frame, values_of, PLACES)
        np.testing.assert_allclose(res.score, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize('family', FAMILIES)
def test_zero_equals_zeroing_the_weights(family):
    model, frame = toy_cross_encoder(family, fresh=True), frame_of(8)
    res = AblatedReranker(model, UNITS)(frame)
    with torch.no_grad():
        for site, columns in PLACES.items():
            oracles.projections(model.model)[site].weight[:, columns] = 0
    expected = model.score(list(frame['query']), list(frame['text']))
    np.testing.assert_allclose(res.score, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize('value', VALUES)
@pytest.mark.parametrize('pooling', [None, 'mean'])
def test_one_head_equals_ablate_heads(value, pooling):
    model, frame = ranker('bert', pooling), frame_of(8)
    effects = AblateHeads(model, value, reference=reference(), seed=2)(frame)
    res = AblatedReranker(model, ['L1H2'], value=value, reference=reference(), seed=2)(frame)
    np.testing.assert_allclose(res.score, effects.score_plain + effects['L1H2'], atol=1e-12)


@pytest.mark.parametrize('value', VALUES)
def test_ablating_nothing_is_the_model(value):
    model = ranker('roberta')
    res, expected = AblatedReranker(model, [], value=value, reference=reference())(frame_of(8)), model(frame_of(8))
    np.testing.assert_allclose(res.score, expected.score, atol=1e-12)
    pd.testing.assert_frame_equal(res.drop(columns='score'), expected.drop(columns='score'))


def test_a_row_resampled_from_itself_keeps_its_score():
    model, frame = ranker('bert'), frame_of(8).iloc[3:4]
    res = AblatedReranker(model, Units.all(model), value='resample', reference=frame)(frame)
    np.testing.assert_allclose(res.score, model(frame).score, atol=1e-12)


def test_everything_zeroed_leaves_the_first_token_which_is_the_same_in_every_text():
    model = ranker('distilbert')
    assert model(frame_of(8)).score.std() > 1e-3
    assert AblatedReranker(model, Units.all(model))(frame_of(8)).score.std() < 1e-12


@pytest.mark.parametrize('value', ['mean', 'resample'])
@pytest.mark.parametrize('pooling', [None, 'mean'])
def test_the_order_of_the_reference_and_the_models_batches_do_not_matter(value, pooling):
    frame = frame_of(8)
    expected = AblatedReranker(ranker('bert', pooling), UNITS, value=value, reference=reference())(frame).score
    given = {'value': value, 'reference': reference().iloc[::-1]}
    small = AblatedReranker(ranker('bert', pooling, batch_tokens=40), UNITS, **given)
    np.testing.assert_allclose(small(frame).score, expected, atol=1e-12)


def test_the_seed_decides_the_draw():
    model, inp = ranker('bert'), frame_of(8)
    stages = [AblatedReranker(model, UNITS, value='resample', reference=reference(), seed=seed) for seed in (0, 0, 1)]
    results = [stage(inp).score for stage in stages]
    np.testing.assert_allclose(results[0], results[1], atol=1e-12)
    assert np.abs(results[0] - results[2]).max() > 1e-6
    np.testing.assert_allclose(stages[0].score(list(inp['query']), list(inp['text'])), results[0], atol=1e-12)


def test_float32_models_give_float32():
    model, double = toy_cross_encoder('bert', dtype=torch.float32), ranker('bert')
    for value in VALUES:
        res = AblatedReranker(model, UNITS, value=value, reference=reference())(frame_of(8))
        assert res.score.dtype == np.float32
        exact = AblatedReranker(double, UNITS, value=value, reference=reference())(frame_of(8))
        np.testing.assert_allclose(res.score, exact.score, atol=1e-5)


@pytest.mark.parametrize(
    ('units', 'settings', 'kind', 'message'),
    [
        (['L0N48'], {}, ValueError, r'L0N48: .* does not have it; it has \[48, 48\] neurons'),
        (['L2H0'], {}, ValueError, 'L2H0: .* does not have it'),
        (['head'], {}, ValueError, "'head' does not name a head or a neuron"),
        (3, {}, TypeError, 'must be a list of names; got 3'),
        ([], {'value': 'median'}, ValueError, "value must be one of .*got (value=)?'median'"),
        ([], {'value': 'mean'}, ValueError, "value='mean' needs rows"),
        ([], {'value': 'mean', 'reference': 'all'}, TypeError, 'reference must be a frame; got str'),
        ([], {'value': 'resample', 'reference': reference().iloc[:0]}, ValueError, 'has no rows'),
    ],
)
def test_bad_input(units, settings, kind, message):
    stage = AblatedReranker(ranker('bert'), units, **settings)
    with pytest.raises(kind, match=message):
        stage(frame_of(8))
    with pytest.raises(kind, match=message):
        stage.score(['rust'], ['bread'])


def test_equality_and_repr_by_units_value_and_reference():
    model = BiEncoder(minilm_path())

    def stages():
        return [
            AblatedReranker(model, ['L0H1', (2, 3), 'L1N9']),
            AblatedReranker(model, Units.of(['L0H1']), value='resample', reference=reference(), seed=4),
            AblatedReranker(model, ['L0H1'], value='resample', reference=reference()),
            AblatedReranker(model, ['L0H1'], value='mean', reference=reference()),
            PatchedReranker(model, ['L0H1']),
            PatchedReranker(model, ['L0H2'], filler='mask'),
            PatchedReranker(model, ['L0H2'], filler=None, text_field='body'),
        ]

    assert len(set(stages())) == len(stages()) and stages() == stages()
    assert stages()[0] == AblatedReranker(model, ['L1N9', 'L2H3', 'L0H1'])
    for stage in (stages()[0], *stages()[4:]):
        assert eval(repr(stage)) == stage and hash(eval(repr(stage))) == hash(stage)
    assert '<DataFrame of 5 rows>' in repr(stages()[1]) and 'seed=4' in repr(stages()[1])


@pytest.mark.real
def test_pickles_without_reference_values():
    model, frame, settings = BiEncoder(minilm_path(), device='cpu'), frame_of(2), {'reference': reference()}
    stages = [
        AblatedReranker(model, UNITS, value='mean', **settings),
        AblateHeads(model, 'mean', heads=['L0H1'], **settings),
    ]
    for stage, read in zip(stages, (lambda res: res.score, effects_of)):
        expected = read(stage(frame))
        assert len(pickle.dumps(stage)) < 20_000
        np.testing.assert_allclose(read(pickle.loads(pickle.dumps(stage))(frame)), expected, atol=1e-6)


def test_an_experiment_compares_interventions():
    model, frame = ranker('bert'), frame_of(8)
    topics = frame[['qid', 'query']].drop_duplicates()
    qrels = pd.DataFrame({'qid': ['0', '1'], 'docno': ['3', '4'], 'label': 1})
    systems = [model, AblatedReranker(model, []), AblatedReranker(model, Units.of([f'L1H{i}' for i in range(4)]))]
    systems = [pt.Transformer.from_df(frame) >> system for system in systems]
    res = pt.Experiment(systems, topics, qrels, ['recip_rank'], names=['model', 'nothing', 'heads'], plan='tree')
    assert res.recip_rank[0] == res.recip_rank[1]
