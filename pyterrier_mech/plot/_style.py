"""What the figures share: where to draw, grids of heads, legends below, texts as they are, and errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

MINUS = '\N{MINUS SIGN}'
_LEGEND: dict[str, Any] = {'frameon': False, 'borderpad': 0, 'handletextpad': 0.5, 'columnspacing': 1.5}


def new_figure(size: tuple[float, float], layout: str | None = 'constrained') -> Figure:
    """Returns an empty figure of a size in inches, known to no global state.

    Raises:
        ImportError: If Matplotlib is not installed.
    """
    return require_matplotlib()(figsize=size, layout=cast('Any', layout))


def require_matplotlib() -> type[Figure]:
    """Checks that Matplotlib can be imported, and returns its class of figures.

    Raises:
        ImportError: If not; the message says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need Matplotlib. Run `pip install 'pyterrier-mech[plot]'`.") from error
    return Figure


def axes_or_new(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Returns the axes to draw on: `ax`, or those of a new figure."""
    return new_figure(size).subplots() if ax is None else ax


def panels(
    figure: Figure | SubFigure | None, size: tuple[float, float], rows: int = 1, columns: int = 1, **options: Any
) -> np.ndarray:
    """Returns the axes [rows, columns] of a figure of several panels, in `figure` or in a new one."""
    where = new_figure(size) if figure is None else figure
    return where.subplots(rows, columns, squeeze=False, **options)


def grid_size(n_layers: int, n_heads: int) -> tuple[float, float]:
    """Returns the size in inches of a figure with a cell for each head."""
    # Cells of a large model shrink to what a label of 6.5 points needs, so that the figure still fits a page.
    width = min(0.38, max(0.32, 6.0 / n_heads))
    height = min(0.30, max(0.17, 7.2 / n_layers))
    return max(3.3, n_heads * width + 1.5), max(2.4, n_layers * height + 1.0)


def head_axes(ax: Axes, n_layers: int, n_heads: int) -> None:
    """Labels a grid of heads whose cells are one wide: layers as rows, layer 0 on top."""
    ax.set_xlim(0, n_heads)
    ax.set_ylim(n_layers, 0)
    ax.set_xticks(np.arange(n_heads) + 0.5, [str(i) for i in range(n_heads)])
    ax.set_yticks(np.arange(n_layers) + 0.5, [str(i) for i in range(n_layers)])
    ax.tick_params(length=0, labelsize=8)
    ax.set_xlabel('head', fontsize=9)
    ax.set_ylabel('layer', fontsize=9)
    ax.spines[:].set_visible(False)


def plain_axes(ax: Axes) -> None:
    """Takes the frame of a curve or bar chart back to two thin lines."""
    ax.spines[['top', 'right']].set_visible(False)
    ax.spines[['left', 'bottom']].set(color='#808080', linewidth=0.6)
    ax.tick_params(labelsize=8, width=0.6, color='#808080', length=3)
    ax.grid(axis='y', color='#e6e6e6', linewidth=0.6)
    ax.set_axisbelow(True)


def legend_below(ax: Axes, handles: Sequence[Any], ncols: int = 2, depth: float = 0.42) -> None:
    """Puts a legend below the label of the x axis, `depth` inches below the axes, where there is anything to name.

    Where no layout of Matplotlib makes room for it, the axes go up.
    """
    from matplotlib.transforms import ScaledTranslation

    if not handles:
        return
    # `figure` is a part of one where the axes stand in a part.
    figure = cast('Figure', ax.figure)
    below_label = ax.transAxes + ScaledTranslation(0, -depth, figure.dpi_scale_trans)
    place: dict[str, Any] = {'loc': 'upper center', 'bbox_to_anchor': (0.5, 0), 'bbox_transform': below_label}
    legend = ax.legend(handles=handles, ncols=ncols, fontsize=8, **place, **_LEGEND)
    for text in legend.get_texts():
        text.set_parse_math(False)  # before anything measures them
    if figure.get_layout_engine() is None:
        below = legend.get_window_extent().transformed(figure.transSubfigure.inverted()).y0
        if below < 0:
            space = figure.subplotpars
            figure.subplots_adjust(bottom=min(space.bottom - below + 0.01, space.top - 0.1))


def inks(colours: np.ndarray) -> np.ndarray:
    """Returns black for light colours [..., 3 or 4] and white for dark ones."""
    # Relative luminance. Contrast formulas switch at 0.18, but small black digits are hard to read on saturated blue.
    return np.where(colours[..., :3] ** 2.2 @ [0.2126, 0.7152, 0.0722] > 0.22, 'black', 'white')


def finish(ax: Axes, title: str | None, *beside: Axes) -> Figure:
    """Puts a title above the axes, if there is one, and makes every text literal: a dollar sign is money here.

    Args:
        ax: The axes of the figure, with what stands inside them.
        title: The title.
        beside: Axes that were made for them, such as that of a colour bar.

    Returns:
        Their figure.
    """
    if title is not None:
        ax.set_title(title, fontsize=10)
    return literal(ax, *beside)


def finish_panels(axes: np.ndarray, title: str | None, *beside: Axes) -> Figure:
    """Puts a title above all panels, if there is one, and makes every text literal. See `finish`."""
    first, *others = axes.flat
    if title is not None:
        heading = first.figure.suptitle(title, fontsize=10)
        heading.set_parse_math(False)
    return literal(first, *others, *beside)


def literal(ax: Axes, *beside: Axes) -> Figure:
    """Makes every text of axes literal, and returns their figure."""
    from matplotlib.text import Text
    from matplotlib.ticker import ScalarFormatter

    for part in (ax, *beside):
        for formatter in (part.xaxis.get_major_formatter(), part.yaxis.get_major_formatter()):
            if isinstance(formatter, ScalarFormatter):
                formatter.set_useMathText(False)
        for text in part.findobj(Text):
            cast('Text', text).set_parse_math(False)
    return cast('Figure', ax.get_figure(root=True))


def check_kind(value: Any, kind: type, way_out: str) -> None:
    """Checks what a figure is asked to draw.

    Raises:
        TypeError: If it is of another kind.
    """
    if not isinstance(value, kind):
        raise TypeError(f'the first argument must be {way_out}; got {type(value).__name__}')
