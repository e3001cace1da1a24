"""Single weights set to zero: which, how many, and that training may keep them so."""

import numpy as np
import pytest
import torch
from inside import fit_data
from toys import (
    HEAD_DIM,
    HEADS,
    NEURONS,
    QUERIES,
    TEXTS,
    same_weights,
    toy_bi_encoder,
    toy_cross_encoder,
    training_frame,
    weights,
)

from pyterrier_mech import PatchHeads
from pyterrier_mech.prune import Distillation, UnitScores, mask_weights


def maps(model):
    """The linear maps of a BERT, by their own names: (kind, rows or columns, layer, weight)."""
    for number, layer in enumerate(model.model.base_model.encoder.layer):
        attention = layer.attention.self
        for part in (attention.query, attention.key, attention.value):
            yield 'heads', 0, number, part.weight.detach()
        yield 'heads', 1, number, layer.attention.output.dense.weight.detach()
        yield 'neurons', 0, number, layer.intermediate.dense.weight.detach()
        yield 'neurons', 1, number, layer.output.dense.weight.detach()


def flat(model, change=lambda kind, dim, layer, weight: weight):
    return torch.cat([change(*part).flatten() for part in maps(model)]).numpy()


@pytest.mark.parametrize('sparsity', [0.001, 0.3, 0.5, 0.9])
@pytest.mark.parametrize('make', [toy_cross_encoder, toy_bi_encoder])
def test_the_smallest_weights_go(make, sparsity):
    model = make('bert')
    before = weights(model)
    masked = mask_weights(model, sparsity)
    whole, left = flat(model), flat(masked)
    gone = left == 0
    assert gone.sum() == round(sparsity * len(whole)) and len(whole) == 2 * (4 * 32 * 32 + 2 * 32 * 48)
    np.testing.assert_array_equal(left[~gone], whole[~gone])
    assert np.abs(whole[gone]).max() <= np.abs(whole[~gone]).min()
    assert same_weights(weights(model), before)
    changed = {name for name, part in weights(masked).items() if not torch.equal(part, before[name])}
    assert changed and all('.layer.' in name and name.endswith('.weight') and 'Norm' not in name for name in changed)


@pytest.mark.parametrize('layer', [0, 1])
def test_importance_of_units(layer):
    """Ranks of both kinds, worked out by repeating them over the rows or columns of the units."""
    model, rng = toy_cross_encoder('bert', seed=layer), np.random.default_rng(layer)
    heads, neurons = rng.standard_normal((2, HEADS)), 1e-6 * rng.standard_normal((2, NEURONS))
    heads[layer] += 100
    scores = UnitScores(list(heads), list(neurons))
    ranks = {
        'heads': np.repeat((heads.ravel().argsort().argsort() + 0.5).reshape(2, HEADS) / 8, HEAD_DIM, axis=1),
        'neurons': (neurons.ravel().argsort().argsort() + 0.5).reshape(2, NEURONS) / 96,
    }

    def weighted(kind, dim, number, weight):
        factors = torch.from_numpy(ranks[kind][number])
        return weight.abs() * (factors[:, None] if dim == 0 else factors[None, :])

    sizes, left = flat(model, weighted), flat(mask_weights(model, 0.5, scores))
    gone = left == 0
    assert gone.sum() == len(gone) // 2 and sizes[gone].max() <= sizes[~gone].min()
    assert (gone != (flat(mask_weights(model, 0.5)) == 0)).any()
    # The heads of one layer are all worth more than those of the other.
    shares = {}
    for kind, _, number, weight in maps(mask_weights(model, 0.5, scores)):
        shares.setdefault((kind, number), []).append(float((weight == 0).double().mean()))
    assert np.mean(shares['heads', layer]) < np.mean(shares['heads', 1 - layer])


def test_equal_scores_are_no_scores():
    model = toy_cross_encoder('bert')
    equal = UnitScores([np.ones(HEADS)] * 2, [np.ones(NEURONS)] * 2)
    plain, scored = (flat(mask_weights(model, 0.5, scores)) == 0 for scores in (None, equal))
    assert (plain == scored).all()


def test_distillation_keeps_the_zeros():
    model = toy_cross_encoder('bert')
    data = fit_data(training_frame(), None, model, 'text')
    for keep in (True, False):
        masked = mask_weights(model, 0.5)
        before = flat(masked)
        Distillation(epochs=2, learning_rate=1e-3, keep_zeros=keep).recover(masked, model, data)
        after = flat(masked)
        assert ((after == 0) == (before == 0)).all() == keep
        assert (after[before != 0] != before[before != 0]).mean() > 0.9


def test_it_is_a_ranker_of_the_same_size():
    model = toy_cross_encoder('roberta', num_labels=2, label=1)
    masked = mask_weights(model, 0.5)
    assert masked.head_counts == model.head_counts and masked.label == 1
    assert np.abs(masked.score(QUERIES, TEXTS) - model.score(QUERIES, TEXTS)).max() > 1e-4
    pairs = training_frame().assign(text_0=lambda f: f['text'], text=lambda f: f['text'] + ' rust')
    assert 'L1H3' in PatchHeads(masked)(pairs).columns


def test_bad_input():
    model = toy_cross_encoder('bert')
    for sparsity in (0, 1, -0.1, float('nan')):
        with pytest.raises(ValueError, match=f'sparsity must be a share between 0 and 1; got sparsity={sparsity}'):
            mask_weights(model, sparsity)
    with pytest.raises(ValueError, match='scores of 1 layers'):
        mask_weights(model, 0.5, UnitScores([np.ones(HEADS)], [np.ones(NEURONS)]))
    with pytest.raises(ValueError, match='cannot be removed'):
        mask_weights(toy_cross_encoder('modernbert'), 0.5)
