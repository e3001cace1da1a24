"""What `stats.compare` reads: runs, judgements and measures, checked and turned into values of queries."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import ir_measures
import numpy as np
import pandas as pd
import pyterrier as pt
from scipy import stats

from pyterrier_mech.columns import FITTED_ON

_KEYS = ['qid', 'docno']


def checked_run(run: Any, name: str) -> pd.DataFrame:
    """Returns a run with its qids and docnos as strings.

    Raises:
        TypeError: If it is no frame.
        ValueError: If it is empty, lacks columns, names a document of a query twice, or has a score that is not finite.
    """
    if not isinstance(run, pd.DataFrame):
        raise TypeError(f'{name} is a {type(run).__name__}, not a frame of results: run the pipeline, pipe(topics)')
    run = _checked(run, name, [*_KEYS, 'score'], _KEYS)
    bad = run[~np.isfinite(run['score'].to_numpy(dtype=float, na_value=np.nan))]
    if len(bad):
        raise ValueError(f'{name}: {len(bad)} of {len(run)} scores are not finite, first {_first(bad)}')
    return run


def checked_qrels(qrels: pd.DataFrame) -> pd.DataFrame:
    """Returns judgements with their qids and docnos as strings.

    Raises:
        ValueError: If they are empty, lack columns or labels, or judge a document of a query twice.
    """
    # Measures of diversity judge a document once for every subtopic, under 'iteration'.
    keys = [*_KEYS, 'iteration'] if 'iteration' in qrels.columns else _KEYS
    qrels = _checked(qrels, 'qrels', [*_KEYS, 'label'], keys)
    bad = qrels[qrels['label'].isna()]
    if len(bad):
        raise ValueError(f'qrels: {len(bad)} of {len(qrels)} rows have no label, first {_first(bad)}')
    return qrels


def _checked(frame: pd.DataFrame, name: str, columns: list[str], keys: list[str]) -> pd.DataFrame:
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise ValueError(f'{name} has no {", ".join(map(repr, missing))}: it has {list(frame.columns)}')
    if not len(frame):
        raise ValueError(f'{name} has no rows')
    frame = frame.astype(dict.fromkeys(_KEYS, str))
    twice = frame[frame.duplicated(keys)]
    if len(twice):
        raise ValueError(
            f'{name}: {len(twice)} rows name a document of a query again, first {_first(twice)}. Measures would merge '
            f'them without a word: choose one, e.g. with .drop_duplicates({keys})'
        )
    return frame


def _first(rows: pd.DataFrame) -> str:
    return f'qid={rows["qid"].iloc[0]!r} docno={rows["docno"].iloc[0]!r}'


def as_measures(measures: Any) -> dict[ir_measures.Measure, str]:
    """Returns measures and their names in a table: as the user wrote them.

    Args:
        measures: One or several of what `pt.Experiment` takes: measures, and names as trec_eval ('ndcg_cut_10') or
            ir_measures ('nDCG@10') write them.

    Raises:
        ValueError: If there are none, or one is unknown.
    """
    named: dict[ir_measures.Measure, str] = {}
    for measure in [measures] if isinstance(measures, (str, ir_measures.Measure)) else list(measures):
        if isinstance(measure, ir_measures.Measure):
            named.setdefault(measure, str(measure))
            continue
        parsed = _parse(measure)
        for one in parsed:
            named.setdefault(one, measure if len(parsed) == 1 else str(one))
    if not named:
        raise ValueError("there are no measures: give some, e.g. ['ndcg_cut_10', RR@10]")
    return named


def _parse(name: Any) -> list[ir_measures.Measure]:
    for parse in (ir_measures.parse_trec_measure, lambda text: [ir_measures.parse_measure(text)]):
        try:
            return parse(name)
        except Exception:  # the two parsers raise what their regular expressions and syntax trees happen to raise
            continue
    raise ValueError(f"{name!r} is no known measure: write 'ndcg_cut_10', 'nDCG@10' or ir_measures.nDCG @ 10")


def judged_queries(runs: Mapping[str, pd.DataFrame], qrels: pd.DataFrame) -> list[str]:
    """Returns the qids of the judgements that at least one run answers, sorted.

    Warns of runs that answer only some of them.

    Raises:
        ValueError: If a run and the judgements have no query in common.
    """
    in_qrels = set(qrels['qid'])
    answered = {name: set(run['qid']) & in_qrels for name, run in runs.items()}
    for name, qids in answered.items():
        if not qids:
            raise ValueError(
                f'{name} and the qrels have no query in common (qids {_some(runs[name]["qid"])} against '
                f'{_some(in_qrels)}): give the qrels of these topics'
            )
    judged = set().union(*answered.values())
    for name, qids in answered.items():
        if len(qids) < len(judged):
            warnings.warn(
                f'{name} has no results for {len(judged) - len(qids)} of {len(judged)} queries that other runs answer '
                f'(qids {_some(judged - qids)}). They count as its failures, with the value 0.',
                stacklevel=3,
            )
    return sorted(judged)


def refuse_seen(judged: Iterable[str], fitted_on: Any, runs: Mapping[str, pd.DataFrame]) -> None:
    """Refuses queries that chose or trained a ranker as its judges.

    Args:
        judged: The queries that would judge.
        fitted_on: What the caller knows: qids, or a frame with a column qid.
        runs: Frames that may carry a list of qids in their attrs.

    Raises:
        TypeError: If a single string is given for the qids.
        ValueError: If a query would judge what it has fitted.
    """
    sources = {'fitted_on': fitted_on}
    sources |= {f'the fit of {name}': run.attrs[FITTED_ON] for name, run in runs.items() if FITTED_ON in run.attrs}
    for source, qids in sources.items():
        seen = sorted(set(judged) & _qids(qids))
        if seen:
            raise ValueError(
                f'{len(seen)} of the queries that would judge stand in {source} (qids {_some(seen)}): a ranker cannot '
                'be judged by the queries that it was fitted on. Fit on other topics, or judge on others with '
                "qrels[~qrels['qid'].isin(fitted)]."
            )


def _qids(given: Any) -> set[str]:
    if isinstance(given, str):
        raise TypeError(f'fitted_on={given!r} is one string: give a list of qids')
    # Iterating a frame gives its column names: topics in place of their qids would pass unseen.
    return {str(qid) for qid in (given['qid'] if isinstance(given, pd.DataFrame) else given)}


def _some(qids: Iterable[str]) -> str:
    distinct = sorted(set(qids))
    return ', '.join(map(repr, distinct[:3])) + (' …' if len(distinct) > 3 else '')


def values_of_queries(
    run: pd.DataFrame, qrels: pd.DataFrame, measures: Mapping[ir_measures.Measure, str], qids: list[str]
) -> pd.DataFrame:
    """Returns the value of every query (rows, in the order of `qids`) under every measure (columns, by name).

    A query without results has the measure's default: 0 for all of ir_measures.
    """
    qrels = qrels[qrels['qid'].isin(qids)]
    values = pd.DataFrame(np.nan, index=pd.Index(qids, name='qid'), columns=list(measures.values()), dtype=float)
    for metric in ir_measures.iter_calc(list(measures), pt.model.to_ir_measures(qrels), pt.model.to_ir_measures(run)):
        values.at[metric.query_id, measures[metric.measure]] = metric.value
    return values


def score_agreement(baseline: pd.DataFrame, run: pd.DataFrame, qids: Iterable[str]) -> dict[str, float]:
    """Returns how far the scores of two runs agree on the documents that both have.

    `pearson`, `spearman` and `kendall` (tau-b) are means over `n_queries`: the queries where neither run gives all
    common documents one score. NaN where nothing is left.
    """
    wanted = set(qids)
    first, second = (frame.loc[frame['qid'].isin(wanted), [*_KEYS, 'score']] for frame in (baseline, run))
    both = first.merge(second, on=_KEYS, suffixes=('_x', '_y')).astype({'score_x': float, 'score_y': float})
    of_queries = [
        _correlations(rows['score_x'].to_numpy(), rows['score_y'].to_numpy()) for _, rows in both.groupby('qid')
    ]
    defined = np.array([row for row in of_queries if row is not None]).reshape(-1, 3)
    means = defined.mean(axis=0) if len(defined) else np.full(3, np.nan)
    x, y = both['score_x'].to_numpy(), both['score_y'].to_numpy()
    return {
        **dict(zip(('pearson', 'spearman', 'kendall'), map(float, means), strict=True)),
        'pearson_pooled': _pearson(x, y) if _vary(x, y) else np.nan,
        'mse': float(np.mean((x - y) ** 2)) if len(both) else np.nan,
        'n_queries': len(defined),
        'n_pairs': len(both),
        'n_missing': len(first) + len(second) - 2 * len(both),
    }


def _correlations(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float] | None:
    if not _vary(x, y):
        return None
    return _pearson(x, y), _pearson(stats.rankdata(x), stats.rankdata(y)), float(stats.kendalltau(x, y).statistic)


def _vary(*arrays: np.ndarray) -> bool:
    return all(len(values) > 1 and np.ptp(values) > 0 for values in arrays)


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1])
