"""What carries the map: a family, a site and a read-out are added here, by description, and every analysis has them."""

import numpy as np
import oracles
import pytest
import torch
from inside import (
    PLACES,
    READOUTS,
    Family,
    Place,
    Site,
    classify_bert,
    inputs_of,
    register_family,
    sides,
    why_not_plain,
)
from toys import PAIRS, QUERIES, TEXTS, pairs, toy_module, wordpiece_tokenizer
from transformers import AutoModelForSequenceClassification, NomicBertConfig

from pyterrier_mech import AttributeHeads, BiEncoder, CrossEncoder, PatchHeads

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings('ignore:.*cannot be patched')]
HEADS = ['L0H1', 'L1H2', 'L1H0']

# -- a family: NomicBERT, with rotary positions, a gated feed-forward block and no biases

NOMIC = Family(
    ('nomic_bert',),
    layers='layers',
    attention_out='self_attn.o_proj',
    head_dim='self_attn.head_dim',
    mlp_out='mlp.down_proj',
    classify=classify_bert,
    qkv=('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'),
    norm_attention='post_attention_layernorm',
    norm_mlp='post_mlp_layernorm',
    mlp_in='mlp.gate_proj',
    mlp_gate='mlp.up_proj',
    activation='mlp.act_fn',
    gated=True,
)


def check_patching(model, plain, reverse=False):
    frame = pairs(6)
    direction = 'original_to_perturbed' if reverse else 'perturbed_to_original'
    res = PatchHeads(model, heads=HEADS, direction=direction)(frame)
    for row, found in zip(frame.itertuples(), res.itertuples()):
        if found.patchable == 'yes':
            expected = oracles.patch_effects(plain, [side.runs(reverse) for side in sides(model, row)], HEADS)
            np.testing.assert_allclose([getattr(found, h) for h in HEADS], [expected[h] for h in HEADS], atol=1e-10)


@pytest.mark.parametrize('reverse', [False, True])
def test_a_family(reverse, monkeypatch):
    register_family(NOMIC)
    tokenizer = wordpiece_tokenizer()
    config = NomicBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=80,
        initializer_range=0.15,
        num_labels=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = AutoModelForSequenceClassification.from_config(config).double().eval()
    model = CrossEncoder(module, tokenizer=tokenizer)
    assert why_not_plain(model) == ''
    with torch.no_grad():
        expected = [module(**tokenizer(q, t, return_tensors='pt')).logits.item() for q, t in zip(*PAIRS)]
    np.testing.assert_allclose(model.score(*PAIRS), expected, atol=1e-10)
    monkeypatch.setitem(
        oracles.OUT_PROJECTIONS, 'nomic_bert', lambda base: [one.self_attn.o_proj for one in base.layers]
    )
    monkeypatch.setitem(oracles.MLP_OUTS, 'nomic_bert', lambda base: [one.mlp.down_proj for one in base.layers])
    check_patching(model, oracles.Plain(module, tokenizer), reverse)
    assert np.isfinite(AttributeHeads(model, 'relp')(pairs(3)).L0H0.iloc[0])


# -- a site: the attention output before the residual sum


def test_a_site(monkeypatch):
    monkeypatch.setitem(PLACES, 'attn_out', lambda layer: Place(layer.attention_out, 'output', rowwise=True))
    module, tokenizer = toy_module('bert')
    model = CrossEncoder(module, tokenizer=tokenizer)
    inputs, rows, site = inputs_of(model, *PAIRS), np.arange(5), Site('attn_out', 1)
    with model.computing():
        seen = model.map.run(inputs.batch(0, rows), record=[site]).values[site]
        other = seen.roll(1, 0)
        found = model.run(inputs, rows, edits={site: lambda tensor: other[:, : tensor.shape[1]]}).numpy()
    dense = module.bert.encoder.layer[1].attention.output.dense
    handle = dense.register_forward_hook(lambda _, args, output: other)
    batch = inputs.batch(0, rows).tensors
    with torch.no_grad():
        expected = module(**batch).logits[:, 0].numpy()
    handle.remove()
    assert np.abs(expected - model.score(*[values[:5] for values in PAIRS])).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-10)


# -- a read-out: the last token of every sequence, which alone the last layer then computes


class LastToken:
    def at(self, scored):
        return scored.sum(-1) - 1

    def represent(self, hidden, scored):
        places = self.at(scored).view(*[1] * (hidden.dim() - 3), -1, 1, 1)
        return hidden.gather(-2, places.expand(*hidden.shape[:-2], 1, hidden.shape[-1])).squeeze(-2)


@pytest.mark.parametrize('family', ['bert', 'distilbert', 'modernbert', 'mpnet'])
def test_a_readout(family, monkeypatch):
    monkeypatch.setitem(READOUTS, 'last', LastToken())
    module, tokenizer = toy_module(family, classifier=False)
    model = BiEncoder(module, tokenizer=tokenizer, pooling='last', similarity='dot')
    with torch.no_grad():
        expected = [module(**tokenizer(t, return_tensors='pt')).last_hidden_state[0, -1].numpy() for t in TEXTS]
    np.testing.assert_allclose(model.encode('text', TEXTS), expected, atol=1e-10)
    res = PatchHeads(model, heads=HEADS)(pairs(6))
    assert why_not_plain(model) == '' or family == 'mpnet'
    slow = PatchHeads(BiEncoder(hooked(module), tokenizer=tokenizer, pooling='last', similarity='dot'), heads=HEADS)
    np.testing.assert_allclose(res[HEADS], slow(pairs(6))[HEADS], atol=1e-10)
    assert len(QUERIES)


def hooked(module):
    """A copy that takes the slow way: it has a hook that does nothing."""
    import copy

    module = copy.deepcopy(module)
    module.register_forward_pre_hook(lambda *_: None)
    return module
