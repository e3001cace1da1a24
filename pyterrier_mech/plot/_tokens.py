"""Positions of a text as rows or columns of a map: which are shown, what they are called, where one part ends."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INSERTED = '#b2182b'
_GAP: Any = {'color': '#bdbdbd', 'linewidth': 0.5, 'linestyle': ':'}
_PARTS = {'query': 'query', 'doc': 'text', 'inserted': 'text'}


def shown(size: np.ndarray, most: int) -> np.ndarray:
    """Returns the positions with the largest numbers, at most so many, in the order of the text."""
    return np.sort(np.argsort(-size, kind='stable')[: max(most, 1)])


def dividers(ax: Axes, kept: np.ndarray, both: bool = False) -> None:
    """Draws a dotted line where positions are left out, of the columns, or of rows too."""
    for place in (np.flatnonzero(np.diff(kept) > 1) + 1).tolist():
        ax.axvline(place, **_GAP)
        if both:
            ax.axhline(place, **_GAP)


def token_ticks(ax: Axes, side: str, tokens: Sequence[str], kinds: Sequence[str] = ()) -> None:
    """Writes tokens beside the rows ('y') or below the columns ('x'); inserted ones are red and bold."""
    axis = ax.xaxis if side == 'x' else ax.yaxis
    axis.set_ticks(np.arange(len(tokens)) + 0.5, list(tokens), fontsize=6.5, rotation=90 if side == 'x' else 0)
    axis.set_tick_params(length=0, pad=2)
    for label, kind in zip(axis.get_ticklabels(), kinds, strict=False):
        if kind == 'inserted':
            label.set(color=_INSERTED, fontweight='bold')


def segments(ax: Axes, kinds: Sequence[str]) -> None:
    """Writes above the columns which part of the input they are of."""
    place = 0
    for part, members in groupby(_PARTS.get(kind.split('_')[0], '') for kind in kinds):
        length = len(list(members))
        if part:
            # Room for the word, or it would run into its neighbour.
            ax.plot(
                [place + 0.15, place + length - 0.15],
                [1.03] * 2,
                color='#404040',
                linewidth=0.8,
                clip_on=False,
                transform=ax.get_xaxis_transform(),
            )
            ax.text(
                place + length / 2, 1.06, part, fontsize=7, ha='center', va='bottom', transform=ax.get_xaxis_transform()
            )
        place += length
