"""PatchedReranker against hooks on the unmodified module, one unpadded row at a time."""

import inside
import numpy as np
import oracles
import pytest
from toys import FAMILIES, frame_of, pairs, toy_bi_encoder, toy_cross_encoder, unpatchable_pairs

from pyterrier_mech import PatchedReranker, PatchHeads, Units

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings('ignore:.*cannot be patched')]

UNITS = ['L0H1', 'L1H0', 'L1H3', 'L0N3', 'L0N40', 'L1N7']
PLACES = {
    ('heads', 0): [*range(8, 16)],
    ('heads', 1): [*range(8), *range(24, 32)],
    ('neurons', 0): [3, 40],
    ('neurons', 1): [7],
}


def patched_score(model, row, places):
    return oracles.patched(oracles.plain(model), [side.runs() for side in inside.sides(model, row)], places)


def ranker(family, pooling=None, **settings):
    return toy_bi_encoder(family, pooling, **settings) if pooling else toy_cross_encoder(family, **settings)


@pytest.mark.parametrize(
    ('family', 'pooling'), [*((family, None) for family in FAMILIES), ('bert', 'cls'), ('bert', 'mean')]
)
def test_scores_equal_the_oracle_in_every_family(family, pooling):
    model = ranker(family, pooling, batch_tokens=300)
    res, plain = PatchedReranker(model, UNITS)(pairs()), PatchHeads(model, heads=[])(pairs())
    expected = [patched_score(model, row, PLACES) for row in res[res.patchable == 'yes'].itertuples()]
    np.testing.assert_allclose(res.score[res.patchable == 'yes'], expected, atol=1e-10, rtol=0)
    assert list(res.patchable) == list(plain.patchable) and (res.patchable == 'yes').sum() > 10
    rest = res.patchable != 'yes'
    np.testing.assert_allclose(res.score[rest], plain.score_original[rest], atol=1e-12)


@pytest.mark.parametrize('filler', ['a', 'mask'])
@pytest.mark.parametrize('pooling', [None, 'mean'])
def test_no_head_and_one_head_equal_patch_heads(filler, pooling):
    model = ranker('bert', pooling)
    effects = PatchHeads(model, filler=filler)(pairs())
    none, one = (PatchedReranker(model, heads, filler=filler)(pairs()) for heads in ([], [(1, 2)]))
    np.testing.assert_allclose(none.score, effects.score_original, atol=1e-12)
    expected = effects.score_original + effects['L1H2'].fillna(0)
    np.testing.assert_allclose(one.score, expected, atol=1e-12)


def test_patching_all_neurons_and_heads_leaves_the_embeddings_alone():
    """The residual stream still begins with the original's tokens: not the perturbed score, but close to neither."""
    model, frame = ranker('bert'), pairs(1)
    plain = PatchHeads(model, heads=[])(frame).iloc[0]
    row = PatchedReranker(model, Units.all(model))(frame).iloc[0]
    everywhere = {(kind, layer): slice(None) for kind in ('heads', 'neurons') for layer in (0, 1)}
    assert row.score == pytest.approx(patched_score(model, row, everywhere), abs=1e-10)
    assert abs(row.score - plain.score_original) > 1e-6


def test_unpatchable_rows_keep_the_score_of_the_original_and_are_counted_once():
    model, frame = toy_cross_encoder('bert', max_length=24), unpatchable_pairs()
    with pytest.warns(UserWarning, match=r'3 of 4 pairs cannot be patched \(.*nothing changed: 1') as warned:
        res = PatchedReranker(model, ['L0H0'])(frame)
    assert len([warning for warning in warned if warning.category is UserWarning]) == 1
    assert list(res.patchable) == ['nothing changed', 'edit truncated away', 'no alignment', 'yes']
    expected = model.score(list(frame['query']), list(frame.text_0))
    np.testing.assert_allclose(res.score[:3], expected[:3], atol=1e-12)


def test_an_edited_query():
    model, inp = ranker('bert'), pairs().rename(columns={'text_0': 'gone'})
    inp = inp.assign(query_0=inp['query'], query=inp['query'] + ' rust', edited='query')
    res = PatchedReranker(model, ['L1H2'])(inp)
    assert set(res.columns) - set(inp.columns) == {'patchable'} and (res.patchable == 'yes').all()
    effects = PatchHeads(model, heads=['L1H2'])(inp)
    np.testing.assert_allclose(res.score, effects.score_original + effects['L1H2'], atol=1e-12)


def test_bad_input():
    model = ranker('bert')
    with pytest.raises(KeyError, match=r'Perturb\(\.\.\.\)'):
        PatchedReranker(model, [])(frame_of(8))
    with pytest.raises(ValueError, match='use a single token'):
        PatchedReranker(model, [], filler='two words')(pairs())
