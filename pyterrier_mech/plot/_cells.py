"""Maps of cells: colours symmetric around 0, dots where an interval excludes 0, hatching where there is nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyterrier_mech.plot import _style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {'ratio': 'share of the score change\ncarried by {}', 'mean': 'mean score change'}
_MISSING: dict[str, Any] = {'facecolor': '#f2f2f2', 'edgecolor': '#bdbdbd', 'hatch': '//////', 'linewidth': 0}


def check_column(column: str) -> None:
    """Checks which numbers are to be drawn.

    Raises:
        ValueError: If they are not known.
    """
    if column not in LABELS:
        raise ValueError(f'column must be one of {list(LABELS)}; got column={column!r}')


def check_some(matrix: np.ndarray, column: str, what: str) -> None:
    """Checks that there is something to draw.

    Raises:
        ValueError: If all is NaN.
    """
    if np.isnan(matrix).all():
        other = next(name for name in LABELS if name != column)
        raise ValueError(f'No {what} has a {column}: all are NaN. Draw column={other!r}.')


def cells(ax: Axes, matrix: np.ndarray, limit: float | None = None) -> Any:
    """Draws a matrix, blue where positive and red where negative, and returns what the colour bar needs.

    Args:
        ax: Where to draw.
        matrix: Numbers; NaN is hatched.
        limit: What has the darkest colours; by default the largest absolute number.
    """
    limit = limit or np.nanmax(np.abs(matrix), initial=0.0) or 1.0
    mesh = ax.pcolormesh(
        np.ma.masked_invalid(matrix), cmap='RdBu', vmin=-limit, vmax=limit, edgecolors='#d0d0d0', linewidth=0.4
    )
    ax.patch.set(**_MISSING)
    return mesh


def colour_bar(mesh: Any, axes: Any, label: str, **where: Any) -> Axes:
    """Draws the colour bar of one or several axes, and returns its own."""
    bar = mesh.figure.colorbar(mesh, ax=axes, **{'pad': 0.02, 'aspect': 30, **where})
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8)
    bar.set_label(label, fontsize=9)
    return bar.ax


def inks(mesh: Any, matrix: np.ndarray) -> np.ndarray:
    """Returns the colour of what is written into each cell."""
    return _style.inks(mesh.cmap(mesh.norm(np.nan_to_num(matrix))))


def dots(ax: Axes, low: np.ndarray, high: np.ndarray, ink: np.ndarray) -> bool:
    """Marks the cells whose interval excludes 0, and returns whether there is one."""
    rows, columns = np.nonzero((low > 0) | (high < 0))
    # In the corner, where the value in the middle of the cell leaves room.
    ax.scatter(columns + 0.88, rows + 0.16, s=4, c=ink[rows, columns], linewidths=0)
    return len(rows) > 0


def values(ax: Axes, matrix: np.ndarray, annotate: int, ink: np.ndarray) -> None:
    """Writes the largest numbers into their cells."""
    size = np.nan_to_num(np.abs(matrix))
    decimals = _decimals(size.max(initial=0.0))
    for index in np.argsort(-size, axis=None, kind='stable')[: max(annotate, 0)]:
        row, column = np.unravel_index(index, matrix.shape)
        if size[row, column] > 0:
            text = f'{matrix[row, column]:.{decimals}f}'.replace('-', _style.MINUS)
            if decimals > 2:  # too wide for a cell
                text = text.replace('0.', '.', 1)
            ax.text(column + 0.5, row + 0.56, text, color=ink[row, column], fontsize=6.5, ha='center', va='center')


def _decimals(largest: float) -> int:
    """Two significant digits of the largest value, for all values alike."""
    return int(np.clip(1 - np.floor(np.log10(largest)), 0, 4)) if largest > 0 else 0


def handles(certain: bool, missing: bool, confidence: float) -> list[Any]:
    """Returns what a legend says of dots and hatching, where there are any."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    found: list[Any] = []
    if certain:
        label = f'{100 * confidence:g}% interval excludes 0'
        found.append(Line2D([], [], color='black', marker='o', markersize=2.5, linestyle='', label=label))
    if missing:
        found.append(Patch(**_MISSING, label='no data'))
    return found


def named_axes(ax: Axes, rows: Sequence[str], columns: Sequence[str], size: float = 8) -> None:
    """Labels a map of cells that are one wide: rows from the top, columns below, upright where names are long."""
    ax.set_xlim(0, len(columns))
    ax.set_ylim(len(rows), 0)
    upright: dict[str, Any] = {'rotation': 90} if max(map(len, columns), default=0) > 2 else {}
    ax.set_xticks(np.arange(len(columns)) + 0.5, list(columns), **upright)
    ax.set_yticks(np.arange(len(rows)) + 0.5, list(rows))
    ax.tick_params(length=0, labelsize=size, pad=2)
    ax.spines[:].set_visible(False)
