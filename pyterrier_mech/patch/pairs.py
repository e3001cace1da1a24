"""What every stage that compares two inputs writes: both scores, and why a pair cannot be patched."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from pyterrier_mech.frames import Fields
from pyterrier_mech.inputs.inputs import Inputs

PATCHABLE = 'yes'


def reasons(inputs: Inputs) -> str:
    """Returns why rows cannot be patched, counted; '' if all can."""
    return _counted([inputs.problems[row] for row in inputs.rest])


def _counted(problems: Sequence[str]) -> str:
    counted = pd.Series(problems, dtype=object).value_counts()
    return ', '.join(f'{reason}: {count}' for reason, count in counted.items())


def warn_of_problems(problems: Sequence[str], stacklevel: int) -> None:
    """Warns, once, of the rows that cannot be patched; a problem is '' where there is none."""
    rest = [problem for problem in problems if problem]
    if rest:
        warnings.warn(
            f'{len(rest)} of {len(problems)} pairs cannot be patched ({_counted(rest)}); see the patchable column',
            stacklevel=stacklevel + 1,
        )


def started(model: Any, inputs: Inputs, versions: Sequence[Fields], n_effects: int) -> np.ndarray:
    """Returns [original score, perturbed score, effects…] x rows, still NaN where there is no problem.

    The texts of rows with a problem are scored as they are, and a warning counts these rows.

    Args:
        model: The ranker.
        inputs: The aligned pairs.
        versions: Query and text of both versions.
        n_effects: How many effects a row has.
    """
    table = np.full((2 + n_effects, len(inputs)), np.nan, dtype=model.float_type)
    if len(inputs.rest):
        for row, texts in enumerate(versions):
            table[row, inputs.rest] = model.score(*[[texts[f][i] for i in inputs.rest] for f in ('query', 'text')])
        warn_of_problems(inputs.problems, 4)
    return table


def pair_columns(scores: np.ndarray, problems: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Returns the columns that every such stage writes, from a table [original, perturbed, effects…] x rows."""
    return {
        'score_original': scores[0],
        'score_perturbed': scores[1],
        'patchable': np.asarray([problem or PATCHABLE for problem in problems], dtype=object),
        **dict(zip(names, scores[2:], strict=True)),
    }


def no_pairs(names: Sequence[str]) -> dict[str, Any]:
    """Returns the columns of a frame without rows."""
    return pair_columns(np.zeros((2 + len(names), 0), dtype=np.float32), [], names)
