"""Units removed against units silenced: by hooks, and by zeroed weight columns in a copy, through plain forwards."""

import copy
import pickle
import random

import inside
import numpy as np
import pandas as pd
import pytest
import torch
from oracles import zeroed
from removals import UNITS, each_removal, every_family
from toys import (
    HEAD_DIM,
    HEADS,
    NEURONS,
    PAIRS,
    real_cross_encoder,
    same_weights,
    toy_bi_encoder,
    toy_cross_encoder,
    weights,
)

from pyterrier_mech import AblatedReranker, CrossEncoder, Units
from pyterrier_mech.prune import prune_units, remove_units

pytestmark = pytest.mark.numeric


def plain(model, module):
    """The scores of a padded batch by the module's own forward and the tokenizer's own encoding."""
    encoded = model.tokenizer(*PAIRS, padding=True, return_tensors='pt')
    with torch.no_grad():
        return module(**encoded).logits[:, 0].numpy()


def close(a, b, atol=1e-10):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


# -- removed is silenced


@each_removal
def test_removed_is_silenced_by_hooks_and_by_zeroed_weights(family, units):
    model = toy_cross_encoder(family)
    before, dense = weights(model.model), model.score(*PAIRS)
    pruned = remove_units(model, units)
    expected = plain(model, zeroed(model.model, units))
    assert np.abs(expected - dense).max() > 1e-3
    close(pruned.score(*PAIRS), expected)
    close(plain(pruned, pruned.model), expected)
    close(AblatedReranker(model, units).score(*PAIRS), pruned.score(*PAIRS))
    assert same_weights(weights(model.model), before)
    close(model.score(*PAIRS), dense)


@each_removal
def test_every_path_of_the_encoder_gives_what_the_module_gives(family, units):
    model, pruned = toy_cross_encoder(family), remove_units(toy_cross_encoder(family), units)
    for found, expected in inside.paths_of_pruned(model, pruned, units, PAIRS):
        assert found.shape == expected.shape
        close(found, expected)


@each_removal
@pytest.mark.parametrize('pooling', ['mean', 'cls'])
def test_bi_encoders(family, pooling, units):
    model = toy_bi_encoder(family, pooling)
    pruned = remove_units(model, units)
    assert pruned.pooling == pooling
    close(pruned.score(*PAIRS), AblatedReranker(model, units).score(*PAIRS))


@every_family
def test_float32(family):
    model = toy_cross_encoder(family, dtype=torch.float32)
    for units in UNITS.values():
        pruned = remove_units(model, units)
        assert {part.dtype for part in pruned.model.parameters()} == {torch.float32}
        close(pruned.score(*PAIRS), plain(model, zeroed(model.model, units)), 1e-6)


@every_family
def test_removing_nothing_is_the_model(family):
    model = toy_cross_encoder(family)
    pruned = remove_units(model, [])
    close(pruned.score(*PAIRS), model.score(*PAIRS))
    assert same_weights(weights(pruned.model), weights(model.model))
    shared = {part.data_ptr() for part in model.model.parameters()}
    assert shared.isdisjoint({part.data_ptr() for part in pruned.model.parameters()})


@every_family
def test_pruning_in_two_steps_is_pruning_at_once(family):
    model = toy_cross_encoder(family)
    once = prune_units(model, [[1], []], [[3, 9], [0, 47]])
    twice = prune_units(prune_units(model, [[1, 2], [3]], [[3, 8, 9], [0, 5, 47]]), [[0], []], [[0, 2], [0, 2]])
    assert same_weights(weights(once.model), weights(twice.model))
    again = prune_units(once, [[0], []], [[0, 1], [0, 1]])
    assert same_weights(weights(again.model), weights(once.model))
    close(once.score(*PAIRS), twice.score(*PAIRS))


@each_removal
def test_sizes(family, units):
    model, pruned = toy_cross_encoder(family), remove_units(toy_cross_encoder(family), units)
    for layer in range(2):
        heads = HEADS - sum(unit.site.layer == layer for unit in units.heads)
        neurons = NEURONS - sum(unit.site.layer == layer for unit in units.neurons)
        assert (pruned.n_heads(layer), pruned.n_neurons(layer)) == (heads, neurons)
    count = sum(part.numel() for part in pruned.model.parameters())
    # Three rows with their bias and a column for each dimension of a head; a row with its bias and a column a neuron.
    gone = len(units.heads) * HEAD_DIM * (3 * 33 + 32) + len(units.neurons) * (33 + 32)
    assert count == sum(part.numel() for part in model.model.parameters()) - gone
    assert all(part.is_contiguous() and part.requires_grad for part in pruned.model.parameters())
    for part in pruned.model.modules():
        if isinstance(part, torch.nn.Linear):
            assert part.weight.shape == (part.out_features, part.in_features)


@every_family
def test_no_attention_is_computed_without_heads(family, monkeypatch):
    pruned = remove_units(toy_cross_encoder(family), UNITS['no heads'])
    expected = pruned.score(*PAIRS)
    monkeypatch.delattr(torch.nn.functional, 'scaled_dot_product_attention')
    close(plain(pruned, pruned.model), expected)


def test_gradients_reach_what_is_left_and_frozen_stays_frozen():
    model = toy_cross_encoder('bert', fresh=True)
    model.model.bert.encoder.layer[0].attention.self.query.weight.requires_grad_(False)
    module = remove_units(model, UNITS['no heads first, no neurons last']).model
    frozen = [name for name, part in module.named_parameters() if not part.requires_grad]
    assert frozen == ['bert.encoder.layer.0.attention.self.query.weight']
    module.train()
    module(**model.tokenizer(*PAIRS, padding=True, return_tensors='pt')).logits.sum().backward()
    read = module.bert.encoder.layer[1].attention.self.value.weight.grad
    assert read.shape == (3 * HEAD_DIM, 32) and read.abs().max() > 0
    assert module.bert.encoder.layer[0].attention.output.dense.bias.grad.abs().max() > 0


def test_settings_survive_and_copies_are_equal():
    model = toy_cross_encoder('bert', num_labels=3, label=2, max_length=30, batch_tokens=100)
    pruned = remove_units(model, UNITS['last layer gone'])
    assert (pruned.label, pruned.max_length, pruned.batch_tokens) == (2, 30, 100)
    close(pruned.score(*PAIRS), AblatedReranker(model, UNITS['last layer gone']).score(*PAIRS))
    for other in (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned))):
        close(other.score(*PAIRS), pruned.score(*PAIRS))
        assert same_weights(weights(other.model), weights(pruned.model))
    fast = CrossEncoder(model.model, tokenizer=model.tokenizer, label=2, dtype='tf32')
    assert remove_units(fast, ['L0H0']).dtype == 'tf32'


# -- the real one


@pytest.mark.real
def test_half_of_the_real_cross_encoder():
    model = real_cross_encoder()
    draw = random.Random(0)
    heads = [sorted(draw.sample(range(12), kept)) for kept in (6, 0, 9, 12, 3, 6)]
    neurons = [sorted(draw.sample(range(1536), kept)) for kept in (768, 1536, 0, 768, 768, 768)]
    pruned = prune_units(model, heads, neurons)
    assert pruned.head_counts == [6, 0, 9, 12, 3, 6]
    kinds = {'heads': heads, 'neurons': neurons}
    kept = Units.of({kind: [(layer, unit) for layer in range(6) for unit in of[layer]] for kind, of in kinds.items()})
    masked = AblatedReranker(model, kept.complement(model)).score(*PAIRS)
    assert np.abs(masked - model.score(*PAIRS)).max() > 0.1
    close(pruned.score(*PAIRS), masked, 1e-5)


@pytest.mark.parametrize(
    'heads, neurons, message',
    [
        ([[0]], [[0], [0]], 'heads of 1 layers are given for a module of 2'),
        ([[0], [4]], [[0], [0]], 'layer 1 has 4 heads, counted from 0: there is no 4'),
        ([[0], [0]], [[-1], [0]], 'layer 0 has 48 neurons, counted from 0: there is no -1'),
        ([[0], [2, 1]], [[0], [0]], 'heads to keep in layer 1 are not sorted'),
        ([[0], [1]], [[3, 3], [0]], 'neurons to keep in layer 0 are not sorted, or not all different'),
    ],
)
def test_wrong_numbers_leave_the_module_as_it_was(heads, neurons, message):
    module = toy_cross_encoder('bert').model
    before = weights(module)
    with pytest.raises(ValueError, match=message):
        inside.keep_units(module, heads, neurons)
    assert same_weights(weights(module), before)


@pytest.mark.parametrize('family', ['modernbert', 'deberta-v2', 'mpnet'])
def test_other_families_are_refused(family):
    message = f"'{family}' cannot be removed.* Those of bert, camembert, distilbert, electra, roberta, xlm-roberta can"
    with pytest.raises(ValueError, match=message):
        remove_units(toy_cross_encoder(family), ['L0H0'])


def test_what_is_no_unit_or_ranker():
    with pytest.raises(ValueError, match='L0H4: .* does not have it'):
        remove_units(toy_cross_encoder('bert'), ['L0H4'])
    with pytest.raises(TypeError, match='model must be a ranker'):
        remove_units(pd.DataFrame(), ['L0H4'])
    module = toy_cross_encoder('bert', fresh=True).model
    module.bert.encoder.layer[1].output.dense = torch.nn.Sequential(module.bert.encoder.layer[1].output.dense)
    module.bert.encoder.layer[1].output.dense.in_features = NEURONS
    with pytest.raises(ValueError, match='layer 1 has a Sequential where a Linear was expected'):
        inside.keep_units(module, [[0], [0]], [[0], [0]])
