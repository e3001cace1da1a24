"""From one array per pair to one mean per label: the arithmetic behind NeuronEffects."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd

from pyterrier_mech.evaluation.runs import judgements, with_ids
from pyterrier_mech.units import neuron

KEYS = ('layer', 'neuron', 'name')
DATASET, SCHEME = 'dataset', 'scheme'
GROUPS = ('relevant', 'non_relevant')

_ERROR = 'completeness_error.neurons'


def aggregate(
    rows: pd.DataFrame, labels: np.ndarray, dataset: str, column: str, min_rel: int, max_error: float | None
) -> dict[str, pd.DataFrame]:
    """Returns the tables of `NeuronEffects`: neurons, schemes, datasets. See `NeuronEffects.from_frame`.

    Args:
        rows: What `sorted_rows` returned.
        labels: What `labels_of` returned for them.
        dataset: What the schemes are called.
        column: The column of arrays.
        min_rel: The lowest label of a relevant pair.
        max_error: The largest completeness error of a pair that enters.
    """
    values, errors = _arrays(rows, column), rows[_ERROR].to_numpy(dtype=np.float64, na_value=np.nan)
    there = np.isfinite(values).any(axis=0)
    whole = np.isfinite(values[:, there]).all(axis=1) & np.isfinite(errors) & there.any()
    exact = np.ones(len(rows), dtype=bool) if max_error is None else ~(errors > max_error)
    judged = ~np.isnan(labels)
    used = judged & whole & exact
    counts = {
        'n_rows': len(rows),
        'n_unjudged': int((~judged).sum()),
        'n_inexact': int((judged & whole & ~exact).sum()),
        'n_nan': int((judged & ~whole).sum()),
        'n_duplicates': int(rows.duplicated(['qid', 'docno']).sum()),
    }
    if not used.any():
        raise ValueError(f'No pair is left to average: {counts}. Look at qrels, min_rel, max_error and {column!r}.')
    layers, neurons = np.nonzero(there)
    table = pd.DataFrame({'layer': layers, 'neuron': neurons})
    table['name'] = [neuron(*unit).name for unit in zip(layers.tolist(), neurons.tolist(), strict=True)]
    schemes = []
    for group, relevant in zip(GROUPS, (True, False), strict=True):
        members = used & ((labels >= min_rel) == relevant)
        table[f'{dataset}.{group}'] = _mean(values[:, there], members)
        schemes.append(_scheme(dataset, group, rows['qid'].to_numpy()[members], errors[members]))
    settings = {'min_rel': int(min_rel), 'max_error': np.nan if max_error is None else float(max_error)}
    for remark in _remarks(counts, schemes):
        warnings.warn(remark, stacklevel=3)
    return {
        'neurons': table,
        'schemes': pd.DataFrame(schemes),
        'datasets': pd.DataFrame([{DATASET: dataset, **counts, **settings}]),
    }


def sorted_rows(frame: pd.DataFrame, column: str, max_error: float | None) -> pd.DataFrame:
    """Checks the frame of `AttributeNeurons`, and returns its rows: their order must not show in a last digit."""
    if missing := [name for name in ('qid', 'docno', column, _ERROR) if name not in frame.columns]:
        raise ValueError(
            f'The frame has no {", ".join(map(repr, missing))}. Pass the whole frame that an AttributeNeurons stage '
            "returned; with by='token_type' name one of its columns, e.g. column='neurons.cls'."
        )
    if max_error is not None and not max_error > 0:
        raise ValueError(f'max_error must be above 0, such as 0.05, or None for all pairs; got max_error={max_error!r}')
    return with_ids(frame, 'the frame').sort_values(['qid', 'docno'])


def _arrays(rows: pd.DataFrame, column: str) -> np.ndarray:
    """Returns [rows, layers, neurons]."""
    arrays = [_array(value) for value in rows[column]]
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1 or any(len(shape) != 2 for shape in shapes):
        raise ValueError(
            f'Column {column!r} has arrays of shapes {shapes}: give the frame of one model, [layers, neurons]'
        )
    return np.stack(arrays).astype(np.result_type(*arrays, np.float32), copy=False) if arrays else np.zeros((0, 0, 0))


def _array(value: Any) -> np.ndarray:
    array = np.asarray(value)
    # Parquet has no arrays of two dimensions: it gives back an array of arrays.
    return np.array(array.tolist()) if array.dtype == object else array


def labels_of(rows: pd.DataFrame, qrels: pd.DataFrame, unjudged: int | None) -> np.ndarray:
    """Returns the label of every row, NaN where there is none."""
    known = judgements(qrels)[['qid', 'docno', 'label']]
    labels = rows[['qid', 'docno']].merge(known, on=['qid', 'docno'], how='left')['label'].to_numpy(dtype=np.float64)
    return labels if unjudged is None else np.where(np.isnan(labels), unjudged, labels)


def _mean(values: np.ndarray, members: np.ndarray) -> np.ndarray:
    return values[members].mean(axis=0, dtype=np.float64) if members.any() else np.full(values.shape[1], np.nan)


def _scheme(dataset: str, group: str, qids: np.ndarray, errors: np.ndarray) -> dict[str, Any]:
    return {
        SCHEME: f'{dataset}.{group}',
        DATASET: dataset,
        'label': group,
        'n': len(errors),
        'n_queries': len(set(qids)),
        'median_error': float(np.median(errors)) if len(errors) else np.nan,
        'worst_error': float(errors.max()) if len(errors) else np.nan,
    }


def _remarks(counts: dict[str, int], schemes: list[dict[str, Any]]) -> list[str]:
    remarks = [f'{scheme[SCHEME]} has no pairs: its values are NaN.' for scheme in schemes if not scheme['n']]
    if counts['n_duplicates']:
        remarks.append(
            f'{counts["n_duplicates"]} rows repeat a (qid, docno) pair. They are kept and count again; remove them '
            "with res.drop_duplicates(['qid', 'docno']) if that was not meant."
        )
    return remarks
