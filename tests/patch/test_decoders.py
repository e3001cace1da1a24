"""Patching of decoders against hooks on the unmodified module, one full forward for each head and site."""

import functools
import logging

import inside
import numpy as np
import pytest
import torch
from decoders import BY_HOOKS, DECODERS, DESCRIBED, KINDS, columns, effect, head_effects, ranker
from toys import effects_of, heads_of, pairs

from pyterrier_mech import PatchedReranker, PatchHeads, PatchLayers

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
        np.testing.assert_allclose(effects_of(res), expected(family, kind), atol=1e-10, rtol=0)


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
