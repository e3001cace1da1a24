"""Effects of heads over the rows of a frame, by hand and by plain loops."""

import math

import numpy as np
import pandas as pd
import pytest
from toys import analysed, effect_frame, simulated_effects

from pyterrier_mech import HeadEffects


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
        frame = effect_frame([(f'q{i}', 'd', 0.0, x, 0.0) for i, x in enumerate([-2, -3, 0.04, 0, 1])], ['L0H0'])
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
            table = HeadEffects.from_frame(
                simulated_effects(rng, 25), confidence=0.9, n_resamples=200, seed=i
            ).to_frame()
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
        numbers = simulated.columns[2:].drop('analysis')
        narrow = simulated.astype(dict.fromkeys(numbers, np.float32))
        wide = narrow.astype(dict.fromkeys(numbers, np.float64))
        assert HeadEffects.from_frame(narrow) == HeadEffects.from_frame(wide)


class TestDirection:
    def test_ratios_of_the_other_direction_divide_by_the_change_in_it(self, by_hand):
        plain = HeadEffects.from_frame(by_hand)
        reverse = HeadEffects.from_frame(analysed(by_hand, direction='original_to_perturbed'))
        np.testing.assert_allclose(reverse.to_frame()['ratio'], -plain.to_frame()['ratio'])
        np.testing.assert_allclose(reverse.to_frame()['mean'], plain.to_frame()['mean'])
        assert reverse.mean_delta == plain.mean_delta

    def test_normalised_effects_are_refused(self, by_hand):
        with pytest.raises(ValueError, match='are normalized, ratios already'):
            HeadEffects.from_frame(analysed(by_hand, effect='normalized'))


class TestMissingData:
    def test_unpatchable_rows_are_counted_by_reason(self, by_hand):
        frame = pd.concat(
            [
                by_hand.assign(patchable='yes').drop(columns='analysis'),
                effect_frame(
                    [
                        ('q1', 'd3', 1.0, 9.0, 'unchanged'),
                        ('q3', 'd1', 1.0, math.nan, 'truncated'),
                        ('q3', 'd2', 1.0, 2.0, 'truncated'),
                        ('q3', 'd3', 1.0, 2.0, None),
                    ],
                    ['patchable'],
                ).drop(columns='analysis'),
            ]
        )
        frame = analysed(frame)
        effects = HeadEffects.from_frame(frame)
        assert effects.n_unpatchable == {'no reason given': 1, 'truncated': 2, 'unchanged': 1}
        assert (effects.n_rows, effects.n_used, effects.n_nan) == (8, 4, 0)
        assert effects.mean_delta == 1.5
        pd.testing.assert_frame_equal(effects.to_frame(), HeadEffects.from_frame(by_hand).to_frame())

    def test_nan_enters_neither_effects_nor_score_changes(self):
        frame = effect_frame(
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
        frame = effect_frame([(f'q{i}', 'd', 0.0, x, 1.0 + i) for i, x in enumerate([0.1, 0.2, -0.3])], ['L0H0'])
        with pytest.warns(UserWarning, match="ratio of 1 heads is NaN .first: L0H0.*Use the column 'mean'"):
            effects = HeadEffects.from_frame(frame)
        row = effects.to_frame().iloc[0]
        assert np.isnan(row[['ratio', 'ratio_low', 'ratio_high']].astype(float)).all()
        assert (row['mean'], row['mean_low'] > 0) == (2, True)
        assert math.isnan(effects.wrong_direction_share)
        assert 'strongest L0H0 mean 2 [' in repr(effects)

    def test_score_changes_that_cancel_in_resamples_give_no_interval(self):
        frame = effect_frame([(f'q{i}', 'd', 0.0, x, 1.0) for i, x in enumerate([1.0, -1.0, 1.0, 1.0])], ['L0H0'])
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
        with pytest.raises(ValueError, match="column must be one of .'ratio'.*got column='name'"):
            effects.matrix('name')

    def test_strongest_by_absolute_ratio(self, simulated):
        effects = HeadEffects.from_frame(simulated.assign(L2H0=-simulated['L0H0'] * 2))
        assert effects.strongest(2)['name'].tolist() == ['L2H0', 'L0H0']
        assert len(effects.strongest()) == 3

    def test_strongest_by_absolute_mean_where_there_is_no_ratio(self):
        frame = effect_frame([('q1', 'd', 0.0, 1.0, 1.0, -3.0), ('q2', 'd', 0.0, -1.0, 1.0, -3.0)], ['L0H0', 'L0H1'])
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
