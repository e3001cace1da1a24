"""One figure of attribution schemes: how many of their top neurons they share, over the size of the top."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import pandas as pd

from pyterrier_mech.plot._style import axes_or_new, check_kind, finish, legend_below, plain_axes
from pyterrier_mech.results import NeuronEffects

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of two schemes: same label of two datasets, or two labels.
_STYLES = {
    'relevant, two datasets': ('#0072b2', '-', 'o'),
    'non-relevant, two datasets': ('#d55e00', '-', 's'),
    'relevant and non-relevant': ('#009e73', '-', 'D'),
}
_P = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def overlaps(
    effects: NeuronEffects,
    *,
    p: Sequence[float] = _P,
    by: str = 'value',
    ax: Axes | None = None,
    title: str | None = None,
) -> Figure:
    """Draws which part of their top `p` percent of neurons two attribution schemes share, over `p`.

    A line is the mean over all pairs of schemes of one kind, its band reaches from the lowest to the highest of them.
    The dashed line is what as many random neurons share.

    Args:
        effects: The effects. With one dataset there is one pair: its relevant and its non-relevant scheme.
        p: Sizes of the top, in percent of all neurons.
        by: 'value' or 'magnitude'. See `NeuronEffects.top`.
        ax: Where to draw. Without it, a new figure is made.
        title: Title above the lines.

    Returns:
        The figure.

    Raises:
        ImportError: If Matplotlib is not installed.
        TypeError: If the first argument is of another kind.
        ValueError: If a setting is out of range, or fewer than two schemes have pairs.

    Source: Vast, Van Cooten, Soulier, Piwowarski, ICTIR 2024, arXiv 2406.19309.
    """
    check_kind(effects, NeuronEffects, 'NeuronEffects: NeuronEffects.from_frame(frame, qrels)')
    rows = []
    for size in sorted(p):
        shared = effects.overlaps(size, by=by)
        rows += [(size, _kind(a, b), 100 * shared.loc[a, b]) for a, b in combinations(shared.index, 2)]
    if not rows:
        raise ValueError('Fewer than two schemes have pairs, or p is empty: there is nothing to compare.')
    table = pd.DataFrame(rows, columns=['p', 'kind', 'shared']).groupby(['kind', 'p'])['shared']
    found: Any = table.agg(['mean', 'min', 'max'])
    ax = axes_or_new(ax, (3.6, 3.0))
    handles: list[Any] = []
    for kind, (colour, line, marker) in _STYLES.items():
        if kind in found.index:
            of = found.loc[kind]
            ax.fill_between(of.index, of['min'], of['max'], color=colour, alpha=0.18, linewidth=0)
            handles += ax.plot(of.index, of['mean'], color=colour, ls=line, marker=marker, markersize=3.5, label=kind)
    handles += ax.plot(sorted(p), sorted(p), color='#404040', ls='--', lw=1, label='random neurons')
    ax.set_xscale('log')
    ax.set_xticks(sorted(p), [f'{size:g}' for size in sorted(p)])
    ax.minorticks_off()
    ax.set_ylim(0, 100)
    ax.set_xlabel('top neurons (% of all)', fontsize=9)
    ax.set_ylabel('shared (% of these)', fontsize=9)
    plain_axes(ax)
    legend_below(ax, handles, ncols=1)
    return finish(ax, title)


def _kind(a: str, b: str) -> str:
    labels = {name.rpartition('.')[2] for name in (a, b)}
    if len(labels) > 1:
        return 'relevant and non-relevant'
    return 'relevant, two datasets' if labels == {'relevant'} else 'non-relevant, two datasets'
