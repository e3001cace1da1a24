"""Units removed against units silenced: by hooks, and by zeroed weight columns in a copy, through plain forwards."""

import copy
import functools
import pickle
import random
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import QUERIES, TEXTS, assets, toy_bi_encoder, toy_cross_encoder
from oracle import OUT_PROJECTIONS
from test_patch_heads import heads_of, oracle, pairs

from pyterrier_mech import AblateHeads, AttentionShares, CrossEncoder, PatchHeads
from pyterrier_mech.anatomy.resizing import keep_units
from pyterrier_mech.attribute import AttributeHeads, AttributeNeurons
from pyterrier_mech.patch import AblatedReranker, Units
from pyterrier_mech.patch.interventions import columns_of, replaced, zeros
from pyterrier_mech.prune.surgery import prune_units, remove_units

FAMILIES = ['bert', 'electra', 'roberta', 'distilbert']
HEADS, NEURONS, HEAD_DIM = 4, 48, 8
PAIRS = [QUERIES * 4, [text for text in TEXTS for _ in QUERIES]]

cross, bi = functools.cache(toy_cross_encoder), functools.cache(toy_bi_encoder)

pytestmark = pytest.mark.filterwarnings('ignore:.*cannot be patched')


def all_heads(layer):
    return {(layer, head) for head in range(HEADS)}


def all_neurons(layer):
    return {(layer, neuron) for neuron in range(NEURONS)}


def some(seed):
    """About half of the heads and neurons of both layers, unevenly."""
    draw = random.Random(seed)
    heads = {(0, 2), (1, 0), (1, 3)} if seed else {(0, 0), (0, 1), (0, 3), (1, 2)}
    return heads, {unit for layer in (0, 1) for unit in all_neurons(layer) if draw.random() < 0.3 + 0.4 * layer}


REMOVED = {
    'some': some(0),
    'others': some(1),
    'no heads first, no neurons last': ({*all_heads(0), (1, 1)}, {*all_neurons(1), (0, 5)}),
    'last layer gone': ({*all_heads(1), (0, 2)}, {*all_neurons(1), (0, 47)}),
    'no heads': (all_heads(0) | all_heads(1), set()),
    'everything': (all_heads(0) | all_heads(1), all_neurons(0) | all_neurons(1)),
}
UNITS = {name: Units(frozenset(heads), frozenset(neurons)) for name, (heads, neurons) in REMOVED.items()}

every_family = pytest.mark.parametrize('family', FAMILIES)
every_set = pytest.mark.parametrize('units', UNITS.values(), ids=UNITS)


def zeroed(module, units):
    """A copy with the columns of the units zeroed in the maps that read them; knows the names by itself."""
    module = copy.deepcopy(module)
    if module.config.model_type == 'distilbert':
        mlp_outs = [layer.ffn.lin2 for layer in module.base_model.transformer.layer]
    else:
        mlp_outs = [layer.output.dense for layer in module.base_model.encoder.layer]
    with torch.no_grad():
        for layer, head in units.heads:
            out = OUT_PROJECTIONS[module.config.model_type](module.base_model)[layer]
            out.weight[:, head * HEAD_DIM : (head + 1) * HEAD_DIM] = 0
        for layer, neuron in units.neurons:
            mlp_outs[layer].weight[:, neuron] = 0
    return module


def plain(model, module):
    """The scores of a padded batch by the module's own forward and the tokenizer's own encoding."""
    encoded = model.loaded.maker.tokenizer(*PAIRS, padding=True, return_tensors='pt')
    with torch.no_grad():
        return module(**encoded).logits[:, 0].numpy()


def weights(module):
    return {name: part.clone() for name, part in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a, b, atol=1e-10):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


# -- removed is silenced


@every_family
@every_set
def test_removed_is_silenced_by_hooks_and_by_zeroed_weights(family, units):
    model = cross(family)
    before, dense = weights(model.model), model.score(*PAIRS)
    pruned = remove_units(model, units)
    expected = plain(model, zeroed(model.model, units))
    assert np.abs(expected - dense).max() > 1e-3
    close(pruned.score(*PAIRS), expected)
    close(plain(pruned, pruned.model), expected)
    close(AblatedReranker(model, units).score(*PAIRS), pruned.score(*PAIRS))
    assert same(weights(model.model), before)
    np.testing.assert_array_equal(model.score(*PAIRS), dense)


@every_family
@every_set
def test_every_path_of_the_encoder_gives_what_the_module_gives(family, units):
    model, pruned = cross(family), remove_units(cross(family), units)
    maker = model.loaded.maker
    inputs = maker.batch([model.tokenize('query', PAIRS[0]), model.tokenize('text', PAIRS[1])], model.encoder.device)
    encoder = pruned.encoder
    with pruned.computing(), replaced(model.encoder, columns_of(model.encoder, units), zeros(model.encoder)):
        expected = model.encoder.run(inputs)
        trace = encoder.trace(inputs)
        real = inputs['attention_mask'].bool()
        close(trace.hidden[real], expected[real])
        close(encoder.run(inputs)[real], expected[real])
        close(encoder.pooled(inputs, 'cls'), expected[:, 0])
        x, context = encoder.until_last_layer(inputs)
        close(x[real], trace.x[-1][real])
        for layer, x, z, context in zip(encoder.layers, trace.x, trace.z, trace.contexts, strict=True):
            assert z.shape == (*x.shape[:2], layer.n_heads * HEAD_DIM)
            close(layer.z(x, context)[real], z[real])
            close(layer.z_first(x, context), z[:, :1])


@every_family
@pytest.mark.parametrize('pooling', ['mean', 'cls'])
@every_set
def test_bi_encoders(family, pooling, units):
    model = bi(family, pooling)
    pruned = remove_units(model, units)
    assert pruned.pooling_ == pooling
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
    model = cross(family)
    pruned = remove_units(model, [])
    np.testing.assert_array_equal(pruned.score(*PAIRS), model.score(*PAIRS))
    assert same(weights(pruned.model), weights(model.model))
    shared = {part.data_ptr() for part in model.model.parameters()}
    assert shared.isdisjoint({part.data_ptr() for part in pruned.model.parameters()})


@every_family
def test_pruning_in_two_steps_is_pruning_at_once(family):
    model = cross(family)
    once = prune_units(model, [[1], []], [[3, 9], [0, 47]])
    twice = prune_units(prune_units(model, [[1, 2], [3]], [[3, 8, 9], [0, 5, 47]]), [[0], []], [[0, 2], [0, 2]])
    assert same(weights(once.model), weights(twice.model))
    np.testing.assert_array_equal(once.score(*PAIRS), twice.score(*PAIRS))
    assert prune_units(once, [[0], []], [[0, 1], [0, 1]]).score(*PAIRS).tolist() == once.score(*PAIRS).tolist()


@every_family
@every_set
def test_sizes(family, units):
    model, pruned = cross(family), remove_units(cross(family), units)
    for layer in range(2):
        heads = HEADS - sum(unit[0] == layer for unit in units.heads)
        neurons = NEURONS - sum(unit[0] == layer for unit in units.neurons)
        assert (pruned.n_heads(layer), pruned.n_neurons(layer)) == (heads, neurons)
    count = sum(part.numel() for part in pruned.model.parameters())
    # Three rows with their bias and a column for each dimension of a head; a row with its bias and a column a neuron.
    gone = len(units.heads) * HEAD_DIM * (3 * 33 + 32) + len(units.neurons) * (33 + 32)
    assert count == sum(part.numel() for part in model.model.parameters()) - gone
    assert all(part.is_contiguous() and part.requires_grad for part in pruned.model.parameters())
    for layer in pruned.encoder.layers:
        for part in (*layer.qkv_parts, layer.attention_out, layer.mlp_in, layer.mlp_out):
            assert part.weight.shape == (part.out_features, part.in_features)


@every_family
def test_no_attention_is_computed_without_heads(family, monkeypatch):
    pruned = remove_units(cross(family), UNITS['no heads'])
    expected = pruned.score(*PAIRS)
    monkeypatch.delattr(torch.nn.functional, 'scaled_dot_product_attention')
    close(plain(pruned, pruned.model), expected)


def test_gradients_reach_what_is_left_and_frozen_stays_frozen():
    model = toy_cross_encoder('bert')
    model.model.bert.encoder.layer[0].attention.self.query.weight.requires_grad_(False)
    module = remove_units(model, UNITS['no heads first, no neurons last']).model
    frozen = [name for name, part in module.named_parameters() if not part.requires_grad]
    assert frozen == ['bert.encoder.layer.0.attention.self.query.weight']
    module.train()
    module(**model.loaded.maker.tokenizer(*PAIRS, padding=True, return_tensors='pt')).logits.sum().backward()
    read = module.bert.encoder.layer[1].attention.self.value.weight.grad
    assert read.shape == (3 * HEAD_DIM, 32) and read.abs().max() > 0
    assert module.bert.encoder.layer[0].attention.output.dense.bias.grad.abs().max() > 0


def test_settings_survive_and_copies_are_equal():
    model = toy_cross_encoder('bert', num_labels=3, label=2, max_length=30, batch_tokens=100)
    pruned = remove_units(model, UNITS['last layer gone'])
    assert (pruned.label, pruned.max_length, pruned.batch_tokens) == (2, 30, 100)
    close(pruned.score(*PAIRS), AblatedReranker(model, UNITS['last layer gone']).score(*PAIRS))
    for other in (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned))):
        np.testing.assert_array_equal(other.score(*PAIRS), pruned.score(*PAIRS))
    fast = CrossEncoder(model.model, tokenizer=model.tokenizer, label=2, dtype='tf32')
    assert remove_units(fast, ['L0H0']).dtype == 'tf32'


# -- a pruned ranker is analysed like any other


@every_family
@every_set
def test_patching_equals_the_oracle(family, units):
    pruned = remove_units(cross(family), units)
    res = PatchHeads(pruned)(pairs())
    names = heads_of(res)
    assert len(names) == 2 * HEADS - len(units.heads)
    if names:
        expected = oracle(pruned, res, pruned.model, HEAD_DIM)
        assert expected.abs().max().max() > 1e-4
        close(res[names], expected)


@pytest.mark.parametrize('family', ['bert', 'distilbert'])
@every_set
def test_ablation_equals_pruning_once_more(family, units):
    pruned = remove_units(cross(family), units)
    res = AblateHeads(pruned)(pairs())
    rows = res['query'].tolist(), res['text'].tolist()
    for name in heads_of(res):
        left = remove_units(pruned, [name]).score(*rows)
        close(AblatedReranker(pruned, [name]).score(*rows), left)
        close(res[name], left - pruned.score(*rows))


@pytest.mark.parametrize('family', ['bert', 'distilbert'])
@every_set
def test_attribution(family, units):
    pruned, frame = remove_units(cross(family), units), pairs().head(6)
    for method in ('gradient', 'integrated_gradients', 'attribution_patching', 'relp'):
        res = AttributeHeads(pruned, method)(frame)
        assert heads_of(res) == [name for name in Units.all(pruned) if 'H' in name]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        values = np.stack(AttributeNeurons(pruned, max_points=9)(frame)['neurons'].tolist())
    for layer in range(2):
        count = pruned.n_neurons(layer)
        assert np.isfinite(values[:, layer, :count]).all()


@every_family
def test_gradient_is_that_of_the_silenced_model(family):
    units = UNITS['no heads first, no neurons last']
    model, frame = cross(family), pairs().head(6)
    silenced = CrossEncoder(zeroed(model.model, units), tokenizer=model.tokenizer)
    expected = AttributeHeads(silenced, 'gradient')(frame)
    found = AttributeHeads(remove_units(model, units), 'gradient')(frame)
    assert [f'L1H{head}' for head in range(3)] == heads_of(found)
    close(found[heads_of(found)], expected[['L1H0', 'L1H2', 'L1H3']])


@every_family
@every_set
def test_attention_shares_are_those_of_the_silenced_model(family, units):
    model, frame = cross(family), pairs().head(6)
    shares = [c for c in AttentionShares(model)(frame.head(0)).columns if c.startswith('attention.')]
    silenced = CrossEncoder(zeroed(model.model, units), tokenizer=model.tokenizer)
    expected, found = AttentionShares(silenced)(frame), AttentionShares(remove_units(model, units))(frame)
    for share in shares:
        whole, left = np.stack(expected[share].tolist()), np.stack(found[share].tolist())
        for layer in range(2):
            kept = [head for head in range(HEADS) if (layer, head) not in units.heads]
            close(left[:, layer, : len(kept)], whole[:, layer, kept])
            assert np.isnan(left[:, layer, len(kept) :]).all()


# -- the real one


def test_half_of_the_real_cross_encoder():
    model = CrossEncoder(str(assets() / 'models' / 'ce-minilm-l6'), device='cpu')
    draw = random.Random(0)
    heads = [sorted(draw.sample(range(12), kept)) for kept in (6, 0, 9, 12, 3, 6)]
    neurons = [sorted(draw.sample(range(1536), kept)) for kept in (768, 1536, 0, 768, 768, 768)]
    pruned = prune_units(model, heads, neurons)
    assert pruned.head_counts == [6, 0, 9, 12, 3, 6]
    kept = Units(
        frozenset((layer, head) for layer in range(6) for head in heads[layer]),
        frozenset((layer, neuron) for layer in range(6) for neuron in neurons[layer]),
    )
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
        keep_units(module, heads, neurons)
    assert same(weights(module), before)


@pytest.mark.parametrize('family', ['modernbert', 'deberta-v2', 'mpnet'])
def test_other_families_are_refused(family):
    message = f"'{family}' cannot be removed.* Those of bert, camembert, distilbert, electra, roberta, xlm-roberta can"
    with pytest.raises(ValueError, match=message):
        remove_units(cross(family), ['L0H0'])


def test_what_is_no_unit_or_ranker():
    with pytest.raises(ValueError, match='no head 4 in layer 0'):
        remove_units(cross('bert'), ['L0H4'])
    with pytest.raises(TypeError, match='is no ranker'):
        remove_units(pd.DataFrame(), ['L0H4'])
    module = toy_cross_encoder('bert').model
    module.bert.encoder.layer[1].output.dense = torch.nn.Sequential(module.bert.encoder.layer[1].output.dense)
    module.bert.encoder.layer[1].output.dense.in_features = NEURONS
    with pytest.raises(ValueError, match='layer 1 has a Sequential where a Linear was expected'):
        keep_units(module, [[0], [0]], [[0], [0]])
