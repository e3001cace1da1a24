"""What `compare` reads: runs, judgements and measures, checked and turned into values of queries."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from numbers import Real
from typing import Any

import ir_measures
import numpy as np
import pandas as pd
import pyterrier as pt
from scipy import stats

from pyterrier_mech.provenance import as_qids, seen_by

_KEYS = ['qid', 'docno']


def with_ids(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """Returns a frame with its qids, and docnos where it has them, as text: 1 and 1.0 are '1', as in judgements.

    Args:
        frame: The frame, left as it is.
        name: What errors call it.

    Raises:
        ValueError: If a row has none.
    """
    texts = {}
    for key in (key for key in _KEYS if key in frame.columns):
        if len(empty := np.flatnonzero(frame[key].isna())):
            raise ValueError(
                f'{name}: {len(empty)} of {len(frame)} rows have no {key}, the first is row {empty[0]}. Remove them '
                f'with .dropna(subset=[{key!r}]).'
            )
        texts[key] = frame[key].map({value: next(iter(as_qids([value]))) for value in frame[key].unique().tolist()})
    return frame.assign(**{key: values.astype(str) for key, values in texts.items()})


def checked_run(run: Any, name: str) -> pd.DataFrame:
    """Returns a run with its qids and docnos as text.

    Raises:
        TypeError: If it is not a frame.
        ValueError: If it is empty, lacks columns, names a document of a query twice, or has a score that is not a
            finite number.
    """
    if not isinstance(run, pd.DataFrame):
        raise TypeError(f'{name} is a {type(run).__name__}, not a frame of results: run the pipeline, pipe(topics)')
    run = _checked(run, name, [*_KEYS, 'score'])
    if not len(run):
        raise ValueError(f'{name} has no rows')
    bad = run[[not (isinstance(score, Real) and math.isfinite(score)) for score in run['score']]]
    if len(bad):
        raise ValueError(
            f'{name}: {len(bad)} of {len(run)} scores are not finite, first {_first(bad, "score")}: give numbers'
        )
    twice = run[run.duplicated(_KEYS)]
    if len(twice):
        raise ValueError(
            f'{name}: {len(twice)} rows name a document of a query again, first {_first(twice)}. Measures would merge '
            f'them without a word: choose one, e.g. with .drop_duplicates({_KEYS})'
        )
    return run.astype({'score': float})


def judgements(qrels: pd.DataFrame, *, subtopics: bool = False) -> pd.DataFrame:
    """Returns judgements with qids and docnos as text and labels as whole numbers, each once.

    Args:
        qrels: Judgements: qid, docno, label.
        subtopics: Whether a document may be judged once for every subtopic, under 'iteration', as measures of
            diversity need it.

    Raises:
        ValueError: If columns or labels are missing, a label is not a whole number, or a document of a query has two
            different labels.
    """
    qrels = _checked(qrels, 'the frame of qrels', [*_KEYS, 'label'])
    whole = [isinstance(label, Real) and float(label).is_integer() for label in qrels['label']]
    if not all(whole):
        bad = qrels[np.logical_not(whole)]
        raise ValueError(
            f'qrels: {len(bad)} of {len(qrels)} rows have no label that is a whole number, first {_first(bad, "label")}'
        )
    keys = [*_KEYS, *(['iteration'] if subtopics and 'iteration' in qrels.columns else [])]
    qrels = qrels.astype({'label': int}).drop_duplicates([*keys, 'label'])
    twice = qrels[qrels.duplicated(keys)]
    if len(twice):
        raise ValueError(
            f'the qrels give {_first(twice)} two labels ({len(twice)} such rows in all): keep one of them, e.g. with '
            f".sort_values('label').drop_duplicates({keys}, keep='last')"
        )
    return qrels


def _checked(frame: pd.DataFrame, name: str, columns: list[str]) -> pd.DataFrame:
    if missing := [column for column in columns if column not in frame.columns]:
        raise ValueError(f'{name} has no {", ".join(map(repr, missing))}: it has {list(frame.columns)}')
    return with_ids(frame, name)


def _first(rows: pd.DataFrame, *others: str) -> str:
    return ' '.join(f'{column}={rows[column].iloc[0]!r}' for column in [*_KEYS, *others])


def as_measures(measures: Any) -> dict[ir_measures.Measure, str]:
    """Returns measures and their names in a table: as the user wrote them.

    Args:
        measures: One or several of what `pt.Experiment` takes: measures, and names as trec_eval ('ndcg_cut_10') or
            ir_measures ('nDCG@10') write them.

    Raises:
        ValueError: If there are none, or one is unknown or cannot be computed.
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
    for measure, name in named.items():
        computable = False
        with suppress(AssertionError):
            computable = ir_measures.DefaultPipeline.supports(measure)
        if not computable:
            raise ValueError(
                f'{name} cannot be computed: it needs a parameter, as the 10 in P@10, or a package that is not '
                "installed. See ir_measures' documentation."
            )
    return named


def _parse(name: Any) -> list[ir_measures.Measure]:
    for parse in (ir_measures.parse_trec_measure, lambda text: [ir_measures.parse_measure(text)]):
        with suppress(Exception):  # the two parsers raise what their regular expressions and syntax trees raise
            return parse(name)
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
        if not len(runs[name][_KEYS].merge(qrels[_KEYS], on=_KEYS)):
            warnings.warn(
                f'none of the documents of {name} is judged (docnos {_some(runs[name]["docno"])} against '
                f'{_some(qrels["docno"])}): measures of relevance will say 0. Give the qrels of this collection.',
                stacklevel=3,
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
    if isinstance(fitted_on, str):
        raise TypeError(f'fitted_on={fitted_on!r} is one string: give a list of qids')
    # Iterating a frame gives its column names: topics in place of their qids would pass unseen.
    known = as_qids(fitted_on['qid'] if isinstance(fitted_on, pd.DataFrame) else fitted_on)
    sources = {'fitted_on': known, **{f'the fit of {name}': seen_by(run) for name, run in runs.items()}}
    for source, qids in sources.items():
        if seen := sorted(as_qids(judged) & qids):
            raise ValueError(
                f'{len(seen)} of the queries that would judge stand in {source} (qids {_some(seen)}): a ranker cannot '
                'be judged by the queries that it was fitted on. Fit on other topics, or judge on others with '
                "qrels[~qrels['qid'].isin(fitted)]."
            )


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
    pairs = [rows[['score_x', 'score_y']].to_numpy().T for _, rows in both.groupby('qid')]
    defined = np.array([_correlations(x, y) for x, y in pairs if _vary(x, y)]).reshape(-1, 3)
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


def _correlations(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    return _pearson(x, y), _pearson(stats.rankdata(x), stats.rankdata(y)), float(stats.kendalltau(x, y).statistic)


def _vary(*arrays: np.ndarray) -> bool:
    return all(len(values) > 1 and np.ptp(values) > 0 for values in arrays)


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1])
