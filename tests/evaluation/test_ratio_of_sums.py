"""Sums divided by sums, with an interval over queries."""

import numpy as np
import pytest
from inside import ratio_of_sums, vanishes

from pyterrier_mech.stats import bootstrap_by_query


def rows(seed=0):
    rng = np.random.default_rng(seed)
    qids = np.repeat(['q1', 'q10', 'q2', 'q3'], [3, 1, 2, 4])
    return rng.normal(size=(10, 5)), rng.gamma(2, size=10), qids


def test_a_plain_loop_over_queries():
    part, whole, qids = rows()
    found = ratio_of_sums(part, whole, qids, n_resamples=200, seed=3, confidence=0.8)
    groups = [np.flatnonzero(qids == qid) for qid in sorted(set(qids))]
    rng = np.random.default_rng(3)
    values = []
    for _ in range(200):
        drawn = np.concatenate([groups[i] for i in rng.integers(4, size=4)])
        values.append(part[drawn].sum(axis=0) / whole[drawn].sum())
    np.testing.assert_allclose(found.value, part.sum(axis=0) / whole.sum(), rtol=1e-12)
    np.testing.assert_allclose([found.low, found.high], np.percentile(values, [10, 90], axis=0), rtol=1e-9)
    assert found.n.tolist() == [10] * 5 and found.n_queries.tolist() == [4] * 5


def test_a_mean_is_a_ratio_to_one():
    part, _, qids = rows()
    found = ratio_of_sums(part, 1, qids)
    sums = np.stack([part[qids == qid].sum(axis=0) for qid in sorted(set(qids))])
    counts = np.array([[3.0], [1], [2], [4]])
    expected = bootstrap_by_query(lambda d, n: d / n, sums, counts)
    np.testing.assert_allclose(found.value, part.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose([found.low, found.high], expected, rtol=1e-9)


def test_order_of_rows_does_not_matter_beyond_rounding():
    part, whole, qids = rows()
    order = np.random.default_rng(1).permutation(10)
    for one, other in zip(ratio_of_sums(part, whole, qids), ratio_of_sums(part[order], whole[order], qids[order])):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_rows_that_are_not_finite_leave_both_sums():
    part, whole, qids = rows()
    part[2, 0], part[7, 1], part[4:, 2], part[:, 3] = np.nan, np.inf, np.nan, np.nan
    found = ratio_of_sums(part, whole, qids)
    assert found.value[0] == pytest.approx(np.delete(part[:, 0], 2).sum() / np.delete(whole, 2).sum())
    assert found.n.tolist() == [9, 9, 4, 0, 10] and found.n_queries.tolist() == [4, 4, 2, 0, 4]
    assert np.isnan(found.value).tolist() == [False, False, False, True, False]
    whole[0] = np.nan
    assert ratio_of_sums(part, whole, qids).n.tolist() == [8, 8, 3, 0, 9]


def test_changes_that_cancel_and_single_queries_have_no_interval():
    with np.errstate(all='raise'):
        found = ratio_of_sums([1.0, 1, 1], [0.1, 0.2, -0.3], list('abc'))
        assert np.isnan([found.value, found.low, found.high]).all()
        one = ratio_of_sums([1.0, 1], [2.0, 2], ['a', 'a'], n_resamples=1)
    assert one.value == 0.5 and np.isnan([one.low, one.high]).all()
    assert vanishes(0.1 + 0.2 - 0.3, 0.6) and not vanishes(1e-9, 1)
