"""One figure of all heads: where in the model the score change comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

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
    values,
)
from pyterrier_mech.results import HeadEffects

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def heads(
    effects: HeadEffects | pd.DataFrame,
    *,
    column: str = 'ratio',
    stack: str = '',
    ax: Axes | None = None,
    title: str | None = None,
    annotate: int = 5,
) -> Figure:
    """Draws the effect of every head, layers as rows and heads as columns.

    Layer 0 is the top row, and blue is positive, as in the figures of MechIR. The colours are
    symmetric around 0. A dot marks the heads whose interval excludes 0. Hatched cells have no data: there is no such
    head, or no value for it.

    Args:
        effects: The effects, or the frame of a ``PatchHeads`` stage, which is aggregated with the defaults of
            :meth:`HeadEffects.from_frame`.
        column: ``'ratio'`` or ``'mean'``.
        stack: Which stack of layers, where the model has several. See :meth:`HeadEffects.matrix`.
        ax: Where to draw. Without it, a new figure is made whose size follows from the number of layers and heads.
        title: Title above the cells.
        annotate: How many of the strongest heads are labelled with their value.

    Returns:
        The figure. Save it with ``figure.savefig('heads.pdf')``; in a notebook it shows itself after
        ``%matplotlib inline``.

    Raises:
        ImportError: If Matplotlib is not installed.
        TypeError: If the effects are of another kind.
        ValueError: If ``column`` is another one, or no head has a value in it.
    """
    check_column(column)
    _style.require_matplotlib()
    if isinstance(effects, pd.DataFrame):
        effects = HeadEffects.from_frame(effects)
    way_out = 'HeadEffects, or the frame that PatchHeads returned; draw several one by one'
    _style.check_kind(effects, HeadEffects, way_out)
    matrix = effects.matrix(column, stack)
    check_some(matrix, column, 'head')
    low, high = (effects.matrix(f'{column}_{end}', stack) for end in ('low', 'high'))
    carrier = {'z': 'the head', 'pattern': 'the attention of the head'}.get(effects.site, f'{effects.site} of the head')
    return head_map(
        matrix, low, high, LABELS[column].format(carrier), effects.confidence, ax=ax, title=title, annotate=annotate
    )


def head_map(
    matrix: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    label: str,
    confidence: float,
    *,
    ax: Axes | None,
    title: str | None,
    annotate: int,
) -> Figure:
    """Draws numbers of heads [layers, heads] with the ends of their intervals.

    Args:
        matrix: The numbers.
        low: Low ends.
        high: High ends.
        label: What the colour bar says.
        confidence: Coverage of the intervals.
        ax: Where to draw, or None for a new figure.
        title: Title above the cells.
        annotate: How many of the largest numbers are written.
    """
    ax = _style.axes_or_new(ax, _style.grid_size(*matrix.shape))
    mesh = cells(ax, matrix)
    _style.head_axes(ax, *matrix.shape)
    bar = colour_bar(mesh, ax, label)
    ink = inks(mesh, matrix)
    certain = dots(ax, low, high, ink)
    values(ax, matrix, annotate, ink)
    _style.legend_below(ax, handles(certain, bool(np.isnan(matrix).any()), confidence))
    return _style.finish(ax, title, bar)
