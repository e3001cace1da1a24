"""Rankers compared with a baseline, query by query."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats as tests

from pyterrier_mech.evaluation import runs as reading
from pyterrier_mech.evaluation.bootstrap import bootstrap_by_query, check_interval


@dataclass(frozen=True, eq=False)
class Comparison:
    """How rankers differ from a baseline on the same queries.

    Attributes:
        table: One row a run and measure. `baseline` and `value` are means over `n_queries`; `difference` is value
            minus baseline and `retention` is value over baseline, each with the ends of its bootstrap interval
            (`_low`, `_high`); `t` and `p` are of the paired t-test (two-sided), `p_corrected` is corrected over all
            rows of the table; `d_z` is Cohen's d of the paired differences, their mean over their standard deviation
            (ddof 1); `n_better` and `n_worse` count queries.
        per_query: One row a run, measure and query: `baseline`, `value`, `difference`.
        scores: One row a run: `pearson`, `spearman` and `kendall` (tau-b) of the scores of the documents that both
            have, within a query, as means over the `n_queries` where they are defined; `pearson_pooled` and `mse` over
            all `n_pairs` rows, of raw scores; `n_missing` counts documents that only one of the two has.
    """

    table: pd.DataFrame
    per_query: pd.DataFrame
    scores: pd.DataFrame


def compare(
    baseline: pd.DataFrame,
    runs: pd.DataFrame | Mapping[str, pd.DataFrame],
    qrels: pd.DataFrame,
    measures: Any,
    *,
    fitted_on: Iterable[Any] = (),
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
    correction: str | None = 'holm',
) -> Comparison:
    """Compares runs with a baseline, query by query, and refuses queries that have fitted what they would judge.

    The same queries judge everything: those in the qrels that the baseline or any of the runs answers. A query that
    one side answers and another does not has the value 0 there, as in `pt.Experiment`, and a warning counts such
    queries. A query that no run answers does not enter, since it cannot be told from one that was never asked; where
    a whole pipeline may find nothing, `pt.Experiment` on the topics counts it.

    The effect size is d_z (Lakens 2013, doi:10.3389/fpsyg.2013.00863), the correction is Holm's (1979) over all rows
    of the table; `pt.Experiment` corrects measure by measure. A run that is equal to the baseline, to rounding, has
    no test: `t`, `p`, `p_corrected` and `d_z` are NaN, and it does not count among the tests corrected for. The same
    difference on every query has p 0 and an infinite d_z. A measure without a value for some query is NaN throughout,
    and `retention` is NaN where the baseline's mean is 0.

    Args:
        baseline: Results with qid, docno and score; what else a measure reads may be there too.
        runs: One such frame, called 'run' in the tables, or several by name.
        qrels: Judgements: qid, docno, label.
        measures: As for `pt.Experiment`: measures, or names such as 'ndcg_cut_10' and 'nDCG@10'.
        fitted_on: Qids (or topics) that chose or trained one of the rankers. Those that a frame carries in its attrs
            under 'pyterrier_mech.fitted_on' are added; files and many pandas operations lose attrs, so give them
            where runs were saved or put together.
        confidence: Coverage of the intervals, between 0 and 1.
        n_resamples: How often the queries are drawn, see `bootstrap_by_query`.
        seed: Random seed.
        correction: 'holm', or None to leave p-values as they are.

    Raises:
        TypeError: If a run is not a frame.
        ValueError: If a query that judges was fitted on; if a frame is empty, lacks columns, names a document of a
            query twice or shares no query with the qrels; if a score is not finite, a measure is unknown, or an
            option is out of range.
    """
    check_interval(confidence, n_resamples)
    if correction not in ('holm', None):
        raise ValueError(f"correction must be 'holm', or None for none; got correction={correction!r}")
    named = reading.as_measures(measures)
    given = {'run': runs} if isinstance(runs, pd.DataFrame) else dict(runs)
    if not given:
        raise ValueError('there are no runs to compare with the baseline')
    qrels = reading.judgements(qrels, subtopics=True)
    base = reading.checked_run(baseline, 'the baseline')
    frames = {name: reading.checked_run(run, f'run {name!r}') for name, run in given.items()}
    everything = {'the baseline': base, **{f'run {name!r}': run for name, run in frames.items()}}
    qids = reading.judged_queries(everything, qrels)
    reading.refuse_seen(qids, fitted_on, everything)

    of_base = reading.values_of_queries(base, qrels, named, qids)
    of_runs = {name: reading.values_of_queries(run, qrels, named, qids) for name, run in frames.items()}
    sides = [
        (name, measure, of_base[measure].to_numpy(), values[measure].to_numpy())
        for name, values in of_runs.items()
        for measure in named.values()
    ]
    options = {'confidence': confidence, 'n_resamples': n_resamples, 'seed': seed}
    table = pd.DataFrame([{'run': run, 'measure': name, **_difference(x, y, options)} for run, name, x, y in sides])
    corrected = holm(table['p']) if correction == 'holm' else table['p']
    table.insert(list(table).index('p') + 1, 'p_corrected', corrected)
    per_query = pd.concat(
        pd.DataFrame({'run': run, 'measure': name, 'qid': qids, 'baseline': x, 'value': y, 'difference': y - x})
        for run, name, x, y in sides
    )
    scores = pd.DataFrame([{'run': name, **reading.score_agreement(base, run, qids)} for name, run in frames.items()])
    return Comparison(table, per_query.reset_index(drop=True), scores)


def _difference(baseline: np.ndarray, value: np.ndarray, options: Mapping[str, Any]) -> dict[str, float]:
    difference = value - baseline
    low = high = np.full(2, np.nan)
    if np.isfinite(difference).all():
        sums = (difference, value, baseline, np.ones(len(value)))
        low, high = bootstrap_by_query(lambda d, v, b, n: np.stack([d / n, v / b], axis=-1), *sums, **options)
    mean = baseline.mean()
    t, p, d_z = _paired_t(baseline, value)
    return {
        'baseline': mean,
        'value': value.mean(),
        'difference': difference.mean(),
        'difference_low': low[0],
        'difference_high': high[0],
        'retention': value.mean() / mean if mean else np.nan,
        'retention_low': low[1],
        'retention_high': high[1],
        't': t,
        'p': p,
        'd_z': d_z,
        'n_queries': len(value),
        'n_better': int((difference > 0).sum()),
        'n_worse': int((difference < 0).sum()),
    }


def _paired_t(baseline: np.ndarray, value: np.ndarray) -> tuple[float, float, float]:
    """Returns t, p and d_z."""
    difference = value - baseline
    rounding = 64 * np.finfo(float).eps * max(np.abs(baseline).max(), np.abs(value).max())
    if len(difference) < 2 or not np.isfinite(difference).all() or np.abs(difference).max() <= rounding:
        return np.nan, np.nan, np.nan
    mean = float(difference.mean())
    if np.ptp(difference) <= rounding:
        return np.copysign(np.inf, mean), 0.0, np.copysign(np.inf, mean)
    t, p = tests.ttest_rel(value, baseline)
    return float(t), float(p), mean / float(difference.std(ddof=1))


def holm(p: npt.ArrayLike) -> np.ndarray:
    """Returns p-values corrected for their number by Holm's step-down method (Holm 1979).

    NaN stays NaN and does not count as a test.
    """
    values = np.asarray(p, dtype=float)
    corrected = np.full_like(values, np.nan)
    tested = np.flatnonzero(~np.isnan(values))
    order = tested[np.argsort(values[tested], kind='stable')]
    stepped = values[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return corrected
