"""From one row per pair to one row per head, block or path: the arithmetic behind all effects."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from pyterrier_mech.evaluation.bootstrap import ratio_of_sums, vanishes
from pyterrier_mech.evaluation.runs import with_ids
from pyterrier_mech.frames import once, row_name
from pyterrier_mech.provenance import Analysis, analysis_of

# Below this score change a single pair says little about its heads.
LOW_DELTA = 0.05

NUMBERS = ('ratio', 'ratio_low', 'ratio_high', 'mean', 'mean_low', 'mean_high', 'n', 'n_queries')
ABSENT = 'n_absent'

_ONE_TEXT = ('gradient', 'integrated_gradients')
_SIGNS = {'perturbed_to_original': 1, 'original_to_perturbed': -1}
_REQUIRED = ['qid', 'docno', 'score_original', 'score_perturbed']


class Kind(NamedTuple):
    """What is aggregated, as the messages say it.

    Attributes:
        artifact: The class of the result.
        stages: The stages that write such columns.
        noun: What the columns are of.
        example: Such columns.
    """

    artifact: str
    stages: tuple[str, ...]
    noun: str
    example: str


@dataclass
class Reading:
    """What is read from a frame: one entry a head, block or path.

    Attributes:
        keys: One row an entry, with its `name`.
        columns: The columns of the frame that are read.
        values: From rows of the frame to effects [rows, entries].
        absent: From effects [rows, entries] of these rows to where a row has no such token; None where that cannot be.
        notes: What is true of all entries.
    """

    keys: pd.DataFrame
    columns: list[str]
    values: Callable[[pd.DataFrame], np.ndarray]
    absent: Callable[[np.ndarray], np.ndarray] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


def aggregate(
    frame: pd.DataFrame, kind: Kind, read: Callable[[pd.DataFrame], Reading], **options: Any
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Returns one row per entry, and what is true of all of them. See `Effects.from_frame`.

    Args:
        frame: The frame of a stage that patches or attributes.
        kind: What is aggregated.
        read: From the frame to what is read from it.
        **options: `confidence`, `n_resamples` and `seed` of the intervals.
    """
    once(frame)
    reading = read(frame)
    _check(frame, kind, reading)
    frame = with_ids(frame, 'the frame')
    patchable, unpatchable = _patchable(frame)
    analysis = analysis_of(frame, reading.columns, expected=kind.stages, what=kind.artifact)
    # Order of rows must not show in the last digit of a sum, nor in which queries the seed draws.
    rows = frame[patchable].sort_values(['qid', 'docno'])
    delta = floats(rows, ['score_perturbed'])[:, 0] - floats(rows, ['score_original'])[:, 0]
    effects = reading.values(rows)
    absent = np.zeros(effects.shape, dtype=bool) if reading.absent is None else reading.absent(effects)
    finite = np.isfinite(effects) & np.isfinite(delta)[:, None]
    whole = (finite | (absent & np.isfinite(delta)[:, None])).all(axis=1)
    used = finite.any(axis=1)
    if not used.any():
        raise ValueError(
            f'None of the {len(rows)} patchable rows has finite scores and a finite effect, so there is nothing to '
            f'aggregate. Look at score_original, score_perturbed and the columns of {kind.noun} of the frame.'
        )
    effects, delta, qids = np.where(finite, effects, np.nan)[used], delta[used], rows['qid'].to_numpy()[used]

    ratio = ratio_of_sums(effects, _sign(analysis) * delta, qids, **options)
    mean = ratio_of_sums(effects, 1, qids, **options)
    numbers = dict(zip(['ratio', 'ratio_low', 'ratio_high', 'n', 'n_queries'], ratio, strict=True))
    numbers |= dict(zip(['mean', 'mean_low', 'mean_high'], mean, strict=False))
    table = reading.keys.assign(**{name: numbers[name] for name in NUMBERS})
    if reading.absent is not None:
        table[ABSENT] = absent[used].sum(axis=0)
    total = delta.sum()
    cancelled = vanishes(total, np.abs(delta).sum())
    summary = {
        **options,
        'analysis': {'by': analysis.name, **analysis.settings},
        'n_rows': len(frame),
        'n_used': len(delta),
        'n_queries': len(set(qids)),
        'n_unpatchable': unpatchable,
        'n_nan': int((~whole).sum()),
        'n_duplicates': int(frame.duplicated(['qid', 'docno']).sum()),
        'mean_delta': float(delta.mean()),
        'low_delta_share': float((np.abs(delta) < LOW_DELTA).mean()),
        'wrong_direction_share': float('nan') if cancelled else float((delta * total < 0).mean()),
        'qids': sorted(set(frame['qid'])),
        **reading.notes,
    }
    for remark in _remarks(table, summary, kind.noun):
        warnings.warn(remark, stacklevel=3)
    return table, summary


def floats(rows: pd.DataFrame, columns: list[str]) -> np.ndarray:
    """Returns columns of numbers as an array [rows, columns], NaN where there is none.

    Raises:
        ValueError: If a column holds anything else.
    """
    _check_numbers(rows, columns)
    return rows[columns].to_numpy(dtype=np.float64, na_value=np.nan)


def has_arrays(frame: pd.DataFrame, column: str) -> bool:
    """Whether the cells of a column are arrays, one effect a position or sender."""
    return frame[column].dtype == object and bool(frame[column].map(np.ndim).any())


def arrays(rows: pd.DataFrame, column: str, lengths: list[int]) -> list[np.ndarray]:
    """Returns the arrays of a column, one a row; all NaN where a row has none.

    Raises:
        ValueError: If one is not of the length that its row must have, or holds anything but numbers.
    """
    _check_numbers(rows, [column])
    found = []
    for row, (cell, length) in enumerate(zip(rows[column], lengths, strict=True)):
        none = cell is None or (np.ndim(cell) == 0 and pd.isna(cell))
        array = np.full(length, np.nan) if none else np.asarray(cell, dtype=np.float64)
        if array.shape != (length,):
            raise ValueError(
                f'{row_name(rows, row)}: column {column!r} has an array of shape {array.shape}, and must have '
                f'{length} effects: pass the whole frame as the stage returned it'
            )
        found.append(array)
    return found


def _check_numbers(rows: pd.DataFrame, columns: list[str]) -> None:
    for column in columns:
        if text := next((cell for cell in rows[column] if isinstance(cell, str)), None):
            raise ValueError(
                f'column {column!r} must hold numbers; got {text[:40]!r}: arrays do not survive CSV, so keep such '
                'frames with write_frame(frame, path)'
            )


def _check(frame: pd.DataFrame, kind: Kind, reading: Reading) -> None:
    lacks = [repr(column) for column in _REQUIRED if column not in frame.columns]
    lacks += [] if reading.columns else [kind.example]
    if lacks:
        stage = kind.stages[0]
        raise ValueError(
            f'The frame has no {", ".join(lacks)}. Pass the whole frame that a {stage} stage returned, e.g. '
            f'{kind.artifact}.from_frame((pipeline >> {stage}(model))(topics)).'
        )


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


def _remarks(table: pd.DataFrame, summary: dict[str, Any], noun: str) -> Iterator[str]:
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
            f'The ratio of {int(undefined.sum())} {noun} is NaN (first: {table["name"][undefined].iloc[0]}), since '
            "their score changes sum to 0 or they have no rows. Use the column 'mean' there."
        )
    no_interval = ~undefined & table['ratio_low'].isna()
    if summary['n_queries'] > 1 and no_interval.any():
        yield (
            f'{int(no_interval.sum())} {noun} have a ratio without an interval (NaN; first: '
            f'{table["name"][no_interval].iloc[0]}), since in some resamples of the queries their score changes sum '
            'to 0 or they have no rows. Run more topics.'
        )
