"""From one row per pair to one row per head: the arithmetic behind HeadEffects."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from pyterrier_mech.evaluation.bootstrap import ratio_of_sums, vanishes
from pyterrier_mech.evaluation.runs import with_ids
from pyterrier_mech.provenance import Analysis, analysis_of
from pyterrier_mech.units import Unit, unit_columns

# Below this score change a single pair says little about its heads.
LOW_DELTA = 0.05

KEYS = ('layer', 'head', 'name')
COLUMNS = (*KEYS, 'ratio', 'ratio_low', 'ratio_high', 'mean', 'mean_low', 'mean_high', 'n', 'n_queries')

_EXPECTED = ('PatchHeads', 'AttributeHeads')
_ONE_TEXT = ('gradient', 'integrated_gradients')
_SIGNS = {'perturbed_to_original': 1, 'original_to_perturbed': -1}
_REQUIRED = ['qid', 'docno', 'score_original', 'score_perturbed']


def aggregate(frame: pd.DataFrame, **options: Any) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Returns one row per head, and what is true of all heads together. See :class:`HeadEffects`.

    Args:
        frame: The frame of a stage that patches or attributes heads.
        **options: `confidence`, `n_resamples` and `seed` of the intervals.
    """
    heads = _check(frame)
    frame = with_ids(frame, 'the frame')
    patchable, unpatchable = _patchable(frame)
    analysis = analysis_of(frame, expected=_EXPECTED, what='HeadEffects')
    # Order of rows must not show in the last digit of a sum, nor in which queries the seed draws.
    rows = frame[patchable].sort_values(['qid', 'docno'])
    effects = _floats(rows, [head.name for head in heads])
    delta = _floats(rows, ['score_perturbed'])[:, 0] - _floats(rows, ['score_original'])[:, 0]
    finite = np.isfinite(effects) & np.isfinite(delta)[:, None]
    used = finite.any(axis=1)
    if not used.any():
        raise ValueError(
            f'None of the {len(rows)} patchable rows has finite scores and a finite effect, so there is nothing to '
            'aggregate. Look at score_original, score_perturbed and the head columns of the frame.'
        )
    effects, delta, qids = np.where(finite, effects, np.nan)[used], delta[used], rows['qid'].to_numpy()[used]

    ratio = ratio_of_sums(effects, _sign(analysis) * delta, qids, **options)
    mean = ratio_of_sums(effects, 1, qids, **options)
    table = pd.DataFrame([(head.site.layer, head.index, head.name) for head in heads], columns=list(KEYS))
    table = table.assign(**dict(zip(['ratio', 'ratio_low', 'ratio_high', 'n', 'n_queries'], ratio, strict=True)))
    table = table.assign(**dict(zip(['mean', 'mean_low', 'mean_high'], mean, strict=False)))[list(COLUMNS)]
    total = delta.sum()
    cancelled = vanishes(total, np.abs(delta).sum())
    summary = {
        **options,
        'analysis': {'by': analysis.name, **analysis.settings},
        'n_rows': len(frame),
        'n_used': len(delta),
        'n_queries': len(set(qids)),
        'n_unpatchable': unpatchable,
        'n_nan': len(rows) - int(finite.all(axis=1).sum()),
        'n_duplicates': int(frame.duplicated(['qid', 'docno']).sum()),
        'mean_delta': float(delta.mean()),
        'low_delta_share': float((np.abs(delta) < LOW_DELTA).mean()),
        'wrong_direction_share': float('nan') if cancelled else float((delta * total < 0).mean()),
        'qids': sorted(set(frame['qid'])),
    }
    for remark in _remarks(table, summary):
        warnings.warn(remark, stacklevel=3)
    return table, summary


def _check(frame: pd.DataFrame) -> list[Unit]:
    missing = [column for column in _REQUIRED if column not in frame.columns]
    heads = unit_columns(frame)
    if missing or not heads:
        lacks = [repr(column) for column in missing] + ([] if heads else ["head columns such as 'L0H0'"])
        raise ValueError(
            f'The frame has no {", ".join(lacks)}. Pass the whole frame that a PatchHeads stage returned, e.g. '
            'HeadEffects.from_frame((pipeline >> PatchHeads(model))(topics)).'
        )
    return heads


def _sign(analysis: Analysis) -> int:
    """Returns 1 where effects move the score towards the perturbed text, -1 where towards the original."""
    settings = analysis.settings
    if settings.get('effect', 'difference') != 'difference':
        raise ValueError(
            f'The effects of this frame are {settings["effect"]}, ratios already. Aggregate the differences: run '
            f"{analysis.name} with effect='difference', its default."
        )
    if settings.get('method') in _ONE_TEXT or settings.get('direction') not in _SIGNS:
        raise ValueError(
            f'The effects of this frame are of {analysis.name} with {dict(settings)}: they are parts of one score and '
            'not of a change between two, so there is no ratio. Use PatchHeads, or AttributeHeads with a method that '
            "reads two texts, such as 'attribution_patching'."
        )
    return _SIGNS[settings['direction']]


def _patchable(frame: pd.DataFrame) -> tuple[np.ndarray, dict[str, int]]:
    answers = frame['patchable'] if 'patchable' in frame.columns else pd.Series('yes', index=frame.index)
    answers = answers.astype(object).fillna('no reason given').astype(str)
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
