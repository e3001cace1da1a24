"""Figures of score changes: every pair, original and perturbed, or the changes query by query."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyterrier_mech.plot._style import axes_or_new, check_kind, finish, legend_below, plain_axes, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_UP, _DOWN, _EVEN = '#2166ac', '#b2182b', '#7f7f7f'
_BOTH = ('pair', 'query')


def scores(frame: pd.DataFrame, *, by: str = 'pair', ax: Axes | None = None, title: str | None = None) -> Figure:
    """Draws how an edit moves scores.

    Args:
        frame: The frame of a stage that compares two versions: qid, `score_original`, `score_perturbed`. Rows that
            could not be patched are drawn too: their scores are right.
        by: 'pair' draws a point for each pair, its score with the edit over that without; what lies above the line
            has risen. 'query' draws the changes of each query in a column, with their mean, queries in the order of it.
        ax: Where to draw. Without it, a new figure is made.
        title: Title above the points.

    Returns:
        The figure.

    Raises:
        ImportError: If Matplotlib is not installed.
        TypeError: If the first argument is of another kind.
        ValueError: If `by` is another one, a column is missing, or no pair has both scores.
    """
    if by not in _BOTH:
        raise ValueError(f'by must be one of {_BOTH}; got by={by!r}')
    check_kind(frame, pd.DataFrame, 'the frame that PatchHeads or another patching stage returned')
    require_matplotlib()
    if missing := [name for name in ('qid', 'score_original', 'score_perturbed') if name not in frame.columns]:
        raise ValueError(f'The frame has no {", ".join(map(repr, missing))}: give what PatchHeads(model) returned.')
    original, perturbed = (frame[f'score_{side}'].to_numpy(dtype=np.float64) for side in ('original', 'perturbed'))
    there = np.isfinite(original) & np.isfinite(perturbed)
    if not there.any():
        raise ValueError(f'None of the {len(frame)} rows has both scores.')
    original, perturbed, qids = original[there], perturbed[there], frame['qid'].to_numpy()[there]
    ax = axes_or_new(ax, (3.4, 3.4) if by == 'pair' else (4.8, 3.0))
    plain_axes(ax)
    draw = _pairs if by == 'pair' else _queries
    legend_below(ax, draw(ax, original, perturbed, qids), ncols=3 if by == 'query' else 2)
    return finish(ax, title)


def _pairs(ax: Axes, original: np.ndarray, perturbed: np.ndarray, qids: np.ndarray) -> list[Any]:
    ends = [min(original.min(), perturbed.min()), max(original.max(), perturbed.max())]
    ax.plot(ends, ends, color='#404040', linewidth=0.8, linestyle=':')
    found: list[Any] = []
    for colour, marker, name, rows in _signs(perturbed - original):
        if rows.any():
            label = f'{name}: {rows.sum()} pairs'
            looks: Any = {'s': 14, 'linewidths': 0, 'alpha': 0.7}
            found.append(ax.scatter(original[rows], perturbed[rows], color=colour, marker=marker, label=label, **looks))
    ax.set_aspect('equal', adjustable='datalim')
    ax.set_xlabel('score of the original', fontsize=9)
    ax.set_ylabel('score with the edit', fontsize=9)
    return found


def _queries(ax: Axes, original: np.ndarray, perturbed: np.ndarray, qids: np.ndarray) -> list[Any]:
    change = pd.Series(perturbed - original)
    means = change.groupby(qids).mean().sort_values(kind='stable')
    place = pd.Series(qids).map({qid: i for i, qid in enumerate(means.index)}).to_numpy()
    ax.axhline(0, color='#404040', linewidth=0.8, linestyle=':')
    found: list[Any] = []
    for colour, marker, name, rows in _signs(change.to_numpy()):
        if rows.any():
            looks: Any = {'s': 10, 'linewidths': 0, 'alpha': 0.7}
            label = f'{name}: {rows.sum()} pairs'
            found.append(ax.scatter(place[rows], change[rows], color=colour, marker=marker, label=label, **looks))
    found += ax.plot(np.arange(len(means)), means, color='black', linewidth=1, label='mean of the query')
    ax.set_xlabel(f'{len(means)} queries, by mean change', fontsize=9)
    ax.set_ylabel('score change', fontsize=9)
    ax.set_xticks([])
    return found


def _signs(change: np.ndarray) -> list[tuple[str, str, str, np.ndarray]]:
    return [(_UP, '^', 'up', change > 0), (_DOWN, 'v', 'down', change < 0), (_EVEN, 'o', 'equal', change == 0)]
