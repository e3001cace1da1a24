"""Attributions of decoders against autograd on the unmodified module, and identities."""

import inside
import numpy as np
import pytest
import torch
from decoders import KINDS, TEMPLATE, WORDS, both, columns, encoded, ranker, run, score, tokenizer, whole
from toys import QUERIES, TEXTS, effects_of, frame_of, pairs

from pyterrier_mech import (
    Activations,
    AttentionShares,
    AttributeHeads,
    AttributeLayers,
    AttributeNeurons,
    AttributePaths,
    AttributeTokens,
    CausalReranker,
    PatchPaths,
    PrunedReranker,
    head_roles,
)
from pyterrier_mech.prune import Random

pytestmark = pytest.mark.numeric


def gradient_by_hand(model, inputs):
    """{layer: (what the output projection reads, ∂s/∂ of it)} of a causal re-ranker and one row."""
    found, handles = [], []

    def keep(_, args):
        z = args[0].detach().requires_grad_()
        found.append(z)
        return (z,)

    layers = model.model.base_model.layers
    for layer in layers:
        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(keep))
    logits = model.model(**inputs, use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    yes, no = (encoded(word)[0] for word in WORDS)
    return found, logits[yes] - logits[no]


def test_attribution_patching_is_the_gradient_times_the_difference():
    model, frame = ranker('qwen3'), pairs(4)
    res = AttributeHeads(model)(frame)
    for i, row in enumerate(frame.itertuples()):
        if res.patchable.iloc[i] != 'yes':
            continue
        (base,), (seen,) = both(model, row)
        own = {}
        run(model.model, whole(base), seen=own)
        # Gradients layer by layer, with the graph of one forward from each cut.
        for layer in range(2):
            start = own['heads', layer].clone().requires_grad_()
            module = model.model.base_model.layers[layer].self_attn.o_proj
            handle = module.register_forward_pre_hook(lambda _, args, start=start: (start[None],))
            logits = model.model(**whole(base), use_cache=False).logits[0, -1]
            handle.remove()
            yes, no = (encoded(word)[0] for word in WORDS)
            (gradient,) = torch.autograd.grad(logits[yes] - logits[no], start)
            product = gradient * (seen['heads', layer] - own['heads', layer])
            for head in range(4):
                found = product[:, columns(model.model, head)].sum().item()
                np.testing.assert_allclose(res[f'L{layer}H{head}'].iloc[i], found, atol=1e-7, rtol=0)


@pytest.mark.parametrize('kind', KINDS)
def test_tokens_sum_to_the_change_and_the_prompt_has_none(kind):
    model, frame = ranker('qwen3', kind), frame_of(3).drop(columns=['score', 'rank'])
    res = AttributeTokens(model, baseline='query', max_points=1025, tolerance=1e-3)(frame)
    for i, row in enumerate(frame.itertuples()):
        assert res['completeness_error.tokens'].iloc[i] < 1e-3
        total = res.token_effects.iloc[i].sum()
        inputs = inside.inputs_of(model, [row.query], [row.text])
        ids = inputs.batch(0, [0]).tensors['input_ids']
        types = np.asarray(inputs.towers[0].types(0))
        pads = torch.where(torch.from_numpy(types == 'query'), 0, ids[0])[None]
        ones = torch.ones_like(ids)
        others = [] if kind != 'last' else [inputs.batch(1, [0]).tensors]
        start = score(model, [{'input_ids': pads, 'attention_mask': ones}, *others])
        end = score(model, [{'input_ids': ids, 'attention_mask': ones}, *others])
        np.testing.assert_allclose(total, end - start, rtol=0, atol=2e-3 * abs(end - start))
        if kind == 'causal':
            words, effects = res.tokens.iloc[i], res.token_effects.iloc[i]
            assert len(words) == len(effects)
            shown = [word for word, effect in zip(words, effects) if effect != 0]
            assert shown == row.query.split()


def test_neurons_of_the_last_layer_are_those_of_the_token_that_is_read():
    """Their conductance stands at the position of the last token, not of the first."""
    model, frame = ranker('qwen3'), frame_of(2).drop(columns=['score', 'rank'])
    whole_ = AttributeNeurons(model)(frame)
    parts = AttributeNeurons(model, by='token_type')(frame)
    for i in range(2):
        types = [
            parts[f'neurons.{kind}'].iloc[i] for kind in ('cls', 'query', 'sep', 'doc_match', 'doc_other', 'prompt')
        ]
        np.testing.assert_allclose(np.nansum(types, axis=0), whole_.neurons.iloc[i], atol=1e-9)
        assert np.abs(types[-1][1]).max() > 0 and np.abs(types[1][1]).max() == 0
        assert np.isnan(types[0]).all(), 'there is no such type'


def test_layers_and_paths_of_a_linear_score():
    """An estimate of a path to the score is the exact one."""
    model, frame = ranker('qwen3'), pairs(2)
    exact, estimate = (stage(model, ['score', 'L1H1.k'])(frame) for stage in (PatchPaths, AttributePaths))
    np.testing.assert_allclose(exact['L0H2>score'], estimate['L0H2>score'], atol=1e-10)
    assert estimate['L0H1>L1H1.k'].notna().all()
    res = AttributeLayers(model)(frame)
    assert 'mlp_out.L1.prompt' in res and res['mlp_out.L1.prompt'].notna().all()


def test_methods_without_a_second_text():
    model, frame = ranker('qwen3'), frame_of(2).drop(columns=['score', 'rank'])
    found = AttributeHeads(model, 'gradient')(frame)
    inputs = inside.inputs_of(model, list(frame['query']), list(frame['text'])).batch(0, [0]).tensors
    z, s = gradient_by_hand(model, {name: tensor[:1] for name, tensor in inputs.items()})
    # The hook detaches: only the last layer's gradient is that of the score.
    (gradient,) = torch.autograd.grad(s, z[1])
    wanted = (gradient * z[1])[0].sum(0).view(4, -1).sum(-1).detach()
    np.testing.assert_allclose(found[[f'L1H{h}' for h in range(4)]].iloc[0].to_numpy(dtype=float), wanted, atol=1e-7)
    assert np.isfinite(effects_of(AttributeHeads(model, 'integrated_gradients')(frame))).all()


def test_relp_and_pruning_are_refused_by_name():
    model = ranker('qwen3')
    with pytest.raises(ValueError, match="method='relp' knows LayerNorm; got Qwen3RMSNorm"):
        AttributeHeads(model, 'relp')(pairs(2))
    with pytest.raises(ValueError, match="heads and neurons of 'qwen3' cannot be removed"):
        PrunedReranker(model, Random(), 0.3).fit(frame_of(4))


@pytest.mark.parametrize('kind', ['cross', 'causal'])
def test_attention_shares_are_those_of_eager_attention(kind):
    model, eager = ranker('qwen3', kind), ranker('qwen3', kind, fresh=True)
    eager.model.set_attn_implementation('eager')
    frame = frame_of(3).drop(columns=['score', 'rank'])
    res = AttentionShares(model)(frame)
    for i, row in enumerate(frame.itertuples()):
        inputs = inside.inputs_of(model, [row.query], [row.text])
        types = np.asarray(inputs.towers[0].types(0))
        with torch.no_grad():
            seen = eager.model.base_model(**inputs.batch(0, [0]).tensors, output_attentions=True).attentions
        document, frame_of_texts = np.isin(types, ['doc_match', 'doc_other']), np.isin(types, ['sep', 'prompt'])
        for layer in range(2):
            shares = seen[layer][0].double().numpy()
            to_query = shares[:, document][:, :, types == 'query'].sum((1, 2)) / len(types)
            np.testing.assert_allclose(res['attention.document_to_query'].iloc[i][layer], to_query, atol=1e-6)
            to_frame = shares[:, :, frame_of_texts].sum((1, 2)) / len(types)
            np.testing.assert_allclose(res['attention.to_sep'].iloc[i][layer], to_frame, atol=1e-6)
        assert np.abs(res['attention.query_to_document'].iloc[i]).max() == 0, 'the query is before the text'
    assert len(head_roles(res)) == 8


def test_activations_know_the_prompt():
    model, frame = ranker('qwen3'), frame_of(2).drop(columns=['score', 'rank'])
    res = Activations(model, ['heads', 'mlp_out.L1'], keep='token_type')(frame)
    assert np.isfinite(res['activation.heads.L0.prompt'].iloc[0]).all()
    read = Activations(model, ['resid_post.L1'], keep='read')(frame)['activation.resid_post.L1'].iloc[0]
    every = Activations(model, ['resid_post.L1'], keep='all')(frame)['activation.resid_post.L1'].iloc[0]
    np.testing.assert_allclose(read, every[-1])


def test_types_of_words_within_a_prompt():
    """A question mark that the tokenizer joins with the prompt is of the query, and no word."""
    model = CausalReranker(ranker().model, tokenizer=tokenizer(), template=TEMPLATE, words=WORDS)
    inputs = inside.inputs_of(model, ['bread rise?'], [f'{TEXTS[0]} Bread {QUERIES[1]}'])
    ids, types = inputs.towers[0].ids(0), inputs.towers[0].types(0, scheme='literature')
    of = [(model.maker.tokenizer.decode(token), kind) for token, kind in zip(ids.tolist(), types)]
    assert ('?\n', 'query_other') in of
    assert {kind for _, kind in of} == {'prompt', 'query_other', 'doc_query', 'doc_other'}
    words = [text for text, kind in of if kind == 'doc_query']
    assert ''.join(words).split() == ['rise', 'Bread', 'rise'], of
