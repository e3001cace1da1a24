"""Figures of pruning: what is kept of a measure over sparsity, and how the worth of units is spread over layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyterrier_mech.plot import _style
from pyterrier_mech.prune import UnitScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Okabe and Ito, with a marker each.
_STYLES = [
    ('#0072b2', 'o'),
    ('#d55e00', 's'),
    ('#009e73', 'D'),
    ('#cc79a7', '^'),
    ('#e69f00', 'v'),
    ('#56b4e9', 'P'),
    ('#000000', 'X'),
]


def retention(
    table: pd.DataFrame, *, x: str = 'sparsity', by: str | None = None, ax: Axes | None = None, title: str | None = None
) -> Figure:
    """Draws what pruned rankers keep of a measure, over how much was taken away, with intervals over queries.

    Args:
        table: Rows of the table of `pyterrier_mech.stats.compare`, with `retention`, `retention_low`,
            `retention_high`, and a column that says how much was taken away: ``result.table.assign(sparsity=0.5)``.
        x: That column.
        by: A column whose values become lines of their own, such as 'criterion'.
        ax: Where to draw. Without it, a new figure is made.
        title: Title above the lines.

    Returns:
        The figure.

    Raises:
        ImportError: If Matplotlib is not installed.
        TypeError: If the first argument is of another kind.
        ValueError: If a column is missing, there are no rows, too many lines, or two rows for one point.
    """
    _style.check_kind(table, pd.DataFrame, 'the table of stats.compare(…) with a column of sparsities')
    wanted = [x, 'retention', 'retention_low', 'retention_high', *([] if by is None else [by])]
    if (missing := [name for name in wanted if name not in table.columns]) or not len(table):
        raise ValueError(
            f'The table has no {", ".join(map(repr, missing)) or "rows"}: give stats.compare(…).table.assign({x}=…).'
        )
    lines = {'': table} if by is None else {str(name): rows for name, rows in table.groupby(by, sort=False)}
    if len(lines) > len(_STYLES):
        raise ValueError(f'{by!r} has {len(lines)} values, and {len(_STYLES)} lines can be told apart: choose some.')
    twice = table[table.duplicated([x] if by is None else [x, by])]
    if len(twice):
        raise ValueError(
            f'Several rows have {x}={twice[x].iloc[0]}: give one measure and one seed, and say with by= what differs.'
        )
    ax = _style.axes_or_new(ax, (3.6, 3.0))
    # A little apart, or the bars of equal sparsities would hide each other.
    step = 0.012 * float(np.ptp(table[x]) or 1)
    handles: list[Any] = []
    for i, (name, rows) in enumerate(lines.items()):
        rows, (colour, marker) = rows.sort_values(x), _STYLES[i]
        place = rows[x].to_numpy(dtype=np.float64) + step * (i - (len(lines) - 1) / 2)
        ax.vlines(place, rows['retention_low'], rows['retention_high'], color=colour, linewidth=1, alpha=0.7)
        handles += ax.plot(
            place, rows['retention'], color=colour, marker=marker, markersize=4, linewidth=1.2, label=name
        )
    ax.axhline(1, color='#404040', linewidth=0.8, linestyle=':')
    ax.set_xticks(sorted(set(table[x])), [f'{value:g}' for value in sorted(set(table[x]))])
    ax.set_xlabel(x, fontsize=9)
    measures = sorted(set(table['measure'])) if 'measure' in table.columns else []
    ax.set_ylabel(f'share of {measures[0]} kept' if len(measures) == 1 else 'share kept', fontsize=9)
    _style.plain_axes(ax)
    _style.legend_below(ax, handles if by is not None else [], ncols=2)
    return _style.finish(ax, title)


def importance(
    scores: UnitScores | pd.DataFrame, *, figure: Figure | SubFigure | None = None, title: str | None = None
) -> Figure:
    """Draws how much units are worth keeping, layer by layer, heads beside neurons.

    A box reaches from the lower to the upper quarter of a layer, its line is the median and its whiskers end at the 5th
    and 95th percentile. Heads are drawn one by one too. Each panel has its own scale: a criterion does not always
    measure heads and neurons in one unit.

    Args:
        scores: What a criterion said: `PrunedReranker.scores_`, ``criterion.scores(model, data)``, or their
            ``to_frame()``.
        figure: Where to draw: an empty figure, or a part of one. Without it, a new figure is made.
        title: Title above the panels.

    Returns:
        The figure.

    Raises:
        ImportError: If Matplotlib is not installed.
        TypeError: If the first argument is of another kind.
        ValueError: If a column is missing or there are no units.
    """
    table = scores.to_frame() if isinstance(scores, UnitScores) else scores
    _style.check_kind(table, pd.DataFrame, 'UnitScores, such as pruned.scores_, or their frame')
    if (missing := [name for name in ('kind', 'layer', 'score') if name not in table.columns]) or not len(table):
        raise ValueError(f'The frame has no {", ".join(map(repr, missing)) or "rows"}: give scores.to_frame().')
    kinds = [kind for kind in ('head', 'neuron') if (table['kind'] == kind).any()]
    n_layers = int(table['layer'].max()) + 1
    axes = _style.panels(figure, (len(kinds) * max(2.4, 0.3 * n_layers + 0.9), 2.6), 1, len(kinds))
    for ax, kind, (colour, _) in zip(axes[0], kinds, _STYLES, strict=False):
        rows = table[table['kind'] == kind]
        by_layer = [rows.loc[rows['layer'] == layer, 'score'].to_numpy(dtype=np.float64) for layer in range(n_layers)]
        line = {'color': '#404040', 'linewidth': 0.8}
        looks: Any = {'boxprops': line, 'whiskerprops': line, 'capprops': line, 'showfliers': False, 'whis': (5, 95)}
        looks['medianprops'] = {'color': colour, 'linewidth': 1.5}
        ax.boxplot(by_layer, positions=np.arange(n_layers), widths=0.6, manage_ticks=False, **looks)
        if kind == 'head':
            ax.scatter(rows['layer'], rows['score'], s=9, color=colour, alpha=0.6, linewidths=0, zorder=3)
        ax.set_xticks(np.arange(n_layers), [str(layer) for layer in range(n_layers)])
        ax.set_xlabel('layer', fontsize=9)
        ax.set_title(f'{kind}s', fontsize=9)
        _style.plain_axes(ax)
    axes[0, 0].set_ylabel('worth keeping', fontsize=9)
    return _style.finish_panels(axes, title)
