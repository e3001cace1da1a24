"""One figure of a text: its words, shaded by their effect on the score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from pyterrier_mech.plot._style import MINUS, finish, inks, new_figure, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS, _LINE, _PAD, _GAP = 10.0, 18.0, 2.5, 2.0
_TITLE, _BAR, _MARGIN = 22.0, 34.0, 8.0


def tokens(
    row: pd.Series | pd.DataFrame | Mapping[str, Any],
    *,
    ax: Axes | None = None,
    title: str | None = None,
    width: float = 6.5,
) -> Figure:
    """Draws the words of one row, as text, each shaded by its effect.

    Blue raises the score and red lowers it; the colours are symmetric around 0.

    Args:
        row: A row of the frame of `AttributeTokens`: `tokens` and `token_effects`.
        ax: Where to draw; its size sets where lines break. Without it, a new figure is made, as high as the text.
        title: Title above the text.
        width: Width of the new figure, in inches.

    Returns:
        The figure.

    Raises:
        ImportError: If Matplotlib is not installed.
        ValueError: If there is not one row, or it has no words or not one finite effect for each.
    """
    words, effects = _content(row)
    require_matplotlib()
    if ax is None:
        room = 72 * width - 2 * _MARGIN
        places, n_lines = _places([_width(word) for word in words], room)
        above = 0.0 if title is None else _TITLE
        height = above + n_lines * _LINE + _BAR + 2 * _MARGIN
        figure = new_figure((width, height / 72), layout=None)
        left, top = _MARGIN / (72 * width), 1 - (_MARGIN + above) / height
        ax = figure.add_axes((left, _MARGIN / height, 1 - 2 * left, top - _MARGIN / height))
    else:
        # Lays the figure out, so that the axes have their width.
        cast('Figure', ax.get_figure(root=True)).draw_without_rendering()
        places, n_lines = _places([_width(word) for word in words], ax.get_window_extent().width / ax.figure.dpi * 72)
    ax.axis('off')
    mappable = _mappable(effects)
    _draw(ax, words, places, mappable.to_rgba(effects))
    _colour_bar(ax, mappable, n_lines * _LINE)
    return finish(ax, title)


def _content(row: Any) -> tuple[list[str], np.ndarray]:
    if isinstance(row, pd.DataFrame):
        if len(row) != 1:
            raise ValueError(f'A frame of {len(row)} rows is not one row: give e.g. res.iloc[0]')
        row = row.iloc[0]
    if missing := [name for name in ('tokens', 'token_effects') if name not in row]:
        raise ValueError(f'The row has no {", ".join(map(repr, missing))}: give one that AttributeTokens returned')
    words, effects = [str(word) for word in row['tokens']], np.asarray(row['token_effects'], dtype=np.float64)
    if not words or effects.shape != (len(words),) or not np.isfinite(effects).all():
        raise ValueError(f'{len(words)} words and effects of shape {effects.shape}: give a finite effect for each word')
    return words, effects


def _width(word: str) -> float:
    """Returns the width of a word in points, without any canvas."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return text_to_path.get_text_width_height_descent(word, FontProperties(size=_POINTS), ismath=False)[0]


def _places(widths: Sequence[float], room: float) -> tuple[list[tuple[float, int, float]], int]:
    """Returns (x, line, width) of every word's box, and the number of lines."""
    places = []
    x, line = 0.0, 0
    for width in widths:
        box = width + 2 * _PAD
        if x > 0 and x + box > room:
            x, line = 0.0, line + 1
        places.append((x, line, box))
        x += box + _GAP
    return places, line + 1


def _mappable(effects: np.ndarray) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    limit = np.abs(effects).max() or 1.0
    return ScalarMappable(Normalize(-limit, limit), 'RdBu')


def _points(ax: Axes) -> Any:
    """Returns the transform from points, counted from the upper left corner of the axes, y upwards."""
    from matplotlib.transforms import Affine2D, ScaledTranslation

    return Affine2D().scale(1 / 72) + ax.figure.dpi_scale_trans + ScaledTranslation(0, 1, cast('Any', ax.transAxes))


def _draw(ax: Axes, words: Sequence[str], places: Sequence[tuple[float, int, float]], colours: np.ndarray) -> None:
    from matplotlib.patches import FancyBboxPatch

    points = _points(ax)
    for word, (x, line, box), colour, ink in zip(words, places, colours, inks(colours), strict=True):
        bottom = -(line + 1) * _LINE
        shape = FancyBboxPatch((x, bottom + 1.5), box, _LINE - 3, boxstyle='round,pad=0,rounding_size=2')
        shape.set(facecolor=colour, edgecolor='#e0e0e0', linewidth=0.4, transform=points, clip_on=False)
        ax.add_artist(shape)
        ax.text(x + _PAD, bottom + _LINE / 2, word, fontsize=_POINTS, color=ink, va='center_baseline', transform=points)


def _colour_bar(ax: Axes, mappable: Any, depth: float) -> None:
    cax = ax.inset_axes((14, -depth - 15, 130, 7), transform=_points(ax))
    bar = ax.figure.colorbar(mappable, cax=cax, orientation='horizontal')
    limit = mappable.norm.vmax
    bar.set_ticks([-limit, 0, limit], labels=[f'{MINUS}{limit:.2g}', '0', f'{limit:.2g}'])
    bar.outline.set_visible(False)  # type: ignore[operator]
    cax.tick_params(labelsize=8, length=0)
    cax.text(1.12, 0.5, 'effect on the score', transform=cax.transAxes, fontsize=8, va='center')
