from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest

from pyterrier_mech.columns import PATCHING, head_columns, head_name, parse_head
from pyterrier_mech.results import HeadEffects


def _frame(rows: list[tuple], heads: list[str]) -> pd.DataFrame:
    """Rows of (qid, docno, score_original, score_perturbed, one value per head)."""
    return pd.DataFrame(rows, columns=['qid', 'docno', 'score_original', 'score_perturbed', *heads])


@pytest.fixture
def by_hand() -> pd.DataFrame:
    # delta: 1, 3, -0.5, 2.5; sum 6, mean 1.5.
    return _frame(
        [
            ('q1', 'd1', 0.0, 1.0, 0.5, -1.0),
            ('q1', 'd2', 1.0, 4.0, 0.5, -1.0),
            ('q2', 'd1', 2.0, 1.5, 0.5, 2.0),
            ('q2', 'd2', 0.5, 3.0, 0.5, 2.0),
        ],
        ['L0H0', 'L1H2'],
    )


@pytest.fixture
def simulated() -> pd.DataFrame:
    """40 queries of 1 to 5 rows; L0H0 carries 0.3 of the score change, L0H1 nothing, L2H0 -0.1."""
    return _simulate(np.random.default_rng(7), 40)


def _simulate(rng: np.random.Generator, n_queries: int) -> pd.DataFrame:
    rows = []
    for q in range(n_queries):
        of_query = rng.normal(0, 0.1)
        for d in range(rng.integers(1, 6)):
            original, delta = rng.normal(), rng.gamma(4, 0.3)
            noise = rng.normal(0, 0.1, size=3) + of_query
            effects = np.array([0.3, 0, -0.1]) * delta + noise
            rows.append((f'q{q}', f'd{d}', original, original + delta, *effects))
    return _frame(rows, ['L0H0', 'L0H1', 'L2H0'])


class TestNames:
    def test_columns_come_in_order_of_layer_and_head(self):
        names = ['qid', 'L10H0', 'L2H11', 'L2H9', 'score', 'L2', 'xL0H0', 'L0H0x', 'L00H1', 'resid_pre.L0', 7]
        assert head_columns(pd.DataFrame([range(len(names))], columns=names)) == ['L2H9', 'L2H11', 'L10H0']

    def test_name_and_parse_are_inverse(self):
        assert parse_head('L3H7') == (3, 7)
        assert parse_head(head_name(10, 0)) == (10, 0)

    @pytest.mark.parametrize('name', ['L3', 'L3H', 'l3h7', 'L3H7 ', 'L03H7', 'L-1H0', 'L3H7\n', '', None])
    def test_anything_else_is_an_error(self, name):
        with pytest.raises(ValueError, match=r'does not name a head.*L3H7'):
            parse_head(name)


class TestNumbers:
    def test_sums_are_divided_not_ratios_averaged(self, by_hand):
        effects = HeadEffects.from_frame(by_hand)
        frame = effects.to_frame()
        assert list(frame.columns) == [
            'layer',
            'head',
            'name',
            'ratio',
            'ratio_low',
            'ratio_high',
            'mean',
            'mean_low',
            'mean_high',
            'n',
            'n_queries',
        ]
        assert frame[['layer', 'head', 'name', 'n', 'n_queries']].values.tolist() == [
            [0, 0, 'L0H0', 4, 2],
            [1, 2, 'L1H2', 4, 2],
        ]
        # Averages of ratios would be (0.5 + 1/6 - 1 + 0.2) / 4 = -0.03 and (-1 - 1/3 - 4 + 0.8) / 4 = -1.13.
        assert frame['ratio'].tolist() == [2 / 6, 2 / 6]
        assert frame['mean'].tolist() == [0.5, 0.5]
        # Sums (d, delta) of q1 and q2: L0H0 (1, 4), (1, 2); L1H2 (-2, 4), (4, 2). Drawing one query twice is the end.
        assert frame['ratio_low'].tolist() == [1 / 4, -2 / 4]
        assert frame['ratio_high'].tolist() == [1 / 2, 4 / 2]
        assert frame['mean_low'].tolist() == [0.5, -1]
        assert frame['mean_high'].tolist() == [0.5, 2]

    def test_what_is_true_of_all_rows(self, by_hand):
        effects = HeadEffects.from_frame(by_hand, confidence=0.9, n_resamples=100, seed=4)
        assert (effects.confidence, effects.n_resamples, effects.seed) == (0.9, 100, 4)
        assert (effects.n_rows, effects.n_used, effects.n_queries) == (4, 4, 2)
        assert (effects.n_unpatchable, effects.n_nan, effects.n_duplicates) == ({}, 0, 0)
        assert (effects.mean_delta, effects.low_delta_share, effects.wrong_direction_share) == (1.5, 0, 0.25)

    def test_low_and_wrong_direction_shares(self):
        frame = _frame([(f'q{i}', 'd', 0.0, x, 0.0) for i, x in enumerate([-2, -3, 0.04, 0, 1])], ['L0H0'])
        with pytest.warns(UserWarning, match='without an interval'):
            effects = HeadEffects.from_frame(frame)
        assert (effects.low_delta_share, effects.wrong_direction_share) == (2 / 5, 2 / 5)

    def test_interval_equals_a_plain_loop_over_queries(self, simulated):
        effects = HeadEffects.from_frame(simulated, confidence=0.9, n_resamples=150, seed=2).to_frame()
        groups = [group for _, group in simulated.groupby('qid')]
        rng = np.random.default_rng(2)
        ratios, means = [], []
        for _ in range(150):
            drawn = pd.concat([groups[i] for i in rng.integers(len(groups), size=len(groups))])
            change = (drawn['score_perturbed'] - drawn['score_original']).sum()
            ratios.append(drawn[['L0H0', 'L0H1', 'L2H0']].sum() / change)
            means.append(drawn[['L0H0', 'L0H1', 'L2H0']].mean())
        for values, name in [(ratios, 'ratio'), (means, 'mean')]:
            np.testing.assert_allclose(effects[f'{name}_low'], np.percentile(values, 5, axis=0), rtol=1e-9)
            np.testing.assert_allclose(effects[f'{name}_high'], np.percentile(values, 95, axis=0), rtol=1e-9)

    def test_intervals_cover_the_truth(self):
        truth, hits = np.array([0.3, 0.0, -0.1]), np.zeros(3)
        rng = np.random.default_rng(1)
        for i in range(200):
            table = HeadEffects.from_frame(_simulate(rng, 25), confidence=0.9, n_resamples=200, seed=i).to_frame()
            hits += (table['ratio_low'] <= truth) & (truth <= table['ratio_high'])
        assert (hits >= 160).all() and (hits <= 194).all(), hits

    def test_order_of_rows_and_columns_does_not_matter(self, simulated):
        shuffled = simulated.sample(frac=1, random_state=0)[simulated.columns[::-1]]
        assert HeadEffects.from_frame(shuffled) == HeadEffects.from_frame(simulated)

    def test_seed_decides(self, simulated):
        first, again = (HeadEffects.from_frame(simulated, seed=3) for _ in range(2))
        other = HeadEffects.from_frame(simulated, seed=4)
        assert first == again and hash(first) == hash(again)
        assert first != other
        assert (first.to_frame()['ratio'] == other.to_frame()['ratio']).all()

    def test_input_is_not_touched_and_index_is_ignored(self, simulated):
        before = simulated.set_index(pd.Index([5] * len(simulated)))
        after = before.copy()
        assert HeadEffects.from_frame(after) == HeadEffects.from_frame(simulated)
        pd.testing.assert_frame_equal(before, after)

    def test_float32_scores_are_summed_in_float64(self, simulated):
        narrow = simulated.astype({c: np.float32 for c in simulated.columns[2:]})
        wide = narrow.astype({c: np.float64 for c in simulated.columns[2:]})
        assert HeadEffects.from_frame(narrow) == HeadEffects.from_frame(wide)


class TestDirection:
    def test_ratios_of_the_other_direction_divide_by_the_change_in_it(self, by_hand):
        plain = HeadEffects.from_frame(by_hand)
        by_hand.attrs[PATCHING] = {'direction': 'original_to_perturbed', 'effect': 'difference'}
        reverse = HeadEffects.from_frame(by_hand)
        np.testing.assert_allclose(reverse.to_frame()['ratio'], -plain.to_frame()['ratio'])
        np.testing.assert_allclose(reverse.to_frame()['mean'], plain.to_frame()['mean'])
        assert reverse.mean_delta == plain.mean_delta

    def test_normalised_effects_are_refused(self, by_hand):
        by_hand.attrs[PATCHING] = {'direction': 'perturbed_to_original', 'effect': 'normalized'}
        with pytest.raises(ValueError, match='are normalized, ratios already'):
            HeadEffects.from_frame(by_hand)


class TestMissingData:
    def test_unpatchable_rows_are_counted_by_reason(self, by_hand):
        nan = math.nan
        frame = pd.concat(
            [
                by_hand.assign(patchable='yes'),
                pd.DataFrame(
                    [
                        {
                            'qid': 'q1',
                            'docno': 'd3',
                            'score_original': 1.0,
                            'score_perturbed': 9.0,
                            'patchable': 'unchanged',
                        },
                        {
                            'qid': 'q3',
                            'docno': 'd1',
                            'score_original': 1.0,
                            'score_perturbed': nan,
                            'patchable': 'truncated',
                        },
                        {
                            'qid': 'q3',
                            'docno': 'd2',
                            'score_original': 1.0,
                            'score_perturbed': 2.0,
                            'patchable': 'truncated',
                        },
                        {'qid': 'q3', 'docno': 'd3', 'score_original': 1.0, 'score_perturbed': 2.0, 'patchable': None},
                    ]
                ),
            ]
        )
        effects = HeadEffects.from_frame(frame)
        assert effects.n_unpatchable == {'no reason given': 1, 'truncated': 2, 'unchanged': 1}
        assert (effects.n_rows, effects.n_used, effects.n_nan) == (8, 4, 0)
        assert effects.mean_delta == 1.5
        pd.testing.assert_frame_equal(effects.to_frame(), HeadEffects.from_frame(by_hand).to_frame())

    def test_nan_enters_neither_effects_nor_score_changes(self):
        frame = _frame(
            [
                ('q1', 'd1', 0.0, 1.0, 0.5, 0.1),
                ('q1', 'd2', 0.0, 8.0, math.nan, 0.2),
                ('q2', 'd1', 0.0, 1.0, 0.3, 0.3),
                ('q2', 'd2', 0.0, math.nan, 9.0, 9.0),
                ('q3', 'd1', 0.0, 2.0, math.inf, math.nan),
            ],
            ['L0H0', 'L0H1'],
        )
        with pytest.warns(UserWarning, match='3 patchable rows have NaN or infinite'):
            effects = HeadEffects.from_frame(frame)
        table = effects.to_frame()
        np.testing.assert_allclose(table['ratio'], [0.8 / 2, 0.6 / 10])
        np.testing.assert_allclose(table['mean'], [0.4, 0.2])
        assert table['n'].tolist() == [2, 3]
        assert table['n_queries'].tolist() == [2, 2]
        assert (effects.n_rows, effects.n_used, effects.n_queries, effects.n_nan) == (5, 3, 2, 3)
        assert effects.mean_delta == pytest.approx(10 / 3)

    def test_head_without_any_row(self, by_hand):
        with pytest.warns(UserWarning) as record:
            effects = HeadEffects.from_frame(by_hand.assign(L1H2=math.nan))
        assert any('ratio of 1 heads is NaN (first: L1H2)' in str(w.message) for w in record)
        assert effects.to_frame().loc[1, ['n', 'n_queries']].tolist() == [0, 0]
        assert effects.strongest()['name'].tolist() == ['L0H0']

    def test_head_with_rows_of_one_query_has_no_interval(self, simulated):
        simulated['L2H0'] = simulated['L2H0'].where(simulated['qid'] == 'q3')
        with pytest.warns(UserWarning) as record:
            table = HeadEffects.from_frame(simulated, n_resamples=1).to_frame().set_index('name')
        assert any('1 heads have a ratio without an interval (NaN; first: L2H0)' in str(w.message) for w in record)
        assert table.loc['L2H0', ['ratio_low', 'ratio_high', 'mean_low', 'mean_high']].isna().all()
        assert table.loc['L0H0', ['ratio_low', 'ratio_high', 'mean_low', 'mean_high']].notna().all()

    def test_score_changes_that_cancel_give_no_ratio(self):
        # 0.1 + 0.2 - 0.3 is 5.6e-17 in floats.
        frame = _frame([(f'q{i}', 'd', 0.0, x, 1.0 + i) for i, x in enumerate([0.1, 0.2, -0.3])], ['L0H0'])
        with pytest.warns(UserWarning, match="ratio of 1 heads is NaN .first: L0H0.*Use the column 'mean'"):
            effects = HeadEffects.from_frame(frame)
        row = effects.to_frame().iloc[0]
        assert np.isnan(row[['ratio', 'ratio_low', 'ratio_high']].astype(float)).all()
        assert (row['mean'], row['mean_low'] > 0) == (2, True)
        assert math.isnan(effects.wrong_direction_share)
        assert 'strongest L0H0 mean 2 [' in repr(effects)

    def test_score_changes_that_cancel_in_resamples_give_no_interval(self):
        frame = _frame([(f'q{i}', 'd', 0.0, x, 1.0) for i, x in enumerate([1.0, -1.0, 1.0, 1.0])], ['L0H0'])
        with pytest.warns(UserWarning, match='1 heads have a ratio without an interval'):
            row = HeadEffects.from_frame(frame).to_frame().iloc[0]
        assert row['ratio'] == 2
        assert np.isnan([row['ratio_low'], row['ratio_high']]).all()
        assert (row['mean_low'], row['mean_high']) == (1, 1)

    def test_one_query_has_no_interval(self, by_hand):
        with pytest.warns(UserWarning, match='All rows belong to one query') as record:
            table = HeadEffects.from_frame(by_hand.iloc[:2]).to_frame()
        assert len(record) == 1
        assert table['ratio'].tolist() == [0.25, -0.5]
        assert table[['ratio_low', 'ratio_high', 'mean_low', 'mean_high']].isna().all(axis=None)

    def test_duplicates_are_kept_and_reported(self, by_hand):
        frame = pd.concat([by_hand, by_hand.iloc[[1, 1]]])
        with pytest.warns(UserWarning, match=r'2 rows repeat a \(qid, docno\) pair.*drop_duplicates') as record:
            effects = HeadEffects.from_frame(frame)
        assert sum('repeat' in str(w.message) for w in record) == 1
        assert effects.n_duplicates == 2
        assert effects.to_frame()['n'].tolist() == [6, 6]
        assert effects.to_frame()['ratio'].tolist() == [3 / 12, 0]

    def test_warnings_point_at_the_caller(self, by_hand):
        with pytest.warns(UserWarning) as record:
            HeadEffects.from_frame(by_hand.iloc[:2])
        assert record[0].filename == __file__


class TestErrors:
    @pytest.mark.parametrize(
        'lacks, message',
        [
            (['score_original'], "no 'score_original'. Pass the whole frame that a PatchHeads"),
            (['score_original', 'score_perturbed'], "no 'score_original', 'score_perturbed'"),
            (['qid', 'docno'], "no 'qid', 'docno'"),
            (['L0H0', 'L1H2'], "no head columns such as 'L0H0'"),
            (['docno', 'L0H0', 'L1H2'], "no 'docno', head columns such as 'L0H0'"),
        ],
    )
    def test_missing_columns(self, by_hand, lacks, message):
        with pytest.raises(ValueError, match=message):
            HeadEffects.from_frame(by_hand.drop(columns=lacks))

    def test_no_row_is_patchable(self, by_hand):
        with pytest.raises(ValueError, match=r"None of the 4 rows is patchable \(reasons: {'unchanged': 4}\)"):
            HeadEffects.from_frame(by_hand.assign(patchable='unchanged'))

    def test_no_rows(self, by_hand):
        with pytest.raises(ValueError, match='None of the 0 rows is patchable'):
            HeadEffects.from_frame(by_hand.iloc[:0])

    def test_all_nan(self, by_hand):
        with pytest.raises(ValueError, match='None of the 4 patchable rows has finite scores'):
            HeadEffects.from_frame(by_hand.assign(score_perturbed=math.nan))

    def test_row_of_no_query(self, by_hand):
        by_hand.loc[2, 'qid'] = None
        with pytest.raises(ValueError, match='1 of 4 rows have no qid.*dropna'):
            HeadEffects.from_frame(by_hand)

    @pytest.mark.parametrize('options', [{'confidence': 1.0}, {'n_resamples': 0}])
    def test_settings_out_of_range(self, by_hand, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            HeadEffects.from_frame(by_hand, **options)


class TestViews:
    def test_matrix_of_uneven_layers(self, simulated):
        matrix = HeadEffects.from_frame(simulated).matrix('n')
        n = len(simulated)
        np.testing.assert_array_equal(matrix, [[n, n], [math.nan, math.nan], [n, math.nan]])

    def test_matrix_of_another_column(self, by_hand):
        effects = HeadEffects.from_frame(by_hand)
        assert effects.matrix()[1, 2] == 2 / 6
        with pytest.raises(ValueError, match="column='name' is not a number of a head. Choose one of .'ratio'"):
            effects.matrix('name')

    def test_strongest_by_absolute_ratio(self, simulated):
        effects = HeadEffects.from_frame(simulated.assign(L2H0=-simulated['L0H0'] * 2))
        assert effects.strongest(2)['name'].tolist() == ['L2H0', 'L0H0']
        assert len(effects.strongest()) == 3

    def test_strongest_by_absolute_mean_where_there_is_no_ratio(self):
        frame = _frame([('q1', 'd', 0.0, 1.0, 1.0, -3.0), ('q2', 'd', 0.0, -1.0, 1.0, -3.0)], ['L0H0', 'L0H1'])
        with pytest.warns(UserWarning, match='ratio of 2 heads is NaN'):
            effects = HeadEffects.from_frame(frame)
        assert effects.strongest(1)['name'].tolist() == ['L0H1']

    def test_views_are_copies(self, by_hand):
        effects = HeadEffects.from_frame(by_hand)
        table, matrix = effects.to_frame(), effects.matrix()
        table['ratio'] = 99
        matrix[:] = 99
        assert effects == HeadEffects.from_frame(by_hand)

    def test_repr(self, by_hand):
        text = repr(HeadEffects.from_frame(by_hand.assign(L1H2=0.1)))
        assert text == 'HeadEffects(2 heads, 4 of 4 rows, 2 queries, strongest L0H0 ratio 0.333 [0.25, 0.5])'

    def test_equality_with_other_things(self, by_hand):
        assert HeadEffects.from_frame(by_hand) != 'effects'


class TestSaving:
    def test_roundtrip(self, simulated, tmp_path):
        frame = simulated.assign(patchable=['unchanged', *['yes'] * (len(simulated) - 1)])
        frame.loc[3, 'L2H0'] = math.nan
        with pytest.warns(UserWarning, match='1 patchable rows'):
            effects = HeadEffects.from_frame(frame, confidence=0.9)
        assert effects.path is pt.Artifact.NO_PATH
        # A folder name that Arrow would take for a partition.
        path = tmp_path / 'fold=1' / 'effects'
        assert effects.save(path) is effects
        assert effects.path == path
        loaded = HeadEffects.load(str(path))
        assert type(loaded) is HeadEffects and loaded.path == path
        assert loaded == effects and hash(loaded) == hash(effects) and repr(loaded) == repr(effects)
        pd.testing.assert_frame_equal(loaded.to_frame(), effects.to_frame(), check_exact=True)
        assert (loaded.n_unpatchable, loaded.n_nan, loaded.confidence) == ({'unchanged': 1}, 1, 0.9)
        assert loaded.mean_delta == effects.mean_delta
        assert sorted(p.name for p in path.parent.iterdir()) == ['effects']

    def test_roundtrip_of_nan(self, tmp_path):
        frame = _frame([('q1', 'd', 0.0, 1.0, 1.0), ('q2', 'd', 0.0, -1.0, 1.0)], ['L0H0'])
        with pytest.warns(UserWarning):
            effects = HeadEffects.from_frame(frame).save(tmp_path / 'e')
        loaded = HeadEffects.load(tmp_path / 'e')
        assert loaded == effects
        assert math.isnan(loaded.wrong_direction_share)
        json.loads((tmp_path / 'e' / 'pt_meta.json').read_text(), parse_constant=pytest.fail)

    def test_metadata(self, by_hand, tmp_path):
        HeadEffects.from_frame(by_hand).save(tmp_path / 'e')
        meta = json.loads((tmp_path / 'e' / 'pt_meta.json').read_text())
        assert (meta['type'], meta['format'], meta['package_hint']) == ('head_effects', 'mech', 'pyterrier-mech')
        assert pt.inspect.artifact_type_format(HeadEffects) == ('head_effects', 'mech')

    def test_load_by_entry_point(self, by_hand, tmp_path):
        if not any(ep.name == 'head_effects.mech' for ep in pt.utils.entry_points('pyterrier.artifact')):
            pytest.skip('entry point head_effects.mech is not registered: the package is not installed')
        effects = HeadEffects.from_frame(by_hand).save(tmp_path / 'e')
        loaded = pt.Artifact.load(str(tmp_path / 'e'))
        assert isinstance(loaded, HeadEffects) and loaded == effects

    def test_existing_path(self, by_hand, simulated, tmp_path):
        first, second = HeadEffects.from_frame(by_hand), HeadEffects.from_frame(simulated)
        first.save(tmp_path / 'e')
        with pytest.raises(FileExistsError, match='already exists; pass overwrite=True'):
            second.save(tmp_path / 'e')
        assert HeadEffects.load(tmp_path / 'e') == first
        second.save(tmp_path / 'e', overwrite=True)
        assert HeadEffects.load(tmp_path / 'e') == second
        assert [p.name for p in tmp_path.iterdir()] == ['e']

    def test_overwrite_spares_what_is_not_ours(self, by_hand, tmp_path):
        (tmp_path / 'thesis').mkdir()
        (tmp_path / 'thesis' / 'thesis.tex').write_text('three years')
        with pytest.raises(FileExistsError, match='holds no saved HeadEffects, so it stays'):
            HeadEffects.from_frame(by_hand).save(tmp_path / 'thesis', overwrite=True)
        assert (tmp_path / 'thesis' / 'thesis.tex').exists()

    @pytest.mark.parametrize('overwrite', [False, True])
    def test_a_failed_save_leaves_nothing_behind(self, by_hand, simulated, tmp_path, monkeypatch, overwrite):
        first = HeadEffects.from_frame(by_hand)
        if overwrite:
            first.save(tmp_path / 'e')

        def full_disk(*_, **__):
            raise OSError('no space left on device')

        second = HeadEffects.from_frame(simulated)
        with monkeypatch.context() as m, pytest.raises(OSError, match='no space'):
            m.setattr(type(tmp_path), 'write_text', full_disk)
            second.save(tmp_path / 'e', overwrite=True)
        assert [p.name for p in tmp_path.iterdir()] == (['e'] if overwrite else [])
        assert second.path is pt.Artifact.NO_PATH
        if overwrite:
            assert HeadEffects.load(tmp_path / 'e') == first

    def test_a_failed_rename_puts_the_old_folder_back(self, by_hand, simulated, tmp_path, monkeypatch):
        first = HeadEffects.from_frame(by_hand).save(tmp_path / 'e')
        rename = type(tmp_path).rename

        def fails_for_new(self, target):
            if self.name.endswith('.new'):
                raise OSError('rename failed')
            return rename(self, target)

        with monkeypatch.context() as m, pytest.raises(OSError, match='rename failed'):
            m.setattr(type(tmp_path), 'rename', fails_for_new)
            HeadEffects.from_frame(simulated).save(tmp_path / 'e', overwrite=True)
        assert [p.name for p in tmp_path.iterdir()] == ['e']
        assert HeadEffects.load(tmp_path / 'e') == first

    def test_nothing_to_load(self, tmp_path):
        with pytest.raises(FileNotFoundError, match='HeadEffects.from_frame'):
            HeadEffects.load(tmp_path / 'nowhere')
        with pytest.raises(ValueError, match='Use HeadEffects.from_frame'):
            HeadEffects(pt.Artifact.NO_PATH)

    def test_something_else_to_load(self, tmp_path):
        (tmp_path / 'pt_meta.json').write_text('{"type": "sparse_index", "format": "pisa"}')
        with pytest.raises(ValueError, match="type='sparse_index', format='pisa'"):
            HeadEffects.load(tmp_path)
