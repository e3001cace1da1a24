"""Effects of blocks: types patched together, means of single positions, everything; heads by type; odd frames."""

import numpy as np
import pandas as pd
import pytest
from inside import Analysis
from toys import pairs, toy_cross_encoder

from pyterrier_mech import HeadEffects, LayerEffects, PatchHeads, PatchLayers

pytestmark = pytest.mark.filterwarnings('ignore:.*have a ratio without an interval', 'ignore:.*cannot be patched')

SETTINGS = {'direction': 'perturbed_to_original', 'effect': 'difference', 'filler': 'a'}
# Score changes 1, 2, 1, 4.
PAIRS = pd.DataFrame(
    {'qid': ['a', 'a', 'b', 'c'], 'docno': list('wxyz'), 'score_original': 1.0, 'score_perturbed': [2.0, 3.0, 2.0, 5.0]}
)
NAN = float('nan')


def noted(frame, columns, by='PatchLayers', **settings):
    return frame.assign(analysis=str(Analysis(by, {**SETTINGS, **settings}, columns)))


def by_type():
    columns = {
        'resid_pre.L0.inserted': [1.0, 2.0, 1.0, 4.0],
        'resid_pre.L0.doc_match': [0.5, NAN, NAN, 1.0],
        'mlp_out.L1.inserted': [0.0, 0.0, 1.0, 1.0],
        'mlp_out.L1.doc_match': [0.0, NAN, NAN, NAN],
    }
    return noted(PAIRS.assign(**columns), list(columns))


def by_position():
    cells = {
        'attn_out.L0': [[1, 3, 5], [2, 2, 2, 6], [0, 0, 4], [8, 8, 0]],
        'attn_out.L1': [[0, 0, 1], [0, 0, 1, 1], [0, 0, 1], [0, 0, 1]],
    }
    frame = PAIRS.assign(**{name: [np.asarray(cell, np.float32) for cell in of] for name, of in cells.items()})
    kinds = [['cls', 'query', 'query'], ['cls', 'query', 'query', 'odd'], ['cls', 'query', 'inserted'], ['cls'] * 3]
    return noted(frame.assign(position_types=kinds), list(cells))


def numbers(effects, column='ratio'):
    return effects.to_frame().set_index('name')[column].to_dict()


# -- types patched together


def test_ratios_divide_by_the_changes_of_the_rows_that_have_the_type():
    with pytest.warns(UserWarning, match='1 patchable rows have NaN'):
        effects = LayerEffects.from_frame(by_type())
    assert numbers(effects) == pytest.approx(
        {
            'resid_pre.L0.doc_match': 1.5 / 5,
            'resid_pre.L0.inserted': 1.0,
            'mlp_out.L1.doc_match': 0.0,
            'mlp_out.L1.inserted': 2 / 8,
        }
    )
    assert list(numbers(effects, 'n').values()) == [2, 4, 1, 4]
    # Row 4 has such a token, since one of its effects is there: the other is not absent but NaN, and counted as that.
    assert list(numbers(effects, 'n_absent').values()) == [2, 0, 2, 0]
    assert (effects.positions, effects.n_nan, effects.n_used) == ('patched together', 1, 4)
    assert list(effects.to_frame())[:5] == ['site', 'layer', 'head', 'type', 'name']


def test_the_order_is_that_of_sites_layers_and_types_whatever_that_of_rows_and_columns():
    frame = by_type()
    with pytest.warns(UserWarning):
        effects = LayerEffects.from_frame(frame)
        turned = LayerEffects.from_frame(frame.iloc[::-1, ::-1])
    assert turned == effects
    assert list(numbers(effects)) == [
        'resid_pre.L0.doc_match', 'resid_pre.L0.inserted', 'mlp_out.L1.doc_match', 'mlp_out.L1.inserted'
    ]  # fmt: skip


def test_the_other_direction_divides_by_the_change_in_it():
    with pytest.warns(UserWarning):
        plain = LayerEffects.from_frame(by_type())
        columns = [place for place in by_type() if '.L' in place]
        other = LayerEffects.from_frame(noted(by_type(), columns, direction='original_to_perturbed'))
    np.testing.assert_allclose(other.to_frame()['ratio'], -plain.to_frame()['ratio'])


def test_ratios_equal_those_of_heads_for_the_same_numbers():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({'qid': [str(i // 2) for i in range(20)], 'docno': [str(i) for i in range(20)]})
    frame = frame.assign(score_original=0.0, score_perturbed=rng.gamma(2, 1, 20), x=rng.normal(size=20))
    heads = HeadEffects.from_frame(noted(frame.rename(columns={'x': 'L0H0'}), ['L0H0'], 'PatchHeads'))
    blocks = LayerEffects.from_frame(noted(frame.rename(columns={'x': 'mlp_out.L0'}), ['mlp_out.L0']))
    shared = ['ratio', 'ratio_low', 'ratio_high', 'mean', 'mean_low', 'mean_high', 'n', 'n_queries']
    pd.testing.assert_frame_equal(heads.to_frame()[shared], blocks.to_frame()[shared])
    assert blocks.positions == 'all' and blocks.to_frame()['type'].tolist() == ['']


# -- one position at a time


def test_means_of_single_positions_and_absent_types():
    effects = LayerEffects.from_frame(by_position())
    assert effects.positions == 'mean of single positions'
    assert numbers(effects, 'n_absent') == {
        f'attn_out.L{layer}.{kind}': n
        for layer in (0, 1)
        for kind, n in {'cls': 0, 'query': 1, 'inserted': 3, 'odd': 3}.items()
    }
    ratios = numbers(effects)
    assert ratios['attn_out.L0.cls'] == pytest.approx((1 + 2 + 0 + 16 / 3) / 8)
    assert ratios['attn_out.L0.query'] == pytest.approx((4 + 2 + 0) / (1 + 2 + 1))
    assert ratios['attn_out.L0.inserted'] == pytest.approx(4 / 1)
    assert ratios['attn_out.L1.odd'] == pytest.approx(1 / 2)


def test_a_row_without_arrays_and_one_of_another_length():
    frame = by_position().astype({'attn_out.L0': object})
    frame.at[1, 'attn_out.L0'] = None
    with pytest.warns(UserWarning, match='1 patchable rows have NaN'):
        assert numbers(LayerEffects.from_frame(frame), 'n')['attn_out.L0.cls'] == 3
    frame.at[1, 'attn_out.L0'] = np.zeros(2)
    with pytest.raises(
        ValueError, match=r"docno='x': column 'attn_out.L0' has an array of shape .2,., and must have 4"
    ):
        LayerEffects.from_frame(frame)
    with pytest.raises(ValueError, match="no column 'position_types'"):
        LayerEffects.from_frame(by_position().drop(columns='position_types'))


@pytest.mark.numeric
@pytest.mark.parametrize('direction', ['perturbed_to_original', 'original_to_perturbed'])
def test_frames_of_the_stage_by_plain_loops(direction):
    model, frame = toy_cross_encoder('bert'), pairs(6)
    joint = PatchLayers(model, sites=['attn_out'], direction=direction)(frame)
    single = PatchLayers(model, sites=['attn_out'], by='position', direction=direction)(frame)
    sign = 1 if direction == 'perturbed_to_original' else -1
    for res, by_types in ((joint, True), (single, False)):
        effects = LayerEffects.from_frame(res)
        for row in effects.to_frame().to_dict('records'):
            above = below = 0.0
            for _, one in res[res['patchable'] == 'yes'].iterrows():
                kinds = np.asarray(single.loc[one.name, 'position_types'])
                if row['type'] in kinds:
                    name = f'attn_out.L{row["layer"]}'
                    found = one[f'{name}.{row["type"]}'] if by_types else one[name][kinds == row['type']].mean()
                    above, below = above + found, below + sign * (one['score_perturbed'] - one['score_original'])
            assert row['ratio'] == pytest.approx(above / below, abs=1e-10) if below else np.isnan(row['ratio'])


# -- heads


def test_heads_by_type_at_any_site_and_whole_ones():
    columns = {'L1H2.k.inserted': [1.0, 1, 1, 1], 'L0H3.k.query': [0.0, 0, 0, 2], 'L0H3.k.inserted': [1.0, 2, 1, 4]}
    frame = noted(PAIRS.assign(**columns), list(columns), 'PatchHeads', site='k')
    table = LayerEffects.from_frame(frame).to_frame()
    assert table[['site', 'layer', 'head', 'type']].to_numpy().tolist() == [
        ['k', 0, 3, 'query'], ['k', 0, 3, 'inserted'], ['k', 1, 2, 'inserted']
    ]  # fmt: skip
    with pytest.raises(ValueError, match='heads of this frame were patched by type of token: use LayerEffects'):
        HeadEffects.from_frame(frame)
    whole = noted(PAIRS.assign(**{'L1H2.k': 1.0, 'L0H3.k': 2.0}), ['L1H2.k', 'L0H3.k'], 'PatchHeads')
    effects = HeadEffects.from_frame(whole)
    assert effects.site == 'k' and effects.to_frame()['name'].tolist() == ['L0H3', 'L1H2']
    with pytest.raises(ValueError, match='patched as a whole: use HeadEffects'):
        LayerEffects.from_frame(whole)
    with pytest.raises(ValueError, match=r"patched at .'k', 'z'.: keep the columns of one"):
        HeadEffects.from_frame(noted(whole.assign(L0H0=1.0), ['L1H2.k', 'L0H3.k', 'L0H0'], 'PatchHeads'))
    arrays = noted(PAIRS.assign(L0H0=[np.zeros(2)] * 4), ['L0H0'], 'PatchHeads')
    with pytest.raises(ValueError, match='one position at a time: use LayerEffects'):
        HeadEffects.from_frame(arrays)
    with pytest.warns(UserWarning):
        by_place = LayerEffects.from_frame(arrays.assign(position_types=[['cls', 'query']] * 3 + [['cls', 'sep']]))
    assert by_place.to_frame()['name'].tolist() == ['L0H0.cls', 'L0H0.query', 'L0H0.sep']


# -- what is refused, and files


def test_what_is_refused():
    with pytest.raises(ValueError, match="no columns of blocks such as 'attn_out.L0'.*PatchLayers stage returned"):
        LayerEffects.from_frame(PAIRS.assign(analysis='x'))
    with pytest.raises(ValueError, match="no column 'analysis'"):
        LayerEffects.from_frame(by_type().drop(columns='analysis'))
    with pytest.raises(ValueError, match='made in several ways .all, patched together.: keep one'):
        LayerEffects.from_frame(by_type().assign(**{'attn_out.L0': 1.0}))
    with pytest.raises(ValueError, match="'mlp_out.L0.cls' was not written by the PatchLayers"):
        LayerEffects.from_frame(by_type().assign(**{'mlp_out.L0.cls': 1.0}))
    with pytest.raises(ValueError, match='LayerEffects needs columns of .*; these are of AblateHeads'):
        LayerEffects.from_frame(noted(by_type(), [], 'AblateHeads'))
    with pytest.raises(ValueError, match='None of the 0 rows is patchable'):
        LayerEffects.from_frame(by_type().iloc[:0])
    twice = pd.concat([by_type(), by_type()[['mlp_out.L1.inserted']]], axis=1)
    with pytest.raises(ValueError, match="2 columns called 'mlp_out.L1.inserted'"):
        LayerEffects.from_frame(twice)


def test_heads_patched_before_do_not_stand_in_the_way():
    frame = PatchLayers(toy_cross_encoder('bert'), by=None)(PatchHeads(toy_cross_encoder('bert'))(pairs(6)))
    assert set(LayerEffects.from_frame(frame).to_frame()['site']) == {'attn_out', 'mlp_out'}


@pytest.mark.parametrize('made', [by_type, by_position])
def test_saved_and_loaded(made, tmp_path):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        effects = LayerEffects.from_frame(made()).save(tmp_path / 'e')
    loaded = LayerEffects.load(tmp_path / 'e')
    assert loaded == effects and loaded.positions == effects.positions and repr(loaded) == repr(effects)
    pd.testing.assert_frame_equal(loaded.to_frame(), effects.to_frame(), check_exact=True)
