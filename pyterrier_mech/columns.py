"""Names of the columns that hold one number per attention head: ``L{layer}H{head}``."""

from __future__ import annotations

import re

import pandas as pd

# Key in the attrs of a frame under which a patching stage says how its effects were made.
PATCHING = 'pyterrier_mech.patching'

# Key under which a fitted stage lists the qids that its fit has seen. A list of strings: Parquet keeps attrs as JSON.
FITTED_ON = 'pyterrier_mech.fitted_on'

_HEAD = re.compile(r'L(0|[1-9][0-9]*)H(0|[1-9][0-9]*)')


def head_name(layer: int, head: int) -> str:
    """Returns the column name of a head: ``head_name(3, 7) == 'L3H7'``."""
    return f'L{layer}H{head}'


def parse_head(name: str) -> tuple[int, int]:
    """Returns layer and head of a column name: ``parse_head('L3H7') == (3, 7)``.

    Raises:
        ValueError: If ``name`` is not of that form.
    """
    match = _HEAD.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise ValueError(
            f"{name!r} does not name a head. Write 'L{{layer}}H{{head}}', both counted from 0 and without leading "
            "zeros, e.g. 'L3H7'."
        )
    return int(match[1]), int(match[2])


def head_columns(frame: pd.DataFrame) -> list[str]:
    """Returns the head columns of a frame in the order of (layer, head), whatever their order in the frame."""
    return sorted((c for c in frame.columns if isinstance(c, str) and _HEAD.fullmatch(c)), key=parse_head)
