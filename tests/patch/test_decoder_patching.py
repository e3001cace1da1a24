"""Patching of decoders against hooks on the unmodified module, one full forward for each head and site."""

import functools

import inside
import numpy as np
import pytest
import torch
from decoders import (
    BY_HOOKS,
    DECODERS,
    DESCRIBED,
    KINDS,
    TEMPLATE,
    both,
    columns,
    effect,
    head_effects,
    of_type,
    path_effect,
    pattern_effect,
    put,
    ranker,
    score,
    tokenizer,
)
from toys import effects_of, heads_of, pairs, reference

from pyterrier_mech import AblatedReranker, AblateHeads, PatchedReranker, PatchHeads, PatchLayers, PatchPaths

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings('ignore:.*cannot be patched')]


@functools.cache
def frame():
    """Edits at the end, at the beginning and in the middle of the text; a question; an edited query."""
    found = pairs(5).assign(query_0=lambda f: f['query'], edited='query text')
    found.loc[0, ['query', 'query_0']] = 'how to store bread?'
    found.loc[4, 'query'] = found.loc[4, 'query'] + ' rust?'
    return found


@functools.cache
def expected(family, kind, reverse=False, filler='a'):
    model = ranker(family, kind)
    found = [head_effects(model, row, reverse=reverse, filler=filler) for row in frame().itertuples()]
    assert np.abs(found).max() > 1e-3
    return np.stack(found)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('family', DECODERS)
def test_heads_equal_hooks_in_every_family_and_kind(family, kind):
    model = ranker(family, kind)
    assert bool(inside.why_not_plain(model)) == (family in BY_HOOKS)
    for batch_tokens in (1, 100_000):
        res = PatchHeads(model, batch_tokens=batch_tokens)(frame())
        assert heads_of(res) == [f'L{i}H{h}' for i in range(2) for h in range(4)]
        # The eager attention of those has its soft-max in float32.
        atol = 1e-10 if family in DESCRIBED else 1e-6
        np.testing.assert_allclose(effects_of(res), expected(family, kind), atol=atol, rtol=0)


@pytest.mark.parametrize('filler', ['a', 'mask'])
@pytest.mark.parametrize('kind', KINDS)
def test_the_other_direction_and_hidden_fillers(kind, filler):
    for direction, reverse in (('original_to_perturbed', True), ('perturbed_to_original', False)):
        res = PatchHeads(ranker('qwen3', kind), direction=direction, filler=filler)(frame())
        wanted = expected('qwen3', kind, reverse, filler)
        if (kind, filler) == ('cross', 'mask'):  # nothing stands behind the text
            assert res.patchable[0] == 'the last token, which is read, is hidden'
            res, wanted = res[1:], wanted[1:]
        assert (res.patchable == 'yes').all()
        np.testing.assert_allclose(effects_of(res), wanted, atol=1e-10, rtol=0)


def by_the_other_engine(model):
    """The same ranker, with a hook that does nothing, so that its own forward runs."""
    model.model.base_model.layers[0].register_forward_hook(lambda *_: None)
    assert 'hooks' in inside.why_not_plain(model)
    return model


@pytest.mark.parametrize('fast', [True, False])
@pytest.mark.parametrize('site', ['q', 'k', 'v'])
@pytest.mark.parametrize('family', ['qwen2', 'qwen3'])
def test_shared_keys_and_values_are_patched_as_a_whole(family, site, fast):
    model = ranker(family) if fast else by_the_other_engine(ranker(family, fresh=True))
    res = PatchHeads(model, site=site)(frame()[:3])
    count = 4 if site == 'q' else 2
    names = [f'L{i}H{h}.{site}' for i in range(2) for h in range(count)]
    assert [name for name in res.columns if name.startswith('L')] == names
    for i, row in enumerate(frame()[:3].itertuples()):
        found = [effect(model, row, (site, layer), columns(model.model, h)) for layer in range(2) for h in range(count)]
        np.testing.assert_allclose(res[names].iloc[i].to_numpy(dtype=float), found, atol=1e-10, rtol=0)


def test_single_heads_of_shared_keys_are_refused():
    for site in ('k', 'v'):
        with pytest.raises(
            ValueError, match=f"share their keys and values, so site='{site}' cannot be patched for some"
        ):
            PatchHeads(ranker(), heads=['L0H1'], site=site)(frame())
    assert 'L0H1.q' in PatchHeads(ranker(), heads=['L0H1'], site='q')(frame()[:1])


@pytest.mark.parametrize('kind', KINDS)
def test_patterns_equal_those_of_eager_attention(kind):
    model = ranker('qwen3', kind)
    eager = ranker('qwen3', kind, fresh=True)
    eager.model.set_attn_implementation('eager')
    res = PatchHeads(model, heads=['L0H1', 'L1H2'], site='pattern')(frame()[:3])
    for i, row in enumerate(frame()[:3].itertuples()):
        for name in ('L0H1', 'L1H2'):
            wanted = pattern_effect(eager, row, int(name[1]), int(name[3]))
            np.testing.assert_allclose(res[f'{name}.pattern'].iloc[i], wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize('fast', [True, False])
@pytest.mark.parametrize('kind', ['causal', 'last'])
def test_blocks_by_token_type_and_position(kind, fast):
    model = ranker('qwen3', kind) if fast else by_the_other_engine(ranker('qwen3', kind, fresh=True))
    some, blocks = frame()[1:3], ('resid_pre', 'attn_out', 'mlp_out')
    types = PatchLayers(model)(some)
    positions = PatchLayers(model, by='position', batch_tokens=2000)(some)
    assert ('mlp_out.L1.prompt' in types) == (kind == 'causal')
    for i, row in enumerate(some.itertuples()):
        towers = inside.sides(model, row)
        assert positions.position_types.iloc[i] == [kind for tower in towers for kind in tower.types]
        for block in blocks:
            for layer in range(2):
                for name in ('query', 'doc_other', 'prompt', 'inserted', 'sep'):
                    column = f'{block}.L{layer}.{name}'
                    if column in types:
                        wanted = of_type(model, row, towers, (block, layer), name)
                        np.testing.assert_allclose(types[column].iloc[i], wanted, atol=1e-10, rtol=0)
        if kind == 'causal':
            whole = [effect(model, row, ('mlp_out', 0), positions=[p]) for p in range(len(towers[0].types))]
            np.testing.assert_allclose(positions['mlp_out.L0'].iloc[i], whole, atol=1e-10, rtol=0)


@pytest.mark.parametrize('fast', [True, False])
@pytest.mark.parametrize('kind', ['causal', 'last'])
def test_paths_equal_hooks(kind, fast):
    model = ranker('qwen3', kind) if fast else by_the_other_engine(ranker('qwen3', kind, fresh=True))
    receivers = ['score', 'L1H2.q', 'L1H1.k', 'L1H0.v']
    for direction, reverse in (('perturbed_to_original', False), ('original_to_perturbed', True)):
        res = PatchPaths(model, receivers, direction=direction)(frame()[:2])
        for i, row in enumerate(frame()[:2].itertuples()):
            for sender in ('L0H0', 'L0H3'):
                for receiver in receivers:
                    wanted = path_effect(model, row, sender, receiver, reverse)
                    np.testing.assert_allclose(res[f'{sender}>{receiver}'].iloc[i], wanted, atol=1e-10, rtol=0)
            np.testing.assert_allclose(res['L1H1>score'].iloc[i], path_effect(model, row, 'L1H1', 'score', reverse))


@pytest.mark.parametrize('kind', KINDS)
def test_all_units_together_are_the_other_score(kind):
    """All heads of the first layer and its feed-forward block, and the embeddings, carry everything."""
    model = ranker('qwen3', kind)
    res = PatchedReranker(model, ['L0H1', 'L1H3', 'L0N5'])(frame())
    for i, row in enumerate(frame().itertuples()):
        bases, seen = both(model, row)
        edits = [
            {
                ('heads', 0): put(columns(model.model, 1), one['heads', 0]),
                ('heads', 1): put(columns(model.model, 3), one['heads', 1]),
                ('neurons', 0): put(slice(5, 6), one['neurons', 0]),
            }
            for one in seen
        ]
        np.testing.assert_allclose(res.score.iloc[i], score(model, bases, edits), atol=1e-10, rtol=0)


@pytest.mark.parametrize('kind', KINDS)
def test_ablation_equals_zeroed_weights(kind):
    model, other = ranker('qwen3', kind), ranker('qwen3', kind, fresh=True)
    plain = frame().drop(columns=['text_0', 'query_0'])
    res = AblateHeads(model)(plain)
    np.testing.assert_allclose(res.score_plain, model.score(plain['query'], plain['text']), atol=1e-12)
    with torch.no_grad():
        other.model.base_model.layers[1].self_attn.o_proj.weight[:, columns(other.model, 2)] = 0
    wanted = other.score(plain['query'], plain['text'])
    np.testing.assert_allclose(res.score_plain + res.L1H2, wanted, atol=1e-10, rtol=0)
    np.testing.assert_allclose(
        AblatedReranker(model, ['L1H2']).score(plain['query'], plain['text']), wanted, atol=1e-10
    )


@pytest.mark.parametrize('value', ['mean', 'resample'])
def test_reference_values_by_both_engines(value):
    plain = frame().drop(columns=['text_0', 'query_0'])
    fast = AblateHeads(ranker(), value, reference=reference())(plain)
    slow = AblateHeads(by_the_other_engine(ranker(fresh=True)), value, reference=reference())(plain)
    assert np.abs(effects_of(fast)).max() > 1e-3
    np.testing.assert_allclose(effects_of(fast), effects_of(slow), atol=1e-10, rtol=0)


def test_only_the_tokens_behind_the_edit_are_computed(monkeypatch):
    """Rows that enter a feed-forward block beyond those of the base run, counted."""
    model, long = ranker(fresh=True), 'bread keeps best in a box. ' * 5
    some = frame()[:1].assign(query_0='rust', query='rust', text_0=long, text=long + 'rust')
    behind = len(tokenizer()(TEMPLATE[2], add_special_tokens=False)['input_ids'])
    rows, (row,) = [], [inside.sides(model, row)[0] for row in some.itertuples()]
    real = inside.Layer.mlp
    monkeypatch.setattr(inside.Layer, 'mlp', lambda layer, a: rows.append(a.shape[:-1].numel()) or real(layer, a))
    PatchHeads(model)(some)
    width = 1 + behind
    assert len(row.types) > 3 * width
    # The perturbed run, then 4 heads of the first layer, these and 4 of the second at the last token.
    assert sum(rows) == 2 * width + 4 * width + 4 + 4
