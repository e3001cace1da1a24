"""Criteria of pruning that do not train: against autograd on explicit masks, the stages they summarise, and by hand."""

import inside
import numpy as np
import pandas as pd
import pytest
import torch
from fits import add_query, assert_layers, fit_on, same_scores
from inside import FitData
from oracles import MLP_OUTS, OUT_PROJECTIONS
from toys import FAMILIES, QUERIES, TEXTS, toy_bi_encoder, toy_cross_encoder

from pyterrier_mech import AttributeHeads, AttributeNeurons, PatchHeads, Perturb
from pyterrier_mech.prune import Conductance, Fisher, Magnitude, Patching, Random, Taylor

pytestmark = pytest.mark.numeric


def by_masks(model, queries, texts):
    """Scores, and their derivatives by a mask on every head and neuron, pair by pair on the plain module."""
    module, family, head_dim = model.model, model.model.config.model_type, 8
    out, mlp = OUT_PROJECTIONS[family](module.base_model), MLP_OUTS[family](module.base_model)
    maps, widths = [*out, *mlp], [head_dim] * len(out) + [1] * len(mlp)
    scores, rows = [], []
    for query, text in zip(queries, texts):
        masks = [torch.ones(m.in_features // w, dtype=torch.float64).requires_grad_() for m, w in zip(maps, widths)]
        handles = [
            m.register_forward_pre_hook(lambda _, args, k=k, w=w: (args[0] * masks[k].repeat_interleave(w),))
            for k, (m, w) in enumerate(zip(maps, widths))
        ]
        score = module(**model.tokenizer(query, text, return_tensors='pt')).logits[0, 0]
        rows.append([g.numpy() for g in torch.autograd.grad(score, masks)])
        scores.append(score.item())
        for handle in handles:
            handle.remove()
    g = [np.stack(layer) for layer in zip(*rows)]
    return np.asarray(scores), g[: len(out)], g[len(out) :]


# -- gradients


@pytest.mark.parametrize('family', FAMILIES)
def test_taylor_and_fisher_are_those_of_explicit_masks(family):
    model, data = toy_cross_encoder(family), fit_on()
    scores, heads, neurons = by_masks(model, data.queries, data.texts)
    assert_layers(Taylor().scores(model, data).heads, [np.abs(g).mean(0) for g in heads])
    assert_layers(Taylor().scores(model, data).neurons, [np.abs(g).mean(0) for g in neurons])
    weights = 1 / (1 + np.exp(-scores)) - (data.labels().to_numpy() >= 2)
    fisher = Fisher('labels', min_rel=2).scores(model, data)
    assert_layers(fisher.heads, [((weights[:, None] * g) ** 2).mean(0) for g in heads])
    assert_layers(fisher.neurons, [((weights[:, None] * g) ** 2).mean(0) for g in neurons])


def test_gradients_of_a_bi_encoder_come_from_both_towers():
    model, data, step = toy_bi_encoder('bert', similarity='dot', fresh=True), fit_on(), 1e-5
    found = inside.neuron_gradients(model, data)[0]
    weight = model.model.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        before, kept = model.score(data.queries, data.texts), weight[:, 5].clone()
        weight[:, 5] *= 1 + step
        after = model.score(data.queries, data.texts)
        weight[:, 5] = kept
    np.testing.assert_allclose(found[:, 5], (after - before) / step, rtol=1e-3, atol=1e-6)


def test_fisher_of_the_score_and_layer_norm():
    model, data = toy_cross_encoder('bert'), fit_on()
    _, heads, neurons = by_masks(model, data.queries, data.texts)
    assert_layers(Fisher().scores(model, data).neurons, [(g**2).mean(0) for g in neurons])
    normed = Taylor(normalize=True).scores(model, data)
    means = [np.abs(g).mean(0) for g in heads]
    assert_layers(normed.heads, [m / np.sqrt((m**2).sum()) for m in means])


def test_pairs_without_judgement_are_left_out():
    model, data = toy_cross_encoder('bert'), fit_on()
    judged = data.frame['docno'] != 'd0'
    fewer = FitData(data.frame, data.qrels[data.qrels['docno'] != 'd0'])
    found = Taylor('labels').scores(model, fewer)
    same_scores(found, Taylor('labels').scores(model, FitData(data.frame[judged].reset_index(drop=True), data.qrels)))
    assert found.notes == {'unjudged': 4, 'pairs': 8} and found.passes == 2


# -- patching and conductance


@pytest.mark.parametrize('family', ['bert', 'deberta-v2'])
def test_patching_of_heads_is_that_of_the_stage(family):
    model, data = toy_cross_encoder(family), fit_on()
    found = Patching(add_query).scores(model, data)
    frame = PatchHeads(model)(Perturb(add_query)(data.frame))
    expected = [[frame[f'L{layer}H{head}'].abs().mean() for head in range(4)] for layer in range(2)]
    assert_layers(found.heads, expected)
    paired = Perturb(add_query)(data.frame)
    same_scores(found, Patching().scores(model, FitData(paired)))
    same_scores(found, Patching(Perturb(add_query)).scores(model, data))


def test_patching_of_neurons_is_the_derivative_towards_the_other_version():
    # Texts of the same length, so that the two versions are plain inputs; mean over pairs of a finite difference.
    model, step = toy_cross_encoder('bert'), 1e-6
    text, other = 'bread keeps best on a board', 'bread keeps rust on a board'
    data = FitData(
        pd.DataFrame([('q', QUERIES[0], 'd', other, text)], columns=['qid', 'query', 'docno', 'text', 'text_0'])
    )
    found = Patching().scores(model, data).neurons
    inputs = [model.tokenizer(QUERIES[0], t, return_tensors='pt') for t in (text, other)]
    for layer in range(2):
        module, seen = model.model.bert.encoder.layer[layer].output.dense, []
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        plain = model.model(**inputs[0]).logits.item()
        model.model(**inputs[1])
        handle.remove()
        for neuron in (0, 17, 47):
            mixed = seen[0].clone()
            mixed[..., neuron] += step * (seen[1] - seen[0])[..., neuron]
            handle = module.register_forward_pre_hook(lambda _, args: (mixed,))
            moved = model.model(**inputs[0]).logits.item()
            handle.remove()
            assert found[layer][neuron] == pytest.approx(abs(moved - plain) / step, rel=1e-3, abs=1e-7)


def test_pairs_that_cannot_be_patched_are_counted():
    model, data = toy_cross_encoder('bert'), fit_on()
    found = Patching(lambda q, t: t if t == TEXTS[0] else add_query(q, t)).scores(model, data)
    assert found.notes['pairs'] == 8 and sum(found.notes['unpatchable'].values()) == 4
    rest = FitData(data.frame[data.frame['docno'] != 'd0'].reset_index(drop=True))
    same_scores(found, Patching(add_query).scores(model, rest))
    with pytest.raises(ValueError, match='none of the 12 pairs can be patched'):
        Patching(lambda q, t: t).scores(model, data)


@pytest.mark.parametrize('make', [lambda: toy_cross_encoder('distilbert'), lambda: toy_bi_encoder('bert', 'cls')])
def test_conductance_is_the_mean_of_the_stages(make):
    model, data = make(), fit_on(texts=range(2))
    found = Conductance(points=17, max_points=17).scores(model, data)
    neurons = AttributeNeurons(model, points=17, max_points=17)(data.frame)['neurons']
    assert_layers(found.neurons, np.abs(np.stack(neurons)).mean(0))
    heads = AttributeHeads(model, 'integrated_gradients', points=17)(data.frame)
    assert_layers(found.heads, [[heads[f'L{i}H{h}'].abs().mean() for h in range(4)] for i in range(2)])
    assert found.passes >= 17 * 3


# -- without data


def test_random_is_a_function_of_seed_layer_and_unit():
    small, large = toy_cross_encoder('bert'), toy_cross_encoder('bert', intermediate_size=96)
    a, b = Random(1).scores(small, None), Random(1).scores(large, None)
    assert_layers(a.neurons, [layer[:48] for layer in b.neurons], atol=0)
    numbers = np.concatenate([*a.heads, *a.neurons, *Random(2).scores(small).heads])
    assert len(set(numbers)) == len(numbers) and (numbers >= 0).all() and (numbers < 1).all()


@pytest.mark.parametrize('family', ['bert', 'distilbert', 'modernbert'])
def test_magnitude_is_the_root_mean_square_of_a_units_weights(family):
    model = toy_cross_encoder(family, fresh=True)
    found = Magnitude().scores(model)
    with torch.no_grad():
        for parts in (OUT_PROJECTIONS, MLP_OUTS):
            parts[family](model.model.base_model)[1].weight.zero_()
        blocks = model.model.base_model
        if family == 'modernbert':
            attention, mlp = blocks.layers[1].attn.Wqkv, blocks.layers[1].mlp.Wi
            rows = [16, 17, 18, 19, 20, 21, 22, 23]
            weights = (
                attention.weight[[r + k * 32 for k in range(3) for r in rows]].ravel(),
                mlp.weight[[5, 53]].ravel(),
            )
        elif family == 'distilbert':
            block = blocks.transformer.layer[1]
            parts = [block.attention.q_lin, block.attention.k_lin, block.attention.v_lin]
            weights = (
                torch.cat([p.weight[16:24].ravel() for p in parts] + [p.bias[16:24] for p in parts]),
                torch.cat([block.ffn.lin1.weight[5], block.ffn.lin1.bias[5:6]]),
            )
        else:
            block = blocks.encoder.layer[1]
            parts = [block.attention.self.query, block.attention.self.key, block.attention.self.value]
            weights = (
                torch.cat([p.weight[16:24].ravel() for p in parts] + [p.bias[16:24] for p in parts]),
                torch.cat([block.intermediate.dense.weight[5], block.intermediate.dense.bias[5:6]]),
            )
    after = Magnitude().scores(model)
    for values, own, extra in ((after.heads, weights[0], 8 * 32), (after.neurons, weights[1], 32)):
        unit = 2 if values is after.heads else 5
        assert values[1][unit] == pytest.approx(float((own**2).sum() / (len(own) + extra)) ** 0.5)
    assert (found.heads[1] > after.heads[1]).all() and (found.heads[0] == after.heads[0]).all()
