"""RelP against the linear map that the model is at the original, by hand."""

import inside
import pytest
import torch
import torch.nn.functional as F
from toys import DESCRIBED, TEXTS, pairs, toy_bi_encoder, toy_cross_encoder

from pyterrier_mech import AttributeHeads

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize('family', DESCRIBED)
def test_the_forward_of_relp_has_the_values_of_the_model(family):
    model = toy_cross_encoder(family)
    tolerance = 1e-6 if family == 'modernbert' else 1e-12
    for mine, theirs in inside.linearised_values(model, TEXTS):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=0)


@torch.no_grad()
def frozen_bert(base, embedded, constants, swap):
    """BERT by hand, [tokens, d]: norms, activations and attention by the `constants` of a first run, which fills them.

    `swap` is (layer, head, z) whose head output is put in, or None.
    """
    first = not constants
    x, outputs = embedded, []

    def norm(module, value, name):
        if first:
            constants[name] = (value.var(-1, correction=0, keepdim=True) + module.eps) ** -0.5
        return (value - value.mean(-1, keepdim=True)) * constants[name] * module.weight + module.bias

    for i, layer in enumerate(base.encoder.layer):
        heads = layer.attention.self
        q, k, v = (part(x).view(-1, 4, 8).transpose(0, 1) for part in (heads.query, heads.key, heads.value))
        if first:
            constants[f'{i}attention'] = torch.softmax(q @ k.transpose(1, 2) / 8**0.5, -1)
        z = (constants[f'{i}attention'] @ v).transpose(0, 1).reshape(len(x), 32)
        outputs.append(z)
        if swap is not None and swap[0] == i:
            z = torch.cat([z[:, : 8 * swap[1]], swap[2], z[:, 8 * swap[1] + 8 :]], 1)
        a = norm(layer.attention.output.LayerNorm, x + layer.attention.output.dense(z), f'{i}a')
        u = layer.intermediate.dense(a)
        if first:
            constants[f'{i}ratio'] = F.gelu(u) / u
        x = norm(layer.output.LayerNorm, a + layer.output.dense(u * constants[f'{i}ratio']), f'{i}m')
    return x, outputs


def test_relp_patches_the_linear_map_that_the_model_is_at_the_original():
    model = toy_bi_encoder('bert', 'cls', similarity='dot')
    row = AttributeHeads(model, 'relp')(pairs(2)).iloc[1]
    _, side = inside.sides(model, row)
    query = torch.tensor(model.encode('query', [row['query']])[0])
    embedded = []
    for given in side.runs():
        with torch.no_grad():
            embedded.append(model.model.embeddings(given['input_ids'], given['token_type_ids'])[0])
    constants = {}
    hidden, _ = frozen_bert(model.model, embedded[0], constants, None)
    start = query @ hidden[0]
    assert float(start) == pytest.approx(row.score_original, abs=1e-12)
    _, target = frozen_bert(model.model, embedded[1], {}, None)
    for layer in range(2):
        for head in range(4):
            swap = (layer, head, target[layer][:, 8 * head : 8 * head + 8])
            patched, _ = frozen_bert(model.model, embedded[0], constants, swap)
            assert row[f'L{layer}H{head}'] == pytest.approx(float(query @ patched[0] - start), abs=1e-10)


def test_relp_refuses_families_whose_layers_are_not_described():
    with pytest.raises(
        ValueError, match=r"'relp' computes with the parts of the layers.*'mpnet'.*attribution_patching"
    ):
        AttributeHeads(toy_cross_encoder('mpnet'), 'relp')(pairs(2))
