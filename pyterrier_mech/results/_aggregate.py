"""From one row per pair to one row per head: the arithmetic behind HeadEffects."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from pyterrier_mech.columns import PATCHING, head_columns, parse_head
from pyterrier_mech.evaluation.stats import bootstrap_by_query

# Below this score change a single pair says little about its heads.
LOW_DELTA = 0.05

_REQUIRED = ['qid', 'docno', 'score_original', 'score_perturbed']


def aggregate(
    frame: pd.DataFrame, confidence: float, n_resamples: int, seed: int
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Returns one row per head, and what is true of all heads together. See :class:`HeadEffects`."""
    heads = _check(frame)
    sign = _sign(frame)
    patchable, unpatchable = _patchable(frame)
    rows = frame[patchable]
    # Order of rows must not show in the last digit of a sum, nor in which queries the seed draws.
    rows = rows.assign(qid=rows['qid'].astype(str), docno=rows['docno'].astype(str)).sort_values(['qid', 'docno'])

    effects = _floats(rows, heads)
    delta = _floats(rows, ['score_perturbed'])[:, 0] - _floats(rows, ['score_original'])[:, 0]
    finite = np.isfinite(effects) & np.isfinite(delta)[:, None]
    used = finite.any(axis=1)
    if not used.any():
        raise ValueError(
            f'None of the {len(rows)} patchable rows has finite scores and a finite effect, so there is nothing to '
            'aggregate. Look at score_original, score_perturbed and the head columns of the frame.'
        )
    effects, delta, finite, qids = effects[used], delta[used], finite[used], rows['qid'].to_numpy()[used]

    starts = np.flatnonzero(np.r_[True, qids[1:] != qids[:-1]])
    per_row = [np.where(finite, x, 0.0) for x in (effects, sign * delta[:, None], np.abs(delta)[:, None], 1.0)]
    per_query = [np.add.reduceat(x, starts, axis=0) for x in per_row]
    n_per_query = per_query[3]

    point = _ratio_and_mean(*(x.sum(axis=0) for x in per_query))
    low, high = bootstrap_by_query(
        _ratio_and_mean, *per_query, confidence=confidence, n_resamples=n_resamples, seed=seed
    )
    n_queries = (n_per_query > 0).sum(axis=0)
    low, high = (np.where(n_queries > 1, x, np.nan) for x in (low, high))

    layers, numbers = np.array([parse_head(name) for name in heads]).T
    table = pd.DataFrame(
        {
            'layer': layers,
            'head': numbers,
            'name': heads,
            'ratio': point[0],
            'ratio_low': low[0],
            'ratio_high': high[0],
            'mean': point[1],
            'mean_low': low[1],
            'mean_high': high[1],
            'n': n_per_query.sum(axis=0).astype(np.int64),
            'n_queries': n_queries.astype(np.int64),
        }
    )
    total = delta.sum()
    cancelled = _vanishes(total, np.abs(delta).sum())
    summary = {
        'confidence': float(confidence),
        'n_resamples': int(n_resamples),
        'seed': int(seed),
        'n_rows': len(frame),
        'n_used': len(delta),
        'n_queries': len(starts),
        'n_unpatchable': unpatchable,
        'n_nan': len(rows) - int(finite.all(axis=1).sum()),
        'n_duplicates': int(frame.duplicated(['qid', 'docno']).sum()),
        'mean_delta': float(delta.mean()),
        'low_delta_share': float((np.abs(delta) < LOW_DELTA).mean()),
        'wrong_direction_share': float('nan') if cancelled else float((delta * total < 0).mean()),
    }
    for remark in _remarks(table, summary):
        warnings.warn(remark, stacklevel=3)
    return table, summary


def _check(frame: pd.DataFrame) -> list[str]:
    missing = [column for column in _REQUIRED if column not in frame.columns]
    heads = head_columns(frame)
    if missing or not heads:
        lacks = [repr(column) for column in missing] + ([] if heads else ["head columns such as 'L0H0'"])
        raise ValueError(
            f'The frame has no {", ".join(lacks)}. Pass the whole frame that a PatchHeads stage returned, e.g. '
            'HeadEffects.from_frame((pipeline >> PatchHeads(model))(topics)).'
        )
    if frame['qid'].isna().any():
        raise ValueError(
            f'{int(frame["qid"].isna().sum())} of {len(frame)} rows have no qid, so they belong to no query. '
            "Remove them with res.dropna(subset=['qid'])."
        )
    return heads


def _sign(frame: pd.DataFrame) -> int:
    """Returns 1 where effects move the score towards the perturbed text, -1 where towards the original."""
    settings = frame.attrs.get(PATCHING, {})
    if settings.get('effect', 'difference') != 'difference':
        raise ValueError(
            f'The effects of this frame are {settings["effect"]}, ratios already. Aggregate the differences: run '
            "PatchHeads with effect='difference', its default."
        )
    return -1 if settings.get('direction') == 'original_to_perturbed' else 1


def _patchable(frame: pd.DataFrame) -> tuple[np.ndarray, dict[str, int]]:
    if 'patchable' not in frame.columns:
        answers = pd.Series('yes', index=frame.index)
    else:
        answers = frame['patchable'].astype(object).fillna('no reason given').astype(str)
    patchable = (answers == 'yes').to_numpy()
    reasons = {str(reason): int(n) for reason, n in answers[~patchable].value_counts().sort_index().items()}
    if not patchable.any():
        raise ValueError(
            f'None of the {len(frame)} rows is patchable (reasons: {reasons}). Change the edit or the max_length of '
            "the ranker so that pairs differ after tokenisation; the column 'patchable' tells why each row is not."
        )
    return patchable, reasons


def _floats(rows: pd.DataFrame, columns: list[str]) -> np.ndarray:
    return rows[columns].to_numpy(dtype=np.float64, na_value=np.nan)


def _ratio_and_mean(effects: np.ndarray, delta: np.ndarray, size: np.ndarray, n: np.ndarray) -> np.ndarray:
    with np.errstate(divide='ignore', invalid='ignore'):
        ratio = np.where(_vanishes(delta, size), np.nan, effects / delta)
        return np.stack([ratio, effects / n], axis=-2)


def _vanishes(total: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Whether changes cancel to 0. Summed in floats, 0.1 + 0.2 - 0.3 is not 0, and would make a ratio of 1e16."""
    return np.abs(total) <= 1e-12 * size


def _remarks(table: pd.DataFrame, summary: dict[str, Any]) -> Iterator[str]:
    if summary['n_duplicates']:
        yield (
            f'{summary["n_duplicates"]} rows repeat a (qid, docno) pair. They are kept and count again; remove them '
            "with res.drop_duplicates(['qid', 'docno']) if that was not meant."
        )
    if summary['n_nan']:
        yield f'{summary["n_nan"]} patchable rows have NaN or infinite scores or effects, which were left out.'
    if summary['n_queries'] == 1:
        yield 'All rows belong to one query, so there are no intervals (NaN). Run more topics.'
    undefined = table['ratio'].isna()
    if undefined.any():
        yield (
            f'The ratio of {int(undefined.sum())} heads is NaN (first: {table["name"][undefined].iloc[0]}), since '
            "their score changes sum to 0 or they have no rows. Use the column 'mean' there."
        )
    no_interval = ~undefined & table['ratio_low'].isna()
    if summary['n_queries'] > 1 and no_interval.any():
        yield (
            f'{int(no_interval.sum())} heads have a ratio without an interval (NaN; first: '
            f'{table["name"][no_interval].iloc[0]}), since in some resamples of the queries their score changes sum '
            'to 0 or they have no rows. Run more topics.'
        )
