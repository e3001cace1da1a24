"""Whatever the family, the pair, the heads, the direction and the chunk: the engine equals the oracle."""

import inside
import numpy as np
import oracles
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import DESCRIBED, heads_of, toy_cross_encoder

from pyterrier_mech import PatchHeads

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings('ignore:.*cannot be patched')]

WORDS = st.lists(st.sampled_from('bread rust dough winter a the keeps, unbelievably 3.5 yeast'.split()), max_size=9)


@st.composite
def rows(draw):
    """Pairs whose texts are cut, joined and edited at random places."""
    before, after, left, right = draw(WORDS), draw(WORDS), draw(WORDS), draw(WORDS)
    query = draw(WORDS.filter(bool))
    return {
        'query': ' '.join(query),
        'text_0': ' '.join(before + left + after),
        'text': ' '.join(before + right + after),
    }


@given(
    family=st.sampled_from(DESCRIBED),
    batch=st.lists(rows(), min_size=1, max_size=3),
    reverse=st.booleans(),
    filler=st.sampled_from(['a', 'the']),
    batch_tokens=st.sampled_from([1, 60, 400, 5000]),
    data=st.data(),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_engine_equals_oracle(family, batch, reverse, filler, batch_tokens, data):
    model = toy_cross_encoder(family)
    every = [f'L{layer}H{head}' for layer in range(model.n_layers) for head in range(model.n_heads(layer))]
    heads = data.draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
    frame = pd.DataFrame(batch).assign(qid=[str(i) for i in range(len(batch))], docno='d')
    direction = 'original_to_perturbed' if reverse else 'perturbed_to_original'
    res = PatchHeads(model, heads=heads, direction=direction, filler=filler, batch_tokens=batch_tokens)(frame)
    for row in res.itertuples():
        sides = inside.sides(model, row, filler)
        assert (row.patchable == 'yes') == (not inside.problem_of(sides))
        expected = dict.fromkeys(heads, np.nan)
        if row.patchable == 'yes':
            expected = oracles.patch_effects(oracles.plain(model), [side.runs(reverse) for side in sides], heads)
        for head in heads_of(res):
            np.testing.assert_allclose(getattr(row, head), expected[head], atol=1e-10, rtol=0)
