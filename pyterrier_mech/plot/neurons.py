"""One figure of neurons: in which layers those stand that speak most for and against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyterrier_mech.plot._style import axes_or_new, check_kind, finish, legend_below, plain_axes
from pyterrier_mech.results.neuron_effects import NeuronEffects

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TOP, _BOTTOM, _EVEN = '#2166ac', '#b2182b', '#404040'


def neurons(
    effects: NeuronEffects,
    *,
    p: float = 1.0,
    scheme: str = 'relevance',
    datasets: Sequence[str] | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Figure:
    """Draws how the top and the bottom `p` percent of the neurons are spread over the layers.

    The line is the share that each layer would have if they were spread evenly over all neurons.

    Args:
        effects: The effects.
        p: In percent of all neurons.
        scheme: 'relevance', 'relevant' or 'non_relevant'. See `NeuronEffects.top`.
        datasets: Names of datasets; by default all, averaged.
        ax: Where to draw. Without it, a new figure is made.
        title: Title above the bars.

    Returns:
        The figure.

    Raises:
        ImportError: If Matplotlib is not installed.
        TypeError: If the first argument is of another kind.
        ValueError: If a setting is not known or out of range.
    """
    check_kind(effects, NeuronEffects, 'NeuronEffects: NeuronEffects.from_frame(frame, qrels)')
    top = effects.top(p, scheme, datasets=datasets)
    bottom = effects.bottom(p, scheme, datasets=datasets)
    sizes = np.bincount(effects.to_frame()['layer'].to_numpy())
    layers = np.arange(len(sizes))
    ax = axes_or_new(ax, (max(3.6, 0.42 * len(sizes) + 1.4), 3.0))
    handles: list[Any] = []
    for shift, units, colour, name in ((-0.2, top, _TOP, 'top'), (0.2, bottom, _BOTTOM, 'bottom')):
        share = np.bincount([unit.site.layer for unit in units], minlength=len(sizes)) / len(units)
        handles.append(ax.bar(layers + shift, 100 * share, 0.38, color=colour, label=f'{name} {p:g} %'))
    even = np.r_[sizes, sizes[-1]] / sizes.sum()
    edges = np.r_[layers, len(sizes)] - 0.5
    handles += ax.step(edges, 100 * even, where='post', color=_EVEN, ls='--', lw=1, label='if spread evenly')
    ax.set_xticks(layers, [str(layer) for layer in layers])
    ax.set_xlabel('layer', fontsize=9)
    ax.set_ylabel('% of these neurons', fontsize=9)
    plain_axes(ax)
    legend_below(ax, handles, ncols=3)
    return finish(ax, title)
