"""Criteria of pruning that train: gates and movement, against what can be computed by hand."""

import inside
import numpy as np
import pandas as pd
import pytest
import torch
from fits import assert_layers, fit_on
from inside import FitData
from toys import toy_bi_encoder, toy_cross_encoder

from pyterrier_mech.prune import L0, Movement

pytestmark = pytest.mark.numeric


def with_useless_units():
    """A ranker with neurons and a head that the score does not feel, and others that it feels much."""
    model = toy_cross_encoder('bert', fresh=True)
    layer = model.model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.output.dense.weight[:, :8] = 0
        layer.output.dense.weight[:, 8:16] *= 20
        layer.attention.output.dense.weight[:, :8] = 0
        layer.attention.output.dense.weight[:, 8:16] *= 8
    return model


def test_gates_close_on_units_that_do_nothing():
    found = L0(steps=60, target=0.6, batch_pairs=12).scores(with_useless_units(), fit_on())
    assert found.neurons[0][:8].max() < found.neurons[0][8:16].min()
    assert found.heads[0][0] < found.heads[0][1]
    assert not found.joint and found.notes['kept'] < 0.95
    assert found.passes == 1 + 3 * 60


def test_a_lower_target_keeps_less():
    model, data = toy_cross_encoder('bert'), fit_on()
    settings = {'steps': 50, 'learning_rate': 0.3, 'batch_pairs': 6}
    kept = [L0(target=target, **settings).scores(model, data).notes['kept'] for target in (0.9, 0.3)]
    assert kept[1] < kept[0] - 0.2


def test_seeds_differ():
    model, data = toy_cross_encoder('bert'), fit_on()
    a, b = (L0(steps=3, batch_pairs=6, seed=seed).scores(model, data).neurons[0] for seed in (0, 1))
    assert not np.allclose(a, b)
    a, b = (Movement(steps=2, seed=seed).scores(model, data).neurons[0] for seed in (0, 1))
    assert not np.allclose(a, b)


def test_hard_concrete_gates():
    # With log α = 0 the gate is the stretched and clipped noise to the power of the temperature's inverse.
    uniform = torch.tensor([[0.5, 0.01, 0.99, 0.3]], dtype=torch.float64)
    odds = (uniform / (1 - uniform)) ** 1.5
    expected = (odds / (1 + odds) * 1.2 - 0.1).clamp(0, 1)
    torch.testing.assert_close(inside.gate(torch.zeros(4, dtype=torch.float64), uniform), expected)
    # The share of draws that leave the gate open is the expected one.
    alpha = torch.tensor([-1.0, 0.5], dtype=torch.float64)
    noise = torch.rand(40000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = (inside.gate(alpha, noise) > 0).double().mean(0)
    for unit in range(2):
        cost = torch.zeros(2, dtype=torch.float64).index_fill(0, torch.tensor(unit), 1)
        assert float(inside.expected_cost([alpha], [cost])) == pytest.approx(float(share[unit]), abs=0.01)


def test_closed_gates_are_zero_weights():
    model, data = toy_cross_encoder('distilbert', fresh=True), fit_on()
    heads = [torch.ones(4, dtype=torch.float64) for _ in range(2)]
    neurons = [torch.ones(48, dtype=torch.float64) for _ in range(2)]
    heads[1][2] = neurons[0][7] = 0
    found = inside.gated_scores(model, data, heads, neurons)
    layers = model.model.distilbert.transformer.layer
    with torch.no_grad():
        layers[1].attention.out_lin.weight[:, 16:24] = 0
        layers[0].ffn.lin2.weight[:, 7] = 0
    np.testing.assert_allclose(found, model.score(data.queries, data.texts), rtol=1e-12)


def test_rows_take_turns():
    assert inside.turn(5, 2, 0).tolist() == [0, 1] and inside.turn(5, 2, 2).tolist() == [4, 0]
    assert inside.turn(3, 8, 1).tolist() == [0, 1, 2]


# -- movement


def one_contrast():
    frame = fit_on().frame.iloc[[0, 1]].reset_index(drop=True)
    return FitData(frame, pd.DataFrame([('q0', 'd0', 0), ('q0', 'd1', 2)], columns=['qid', 'docno', 'label']))


@pytest.mark.parametrize('make', [toy_cross_encoder, toy_bi_encoder])
def test_one_step_by_hand(make):
    model, data = make('bert', fresh=True), one_contrast()
    found = Movement(steps=1, batch_pairs=1).scores(model, data)
    scores = inside.scores_with_gradients(model, data)
    torch.log1p(torch.exp(scores[0] - scores[1])).backward()
    layer = model.model.base_model.encoder.layer[1]
    attention = layer.attention.self

    def moved(tensor, pick):
        # Where one token is read the keys' bias, which moves no attention, is left out.
        return 0.0 if tensor.grad is None else -float((tensor * tensor.grad)[pick].detach().sum())

    parts = [attention.query, attention.key, attention.value]
    head = sum(moved(part.weight, slice(8, 16)) + moved(part.bias, slice(8, 16)) for part in parts)
    head += moved(layer.attention.output.dense.weight, (slice(None), slice(8, 16)))
    assert found.heads[1][1] == pytest.approx(head, rel=1e-9)
    neuron = moved(layer.intermediate.dense.weight, 5) + moved(layer.intermediate.dense.bias, 5)
    neuron += moved(layer.output.dense.weight, (slice(None), 5))
    assert found.neurons[1][5] == pytest.approx(neuron, rel=1e-9)
    assert found.passes == 3


def test_steps_add_up_along_the_way():
    model, data = toy_cross_encoder('bert'), one_contrast()
    one, ten = (Movement(steps=n, batch_pairs=1, learning_rate=1e-12).scores(model, data) for n in (1, 10))
    assert_layers(ten.neurons, [10 * layer for layer in one.neurons], rtol=1e-6)
    fast = Movement(steps=10, batch_pairs=1, learning_rate=1e-2).scores(model, data)
    assert not np.allclose(fast.neurons[0], ten.neurons[0], rtol=0.01)


def test_without_contrasts_there_is_nothing_to_learn():
    data = fit_on()
    with pytest.raises(ValueError, match='none of the 4 queries has two texts with different labels'):
        Movement().scores(toy_cross_encoder('bert'), FitData(data.frame, data.qrels.assign(label=1)))
