"""Attributions of ColBERT and Splade against autograd through the unmodified modules."""

import late
import numpy as np
import oracles
import pandas as pd
import pytest
import torch
from toys import QUERIES, TEXTS, effects_of

from pyterrier_mech import Activations, AttributeHeads, AttributeLayers, AttributeNeurons, AttributeTokens, PatchHeads

pytestmark = pytest.mark.numeric
MAKE = [late.toy_colbert, late.toy_splade]


def frame():
    rows = [(str(i), str(i), query, text) for i, (query, text) in enumerate(zip(QUERIES, TEXTS, strict=True))]
    return pd.DataFrame(rows, columns=['qid', 'docno', 'query', 'text'])


def same_length():
    """One word for another, so that no filler is needed."""
    edited = [text.replace(old, new) for text, old, new in zip(TEXTS, ['sugar', 'slow', 'paint', 'cut'], ['bread'] * 4)]
    return frame().assign(text_0=TEXTS, text=edited)


def inputs_of(model, query, text):
    """What the plain modules read, by hand, and which tokens are compared."""
    words, made = model.tokenizer, []
    for value, marker in ((query, '[unused0]'), (text, '[unused1]')):
        ids = words(value)['input_ids']
        if model.__class__.__name__ != 'ColBERT':
            made.append((torch.tensor([ids]), torch.ones(1, len(ids)), torch.ones(len(ids), dtype=torch.bool)))
            continue
        ids = [ids[0], words.convert_tokens_to_ids(marker), *ids[1:]]
        masks = [words.mask_token_id] * (16 - len(ids) if value is query else 0)
        compared = [value is query or token not in words.convert_tokens_to_ids(list('.,-')) for token in [*ids, *masks]]
        mask = torch.tensor([[1] * len(ids) + [0] * len(masks)])
        made.append((torch.tensor([[*ids, *masks]]), mask, torch.tensor(compared)))
    return made


def score_of(model, inputs):
    """A score with its graph, and what every head projection read, tower by tower."""
    read, seen = [], []
    module = model.model.base_model if model.__class__.__name__ == 'ColBERT' else model.model
    for ids, mask, _ in inputs:
        found = []
        handles = [
            part.register_forward_pre_hook(lambda _, args, found=found: found.append(args[0]))
            for part in oracles.OUT_PROJECTIONS['bert'](module.base_model)
        ]
        read.append(module(input_ids=ids, attention_mask=mask)[0][0])
        seen.append(found)
        for handle in handles:
            handle.remove()
    if module is model.model:
        q, d = (torch.log1p(torch.relu(logits)).amax(0) for logits in read)
        return q @ d, seen
    q, d = (torch.nn.functional.normalize(model.model.projection(hidden), dim=-1) for hidden in read)
    return (q[inputs[0][2]] @ d[inputs[1][2]].T).amax(1).sum(), seen


@pytest.mark.parametrize('make', MAKE)
def test_attribution_patching_is_that_of_autograd(make):
    model, rows, expected = make(), same_length(), []
    for row in rows.itertuples():
        score, seen = score_of(model, inputs_of(model, row.query, row.text_0))
        _, other = score_of(model, inputs_of(model, row.query, row.text))
        gradients = torch.autograd.grad(score, [z for tower in seen for z in tower])
        before, after = ([z for tower in towers for z in tower] for towers in (seen, other))
        products = [((b - a) * g)[0].sum(0) for a, b, g in zip(before, after, gradients, strict=True)]
        by_layer = [products[layer] + products[2 + layer] for layer in range(2)]
        expected.append(torch.cat([one.view(4, 8).sum(1) for one in by_layer]).detach().numpy())
    np.testing.assert_allclose(effects_of(AttributeHeads(model)(rows)), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize('make', MAKE)
@pytest.mark.parametrize('baseline', ['all', 'query'])
def test_tokens_and_neurons_are_complete(make, baseline):
    model = make()
    settings = {'baseline': baseline, 'tolerance': 1e-3, 'max_points': 2049}
    tokens = AttributeTokens(model, **settings)(frame()[:2])
    assert tokens['completeness_error.tokens'].max() < 0.01
    for row in tokens.itertuples():
        assert len(row.tokens) == len(row.token_effects)
        moved = row.token_effects[[token not in model.tokenizer.all_special_tokens for token in row.tokens]]
        assert np.abs(moved).max() > 1e-3
    neurons = AttributeNeurons(model, baseline=baseline)(frame()[:2])
    assert np.stack(neurons['neurons'].tolist()).shape == (2, 2, 48)


@pytest.mark.parametrize('make', MAKE)
def test_verified_heads_are_patched_heads(make):
    rows = same_length()
    res, exact = AttributeHeads(make(), verify=2)(rows), PatchHeads(make())(rows)
    verified = [name for name in res.columns if name.endswith('.exact')]
    assert len(verified) == 2
    for name in verified:
        np.testing.assert_allclose(res[name], exact[name.removesuffix('.exact')], atol=1e-10, rtol=1e-12)


@pytest.mark.parametrize('make', MAKE)
def test_blocks_at_all_positions_are_the_sum_over_types(make):
    rows = same_length()
    typed = AttributeLayers(make(), sites=['mlp_out'])(rows)
    whole = AttributeLayers(make(), sites=['mlp_out'], by=None)(rows)
    parts = typed[[name for name in typed if name.startswith('mlp_out.L0.')]].fillna(0).sum(axis=1)
    np.testing.assert_allclose(parts, whole['mlp_out.L0'], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize('make', MAKE)
def test_one_vector_cannot_be_had(make):
    with pytest.raises(ValueError, match="keep='read' needs one vector a sequence"):
        Activations(make(), 'resid_pre', keep='read')(frame())
