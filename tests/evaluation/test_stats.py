from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from pyterrier_mech.stats import bootstrap_by_query


def _ratio(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x / y


@pytest.fixture
def sums() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.normal(1, 1, size=(17, 5)), rng.gamma(4, size=(17, 5))


def test_equals_a_plain_loop(sums):
    x, y = sums
    rng = np.random.default_rng(11)
    values = []
    for _ in range(200):
        drawn = rng.integers(17, size=17)
        values.append(sum(x[q] for q in drawn) / sum(y[q] for q in drawn))
    interval = bootstrap_by_query(_ratio, x, y, confidence=0.8, n_resamples=200, seed=11)
    np.testing.assert_allclose(interval.low, np.percentile(values, 10, axis=0), rtol=1e-12)
    np.testing.assert_allclose(interval.high, np.percentile(values, 90, axis=0), rtol=1e-12)


def test_equals_scipy_on_the_same_seed(sums):
    x, y = sums
    theirs = scipy.stats.bootstrap(
        (x, y),
        lambda x, y, axis: x.sum(axis=axis) / y.sum(axis=axis),
        paired=True,
        vectorized=True,
        axis=0,
        method='percentile',
        n_resamples=300,
        rng=np.random.default_rng(5),
    ).confidence_interval
    ours = bootstrap_by_query(_ratio, x, y, n_resamples=300, seed=5)
    np.testing.assert_allclose(ours.low, theirs.low, rtol=1e-12)
    np.testing.assert_allclose(ours.high, theirs.high, rtol=1e-12)


def test_two_queries_by_hand():
    # Totals of two draws from {0, 10} are 0, 10, 20 with probability 1/4, 1/2, 1/4.
    low, high = bootstrap_by_query(lambda x: x, [0.0, 10.0], confidence=0.9)
    assert (low, high) == (0, 20)
    low, high = bootstrap_by_query(lambda x: x, [0.0, 10.0], confidence=0.4)
    assert (low, high) == (10, 10)


def test_same_queries_have_no_spread():
    low, high = bootstrap_by_query(_ratio, np.full((4, 2), 3.0), np.full((4, 2), 6.0))
    np.testing.assert_array_equal([low, high], 0.5)


def test_any_trailing_shape_and_arrays_that_differ_in_it(sums):
    x = np.arange(24.0).reshape(4, 3, 2)
    interval = bootstrap_by_query(lambda x, n: x / n[:, None, None], x, np.ones(4), n_resamples=50)
    assert interval.low.shape == interval.high.shape == (3, 2)
    alone = bootstrap_by_query(_ratio, x[:, 2, 1], np.ones(4), n_resamples=50)
    assert (interval.low[2, 1], interval.high[2, 1]) == pytest.approx(alone)


def test_seed_decides_and_the_global_state_does_not(sums):
    first = bootstrap_by_query(_ratio, *sums, seed=1)
    state = np.random.get_state()[1].copy()
    again = bootstrap_by_query(_ratio, *sums, seed=1)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    np.testing.assert_array_equal(first, again)
    assert (first.low != bootstrap_by_query(_ratio, *sums, seed=2).low).any()


def test_value_that_is_not_finite_in_any_resample_gives_nan():
    x, y = np.ones((6, 2)), np.ones((6, 2))
    y[1:, 1] = 0
    low, high = bootstrap_by_query(_ratio, x, y)
    np.testing.assert_array_equal(low, [1, np.nan])
    np.testing.assert_array_equal(high, [1, np.nan])


def test_one_query_gives_nan():
    low, high = bootstrap_by_query(_ratio, np.ones((1, 3)), np.ones((1, 3)))
    np.testing.assert_array_equal([low, high], np.full((2, 3), np.nan))


def test_interval_covers_the_mean():
    # 30 queries whose 4 rows share an offset: intervals over rows would be far too narrow.
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        rows = rng.normal(2, 1, size=(30, 1)) + rng.normal(0, 0.5, size=(30, 4))
        low, high = bootstrap_by_query(
            _ratio, rows.sum(axis=1), np.full(30, 4.0), confidence=0.9, n_resamples=300, seed=i
        )
        hits += low <= 2 <= high
    assert 160 <= hits <= 194


@pytest.mark.parametrize(
    'sums, options, message',
    [
        ([[1.0, 2.0]], {'confidence': 95}, 'confidence must be between 0 and 1 .0.95.*got confidence=95'),
        ([[1.0, 2.0]], {'n_resamples': 0}, 'n_resamples must be 1 or more.*got n_resamples=0'),
        ([], {}, r'shapes \[\] do not belong together'),
        ([3.0], {}, r'shapes \[\(\)\] do not belong together'),
        ([[]], {}, r'shapes \[\(0,\)\] do not belong together'),
        ([[1.0, 2.0], [1.0]], {}, r'shapes \[\(2,\), \(1,\)\] do not belong together'),
        ([[1.0, np.nan]], {}, 'NaN or infinite.*count as one more array'),
    ],
)
def test_errors(sums, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_by_query(lambda *totals: totals[0], *sums, **options)


def test_statistic_that_drops_the_resamples():
    with pytest.raises(ValueError, match=r'shape \(\) for 1000 resamples.*Keep the first axis'):
        bootstrap_by_query(np.mean, [1.0, 2.0])
