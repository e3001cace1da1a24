"""Where numbers come from: which analysis wrote the columns of units, and which queries a stage has seen.

How effects were made travels as a column, since the `attrs` of a frame do not survive CSV, `+`, `**`, a list of
dictionaries or a concatenation of different frames, and a lost direction is a flipped sign.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pyterrier_mech.draws import digest

ANALYSIS = 'analysis'
"""Column that says which analysis wrote the columns of units, with which settings, as JSON."""

FITTED_ON = 'pyterrier_mech.fitted_on'
"""Key in a frame's `attrs` of the qids that chose or trained what ranked it: a list, since Parquet keeps JSON."""

# Of a path, the number of the sender.
_NUMBERED = re.compile(r'([^>]*[HNL])([0-9]+)(.*)')
_RANGE = re.compile(r'([^>]*[HNL])([0-9]+)-([0-9]+)(.*)')


@dataclass(frozen=True)
class Analysis:
    """How columns of units were made.

    Attributes:
        name: The stage's class.
        settings: What tells two such analyses apart: direction, kind of effect, method, model.
        columns: Names of the columns.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    columns: Sequence[str] = ()

    def __str__(self) -> str:
        """The value of the column."""
        return json.dumps({'by': self.name, **self.settings, 'columns': _joined(self.columns)}, ensure_ascii=False)

    @classmethod
    def parse(cls, text: str) -> Analysis:
        """Reads the value of the column.

        Raises:
            ValueError: If it is something else.
        """
        try:
            values = json.loads(text)
            return cls(values.pop('by'), {k: v for k, v in values.items() if k != 'columns'}, _split(values['columns']))
        except (TypeError, ValueError, KeyError, AttributeError):
            raise ValueError(
                f'the column {ANALYSIS!r} must hold what an analysis of pyterrier_mech wrote; got {text!r}'
            ) from None

    def same_as(self, other: Analysis) -> bool:
        """Whether both are one analysis, of whichever units."""
        return (self.name, dict(self.settings)) == (other.name, dict(other.settings))

    def noted(self, inp: pd.DataFrame) -> str:
        """Returns the column's value for a frame to which these columns are added; the same analysis is joined."""
        before = _only(inp)
        if before is None or not self.same_as(before):
            return str(self)
        earlier = [name for name in before.columns if name in inp.columns and name not in self.columns]
        return str(Analysis(self.name, self.settings, [*earlier, *self.columns]))


def analysis_of(frame: pd.DataFrame, columns: Sequence[str], *, expected: Sequence[str], what: str) -> Analysis:
    """Returns which analysis wrote columns of a frame.

    Args:
        frame: The frame.
        columns: The columns of effects that are needed.
        expected: Classes of the stages that may have written it.
        what: What the columns are needed for, as errors say it.

    Raises:
        ValueError: If the frame does not say it, holds rows of different analyses, or columns of another one.
    """
    if ANALYSIS not in frame.columns:
        raise ValueError(
            f'the frame has no column {ANALYSIS!r}, which says how its effects were made, so their sign is unknown: '
            f'pass the whole frame that {" or ".join(expected)} returned'
        )
    found = frame[ANALYSIS].drop_duplicates().tolist()
    if len(found) > 1:
        raise ValueError(
            f'the rows come from {len(found)} different analyses ({found[0]} and {found[1]}), which must not be mixed: '
            f'keep those of one, frame[frame[{ANALYSIS!r}] == …]'
        )
    analysis = Analysis.parse(found[0]) if found else Analysis(expected[0])
    if analysis.name not in expected:
        raise ValueError(f'{what} needs columns of {" or ".join(expected)}; these are of {analysis.name}')
    written = set(analysis.columns)
    foreign = [column for column in columns if column not in written]
    if foreign and found:
        raise ValueError(
            f'the column {foreign[0]!r} was not written by the {analysis.name} that the column {ANALYSIS!r} names: '
            f'remove it, frame.drop(columns={foreign!r}), or run one analysis for all columns'
        )
    return analysis


def _only(frame: pd.DataFrame) -> Analysis | None:
    found = frame[ANALYSIS].drop_duplicates().tolist() if ANALYSIS in frame.columns else []
    try:
        return Analysis.parse(found[0]) if len(found) == 1 else None
    except ValueError:
        return None


def _joined(names: Sequence[str]) -> str:
    """From ['L0H0', 'L0H1', 'L0H2', 'L1H4'] to 'L0H0-2 L1H4'."""
    runs: list[tuple[str, int | None, int | None, str]] = []
    for name in names:
        match = _NUMBERED.fullmatch(name)
        before, number, after = (match[1], int(match[2]), match[3]) if match else (name, None, '')
        if number is not None and runs and runs[-1] == (before, runs[-1][1], number - 1, after):
            runs[-1] = (before, runs[-1][1], number, after)
        else:
            runs.append((before, number, number, after))
    return ' '.join(f'{b}{"" if i is None else i}{a}' if i == j else f'{b}{i}-{j}{a}' for b, i, j, a in runs)


def _split(joined: str) -> list[str]:
    names = []
    for part in joined.split():
        match = _RANGE.fullmatch(part)
        numbers = range(int(match[2]), int(match[3]) + 1) if match else []
        names += [f'{match[1]}{i}{match[4]}' for i in numbers] if match else [part]
    return names


def noted(model: Any) -> str:
    """Returns what notes call a ranker: the call that makes it and, as modules look alike, a name of weights."""
    if isinstance(model.model, (str, Path)):
        return repr(model)
    some = [part.detach().flatten()[:: part.numel() // 8 + 1].tolist() for part in model.map.module.parameters()]
    return f'{model!r} {digest(some).hex()[:8]}'


# -- queries that were seen


def as_qids(qids: Iterable[Any]) -> set[str]:
    """Returns qids as text. Whole numbers that a merge made floats are whole numbers again: 1.0 is '1'."""
    floats = (float, np.floating)
    return {str(int(qid)) if isinstance(qid, floats) and float(qid).is_integer() else str(qid) for qid in qids}


def seen_by(frame: pd.DataFrame) -> set[str]:
    """Returns the qids that have chosen or trained what ranked a frame, as far as its `attrs` tell."""
    return as_qids(frame.attrs.get(FITTED_ON, ()))


def with_seen(frame: pd.DataFrame, qids: Iterable[Any]) -> pd.DataFrame:
    """Notes in a new frame's `attrs` qids that have chosen or trained what ranked it; returns the frame."""
    known = seen_by(frame) | as_qids(qids)
    if known:
        frame.attrs = {**frame.attrs, FITTED_ON: sorted(known)}
    return frame
