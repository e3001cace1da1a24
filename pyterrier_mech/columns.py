"""Columns of effects: from a column's name to the place in a model, and the positions of the text, that it is of.

`L2H9` is a whole head, `L2H9.k` its keys, `resid_pre.L3` a block; `.inserted` behind them is a type of token. Paths are
`L0H4>score` and `L1H1>L2H9.k`, or all paths to a receiver in one array, `paths.L2H9.k`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pandas as pd

from pyterrier_mech.units import Unit, parse

Z = 'z'
"""The output of a head, as a site."""
SITES = ('resid_pre', 'attn_out', 'mlp_out', Z, 'q', 'k', 'v', 'pattern')
"""What effects are of: three blocks of a layer, the output of a head, and what is inside a head."""
SCORE = 'score'
"""The receiver that is no head."""
PATHS = 'paths.'
"""How the columns begin that hold all paths to one receiver."""
SENDERS = 'path_senders'
"""Column with the names of the senders of such arrays, in order."""

_STACK = r'(?:(?:enc|dec|cross)\.)?'
_HEAD = rf'{_STACK}L[0-9]+H[0-9]+'
_INSIDE = '|'.join(SITES[4:])
_BLOCK = re.compile(rf'({"|".join(SITES[:3])})\.({_STACK}L([0-9]+))(?:\.([^.>]+))?')
_PART = re.compile(rf'({_HEAD})(?:\.({_INSIDE}))?(?:\.([^.>]+))?')
_RECEIVER = rf'{SCORE}|{_HEAD}\.(?:{_INSIDE})'
_PATH = re.compile(rf'({_HEAD})>({_RECEIVER})')
_ARRAY = re.compile(rf'{re.escape(PATHS)}({_RECEIVER})')
# Ends of columns that hold the same effect, verified.
_EXACT = 'exact'


class Place(NamedTuple):
    """What a column of effects is of.

    Attributes:
        column: The column.
        site: One of `SITES`.
        layer: The layer.
        unit: The head; None for a block.
        type: The type of the positions; '' for all, or where a cell has an array with one effect a position.
    """

    column: str
    site: str
    layer: int
    unit: Unit | None
    type: str

    def of_type(self, kind: str) -> Place:
        """Returns the same place for the positions of a type, with the name that it has then."""
        return self._replace(column=f'{self.column}.{kind}', type=kind)


class Path(NamedTuple):
    """A path from a sender, the name of a head, to a receiver, 'score' or the input of a head."""

    sender: str
    receiver: str

    @property
    def name(self) -> str:
        """Its name: 'L1H1>L2H9.k'."""
        return f'{self.sender}>{self.receiver}'

    @property
    def ends(self) -> tuple[Unit, Unit | None]:
        """The heads at both ends; None for the score."""
        return parse(self.sender), None if self.receiver == SCORE else parse(self.receiver.rpartition('.')[0])

    @property
    def heads(self) -> set[str]:
        """The names of the heads at its ends."""
        return {unit.name for unit in self.ends if unit is not None}


def path_of(name: str) -> Path:
    """Returns the path of a name.

    Raises:
        ValueError: If it names no path.
    """
    match = _PATH.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise ValueError(f"{name!r} does not name a path: write 'L0H4>score' or 'L1H1>L2H9.k'")
    return Path(*match.groups())


def places(frame: pd.DataFrame) -> list[Place]:
    """Returns the places that have a column in a frame, in the order of the columns."""
    found = (_place(column) for column in frame.columns if isinstance(column, str))
    return [place for place in found if place is not None and place.type != _EXACT]


def paths(frame: pd.DataFrame) -> dict[str, Path]:
    """Returns the paths that have a column in a frame."""
    found = {column: _PATH.fullmatch(column) for column in frame.columns if isinstance(column, str)}
    return {column: Path(*match.groups()) for column, match in found.items() if match}


def path_arrays(frame: pd.DataFrame) -> dict[str, str]:
    """Returns the receivers whose paths have a column of arrays in a frame."""
    found = {column: _ARRAY.fullmatch(column) for column in frame.columns if isinstance(column, str)}
    return {column: match[1] for column, match in found.items() if match}


def _place(column: str) -> Place | None:
    if block := _BLOCK.fullmatch(column):
        return Place(column, block[1], int(block[3]), None, block[4] or '')
    if part := _PART.fullmatch(column):
        unit = parse(part[1])
        return Place(column, part[2] or Z, unit.site.layer, unit, part[3] or '')
    return None
