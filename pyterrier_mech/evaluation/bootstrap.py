"""Uncertainty over queries: intervals by resampling whole queries, and ratios of sums with such an interval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Interval(NamedTuple):
    """A confidence interval for every entry of a result: two arrays of the same shape."""

    low: np.ndarray
    high: np.ndarray


def bootstrap_by_query(
    statistic: Callable[..., np.ndarray],
    *sums: npt.ArrayLike,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval (Efron 1979) that resamples whole queries.

    Rows of one query are not independent, so a query is drawn with all its rows or not at all. That makes sums over
    the rows of a query all that has to be known. A mean over rows and a ratio of sums are

        bootstrap_by_query(lambda d, n: d / n, effect_sums, row_counts)
        bootstrap_by_query(lambda d, delta: d / delta, effect_sums, delta_sums)

    The interval equals ``scipy.stats.bootstrap(..., paired=True, method='percentile')`` on the same seed. It depends on
    the order of the queries: sort them.

    Args:
        statistic: Called once as ``statistic(*totals)``, with an array ``[n_resamples, ...]`` for each array in
            ``sums``. Returns an array ``[n_resamples, *shape]``. Division by zero is silent inside.
        *sums: Arrays ``[n_queries, ...]``: what each query contributes, i.e. sums of its rows (effects, denominators,
            row counts). They may differ in all but the first dimension. Finite: a missing row is left out of its
            query's sum and of its query's count.
        confidence: Coverage of the interval, between 0 and 1.
        n_resamples: How often the queries are drawn. The largest array in memory is ``[n_resamples, ...]``.
        seed: Random seed.

    Returns:
        Low and high ends, each of ``shape``. An entry is NaN where any resample gives a value that is not finite
        (e.g. a denominator of 0), since its distribution then has no percentiles; everything is NaN where there is
        only one query.

    Raises:
        ValueError: If there are no queries, if ``sums`` differ in their number of queries or are not finite, or if
            ``confidence`` or ``n_resamples`` is out of range.
    """
    check_interval(confidence, n_resamples)
    arrays = [np.asarray(values, dtype=np.float64) for values in sums]
    n_queries = _n_queries(arrays)

    # A resample is how often each query was drawn, so the totals of all resamples are one matrix product;
    # copying the drawn rows instead needs n_queries times the memory.
    rng = np.random.default_rng(seed)
    counts = np.empty((n_resamples, n_queries))
    for row in counts:
        row[:] = np.bincount(rng.integers(n_queries, size=n_queries), minlength=n_queries)
    with np.errstate(divide='ignore', invalid='ignore'):
        values = np.asarray(statistic(*(np.tensordot(counts, array, axes=1) for array in arrays)), dtype=np.float64)
    if values.shape[:1] != (n_resamples,):
        raise ValueError(
            f'The statistic returned shape {values.shape} for {n_resamples} resamples. Keep the first axis of the '
            'totals, e.g. lambda d, n: d / n.'
        )

    if n_queries == 1:
        values = np.full_like(values, np.nan)
    values = np.where(np.isfinite(values), values, np.nan)
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail], axis=0)
    return Interval(low, high)


def check_interval(confidence: float, n_resamples: int) -> None:
    """Checks the settings of an interval.

    Raises:
        ValueError: If one is out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f'confidence must be between 0 and 1 (0.95 for a 95% interval); got confidence={confidence!r}')
    if n_resamples < 1:
        raise ValueError(f'n_resamples must be 1 or more, better 1000; got n_resamples={n_resamples!r}')


def _n_queries(arrays: list[np.ndarray]) -> int:
    lengths = {array.shape[:1] for array in arrays}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        raise ValueError(
            f'Sums of shapes {[array.shape for array in arrays]} do not belong together. Give arrays whose first '
            'axis counts the same queries, at least one.'
        )
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError(
            'The sums of a query hold NaN or infinite values. Leave missing rows out of the sums, and give their '
            'count as one more array.'
        )
    return arrays[0].shape[0]


class Ratio(NamedTuple):
    """Sums divided by sums, for every entry of a result: arrays of one shape.

    Attributes:
        value: The ratio over all rows; NaN where the sum below vanishes.
        low: Low end of its interval; NaN where a resample has no ratio, and with one query only.
        high: High end of its interval.
        n: Rows that entered.
        n_queries: Queries of these rows.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: np.ndarray
    n_queries: np.ndarray


def ratio_of_sums(part: npt.ArrayLike, whole: npt.ArrayLike, qids: npt.ArrayLike, **options: Any) -> Ratio:
    """Returns the sum of `part` over the sum of `whole`, with its bootstrap interval over queries.

    Ratios of single rows are never averaged: they are undefined where `whole` is 0, and wild near it. A row with a
    value that is not finite on either side enters neither sum.

    Args:
        part: Array ``[rows, ...]``.
        whole: Array ``[rows, ...]`` or ``[rows]``; or 1, for a mean.
        qids: The query of every row.
        **options: `confidence`, `n_resamples` and `seed` of `bootstrap_by_query`.
    """
    above, below = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    below = np.broadcast_to(below.reshape(below.shape + (1,) * (above.ndim - below.ndim)), above.shape)
    _, query = np.unique(np.asarray(qids, dtype=str), return_inverse=True)
    order = np.argsort(query, kind='stable')
    starts = np.flatnonzero(np.diff(query[order], prepend=-1))
    there = np.isfinite(above) & np.isfinite(below)
    rows = (np.where(there, values, 0.0) for values in (above, below, np.abs(below), np.ones(above.shape)))
    sums = [np.add.reduceat(values[order], starts, axis=0) for values in rows]
    low, high = bootstrap_by_query(_ratio, *sums, **options)
    n_queries = (sums[3] > 0).sum(axis=0)
    value = _ratio(*(values.sum(axis=0) for values in sums))
    low, high = (np.where(n_queries > 1, end, np.nan) for end in (low, high))
    return Ratio(value, low, high, sums[3].sum(axis=0).astype(np.int64), n_queries)


def vanishes(total: npt.ArrayLike, size: npt.ArrayLike) -> np.ndarray:
    """Returns whether changes cancel to 0. Summed in floats, 0.1 + 0.2 - 0.3 is not 0, and would make a ratio of 1e16.

    Args:
        total: Sum of the changes.
        size: Sum of their absolute values.
    """
    return np.abs(total) <= 1e-12 * np.asarray(size)


def _ratio(above: np.ndarray, below: np.ndarray, size: np.ndarray, _: np.ndarray) -> np.ndarray:
    with np.errstate(divide='ignore', invalid='ignore'):
        return np.where(vanishes(below, size), np.nan, above / below)
