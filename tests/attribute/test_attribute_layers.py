"""AttributeLayers against gradients of the unmodified module, and against PatchLayers."""

import numpy as np
import pytest
import torch
from inside import sides
from oracles import MLP_OUTS, OUT_PROJECTIONS
from toys import FAMILIES, pairs, toy_bi_encoder, toy_cross_encoder

from pyterrier_mech import AttributeLayers, PatchLayers
from pyterrier_mech.attribute import agreement

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings('ignore:.*cannot be patched')]
PARTS = {'attn_out': OUT_PROJECTIONS, 'mlp_out': MLP_OUTS}


def passing(model, block, layer, inputs):
    """(output, tensor) of a run of the module, the tensor in the graph."""
    part, seen = PARTS[block][model.model.config.model_type](model.model.base_model)[layer], []
    handle = part.register_forward_hook(lambda _, args, out: seen.append(out) or None)
    with torch.enable_grad():
        output = model.model(**inputs)
    handle.remove()
    return output, seen[0]


def products(model, row, block, layer):
    """(x' - x) . ds/dx at every position, of all towers."""
    towers = sides(model, row)
    runs = [passing(model, block, layer, tower.original) for tower in towers]
    theirs = [passing(model, block, layer, tower.perturbed)[1] for tower in towers]
    if len(towers) == 1:
        score = runs[0][0].logits[0, 0]
    else:
        score = torch.cosine_similarity(*(out.last_hidden_state[0].mean(0) for out, _ in runs), dim=0)
    gradients = torch.autograd.grad(score, [x for _, x in runs])
    found = [((b - x) * g)[0].sum(-1).detach() for (_, x), b, g in zip(runs, theirs, gradients)]
    return torch.cat(found).numpy(), [kind for tower in towers for kind in tower.types]


def rows_of(frame, res):
    return [(row, i) for i, row in enumerate(frame.itertuples()) if res.patchable.iloc[i] == 'yes'][:2]


@pytest.mark.parametrize('make', [toy_cross_encoder, toy_bi_encoder])
@pytest.mark.parametrize('family', FAMILIES)
def test_equals_autograd(make, family):
    model, frame = make(family), pairs(5)
    types, positions, whole = (
        AttributeLayers(model, sites=['attn_out', 'mlp_out'], by=by)(frame) for by in ('token_type', 'position', None)
    )
    for row, i in rows_of(frame, types):
        for block in PARTS:
            found, kinds = products(model, row, block, 1)
            np.testing.assert_allclose(positions[f'{block}.L1'].iloc[i], found, atol=1e-10)
            np.testing.assert_allclose(whole[f'{block}.L1'].iloc[i], found.sum(), atol=1e-10)
            for kind in ('cls', 'query', 'sep', 'doc_match', 'doc_other', 'inserted'):
                some = found[np.array(kinds) == kind]
                expected = some.sum() if len(some) else np.nan
                np.testing.assert_allclose(types[f'{block}.L1.{kind}'].iloc[i], expected, atol=1e-10)


def test_a_small_edit_is_what_patching_gives():
    """First order: nearly exact where activations hardly differ."""
    model = toy_cross_encoder('bert', fresh=True)
    words = model.model.base_model.embeddings.word_embeddings.weight
    with torch.no_grad():
        words.copy_(words.mean(0) + 1e-3 * (words - words.mean(0)))
    frame = pairs(6)
    for direction in ('perturbed_to_original', 'original_to_perturbed'):
        estimate = AttributeLayers(model, direction=direction)(frame)
        exact = PatchLayers(model, direction=direction)(frame)
        names = [name for name in exact if name.startswith(('resid_pre.', 'mlp_out.'))]
        a, b = (res[names].to_numpy(dtype=float) for res in (estimate, exact))
        assert np.nanmax(np.abs(b)) > 1e-6
        np.testing.assert_allclose(a, b, atol=2e-2 * np.nanmax(np.abs(b)))


def test_what_is_verified_is_exact():
    model, frame = toy_cross_encoder('electra'), pairs(8)
    res = AttributeLayers(model, verify=4, effect='normalized')(frame)
    exact = PatchLayers(model, effect='normalized')(frame)
    names = [name for name in res if name.endswith('.exact')]
    assert len(names) == 4 and 0 < agreement(res)['n'] <= 4 * len(frame)
    for name in names:
        np.testing.assert_allclose(res[name], exact[name.removesuffix('.exact')], atol=1e-12)
    with pytest.raises(ValueError, match="verify=1 with by='position'"):
        AttributeLayers(model, by='position', verify=1)(frame)
