"""One figure of all heads: where in the model the score change comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyterrier_mech.plot import _style
from pyterrier_mech.results import HeadEffects

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABELS = {'ratio': 'share of the score change\ncarried by the head', 'mean': 'mean score change (logits)'}
_MISSING: dict[str, Any] = {'facecolor': '#f2f2f2', 'edgecolor': '#bdbdbd', 'hatch': '//////', 'linewidth': 0}


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
    if column not in _LABELS:
        raise ValueError(f'column must be one of {list(_LABELS)}; got column={column!r}')
    _style.require_matplotlib()
    if isinstance(effects, pd.DataFrame):
        effects = HeadEffects.from_frame(effects)
    way_out = 'HeadEffects, or the frame that PatchHeads returned; draw several one by one'
    _style.check_kind(effects, HeadEffects, way_out)
    matrix = effects.matrix(column, stack)
    if np.isnan(matrix).all():
        other = next(name for name in _LABELS if name != column)
        raise ValueError(f'No head has a {column}: all are NaN. Draw column={other!r}.')

    ax = _style.axes_or_new(ax, _style.grid_size(*matrix.shape))
    mesh = _cells(ax, matrix)
    colour_bar = ax.figure.colorbar(mesh, ax=ax, pad=0.02, aspect=30)
    colour_bar.outline.set_visible(False)
    colour_bar.ax.tick_params(labelsize=8)
    colour_bar.set_label(_LABELS[column], fontsize=9)
    ink = _style.inks(mesh.cmap(mesh.norm(np.nan_to_num(matrix))))
    certain = _dots(ax, effects, column, stack, ink)
    _values(ax, matrix, annotate, ink)
    _legend(ax, certain, bool(np.isnan(matrix).any()), effects.confidence)
    return _style.finish(ax, title, colour_bar.ax)


def _cells(ax: Axes, matrix: np.ndarray) -> Any:  # noqa: ANN401
    limit = np.nanmax(np.abs(matrix)) or 1.0
    mesh = ax.pcolormesh(
        np.ma.masked_invalid(matrix), cmap='RdBu', vmin=-limit, vmax=limit, edgecolors='#d0d0d0', linewidth=0.4
    )
    ax.patch.set(**_MISSING)
    _style.head_axes(ax, *matrix.shape)
    return mesh


def _dots(ax: Axes, effects: HeadEffects, column: str, stack: str, ink: np.ndarray) -> bool:
    low, high = (effects.matrix(f'{column}_{end}', stack) for end in ('low', 'high'))
    layers, numbers = np.nonzero((low > 0) | (high < 0))
    # In the corner, where the value in the middle of the cell leaves room.
    ax.scatter(numbers + 0.88, layers + 0.16, s=4, c=ink[layers, numbers], linewidths=0)
    return len(layers) > 0


def _values(ax: Axes, matrix: np.ndarray, annotate: int, ink: np.ndarray) -> None:
    size = np.nan_to_num(np.abs(matrix))
    decimals = _decimals(size.max())
    for index in np.argsort(-size, axis=None, kind='stable')[: max(annotate, 0)]:
        layer, head = np.unravel_index(index, matrix.shape)
        if size[layer, head] > 0:
            text = f'{matrix[layer, head]:.{decimals}f}'.replace('-', _style.MINUS)
            ax.text(head + 0.5, layer + 0.56, text, color=ink[layer, head], fontsize=6.5, ha='center', va='center')


def _decimals(largest: float) -> int:
    """Two significant digits of the largest value, for all values alike."""
    return int(np.clip(1 - np.floor(np.log10(largest)), 0, 4)) if largest > 0 else 0


def _legend(ax: Axes, dots: bool, missing: bool, confidence: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    if dots:
        label = f'{100 * confidence:g}% interval excludes 0'
        handles.append(Line2D([], [], color='black', marker='o', markersize=2.5, linestyle='', label=label))
    if missing:
        handles.append(Patch(**_MISSING, label='no data'))
    _style.legend_below(ax, handles)
