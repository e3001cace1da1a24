"""PatchLayers against hooks on the dense outputs and the layers' inputs of the unmodified module, one forward each."""

import numpy as np
import pytest
import torch
from inside import sides
from inside_patching import whole_streams
from oracles import block_places as places
from toys import FAMILIES, pairs, toy_bi_encoder, toy_cross_encoder, unpatchable_pairs

from pyterrier_mech import PatchedReranker, PatchHeads, PatchLayers

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings('ignore:.*cannot be patched')]
BLOCKS = ('resid_pre', 'attn_out', 'mlp_out')


@torch.no_grad()
def run(module, inputs, change=None, seen=None):
    """The output, with `change` (block, layer, positions, values) or recording into `seen`."""
    handles = []
    for site, (part, is_input) in places(module).items():
        if seen is None and (change is None or site != change[:2]):
            continue

        def act(tensor, site=site):
            if seen is not None:
                seen[site] = tensor.clone()
                return tensor
            tensor = tensor.clone()
            tensor[:, change[2]] = change[3][:, change[2]]
            return tensor

        if is_input:
            handles.append(part.register_forward_pre_hook(lambda _, args, act=act: (act(args[0]), *args[1:])))
        else:
            handles.append(part.register_forward_hook(lambda _, args, out, act=act: act(out)))
    output = module(**inputs)
    for handle in handles:
        handle.remove()
    return output


def score(model, outputs):
    if len(model.towers) == 1:
        return outputs[0].logits[0, 0].item()
    a, b = (out.last_hidden_state[0].mean(0) for out in outputs)
    return torch.cosine_similarity(a, b, dim=0).item()


def oracle(model, row, block, layer, positions_of, reverse=False):
    """Patched score - score of a row; `positions_of` says which positions of every tower are patched."""
    module, towers = model.model, sides(model, row)
    bases, outputs = [], []
    for number, tower in enumerate(towers):
        base, source = tower.runs(reverse)
        seen = {}
        run(module, source, seen=seen)
        bases.append(run(module, base))
        outputs.append(run(module, base, (block, layer, positions_of(number, tower.types), seen[block, layer])))
    return score(model, outputs) - score(model, bases)


def of_type(kind):
    return lambda _, types: [i for i, found in enumerate(types) if found == kind]


def rows_of(frame, res):
    return [(row, i) for i, row in enumerate(frame.itertuples()) if res.patchable.iloc[i] == 'yes']


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('family', FAMILIES)
def test_types_equal_hooks_in_every_family(family, reverse):
    model, frame = toy_cross_encoder(family), pairs(6)
    direction = 'original_to_perturbed' if reverse else 'perturbed_to_original'
    res = PatchLayers(model, direction=direction, batch_tokens=400)(frame)
    for row, i in rows_of(frame, res)[:3]:
        kinds = {kind for tower in sides(model, row) for kind in tower.types}
        for layer in (0, model.n_layers - 1):
            for block in BLOCKS:
                for kind in ('cls', 'query', 'sep', 'doc_match', 'doc_other', 'inserted'):
                    found = res[f'{block}.L{layer}.{kind}'].iloc[i]
                    expected = oracle(model, row, block, layer, of_type(kind), reverse) if kind in kinds else np.nan
                    np.testing.assert_allclose(found, expected, atol=1e-10, rtol=0)


def test_types_of_the_literature_are_patches_of_their_own():
    model, frame = toy_cross_encoder('roberta'), pairs(8)
    res = PatchLayers(model, sites=['mlp_out'], types='literature')(frame)
    positions = PatchLayers(model, sites=['mlp_out'], types='literature', by='position')(frame)
    seen = set()
    for row, i in rows_of(frame, res):
        names = positions.position_types[i]
        for kind in ('cls', 'query_same', 'query_other', 'sep_first', 'sep_last', 'doc_same', 'doc_query', 'inserted'):
            at = [p for p, name in enumerate(names) if name == kind]
            expected = oracle(model, row, 'mlp_out', 0, lambda *_, at=at: at) if at else np.nan
            np.testing.assert_allclose(res[f'mlp_out.L0.{kind}'].iloc[i], expected, atol=1e-10, rtol=0)
            seen |= {kind} if at else set()
    assert len(seen) == 8


@pytest.mark.parametrize('family', ['bert', 'modernbert', 'mpnet'])
def test_positions_equal_hooks(family):
    model, frame = toy_cross_encoder(family), pairs(5)
    res = PatchLayers(model, by='position')(frame)
    row, i = rows_of(frame, res)[1]
    (tower,) = sides(model, row)
    assert res.position_types.iloc[i] == list(tower.types) and len(res.position_tokens.iloc[i]) == len(tower.types)
    for layer in range(model.n_layers):
        for block in BLOCKS:
            found = res[f'{block}.L{layer}'].iloc[i]
            expected = [oracle(model, row, block, layer, lambda *_, p=p: [p]) for p in range(len(tower.types))]
            np.testing.assert_allclose(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize('by', ['token_type', 'position', None])
def test_bi_encoders_equal_hooks(by):
    model, frame = toy_bi_encoder(), pairs(6)
    frame = frame.assign(query_0=frame['query'], query=frame['query'] + ' rust', edited='query text')
    res = PatchLayers(model, by=by)(frame)
    row, i = rows_of(frame, res)[1]
    towers = sides(model, row)
    if by == 'position':
        expected = [
            oracle(model, row, 'mlp_out', 0, lambda number, _, t=t, p=p: [p] if number == t else [])
            for t, tower in enumerate(towers)
            for p in range(len(tower.types))
        ]
        np.testing.assert_allclose(res['mlp_out.L0'].iloc[i], expected, atol=1e-10, rtol=0)
    else:
        which = of_type('inserted') if by else (lambda _, types: list(range(len(types))))
        name = 'mlp_out.L0.inserted' if by else 'mlp_out.L0'
        np.testing.assert_allclose(res[name].iloc[i], oracle(model, row, 'mlp_out', 0, which), atol=1e-10, rtol=0)


@pytest.mark.parametrize('make', [toy_cross_encoder, toy_bi_encoder])
@pytest.mark.parametrize('family', FAMILIES)
def test_identities(make, family):
    model, frame = make(family), pairs(6)
    good = PatchHeads(model, heads=[])(frame).query("patchable == 'yes'").index
    whole = PatchLayers(model, by=None)(frame).loc[good]
    for layer in range(model.n_layers):
        heads = [(layer, head) for head in range(model.n_heads(layer))]
        together = PatchedReranker(model, heads)(frame).loc[good, 'score'] - whole.score_original
        np.testing.assert_allclose(whole[f'attn_out.L{layer}'], together, atol=1e-10)
    by_type = PatchLayers(model, sites=['resid_pre'])(frame).loc[good]
    added = by_type[[c for c in by_type if c.startswith('resid_pre.L0.')]].drop(columns='resid_pre.L0.inserted')
    only = by_type['resid_pre.L0.inserted'].notna() & (added.fillna(0).abs().max(axis=1) < 1e-12)
    change = by_type.score_perturbed - by_type.score_original
    assert only.any()
    np.testing.assert_allclose(by_type['resid_pre.L0.inserted'][only], change[only], atol=1e-10)


def test_same_texts_and_what_cannot_be_patched():
    model, frame = toy_cross_encoder(max_length=24), unpatchable_pairs()
    for by in ('token_type', 'position', None):
        res = PatchLayers(model, by=by)(frame)
        assert list(res.patchable) == ['nothing changed', 'edit truncated away', 'no alignment', 'yes']
        values = res['mlp_out.L0.sep' if by == 'token_type' else 'mlp_out.L0']
        finite = [bool(np.isfinite(value).any()) for value in values]
        assert finite == [False, False, False, True] and np.isfinite(res.score_original).all()


def test_effects_relative_to_the_change_and_batches():
    model, frame = toy_cross_encoder(), pairs(6)
    plain, ratio = PatchLayers(model)(frame), PatchLayers(model, effect='normalized', batch_tokens=1)(frame)
    change = plain.score_perturbed - plain.score_original
    np.testing.assert_allclose(ratio['mlp_out.L0.cls'], plain['mlp_out.L0.cls'] / change.replace(0, np.nan), atol=1e-9)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'sites': ['z']}, 'sites must be a list of some of'),
        ({'sites': 'mlp_out'}, 'sites must be a list'),
        ({'by': 'layer'}, 'by must be one of'),
        ({'by': None, 'sites': ['resid_pre']}, 'is the whole change by itself'),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PatchLayers(toy_cross_encoder(), **settings)(pairs(2))


@pytest.mark.parametrize('make', [toy_cross_encoder, toy_bi_encoder])
@pytest.mark.parametrize('family', FAMILIES)
def test_a_whole_stream_is_the_whole_change(make, family):
    model, frame = make(family), pairs(6)
    scores, good = whole_streams(model, frame)
    expected = PatchHeads(model, heads=[])(frame)['score_perturbed'].to_numpy()[good]
    np.testing.assert_allclose(scores, np.tile(expected, (model.n_layers, 1)), atol=1e-10)
