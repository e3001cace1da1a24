"""One figure of faithfulness: a circuit against random ones, over their size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from pyterrier_mech.plot._style import axes_or_new, check_kind, finish, legend_below, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABELS = {
    'faithfulness': 'share of the score change\nthat is left in the circuit alone',
    'completeness': 'share of the score change\nthat goes with the circuit',
}
_CIRCUIT, _RANDOM = '#0072b2', '#7f7f7f'


def faithfulness(
    curves: pd.DataFrame, *, column: str = 'faithfulness', ax: Axes | None = None, title: str | None = None
) -> Figure:
    """Draws a curve of `pyterrier_mech.faithfulness`: the circuit with its interval, and random circuits.

    The band around the circuit is its interval over queries. The random line is the mean of the random sets, the band
    around it reaches from the lowest to the highest of them. Dotted lines stand at 0 and 1.

    Args:
        curves: The frame that `faithfulness` returned.
        column: 'faithfulness' or 'completeness'.
        ax: Where to draw. Without it, a new figure is made.
        title: Title above the curves.

    Returns:
        The figure.

    Raises:
        ImportError: If Matplotlib is not installed.
        TypeError: If the first argument is of another kind.
        ValueError: If `column` is another one, or the frame is another.
    """
    if column not in _LABELS:
        raise ValueError(f'column must be one of {list(_LABELS)}; got column={column!r}')
    check_kind(curves, pd.DataFrame, 'the frame that faithfulness(model, circuit, frame) returned')
    missing = [name for name in ('size', 'kind', column, f'{column}_low') if name not in curves.columns]
    if missing or not len(curves):
        raise ValueError(
            f'The frame has no {missing or "rows"}: give what faithfulness(model, circuit, frame) returned.'
        )
    ax = axes_or_new(ax, (4.4, 3.2))
    handles = []
    own = curves[curves['kind'] == 'circuit'].sort_values('size')
    ax.fill_between(own['size'], own[f'{column}_low'], own[f'{column}_high'], color=_CIRCUIT, alpha=0.18, linewidth=0)
    handles += ax.plot(own['size'], own[column], color=_CIRCUIT, marker='o', markersize=3.5, label='circuit')
    random = curves[curves['kind'] == 'random'].groupby('size')[column].agg(['mean', 'min', 'max', 'size'])
    if len(random):
        ax.fill_between(random.index, random['min'], random['max'], color=_RANDOM, alpha=0.25, linewidth=0)
        label = f'{random["size"].max()} random circuits: mean, range'
        handles += ax.plot(random.index, random['mean'], color=_RANDOM, linestyle='--', label=label)
    for level in (0, 1):
        ax.axhline(level, color='#404040', linewidth=0.8, linestyle=':')
    _size_axis(ax, sorted(set(curves['size'])), 'heads' if curves['n_heads'].any() else 'neurons')
    ax.set_ylabel(_LABELS[column], fontsize=9)
    plain_axes(ax)
    legend_below(ax, handles)
    return finish(ax, title)


def _size_axis(ax: Axes, sizes: list[int], unit: str) -> None:
    # Sizes double, so that even steps show all of them; 0 has a place too.
    if len(sizes) > 1 and sizes[-1] > 4:
        ax.set_xscale('symlog', base=2, linthresh=1)
        ax.set_xlim(min(sizes[0] - 0.2, 0.8 * sizes[0]), 1.15 * sizes[-1])
    # The whole circuit is named even where its last doubling is near.
    shown = [size for size in sizes[:-1] if size < 0.72 * sizes[-1]] + sizes[-1:]
    ax.set_xticks(shown, [str(size) for size in shown])
    ax.set_xticks([], minor=True)
    ax.set_xlabel(f'{unit} in the circuit', fontsize=9)
