"""Figures of paths: which heads send to the score or to an input of another head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pyterrier_mech.columns import SCORE
from pyterrier_mech.plot import _style
from pyterrier_mech.plot._cells import (
    LABELS,
    cells,
    check_column,
    check_some,
    colour_bar,
    dots,
    handles,
    inks,
    named_axes,
    values,
)
from pyterrier_mech.plot.heads import head_map
from pyterrier_mech.results import PathEffects
from pyterrier_mech.units import parse

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def paths(
    effects: PathEffects | pd.DataFrame,
    *,
    receiver: str | None = None,
    column: str = 'ratio',
    stack: str = '',
    n_senders: int = 20,
    n_receivers: int = 20,
    ax: Axes | None = None,
    title: str | None = None,
    annotate: int = 5,
) -> Figure:
    """Draws effects of paths: of one receiver in the grid of its senders, of several as senders by receivers.

    With one receiver, layers are rows and heads are columns, as in `plot.heads`. With several, receivers are rows and
    senders are columns, those with the largest numbers, in the order of the model; the score, to which all heads send,
    has a grid of its own: ``receiver='score'``. Blue is positive, and colours are
    symmetric around 0. A dot marks a path whose interval excludes 0. Hatched cells have no data: there is no such path.

    Args:
        effects: The effects, or the frame of a ``PatchPaths`` stage, which is aggregated with the defaults of
            `PathEffects.from_frame`.
        receiver: The receiver of the grid, 'score' or e.g. 'L2H9.k'; by default all heads that receive.
        column: 'ratio' or 'mean'.
        stack: Which stack of layers the senders of the grid are of, where the model has several.
        n_senders: How many senders are drawn at most where there are several receivers.
        n_receivers: How many receivers.
        ax: Where to draw. Without it, a new figure is made.
        title: Title above the cells.
        annotate: How many of the strongest paths are labelled with their value.

    Returns:
        The figure.

    Raises:
        ImportError: If Matplotlib is not installed.
        TypeError: If the effects are of another kind.
        ValueError: If `column` or `receiver` is another one, or no path has a value.
    """
    check_column(column)
    _style.require_matplotlib()
    if isinstance(effects, pd.DataFrame):
        effects = PathEffects.from_frame(effects)
    _style.check_kind(effects, PathEffects, 'PathEffects, or the frame that PatchPaths returned')
    if receiver is None and len(effects.receivers) == 1:
        receiver = effects.receivers[0]
    names, label = (column, f'{column}_low', f'{column}_high'), LABELS[column].format('the path')
    if receiver is not None:
        value, low, high = (effects.matrix(receiver, name, stack) for name in names)
        check_some(value, column, 'path')
        title = f'to {"the score" if receiver == SCORE else receiver}' if title is None else title
        return head_map(value, low, high, label, effects.confidence, ax=ax, title=title, annotate=annotate)
    table = effects.to_frame()
    table = table[table['receiver'] != SCORE]
    check_some(table[column].to_numpy(), column, 'path')
    senders = sorted(_largest(table, 'sender', column, n_senders), key=parse)
    kept = _largest(table, 'receiver', column, n_receivers)
    receivers = [name for name in effects.receivers if name in kept]
    matrix, low, high = (
        table.pivot(index='receiver', columns='sender', values=name)
        .reindex(index=receivers, columns=senders)
        .to_numpy()
        for name in names
    )
    ax = _style.axes_or_new(ax, (max(4.6, 0.32 * len(senders) + 2.0), max(2.4, 0.22 * len(receivers) + 1.7)))
    mesh = cells(ax, matrix)
    named_axes(ax, receivers, senders, 7)
    ax.set_xlabel('sender', fontsize=9)
    ax.set_ylabel('receiver', fontsize=9)
    bar = colour_bar(mesh, ax, label)
    ink = inks(mesh, matrix)
    certain = dots(ax, low, high, ink)
    values(ax, matrix, annotate, ink)
    found = handles(certain, bool(np.isnan(matrix).any()), effects.confidence)
    # Below the names of senders, which stand upright.
    _style.legend_below(ax, found, depth=0.75)
    return _style.finish(ax, title, bar)


def _largest(table: pd.DataFrame, end: str, column: str, most: int) -> set[str]:
    size = table[column].abs().groupby(table[end]).max().sort_values(ascending=False, kind='stable')
    return set(size.index[: max(most, 1)])
