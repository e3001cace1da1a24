"""AttributeHeads against finite differences, exact patching, and plain loops over the points of its integrals."""

import inside
import numpy as np
import oracles
import pandas as pd
import pytest
import torch
from scipy.stats import pearsonr
from toys import (
    DESCRIBED,
    FAMILIES,
    effects_of,
    heads_of,
    minilm_path,
    pairs,
    toy_bi_encoder,
    toy_cross_encoder,
    unpatchable_pairs,
    with_heads,
)

from pyterrier_mech import AttributeHeads, BiEncoder, PatchHeads

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings('ignore:.*cannot be patched')]

PAIRED = ['attribution_patching', 'trapezoid', 'relp']

METHODS = [*PAIRED, 'gradient', 'integrated_gradients']


@pytest.mark.parametrize('family', FAMILIES)
def test_attribution_patching_is_the_slope_towards_the_patched_run(family):
    model = toy_cross_encoder(family)
    row = AttributeHeads(model)(pairs(2)).iloc[1]
    (side,) = inside.sides(model, row)
    z, target = (oracles.activations(model.model, given) for given in side.runs())
    for layer, head, columns in oracles.head_sites(model.model):
        if layer < 2:
            way = target['heads', layer] - z['heads', layer]
            expected = oracles.slope(lambda t: moved_score(model, [side.original], layer, columns, [t * way]))
            # ModernBERT turns queries and keys in float32, which a difference quotient magnifies.
            assert row[f'L{layer}H{head}'] == pytest.approx(expected, abs=1e-4 if family == 'modernbert' else 1e-9)


def moved_score(model, bases, layer, columns, ways):
    """The score with something added to the outputs of a head in every tower."""
    edits = [{('heads', layer): oracles.moved(way, columns)} for way in ways]
    return oracles.score(oracles.plain(model), bases, edits)


def linear_bi_encoder():
    """Without norms and activations, the similarity is a linear function of the last layer's head outputs."""
    model = toy_bi_encoder('bert', 'cls', similarity='dot', fresh=True)
    for layer in model.model.encoder.layer:
        layer.attention.output.LayerNorm = layer.output.LayerNorm = torch.nn.Identity()
        layer.intermediate.intermediate_act_fn = torch.nn.Identity()
    return model


@pytest.mark.parametrize('method', ['attribution_patching', 'trapezoid'])
def test_on_a_linear_toy_it_is_exact_patching(method):
    model = linear_bi_encoder()
    res = AttributeHeads(model, method)(pairs(2))
    for row in res.itertuples():
        sides = [side.runs() for side in inside.sides(model, row)]
        exact = oracles.patch_effects(oracles.plain(model), sides, [f'L1H{head}' for head in range(4)])
        for name, expected in exact.items():
            assert abs(expected) > 1e-4
            assert getattr(row, name) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize('method', ['attribution_patching', 'trapezoid'])
def test_the_error_falls_with_the_square_of_a_small_edit(method):
    """'rust' becomes 'paint', whose embedding is that of 'rust' and a little more."""
    frame = pairs(4).iloc[2:3].assign(text_0='the rust of winter', text='the paint of winter')
    errors, sizes = [], []
    for size in (0.2, 0.1):
        model = toy_cross_encoder('bert', fresh=True)
        rust, paint = model.tokenizer.convert_tokens_to_ids(['rust', 'paint'])
        with torch.no_grad():
            table = model.model.bert.embeddings.word_embeddings.weight
            table[paint] = table[rust] + size * torch.linspace(-1, 1, 32)
        exact = effects_of(PatchHeads(model)(frame))
        errors.append(np.abs(effects_of(AttributeHeads(model, method)(frame)) - exact).max())
        sizes.append(np.abs(exact).max())
    assert errors[0] < 0.1 * sizes[0]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25)


def test_the_trapezoid_averages_the_gradients_of_both_pairs():
    model = toy_cross_encoder('electra')
    forth = AttributeHeads(model)(pairs(8))
    back = AttributeHeads(model, direction='original_to_perturbed')(pairs(8))
    both = AttributeHeads(model, 'trapezoid')(pairs(8))
    np.testing.assert_allclose(effects_of(both), (effects_of(forth) - effects_of(back)) / 2, atol=1e-12)
    other = AttributeHeads(model, 'trapezoid', direction='original_to_perturbed')(pairs(8))
    np.testing.assert_allclose(effects_of(other), -effects_of(both), atol=1e-12)


@pytest.mark.parametrize('pooling', ['cls', 'mean'])
def test_bi_encoder_with_both_sides_edited(pooling):
    """The slope along which the head moves in both towers at once, as `PatchHeads` patches it."""
    model = toy_bi_encoder('bert', pooling)
    frame = pairs(4).assign(query_0=lambda f: f['query'], query=lambda f: f['query'] + ' rust', edited='query text')
    row = AttributeHeads(model)(frame).iloc[1]
    sides = [side.runs() for side in inside.sides(model, row)]
    seen = [[oracles.activations(model.model, given) for given in side] for side in sides]
    for layer, head, columns in oracles.head_sites(model.model):
        ways = [target['heads', layer] - z['heads', layer] for z, target in seen]

        def score(t, layer=layer, columns=columns, ways=ways):
            return moved_score(model, [base for base, _ in sides], layer, columns, [t * way for way in ways])

        assert row[f'L{layer}H{head}'] == pytest.approx(oracles.slope(score), abs=1e-9)


@pytest.mark.parametrize('method', PAIRED)
@pytest.mark.parametrize('direction', ['perturbed_to_original', 'original_to_perturbed'])
def test_scores_and_patchable_are_those_of_patch_heads(method, direction):
    model = toy_cross_encoder('roberta')
    frame = pairs(16)
    exact = PatchHeads(model, direction=direction)(frame)
    res = AttributeHeads(model, method, direction=direction)(frame)
    assert list(res.columns) == list(exact.columns)
    assert list(res.patchable) == list(exact.patchable) and 'nothing changed' in set(res.patchable)
    for column in ('score_original', 'score_perturbed'):
        np.testing.assert_allclose(res[column], exact[column], atol=1e-12)
    np.testing.assert_array_equal(res[heads_of(res)].isna(), exact[heads_of(exact)].isna())
    good = (res.patchable == 'yes').to_numpy()
    assert pearsonr(effects_of(res)[good].ravel(), effects_of(exact)[good].ravel()).statistic > 0.95


@pytest.mark.parametrize('family', FAMILIES)
def test_the_gradient_is_the_slope_of_scaling_a_head(family):
    model = toy_cross_encoder(family)
    frame = pairs(2).drop(columns='text_0')
    res = AttributeHeads(model, 'gradient')(frame)
    np.testing.assert_allclose(res.score_plain, model.score(list(frame['query']), list(frame.text)), atol=1e-12)
    row = res.iloc[1]
    given = dict(model.tokenizer([row['query']], [row.text], return_tensors='pt'))
    z = oracles.activations(model.model, given)
    for layer in range(2):
        values = z['heads', layer]
        expected = oracles.slope(
            lambda t, at=layer, values=values: moved_score(model, [given], at, slice(8, 16), [t * values])
        )
        assert row[f'L{layer}H1'] == pytest.approx(expected, abs=1e-4 if family == 'modernbert' else 1e-9)


def test_integrated_gradients_by_the_modules_own_embeddings():
    """The same integral by a loop over the points; the baseline replaces the query tokens."""
    model = toy_cross_encoder('bert')
    row = AttributeHeads(model, 'integrated_gradients', points=6)(pairs(2)).iloc[1]
    given = dict(model.tokenizer([row['query']], [row.text], return_tensors='pt'))
    ids = given.pop('input_ids')
    n_query = len(model.tokenizer(row['query'], add_special_tokens=False)['input_ids'])
    start = ids.clone()
    start[0, 1 : 1 + n_query] = model.tokenizer.pad_token_id
    embed = model.model.bert.embeddings.word_embeddings
    curve = []
    for alpha in np.linspace(0, 1, 6):
        found = []
        handles = [
            layer.attention.output.dense.register_forward_pre_hook(lambda _, args: found.append(args[0]))
            for layer in model.model.bert.encoder.layer
        ]
        point = (embed(start) + alpha * (embed(ids) - embed(start))).detach()
        logit = model.model(inputs_embeds=point, **given).logits.sum()
        curve.append((found, torch.autograd.grad(logit, found)))
        for handle in handles:
            handle.remove()
    for layer in range(2):
        steps = [(b[layer] - a[layer]) * (g[layer] + h[layer]) / 2 for (a, g), (b, h) in zip(curve, curve[1:])]
        expected = sum(steps)[0].view(-1, 4, 8).sum((0, 2)).detach()
        np.testing.assert_allclose([row[f'L{layer}H{h}'] for h in range(4)], expected, atol=1e-12)


def test_more_points_are_more_complete():
    model = toy_cross_encoder('bert')
    coarse, fine = (AttributeHeads(model, 'integrated_gradients', points=n)(pairs(4)) for n in (5, 9))
    ratio = coarse['completeness_error.heads'] / fine['completeness_error.heads']
    assert (ratio > 3).all() and (ratio < 5).all()
    assert list(fine.columns[-10:]) == [*heads_of(fine), 'completeness_error.heads', 'analysis']


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('family', ['modernbert'])
def test_row_order_batches_and_neighbours_do_not_matter(method, family):
    model = toy_cross_encoder(family)
    tolerance = 1e-6  # ModernBERT turns queries and keys in float32
    res = AttributeHeads(model, method)(pairs(8))
    shuffled = AttributeHeads(model, method, batch_tokens=300)(pairs(8).sample(frac=1, random_state=3)).sort_index()
    np.testing.assert_allclose(effects_of(shuffled), effects_of(res), atol=tolerance)
    single = pd.concat([AttributeHeads(model, method, batch_tokens=1)(pairs(8).iloc[i : i + 1]) for i in range(8)])
    np.testing.assert_allclose(effects_of(single), effects_of(res), atol=tolerance)


@pytest.mark.parametrize('method', METHODS)
def test_every_kind_of_ranker(method):
    for family in FAMILIES:
        if method == 'relp' and family not in DESCRIBED:
            continue
        res = AttributeHeads(toy_bi_encoder(family), method)(pairs(4))
        assert np.isfinite(effects_of(res)).any() and np.abs(effects_of(res)[0]).max() > 1e-6


def test_a_subset_of_heads_gives_the_same_numbers():
    model = toy_cross_encoder('bert')
    every = AttributeHeads(model)(pairs(2))
    some = AttributeHeads(model, heads=['L1H3', (0, 2)])(pairs(2))
    assert heads_of(some) == ['L0H2', 'L1H3']
    np.testing.assert_allclose(effects_of(some), every[['L0H2', 'L1H3']], atol=1e-13)


@pytest.mark.parametrize('kept', [3, 0])
@pytest.mark.parametrize('layer', [0, 1])
def test_layers_with_fewer_heads_or_none(kept, layer):
    model = with_heads(toy_cross_encoder('bert', fresh=True), layer, range(4 - kept, 4))
    for method in METHODS:
        res = AttributeHeads(model, method)(pairs(2))
        assert heads_of(res) == [f'L{i}H{h}' for i in (0, 1) for h in range(kept if i == layer else 4)]
        assert np.isfinite(effects_of(res)).all()


def test_unpatchable_rows_are_marked_and_counted():
    model = toy_cross_encoder('bert', max_length=24)
    with pytest.warns(UserWarning, match='3 of 4 pairs cannot be patched'):
        res = AttributeHeads(model)(unpatchable_pairs())
    assert list(res.patchable) == ['nothing changed', 'edit truncated away', 'no alignment', 'yes']
    assert np.isnan(effects_of(res)[:3]).all() and np.isfinite(effects_of(res)[3]).all()


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'method': 'magic'}, "method must be one of .*got (method=)?'magic'"),
        ({'direction': 'up'}, "direction must be one of .*got (direction=)?'up'"),
        ({'heads': ['L7H0']}, 'L7H0: .* does not have it'),
        ({'points': 1}, 'points must be 2 or more'),
        ({'verify': -1}, 'verify=-1'),
        ({'method': 'gradient', 'verify': 2}, "verify=2 with method='gradient'"),
        ({'method': 'integrated_gradients', 'baseline': 'none'}, "baseline must be one of .*got (baseline=)?'none'"),
    ],
)
def test_unknown_settings_name_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        AttributeHeads(toy_cross_encoder('bert'), **settings)(pairs(8))


def test_empty_texts():
    frame = pairs(2).assign(text_0=['', 'rust'], text=['bread', ''])
    for method in METHODS:
        assert np.isfinite(effects_of(AttributeHeads(toy_cross_encoder('bert'), method)(frame))).all()


@pytest.mark.parametrize('method', METHODS)
def test_gradients_that_are_not_finite_name_the_row(method):
    model = toy_cross_encoder('bert', fresh=True)
    bread = model.tokenizer.convert_tokens_to_ids('paint')
    with torch.no_grad():
        model.model.bert.embeddings.word_embeddings.weight[bread] = torch.nan
    with pytest.raises(ValueError, match="not finite \\(qid='0' docno='2'"):
        AttributeHeads(model, method)(pairs(4))


def test_equality_and_repr_by_method():
    model = BiEncoder(minilm_path())
    assert AttributeHeads(model) != AttributeHeads(model, 'relp')
    stage = AttributeHeads(model, 'trapezoid', heads=['L0H1'], verify=2, filler='mask')
    assert eval(repr(stage)) == stage and hash(eval(repr(stage))) == hash(stage)
