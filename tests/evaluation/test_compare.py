import warnings

import inside
import ir_measures
import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import scipy.stats
from ir_measures import AP, RR, P, nDCG

from pyterrier_mech.measures import ScoreChange
from pyterrier_mech.stats import compare, holm

QIDS = [f'q{i}' for i in range(12)]
DOCNOS = [f'd{i}' for i in range(8)]


def run_of(seed, spread=1.0):
    """Scores that follow the labels below, with noise."""
    rng = np.random.default_rng(seed)
    rows = [(qid, docno, i % 3 + spread * rng.normal()) for qid in QIDS for i, docno in enumerate(DOCNOS)]
    return pt.model.add_ranks(pd.DataFrame(rows, columns=['qid', 'docno', 'score']))


@pytest.fixture
def qrels():
    return pd.DataFrame([(qid, docno, i % 3) for qid in QIDS for i, docno in enumerate(DOCNOS)]).set_axis(
        ['qid', 'docno', 'label'], axis=1
    )


@pytest.fixture
def baseline():
    return run_of(0, 0.5)


def test_means_and_p_values_of_experiment(baseline, qrels):
    runs = {'a': run_of(1), 'b': run_of(2, 3.0), 'c': run_of(3, 0.6)}
    given = ['ndcg_cut_5', AP(rel=2), 'P_5']
    ours = compare(baseline, runs, qrels, given).table.set_index(['run', 'measure'])
    theirs = pt.Experiment(
        [baseline, *runs.values()],
        pd.DataFrame({'qid': QIDS, 'query': 'x'}),
        qrels,
        given,
        names=['base', *runs],
        baseline=0,
    ).set_index('name')
    for (run, measure), row in ours.iterrows():
        assert row['baseline'] == pytest.approx(theirs.at['base', measure], rel=1e-12)
        assert row['value'] == pytest.approx(theirs.at[run, measure], rel=1e-12)
        assert row['p'] == pytest.approx(theirs.at[run, f'{measure} p-value'], rel=1e-12)
        assert row['n_better'] == theirs.at[run, f'{measure} +']
        assert row['n_worse'] == theirs.at[run, f'{measure} -']
    assert list(ours.index) == [(run, measure) for run in runs for measure in ('ndcg_cut_5', 'AP(rel=2)', 'P_5')]


def test_correction_of_experiment_where_there_is_one_measure(baseline, qrels):
    runs = {'a': run_of(1), 'b': run_of(2, 3.0), 'c': run_of(3, 0.6)}
    theirs = pt.Experiment(
        [baseline, *runs.values()],
        pd.DataFrame({'qid': QIDS, 'query': 'x'}),
        qrels,
        ['ndcg_cut_5'],
        baseline=0,
        correction='holm',
    )['ndcg_cut_5 p-value corrected'][1:]
    np.testing.assert_allclose(compare(baseline, runs, qrels, 'ndcg_cut_5').table['p_corrected'], theirs, rtol=1e-12)
    both = compare(baseline, runs, qrels, ['ndcg_cut_5', 'map']).table
    np.testing.assert_allclose(both['p_corrected'], holm(both['p']), rtol=0)
    assert (both['p_corrected'] > both['p']).any()
    plain = compare(baseline, runs, qrels, 'ndcg_cut_5', correction=None).table
    np.testing.assert_array_equal(plain['p_corrected'], plain['p'])


def test_row_by_hand(baseline, qrels):
    run = run_of(1)
    result = compare(baseline, run, qrels, nDCG @ 5, n_resamples=300, seed=4, confidence=0.9)
    x, y = (
        np.array([v for _, v in sorted((m.query_id, m.value) for m in values)])
        for values in (
            ir_measures.iter_calc([nDCG @ 5], pt.model.to_ir_measures(qrels), pt.model.to_ir_measures(frame))
            for frame in (baseline, run)
        )
    )
    (row,) = result.table.to_dict('records')
    t, p = scipy.stats.ttest_rel(y, x)
    assert (row['run'], row['measure'], row['n_queries']) == ('run', 'nDCG@5', 12)
    assert (row['t'], row['p'], row['p_corrected']) == pytest.approx((t, p, p), rel=1e-12)
    assert row['d_z'] == pytest.approx((y - x).mean() / np.sqrt(((y - x - (y - x).mean()) ** 2).sum() / 11), rel=1e-12)
    assert row['d_z'] == pytest.approx(t / np.sqrt(12), rel=1e-12)
    assert row['retention'] == pytest.approx(y.sum() / x.sum(), rel=1e-12)
    rng = np.random.default_rng(4)
    drawn = [rng.integers(12, size=12) for _ in range(300)]
    for name, values in (
        ('difference', [(y - x)[d].mean() for d in drawn]),
        ('retention', [y[d].sum() / x[d].sum() for d in drawn]),
    ):
        np.testing.assert_allclose([row[f'{name}_low'], row[f'{name}_high']], np.percentile(values, [5, 95]))
    per_query = result.per_query
    assert list(per_query.columns) == ['run', 'measure', 'qid', 'baseline', 'value', 'difference']
    assert per_query['qid'].tolist() == sorted(QIDS)
    np.testing.assert_array_equal(per_query['baseline'], x)
    np.testing.assert_array_equal(per_query['difference'], y - x)


def test_scores_by_hand(baseline, qrels):
    run = run_of(1)
    (row,) = compare(baseline, run, qrels, 'map').scores.to_dict('records')
    both = baseline.merge(run, on=['qid', 'docno'])
    for name, method in (
        ('pearson', scipy.stats.pearsonr),
        ('spearman', scipy.stats.spearmanr),
        ('kendall', scipy.stats.kendalltau),
    ):
        values = [method(rows['score_x'], rows['score_y']).statistic for _, rows in both.groupby('qid')]
        assert row[name] == pytest.approx(np.mean(values), rel=1e-12)
    assert row['pearson_pooled'] == pytest.approx(scipy.stats.pearsonr(both['score_x'], both['score_y'])[0], rel=1e-12)
    assert row['mse'] == pytest.approx(((both['score_x'] - both['score_y']) ** 2).mean(), rel=1e-12)
    assert (row['n_queries'], row['n_pairs'], row['n_missing']) == (12, 96, 0)


def test_scores_of_documents_that_one_side_lacks(baseline, qrels):
    run = baseline.assign(score=baseline['score'] * 2 + 1)
    run.loc[run['qid'] == 'q3', 'score'] = 1.0  # no order to correlate
    run = run[~((run['qid'] == 'q1') & (run['docno'] != 'd0'))]  # one document left
    (row,) = compare(baseline[baseline['docno'] != 'd7'], run, qrels, 'map').scores.to_dict('records')
    assert (row['pearson'], row['spearman'], row['kendall']) == pytest.approx((1, 1, 1))
    assert row['pearson_pooled'] < 0.999
    assert (row['n_queries'], row['n_pairs'], row['n_missing']) == (10, 11 * 7 + 1, 11 + 6)


def test_identical_run_is_never_significant(baseline, qrels):
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        result = compare(baseline, {'same': baseline.copy(), 'other': run_of(2)}, qrels, ['map', RR])
    same = result.table[result.table['run'] == 'same']
    assert same[['t', 'p', 'p_corrected', 'd_z']].isna().all(axis=None)
    assert not (same['p_corrected'] < 0.05).any()
    assert (same[['difference', 'difference_low', 'difference_high', 'n_better', 'n_worse']] == 0).all(axis=None)
    assert (same[['retention', 'retention_low', 'retention_high']] == 1).all(axis=None)
    other = result.table[result.table['run'] == 'other']
    np.testing.assert_array_equal(other['p_corrected'], holm(other['p']))  # a family of two, not of four


def test_same_difference_everywhere(qrels):
    judged = qrels.assign(label=(qrels['docno'] == 'd0').astype(int))
    first = judged.assign(score=judged['label'] * 1.0)
    second = first.assign(score=-first['score'] + first['docno'].rank() / 100)
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        (row,) = compare(first, second, judged, 'recip_rank').table.to_dict('records')
    assert row['difference'] == row['difference_low'] == row['difference_high'] == 1 / 8 - 1
    assert (row['t'], row['p'], row['d_z']) == (-np.inf, 0, -np.inf)
    assert row['n_worse'] == 12


def test_equal_differences_with_rounding():
    x = np.array([0.1, 0.2, 0.3, 0.7])
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        assert inside.paired_t(x, x + 0.1) == (np.inf, 0, np.inf)
        assert np.isnan(inside.paired_t(x, x * (1 + 1e-16) + 1e-17)).all()
        assert np.isnan(inside.paired_t(x[:1], x[1:2])).all()


def test_query_that_a_run_lacks_counts_zero(baseline, qrels):
    run = run_of(1)
    short = run[run['qid'] != 'q5']
    unasked = pd.concat([qrels, pd.DataFrame({'qid': ['z'], 'docno': ['d0'], 'label': [2]})])
    with pytest.warns(UserWarning, match=r"run 'run' has no results for 1 of 12 .*'q5'.*value 0"):
        result = compare(baseline, short, unasked, 'ndcg_cut_5')
    theirs = pt.Experiment(
        [baseline, short], pd.DataFrame({'qid': QIDS, 'query': 'x'}), unasked, ['ndcg_cut_5'], baseline=0
    )
    assert result.table['value'].tolist() == pytest.approx([theirs.at[1, 'ndcg_cut_5']])
    assert result.table['p'].tolist() == pytest.approx([theirs.at[1, 'ndcg_cut_5 p-value']])
    assert result.per_query.set_index('qid').at['q5', 'value'] == 0
    assert 'z' not in set(result.per_query['qid'])
    assert result.table['n_queries'].tolist() == [12]


def test_queries_without_judgements_do_not_count(baseline, qrels):
    few = qrels[qrels['qid'].isin(['q1', 'q2', 'q3'])]
    result = compare(baseline, run_of(1), few, 'map')
    assert set(result.per_query['qid']) == {'q1', 'q2', 'q3'}
    assert result.scores['n_pairs'].tolist() == [24]
    kept = compare(*(frame[frame['qid'].isin(['q1', 'q2', 'q3'])] for frame in (baseline, run_of(1), qrels)), 'map')
    pd.testing.assert_frame_equal(result.table, kept.table)


def test_order_of_rows_and_types_of_ids_do_not_matter(baseline, qrels):
    def shuffled(frame):
        frame = frame.assign(qid=frame['qid'].str[1:].astype(int), docno=frame['docno'].str[1:].astype(int))
        return frame.sample(frac=1, random_state=1).reset_index(drop=True)

    as_text = [frame.assign(qid=frame['qid'].str[1:]) for frame in (baseline, run_of(1), qrels)]
    ours = compare(*map(shuffled, (baseline, run_of(1), qrels)), 'map')
    pd.testing.assert_frame_equal(ours.table, compare(*as_text, 'map').table)
    pd.testing.assert_frame_equal(ours.scores, compare(*as_text, 'map').scores, rtol=1e-12)


def test_frames_are_left_alone(baseline, qrels):
    run = run_of(1)
    copies = [frame.copy() for frame in (baseline, run, qrels)]
    compare(baseline, run, qrels, 'map')
    for frame, copy in zip((baseline, run, qrels), copies, strict=True):
        pd.testing.assert_frame_equal(frame, copy)


def test_measure_without_a_value_is_nan_throughout(baseline, qrels):
    run = run_of(1).assign(score_original=0.0, score_perturbed=1.0)
    run.loc[run['qid'] == 'q0', 'score_perturbed'] = np.nan
    (row,) = compare(run.assign(score_perturbed=2.0), run, qrels, ScoreChange).table.to_dict('records')
    assert row['baseline'] == 2
    names = ['value', 'difference', 'difference_low', 'retention', 'retention_high', 't', 'p', 'd_z']
    assert np.isnan([row[name] for name in names]).all()


def test_retention_of_nothing_is_nan(qrels):
    none = qrels.assign(label=0)
    (row,) = compare(run_of(0), run_of(1), none, P @ 5).table.to_dict('records')
    assert row['value'] == 0
    assert np.isnan([row[name] for name in ('retention', 'retention_low', 'retention_high')]).all()


@pytest.mark.parametrize('seen', [['q4', 'q7'], {'q4', 'q7'}, pd.Series(['q4', 'q7'])])
def test_queries_that_were_fitted_on_do_not_judge(baseline, qrels, seen):
    with pytest.raises(ValueError, match=r"2 of the queries.*stand in fitted_on \(qids 'q4', 'q7'\).*other topics"):
        compare(baseline, run_of(1), qrels, 'map', fitted_on=seen)
    rest = qrels[~qrels['qid'].isin(['q4', 'q7'])]
    assert compare(baseline, run_of(1), rest, 'map', fitted_on=seen).table['n_queries'].tolist() == [10]


def test_topics_and_numbers_as_fitted_on(baseline, qrels):
    with pytest.raises(ValueError, match="1 of the queries.*'q4'"):
        compare(baseline, run_of(1), qrels, 'map', fitted_on=pd.DataFrame({'qid': ['q4'], 'query': ['x']}))
    with pytest.raises(TypeError, match="fitted_on='q4' is one string"):
        compare(baseline, run_of(1), qrels, 'map', fitted_on='q4')
    numbers = [frame.assign(qid=frame['qid'].str[1:]) for frame in (baseline, run_of(1), qrels)]
    with pytest.raises(ValueError, match="'4'"):
        compare(*numbers, 'map', fitted_on=np.array([4]))


@pytest.mark.parametrize('side', ['the baseline', "run 'pruned'"])
def test_frame_that_says_what_it_was_fitted_on(baseline, qrels, side):
    run = run_of(1)
    (baseline if side == 'the baseline' else run).attrs[inside.FITTED_ON] = ['q9', 'elsewhere']
    with pytest.raises(ValueError, match=rf"1 of the queries.*the fit of {side} \(qids 'q9'\)"):
        compare(baseline, {'plain': run_of(2), 'pruned': run}, qrels, 'map')


@pytest.mark.parametrize(
    'change, message',
    [
        ({'baseline': pd.DataFrame({'qid': [], 'docno': [], 'score': []})}, 'the baseline has no rows'),
        ({'runs': run_of(1).drop(columns='score')}, "run 'run' has no 'score'"),
        ({'runs': {'a': pd.concat([run_of(1)] * 2)}}, "run 'a': 96 rows name a document .* again, first qid='q"),
        ({'runs': run_of(1).assign(score=np.nan)}, "run 'run': 96 of 96 scores are not finite, first qid="),
        ({'runs': run_of(1).replace({'qid': 'q'}, 'x', regex=True)}, "run 'run' and the qrels .*'x0', .*'q0', 'q1'"),
        ({'runs': {}}, 'no runs'),
        ({'measures': ['map', 'ndgc@10']}, "'ndgc@10' is no known measure.*nDCG@10"),
        ({'measures': []}, 'no measures'),
        ({'qrels': pd.DataFrame({'qid': ['q1'], 'docno': ['d1']})}, "qrels has no 'label'"),
        (
            {'qrels': pd.DataFrame({'qid': ['q1'] * 2, 'docno': 'd1', 'label': [0, 1]})},
            "qid='q1' docno='d1' two labels",
        ),
        ({'qrels': pd.DataFrame({'qid': ['q1'], 'docno': 'd1', 'label': [None]})}, 'qrels: 1 of 1 rows have no label'),
        ({'confidence': 95}, 'confidence must be between 0 and 1.*got confidence=95'),
        ({'n_resamples': 0}, 'n_resamples=0'),
        ({'correction': 'bonferoni'}, "correction must be .*got correction='bonferoni'"),
    ],
)
def test_errors(baseline, qrels, change, message, monkeypatch):
    def never(*_):
        raise AssertionError('worked before it checked')

    inside.never_evaluate(monkeypatch, never)
    given = {'baseline': baseline, 'runs': run_of(1), 'qrels': qrels, 'measures': ['map'], **change}
    with pytest.raises(ValueError, match=message):
        compare(**given)


def test_pipeline_in_place_of_its_results(baseline, qrels):
    with pytest.raises(TypeError, match="run 'a' is a .*run the pipeline"):
        compare(baseline, {'a': pt.Transformer.identity()}, qrels, 'map')


def test_names_of_measures(baseline, qrels):
    table = compare(baseline, run_of(1), qrels, ['ndcg_cut_10', 'nDCG@5', RR @ 10, nDCG @ 10, 'P_5,10']).table
    assert table['measure'].tolist() == ['ndcg_cut_10', 'nDCG@5', 'RR@10', 'P@5', 'P@10']


def test_holm():
    multitest = pytest.importorskip('statsmodels.stats.multitest')
    p = np.array([0.04, 0.001, 0.03, 0.8, 0.03, 0.02])
    np.testing.assert_allclose(holm(p), multitest.multipletests(p, method='holm')[1], rtol=1e-12)
    np.testing.assert_allclose(holm([0.01, np.nan, 0.04]), [0.02, np.nan, 0.04], rtol=1e-12)
    assert len(holm([])) == 0
