"""Heads at other sites, by kind of token and by position, against hooks on the unmodified module, one forward each."""

import numpy as np
import paths_by_hooks as oracle
import pytest
import torch
from inside import sides
from toys import DESCRIBED, pairs, toy_bi_encoder, toy_cross_encoder, unpatchable_pairs

from pyterrier_mech import AblatedReranker, HeadEffects, PatchedReranker, PatchHeads

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings('ignore:.*cannot be patched')]
HEADS = ['L0H1', 'L1H2', 'L1H0']
INSIDE = ['q', 'k', 'v', 'pattern']


def atol(family, site):
    """ModernBERT's own eager attention has its soft-max in float32."""
    return 1e-8 if (family, site) == ('modernbert', 'pattern') else 1e-10


def expected(model, row, site, name, positions_of=lambda tower: None, reverse=False):
    layer, head = int(name[1]), int(name[3])
    if site == 'pattern':
        return oracle.pattern_effect(model, sides(model, row), layer, head, positions_of)
    return oracle.site_effect(model, sides(model, row), site, layer, head, positions_of, reverse)


def named(name, site):
    return name if site == 'z' else f'{name}.{site}'


def some(frame, res, count=2):
    return [(row, i) for i, row in enumerate(frame.itertuples()) if res.patchable.iloc[i] == 'yes'][:count]


@pytest.mark.parametrize('site', INSIDE)
@pytest.mark.parametrize('family', DESCRIBED)
def test_whole_sites_equal_hooks(family, site):
    model, frame = toy_cross_encoder(family), pairs(5)
    res = PatchHeads(model, heads=HEADS, site=site, batch_tokens=300)(frame)
    assert res[[named(name, site) for name in HEADS]].abs().max().max() > 1e-4
    for row, i in some(frame, res):
        for name in HEADS:
            found = res[named(name, site)].iloc[i]
            np.testing.assert_allclose(found, expected(model, row, site, name), atol=atol(family, site), rtol=0)


@pytest.mark.parametrize('site', ['z', *INSIDE])
@pytest.mark.parametrize('family', ['bert', 'modernbert'])
def test_token_types_and_positions_equal_hooks(family, site):
    model, frame = toy_cross_encoder(family), pairs(5)
    types = PatchHeads(model, heads=HEADS, site=site, by='token_type')(frame)
    positions = PatchHeads(model, heads=HEADS, site=site, by='position', batch_tokens=500)(frame)
    row, i = some(frame, types)[1]
    (tower,) = sides(model, row)
    assert positions.position_types.iloc[i] == list(tower.types)
    for name in HEADS[:2]:
        for kind in ('cls', 'query', 'sep', 'doc_match', 'doc_other', 'inserted'):
            at = [p for p, found in enumerate(tower.types) if found == kind]
            wanted = expected(model, row, site, name, lambda _, at=at: at) if at else np.nan
            found = types[f'{named(name, site)}.{kind}'].iloc[i]
            np.testing.assert_allclose(found, wanted, atol=atol(family, site), rtol=0)
        wanted = [expected(model, row, site, name, lambda _, p=p: [p]) for p in range(len(tower.types))]
        np.testing.assert_allclose(positions[named(name, site)].iloc[i], wanted, atol=atol(family, site), rtol=0)


@pytest.mark.parametrize('site', ['z', 'k'])
def test_the_other_direction_and_both_towers(site):
    model, frame = toy_bi_encoder(), pairs(6)
    frame = frame.assign(query_0=frame['query'], query=frame['query'] + ' rust', edited='query text')
    res = PatchHeads(model, heads=HEADS, site=site, direction='original_to_perturbed')(frame)
    for row, i in some(frame, res):
        for name in HEADS:
            wanted = expected(model, row, site, name, reverse=True)
            np.testing.assert_allclose(res[named(name, site)].iloc[i], wanted, atol=1e-10, rtol=0)


def test_a_module_with_hooks_is_patched_by_its_own_forward_and_patterns_are_refused():
    model, frame = toy_cross_encoder('bert', fresh=True), pairs(4)
    model.model.base_model.encoder.layer[0].attention.self.key.register_forward_hook(lambda _, args, out: out * 1.5)
    for site in ('q', 'k', 'v'):
        res = PatchHeads(model, heads=HEADS, site=site, by='token_type')(frame)
        row, i = some(frame, res)[1]
        at = [p for p, found in enumerate(sides(model, row)[0].types) if found == 'doc_other']
        for name in HEADS:
            wanted = expected(model, row, site, name, lambda _: at)
            np.testing.assert_allclose(res[f'{name}.{site}.doc_other'].iloc[i], wanted, atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match='a Linear has hooks'):
        PatchHeads(model, heads=HEADS, site='pattern')(frame)


def test_undescribed_families_say_so():
    with pytest.raises(ValueError, match='projections of this family are not described'):
        PatchHeads(toy_cross_encoder('mpnet'), heads=HEADS, site='q')(pairs(2))
    res = PatchHeads(toy_cross_encoder('mpnet'), heads=['L0H1'], by='token_type')(pairs(2))
    assert res['L0H1.cls'].notna().all()


@pytest.mark.parametrize('family', ['bert', 'modernbert'])
def test_identities(family):
    model, frame = toy_cross_encoder(family), pairs(6)
    whole = PatchHeads(model)(frame)
    good = whole.index[whole.patchable == 'yes']
    # A pattern and the values that it takes together are the head's output; here only the values differ, or nothing.
    swapped = frame.assign(text=frame['text_0'])
    same = PatchHeads(model, heads=HEADS, site='k')(swapped)
    assert same[[f'{name}.k' for name in HEADS]].isna().all().all() and set(same.patchable) == {'nothing changed'}
    # The first layer's queries differ only where the tokens do.
    positions = PatchHeads(model, heads=['L0H1'], site='q', by='position')(frame)
    for i in good:
        (tower,) = sides(model, frame.iloc[i].to_dict())
        ids = [tower.original['input_ids'][0], tower.perturbed['input_ids'][0]]
        same = (ids[0] == ids[1]).numpy()
        np.testing.assert_allclose(positions['L0H1.q'].iloc[i][same], 0, atol=1e-12)
    one = PatchedReranker(model, ['L1H2'])(frame).loc[good, 'score'] - whole.loc[good, 'score_original']
    np.testing.assert_allclose(whole.loc[good, 'L1H2'], one, atol=1e-10)


def test_unpatchable_rows_and_names():
    model = toy_cross_encoder('bert', max_length=24)
    res = PatchHeads(model, heads=HEADS, site='v', by='position')(unpatchable_pairs())
    assert [bool(np.isnan(cell).all()) for cell in res['L0H1.v']] == [True, True, True, False]
    assert not np.isnan(res['L0H1.v'].iloc[3]).any()
    with pytest.raises(ValueError, match='inside a head'):
        AblatedReranker(model, ['L0H1.k'])(pairs(2))
    with pytest.raises(ValueError, match="site must be one of .* got site='keys'"):
        PatchHeads(model, site='keys')(pairs(2))
    with pytest.raises(ValueError, match='patched by type of token: use LayerEffects'):
        HeadEffects.from_frame(PatchHeads(model, heads=HEADS, by='token_type')(pairs(4)).drop(columns='analysis'))


def test_dtype_and_length_of_cells():
    model = toy_cross_encoder('bert', dtype=torch.float32)
    res = PatchHeads(model, heads=['L0H1'], by='position')(pairs(3))
    for cell, tokens in zip(res['L0H1'], res.position_tokens):
        assert cell.dtype == np.float32 and cell.shape == (len(tokens),)
