"""AblateHeads against hooks on the unmodified module: one unpadded row, one head, one full forward at a time."""

import functools
import logging

import inside
import numpy as np
import oracles
import pandas as pd
import pytest
import torch
from toys import (
    FAMILIES,
    QUERIES,
    TEXTS,
    effects_of,
    frame_of,
    heads_of,
    minilm_path,
    reference,
    toy_bi_encoder,
    toy_cross_encoder,
)

from pyterrier_mech import AblateHeads, BiEncoder, Units

pytestmark = pytest.mark.numeric


def ranker(family, pooling=None):
    return toy_bi_encoder(family, pooling) if pooling else toy_cross_encoder(family)


def check(model, frame, value, values_of, given=None, least=1e-3, **settings):
    res = AblateHeads(model, value, reference=given, **settings)(frame)
    expected = oracles.ablation_effects(oracles.plain(model), frame, values_of)
    assert expected.abs().max().max() > least
    np.testing.assert_allclose(res[heads_of(res)], expected, atol=1e-10, rtol=0)
    return res, expected


def replacements(model, value):
    """(what the stage is given, the values by the oracle) of one way to ablate."""
    plain = oracles.plain(model)
    if value == 'zero':
        return None, oracles.zero_values
    if value == 'mean':
        return reference(), oracles.mean_values(plain, reference())
    return reference().iloc[1:2], oracles.other_values(plain, *reference().iloc[1])


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize(
    ('value', 'step'), [('zero', slice(0, 8, 2)), ('mean', slice(0, 8, 3)), ('resample', slice(1, 8, 4))]
)
def test_every_value_equals_the_oracle_in_every_family(family, value, step):
    model, frame = ranker(family), frame_of(8)[step]
    given, values_of = replacements(model, value)
    res, expected = check(model, frame, value, values_of, given)
    np.testing.assert_allclose(res.score_plain, model.score(list(frame['query']), list(frame.text)), atol=1e-12)
    if value == 'zero':
        for batch_tokens in (1, 300):
            res = AblateHeads(model, batch_tokens=batch_tokens)(frame)
            np.testing.assert_allclose(res[heads_of(res)], expected, atol=1e-10, rtol=0)


def test_a_type_that_the_reference_lacks_takes_the_mean_of_all_positions():
    model = ranker('bert')
    plain = oracles.plain(model)
    without = pd.DataFrame({'query': ['bicycle', 'rust'], 'text': ['A slow rise.', 'Bread keeps best cut side down.']})
    assert not any('doc_match' in oracles.towers_of(plain, *pair)[0][1] for pair in without.to_numpy())
    check(model, frame_of(2), 'mean', oracles.mean_values(plain, without), without)


def test_resample_takes_a_row_of_the_reference_that_is_not_the_own():
    model, frame, everything = ranker('bert'), frame_of(8), pd.concat([frame_of(8), reference()])
    plain = oracles.plain(model)
    res = AblateHeads(model, 'resample', reference=everything, seed=3)(frame)
    drawn = {}
    for pair in sorted(set(zip(everything['query'], everything['text']))):
        values_of = oracles.other_values(plain, *pair)
        expected = oracles.ablation_effects(plain, frame, values_of, ['L0H1', 'L1H2'])
        fits = np.isclose(res[['L0H1', 'L1H2']], expected, atol=1e-10, rtol=0).all(1)
        for row in np.flatnonzero(fits):
            drawn.setdefault(row, []).append(pair)
    assert len(drawn) == 8
    for row, (pair,) in drawn.items():
        assert pair != (frame['query'][row], frame['text'][row])
    assert len({pair for (pair,) in drawn.values()}) > 3


@pytest.mark.parametrize('family', ['bert', 'modernbert', 'mpnet'])
@pytest.mark.parametrize('pooling', ['cls', 'mean'])
def test_both_towers_of_a_bi_encoder_equal_the_oracle(family, pooling):
    model = ranker(family, pooling)
    for value in ('zero', 'mean', 'resample'):
        given, values_of = replacements(model, value)
        check(model, frame_of(8).iloc[::5], value, values_of, given, least=1e-4)


def test_a_tower_of_a_bi_encoder_draws_by_its_own_text():
    """One query: its tower has one other query to draw, for every document."""
    model, frame = ranker('bert', 'mean'), frame_of(8).iloc[2:3]
    plain = oracles.plain(model)
    given = pd.DataFrame({'query': ['rust', 'rust', QUERIES[0]], 'text': ['winter', 'oil', TEXTS[2]]})
    res = AblateHeads(model, 'resample', reference=given)(frame)
    fits = 0
    for text in ('winter', 'oil'):
        expected = oracles.ablation_effects(plain, frame, oracles.other_values(plain, 'rust', text))
        fits += np.allclose(effects_of(res), expected, atol=1e-10, rtol=0)
    assert fits == 1


def test_long_texts_are_ablated_as_the_model_reads_them():
    model = toy_cross_encoder('bert', max_length=24)
    frame = frame_of(2).assign(text=lambda f: f['text'] + ' bread' * 40)
    check(model, frame, 'mean', oracles.mean_values(oracles.plain(model), frame), frame)


def test_zero_equals_zeroing_the_weights():
    model, frame = toy_cross_encoder('electra', fresh=True), frame_of(8)
    res = AblateHeads(model, heads=['L1H2'])(frame)
    with torch.no_grad():
        model.model.electra.encoder.layer[1].attention.output.dense.weight[:, 16:24] = 0
    expected = model.score(list(frame['query']), list(frame['text']))
    np.testing.assert_allclose(res['L1H2'] + res.score_plain, expected, atol=1e-12, rtol=0)


# -- identities and invariances


def test_a_row_resampled_from_itself_stays():
    frame = frame_of(1)
    res = AblateHeads(ranker('bert'), 'resample', reference=frame)(frame)
    assert np.abs(effects_of(res)).max() < 1e-13


@pytest.mark.parametrize('value', ['mean', 'resample'])
@pytest.mark.parametrize('pooling', [None, 'mean'])
def test_the_order_of_the_reference_and_the_models_batches_do_not_matter(value, pooling):
    make = functools.partial(toy_bi_encoder, 'bert') if pooling else functools.partial(toy_cross_encoder, 'bert')
    res = AblateHeads(make(), value, reference=reference())(frame_of(8))
    small = AblateHeads(make(batch_tokens=40), value, reference=reference().iloc[::-1], batch_tokens=200)
    shuffled = small(frame_of(8).sample(frac=1, random_state=3)).sort_index()
    np.testing.assert_allclose(effects_of(shuffled), effects_of(res), atol=1e-12)


def test_the_seed_decides_the_draw_and_nothing_else():
    model, frame = ranker('bert'), frame_of(8)
    runs = [AblateHeads(model, 'resample', reference=reference(), seed=seed)(frame) for seed in (0, 0, 1)]
    np.testing.assert_allclose(effects_of(runs[0]), effects_of(runs[1]), atol=1e-12)
    assert ((runs[0]['L0H0'] - runs[2]['L0H0']).abs() > 1e-6).any()
    twice = reference().iloc[[0, 1, 2, 3, 4, 0, 0]].assign(more=1)
    again = AblateHeads(model, 'resample', reference=twice, seed=0)(frame)
    np.testing.assert_allclose(again['L0H0'], runs[0]['L0H0'], atol=1e-12)


def test_the_reference_is_run_once():
    model = toy_cross_encoder('bert', fresh=True)
    stage, given, tokens = AblateHeads(model, 'mean', reference=reference()), reference(), []
    handle = model.model.bert.encoder.layer[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape))
    first = stage(frame_of(8))
    whole = len(tokens)
    again = stage(frame_of(8))
    handle.remove()
    assert 0 < len(tokens) - whole < whole
    np.testing.assert_allclose(effects_of(again), effects_of(first), atol=1e-12)
    pd.testing.assert_frame_equal(given, reference())


def test_a_subset_of_heads_gives_the_same_numbers():
    model, frame = ranker('distilbert'), frame_of(3)
    every = AblateHeads(model, 'mean', reference=reference())(frame)
    for heads in (['L1H3', (0, 2)], Units.of(['L1H3', 'L0H2'])):
        some = AblateHeads(model, 'mean', reference=reference(), heads=heads)(frame)
        assert heads_of(some) == ['L0H2', 'L1H3']
        np.testing.assert_allclose(effects_of(some), every[heads_of(some)], atol=1e-13)
    assert heads_of(AblateHeads(model, heads=[])(frame)) == []
    assert heads_of(AblateHeads(model, heads=['L1H0'])(frame)) == ['L1H0']


def test_out_of_memory_in_the_reference_halves_the_budget_and_changes_no_number():
    model = toy_cross_encoder('bert', batch_tokens=5000, fresh=True)
    expected = AblateHeads(model, 'mean', reference=reference())(frame_of(8))

    def limited(_, args):
        if args[0].shape[:2].numel() > 60:
            raise torch.OutOfMemoryError('device memory is full')

    handle = model.model.bert.encoder.layer[1].attention.self.value.register_forward_pre_hook(limited)
    res = AblateHeads(model, 'mean', reference=reference())(frame_of(8))
    handle.remove()
    assert inside.budget_of(model) < 200
    np.testing.assert_allclose(effects_of(res), effects_of(expected), atol=1e-12)


# -- the frame


def test_columns():
    res = AblateHeads(ranker('bert'), 'mean', reference=reference())(frame_of(8))
    new = [column for column in res.columns if column not in frame_of(8).columns]
    assert new == ['score_plain'] + [f'L{i}H{h}' for i in (0, 1) for h in range(4)] + ['analysis']


def test_empty_texts():
    frame = frame_of(2).assign(text=['', 'rust'])
    res = AblateHeads(ranker('bert'), 'resample', reference=reference())(frame)
    assert np.isfinite(effects_of(res)).all()


def test_another_text_field_is_that_of_the_reference_too():
    model, renamed = ranker('bert'), {'text': 'body'}
    expected = AblateHeads(model, 'mean', reference=reference())(frame_of(8))
    stage = AblateHeads(model, 'mean', reference=reference().rename(columns=renamed), text_field='body')
    np.testing.assert_allclose(stage(frame_of(8).rename(columns=renamed))['L0H0'], expected['L0H0'], atol=1e-13)


@pytest.mark.parametrize(
    ('settings', 'kind', 'message'),
    [
        ({'value': 'max'}, ValueError, r"value must be one of .*got (value=)?'max'"),
        ({'value': 'mean'}, ValueError, "value='mean' needs rows to take values from: give reference="),
        ({'value': 'resample'}, ValueError, "value='resample' needs rows"),
        ({'value': 'mean', 'reference': ['text']}, TypeError, 'reference must be a frame; got list'),
        ({'value': 'mean', 'reference': reference().iloc[:0]}, ValueError, 'reference= has no rows'),
        (
            {'value': 'mean', 'reference': reference()[['text']]},
            ValueError,
            r"reference= lacks the columns \['query'\]",
        ),
        (
            {'value': 'resample', 'reference': pd.DataFrame({'query': ['a', 'b'], 'text': ['x', None]})},
            ValueError,
            "1 of 2 rows without a string in column 'text' \\(first at position 1\\)",
        ),
        ({'heads': ['L7H0']}, ValueError, 'L7H0: .* does not have it'),
        ({'heads': ['head 3']}, ValueError, 'does not name a head'),
        ({'heads': ['L0N3']}, ValueError, "heads must name heads only; got 'L0N3'"),
    ],
)
def test_bad_settings_name_the_value_and_the_way_out(settings, kind, message):
    stage = AblateHeads(ranker('bert'), **settings)
    for frame in (frame_of(8), frame_of(0)):
        with pytest.raises(kind, match=message):
            stage(frame)


def test_families_without_a_fast_engine_say_so_once(caplog):
    inside.forget_what_was_told()
    model = ranker('mpnet')
    with caplog.at_level(logging.INFO, logger='pyterrier_mech'):
        for _ in range(2):
            AblateHeads(model)(frame_of(2))
    assert caplog.text.count("no fast engine (the attention of 'mpnet'") == 1


def test_equality_and_repr_by_value_and_reference():
    model = BiEncoder(minilm_path())
    stages = [
        AblateHeads(model),
        AblateHeads(model, 'mean', reference=reference()),
        AblateHeads(model, 'mean', reference=reference().iloc[1:]),
        AblateHeads(model, 'resample', reference=reference()),
        AblateHeads(model, 'resample', reference=reference(), seed=1),
        AblateHeads(model, heads=['L0H1']),
        AblateHeads(BiEncoder(minilm_path(), pooling='cls')),
    ]
    assert len(set(stages)) == len(stages)
    assert AblateHeads(model, 'mean', reference=reference()) == stages[1]
    for stage in (stages[5], AblateHeads(model, heads=Units.of(['L0H1']), text_field='body', seed=2)):
        assert eval(repr(stage)) == stage and hash(eval(repr(stage))) == hash(stage)
    assert repr(stages[1]).endswith("value='mean', reference=<DataFrame of 5 rows>)")
