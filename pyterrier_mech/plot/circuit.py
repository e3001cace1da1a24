"""One figure of a circuit: which heads it has, what they do and how much they carry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyterrier_mech.columns import path_of
from pyterrier_mech.plot._style import axes_or_new, check_kind, finish, grid_size, head_axes, legend_below
from pyterrier_mech.results.circuit import UNKNOWN, Circuit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that also differ for the colour-blind (Okabe and Ito), with a marker each for print without colour.
_STYLES = {
    'same-token': ('#d55e00', 'P'),
    'query-focused': ('#0072b2', 'o'),
    'document-focused': ('#e69f00', 's'),
    'matching': ('#009e73', 'D'),
    'special-token': ('#7f7f7f', '^'),
    'mixed': ('#cc79a7', 'v'),
    UNKNOWN: ('#4d4d4d', 'o'),
}
_LARGEST, _SMALLEST = 120.0, 12.0
_UP, _DOWN = '#2166ac', '#b2182b'


def circuit(
    circuit: Circuit,
    *,
    head_counts: Sequence[int] | None = None,
    n_edges: int = 20,
    ax: Axes | None = None,
    title: str | None = None,
) -> Figure:
    """Draws the heads of a circuit in the grid of all heads, layers as rows and heads as columns.

    Colour and shape are the role of a head, the area its absolute effect; a hollow marker takes away from the score
    change. Where the circuit has neurons, their number stands at the right of each layer.

    Arrows are its edges, from a head to a later head or to the score, which then stands below the grid: blue, or red
    and dashed where the effect is negative, thicker where it is larger. Letters say by which input of the receiver: q
    its queries, k its keys, v its values. Edges of the same two heads are one arrow, as strong as the strongest.

    Args:
        circuit: The circuit.
        head_counts: Heads of every layer, ``list(model.counts('heads').values())``; by default what the circuit was
            chosen from, or as far as its heads reach.
        n_edges: How many edges are drawn at most, the strongest ones.
        ax: Where to draw. Without it, a new figure is made.
        title: Title above the grid.

    Returns:
        The figure.

    Raises:
        ImportError: If Matplotlib is not installed.
        TypeError: If the first argument is of another kind.
        ValueError: If a head is outside of `head_counts`, or there is no head and no grid to draw.
    """
    check_kind(circuit, Circuit, 'a Circuit: discover_circuit(effects) or Circuit.from_units(units)')
    heads = circuit.heads
    counts = _head_counts(circuit, head_counts)
    width = max(counts)
    below = int(len(circuit.edges) > 0)
    ax = axes_or_new(ax, grid_size(len(counts) + 2 * below, width))
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    cells = [Rectangle((head, layer), 1, 1) for layer, count in enumerate(counts) for head in range(count)]
    ax.add_collection(PatchCollection(cells, facecolor='#fafafa', edgecolor='#d0d0d0', linewidth=0.4, clip_on=False))
    head_axes(ax, len(counts), width)
    effect = heads['effect'].to_numpy()
    largest = np.nanmax(np.abs(effect)) if np.isfinite(effect).any() else 0.0
    area = _areas(effect, largest)
    for role, (colour, marker) in _styles(heads['role'].tolist()).items():
        rows = (heads['role'] == role).to_numpy()
        face = [colour if not value < 0 else 'white' for value in effect[rows]]
        x, y = heads['head'][rows] + 0.5, heads['layer'][rows] + 0.5
        ax.scatter(x, y, s=area[rows], c=face, marker=marker, edgecolors=colour, linewidths=1.2)
    _neuron_counts(ax, circuit, len(counts), width)
    _arrows(ax, circuit, n_edges, len(counts), width)
    legend_below(ax, _handles(heads['role'].tolist(), effect, largest), ncols=3 if width >= 8 else 2)
    return finish(ax, title)


def _head_counts(circuit: Circuit, given: Sequence[int] | None) -> list[int]:
    units = circuit.units
    counts = list(given) if given is not None else circuit.settings.get('head_counts')
    if counts is None and units.heads:
        deepest = max(unit.site.layer for unit in units)
        counts = [max(unit.index for unit in units.heads) + 1] * (deepest + 1)
    if not counts or not max(counts):
        raise ValueError(
            "This circuit has no heads and knows of no grid: give head_counts=list(model.counts('heads').values())"
        )
    for layer, head in sorted((unit.site.layer, unit.index) for unit in units.heads):
        if layer >= len(counts) or head >= counts[layer]:
            raise ValueError(f'head_counts={counts!r} has no head {head} in layer {layer}')
    return counts


def _arrows(ax: Axes, circuit: Circuit, most: int, n_layers: int, width: int) -> None:
    """Draws the edges, and the score below the grid where there are any."""
    from matplotlib.patches import FancyArrowPatch, Rectangle

    edges = circuit.edges.head(max(most, 0))
    if not len(edges):
        return
    joined: dict[Any, tuple[float, list[str]]] = {}
    for name, effect in zip(edges['name'], edges['effect'].fillna(0.0), strict=True):
        path = path_of(name)
        first, inputs = joined.setdefault(path.ends, (effect, []))
        inputs += [path.receiver.rpartition('.')[2]] if path.ends[1] is not None else []
    largest = max(abs(effect) for effect, _ in joined.values()) or 1.0
    for (sender, receiver), (effect, inputs) in joined.items():
        start = (sender.index + 0.5, sender.site.layer + 0.5)
        end = (start[0], n_layers + 0.45) if receiver is None else (receiver.index + 0.5, receiver.site.layer + 0.5)
        looks: Any = {'color': _DOWN if effect < 0 else _UP, 'linestyle': '--' if effect < 0 else '-', 'alpha': 0.75}
        looks |= {'linewidth': 0.5 + 2 * abs(effect) / largest, 'shrinkA': 5, 'shrinkB': 0 if receiver is None else 6}
        # Curved a little, or arrows within a column would run through the heads between.
        bend = 0.15 if start[0] == end[0] and end[1] - start[1] > 1.5 else 0.08
        curve = f'arc3,rad={bend if start[0] <= end[0] else -bend}'
        ax.add_patch(FancyArrowPatch(start, end, arrowstyle='-|>', mutation_scale=7, connectionstyle=curve, **looks))
        if inputs:
            x, y = (a + 0.85 * (b - a) for a, b in zip(start, end, strict=True))
            box = {'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.6, 'alpha': 0.85}
            ax.text(x, y, ' '.join(sorted(inputs)), fontsize=6.5, ha='center', va='center', bbox=box)
    if any(receiver is None for _, receiver in joined):
        bar = Rectangle((0, n_layers + 0.45), width, 0.6, facecolor='#ececec', edgecolor='#808080', linewidth=0.6)
        ax.add_patch(bar)
        ax.text(width / 2, n_layers + 0.75, 'score', fontsize=8, ha='center', va='center')
        ax.set_ylim(n_layers + 1.15, 0)


def _areas(effect: np.ndarray, largest: float) -> np.ndarray:
    if not largest:
        return np.full(len(effect), _LARGEST / 2)
    return np.maximum(np.nan_to_num(np.abs(effect)) / largest * _LARGEST, _SMALLEST)


def _styles(roles: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Returns colour and marker of the roles that occur, known ones first."""
    known = {role: style for role, style in _STYLES.items() if role in roles}
    return known | {role: _STYLES[UNKNOWN] for role in dict.fromkeys(roles) if role not in known}


def _neuron_counts(ax: Axes, circuit: Circuit, n_layers: int, width: int) -> None:
    numbers = np.bincount(circuit.neurons['layer'].to_numpy(), minlength=n_layers)
    if not numbers.any():
        return
    for layer, number in enumerate(numbers.tolist()):
        ax.text(width + 0.2, layer + 0.5, str(number), fontsize=8, va='center', color='#404040')
    ax.text(width + 0.2, -0.15, 'neurons', fontsize=8, va='bottom', color='#404040')


def _handles(roles: Sequence[str], effect: np.ndarray, largest: float) -> list[Any]:
    from matplotlib.lines import Line2D

    def handle(label: str, colour: str, marker: str, area: float, hollow: bool = False) -> Line2D:
        line = Line2D([], [], linestyle='', label=label, marker=marker, markersize=area**0.5)
        line.set(markerfacecolor='white' if hollow else colour, markeredgecolor=colour, markeredgewidth=1.2)
        return line

    styles = _styles(roles)
    handles = [handle(role, *style, 36) for role, style in styles.items() if list(styles) != [UNKNOWN]]
    if largest:
        handles += [handle(f'effect {largest / n:.2g}', '#4d4d4d', 'o', _LARGEST / n) for n in (1, 4)]
    if (effect < 0).any():
        handles.append(handle('negative effect', '#4d4d4d', 'o', 36, hollow=True))
    return handles
