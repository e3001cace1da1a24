"""A pruned ranker is analysed like any other."""

import inside
import numpy as np
import oracles
import pytest
from oracles import zeroed
from removals import UNITS, each_removal, every_family
from toys import HEADS, heads_of, pairs, stacked, toy_cross_encoder

from pyterrier_mech import (
    AblatedReranker,
    AblateHeads,
    AttentionShares,
    AttributeHeads,
    AttributeNeurons,
    CrossEncoder,
    PatchHeads,
    Units,
)
from pyterrier_mech.prune import remove_units

pytestmark = [
    pytest.mark.numeric,
    pytest.mark.filterwarnings('ignore:.*cannot be patched', 'ignore:.*completeness error'),
]


def close(a, b, atol=1e-10):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@each_removal
def test_patching_equals_the_oracle(family, units):
    pruned = remove_units(toy_cross_encoder(family), units)
    res = PatchHeads(pruned)(pairs())
    names = heads_of(res)
    assert len(names) == 2 * HEADS - len(units.heads)
    largest = []
    for row in res[res.patchable == 'yes'].itertuples():
        sides = [side.runs() for side in inside.sides(pruned, row)]
        expected = oracles.patch_effects(oracles.plain(pruned), sides)
        close([getattr(row, name) for name in names], [expected[name] for name in names])
        largest += map(abs, expected.values())
    assert not names or max(largest) > 1e-4


@each_removal
def test_ablation_equals_pruning_once_more(family, units):
    pruned = remove_units(toy_cross_encoder(family), units)
    res = AblateHeads(pruned)(pairs())
    rows = res['query'].tolist(), res['text'].tolist()
    for name in heads_of(res):
        left = remove_units(pruned, [name]).score(*rows)
        close(AblatedReranker(pruned, [name]).score(*rows), left)
        close(res[name], left - pruned.score(*rows))


@each_removal
def test_attribution(family, units):
    pruned, frame = remove_units(toy_cross_encoder(family), units), pairs(6)
    for method in ('gradient', 'integrated_gradients', 'attribution_patching', 'relp'):
        res = AttributeHeads(pruned, method)(frame)
        assert heads_of(res) == Units.all(pruned, ['heads']).names
    values = stacked(AttributeNeurons(pruned, max_points=9)(frame), 'neurons')
    for layer in range(2):
        count = pruned.n_neurons(layer)
        assert np.isfinite(values[:, layer, :count]).all()


@every_family
def test_gradient_is_that_of_the_silenced_model(family):
    units = UNITS['no heads first, no neurons last']
    model, frame = toy_cross_encoder(family), pairs(6)
    silenced = CrossEncoder(zeroed(model.model, units), tokenizer=model.tokenizer)
    expected = AttributeHeads(silenced, 'gradient')(frame)
    found = AttributeHeads(remove_units(model, units), 'gradient')(frame)
    assert [f'L1H{head}' for head in range(3)] == heads_of(found)
    close(found[heads_of(found)], expected[['L1H0', 'L1H2', 'L1H3']])


@each_removal
def test_attention_shares_are_those_of_the_silenced_model(family, units):
    model, frame = toy_cross_encoder(family), pairs(6)
    shares = [c for c in AttentionShares(model)(frame.head(0)).columns if c.startswith('attention.')]
    silenced = CrossEncoder(zeroed(model.model, units), tokenizer=model.tokenizer)
    expected, found = AttentionShares(silenced)(frame), AttentionShares(remove_units(model, units))(frame)
    for share in shares:
        whole, left = stacked(expected, share), stacked(found, share)
        for layer in range(2):
            kept = [head for head in range(HEADS) if f'L{layer}H{head}' not in units.names]
            close(left[:, layer, : len(kept)], whole[:, layer, kept])
            assert np.isnan(left[:, layer, len(kept) :]).all()
