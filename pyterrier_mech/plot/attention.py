"""The attention of one head to one pair, original beside perturbed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyterrier_mech.plot import _style
from pyterrier_mech.plot._cells import colour_bar
from pyterrier_mech.plot._tokens import dividers, shown, token_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

_SIDES = {'_0': 'original', '': 'perturbed'}
_SPECIAL = ('[CLS]', '[SEP]', '<s>', '</s>', '[PAD]')


def attention(
    row: pd.Series | pd.DataFrame | Mapping[str, Any],
    head: str,
    *,
    n_tokens: int = 24,
    figure: Figure | SubFigure | None = None,
    title: str | None = None,
) -> Figure:
    """Draws where a head looks in one pair: from the tokens of the rows to those of the columns.

    Where the row has both versions they stand side by side, with the same colours: white is 0. A token that the other
    version does not have at its place is red and bold. Dotted lines stand where tokens are left out.

    Args:
        row: A row of the frame of `AttentionPatterns`: `attention.L2H9`, `attention_tokens`, and of the original
            `attention_0.L2H9`, `attention_tokens_0`.
        head: The head, 'L2H9'; of a bi-encoder with the tower before it, 'text.L2H9'.
        n_tokens: How many tokens are drawn at most: those that give or take the largest weights, special tokens aside.
        figure: Where to draw: an empty figure, or a part of one. Without it, a new figure is made.
        title: Title above the panels.

    Returns:
        The figure.

    Raises:
        ImportError: If Matplotlib is not installed.
        ValueError: If there is not one row, or it does not have the attention of that head.
    """
    sides = _content(row, head)
    _style.require_matplotlib()
    kept = _kept(sides, n_tokens)
    n = max(map(len, kept))
    size = (max(3.4, len(sides) * (0.115 * n + 0.85) + 1.2), 0.115 * n + 1.5)
    axes = _style.panels(figure, size, 1, len(sides))
    largest = max(weights[np.ix_(places, places)].max() for (_, weights, _), places in zip(sides, kept, strict=True))
    for ax, (name, weights, tokens), places in zip(axes[0], sides, kept, strict=True):
        other = [tokens_of for other, _, tokens_of in sides if other != name]
        mesh = ax.pcolormesh(weights[np.ix_(places, places)], cmap='Blues', vmin=0, vmax=largest or 1.0)
        ax.set_aspect('equal')
        ax.invert_yaxis()
        ax.spines[:].set(color='#bdbdbd', linewidth=0.5)
        kinds = ['inserted' if _differs(tokens, other, i) else '' for i in places]
        for side in 'xy':
            token_ticks(ax, side, [tokens[i] for i in places], kinds)
        dividers(ax, places, both=True)
        ax.set_title(name, fontsize=9)
        ax.set_xlabel('to', fontsize=9)
    axes[0, 0].set_ylabel('from', fontsize=9)
    bar = colour_bar(mesh, list(axes[0]), f'attention of {head}', aspect=25, shrink=0.8)
    return _style.finish_panels(axes, title, bar)


def _content(row: Any, head: str) -> list[tuple[str, np.ndarray, list[str]]]:
    """Returns name, weights [tokens, tokens] and tokens of each version."""
    if isinstance(row, pd.DataFrame):
        if len(row) != 1:
            raise ValueError(f'A frame of {len(row)} rows is not one row: give e.g. res.iloc[0]')
        row = row.iloc[0]
    sides, tower = [], f'.{head.rpartition(".")[0]}'.rstrip('.')
    for end, name in _SIDES.items():
        weights, tokens = (row.get(column) for column in (f'attention{end}.{head}', f'attention_tokens{end}{tower}'))
        if np.ndim(weights) == 0 or np.ndim(tokens) == 0:
            continue
        table, words = np.asarray(weights, dtype=np.float64), [str(token) for token in tokens]
        if np.isnan(table).all():
            raise ValueError(f'All attention of {head} is NaN in this row: look at its column attention_aligned.')
        if table.shape != (len(words),) * 2 or not np.isfinite(table).all():
            raise ValueError(f'attention{end}.{head} of shape {table.shape} does not fit {len(words)} tokens')
        sides.append((name, table, words))
    if not sides:
        raise ValueError(
            f'The row has no attention of {head}: give one that AttentionPatterns(model, [{head!r}]) returned; of a '
            "bi-encoder, name the sequence too: 'text.L2H9'."
        )
    return [('', *sides[0][1:])] if len(sides) == 1 else sides


def _kept(sides: list[tuple[str, np.ndarray, list[str]]], most: int) -> list[np.ndarray]:
    """Returns the positions of each version that are drawn, the same ones where both are equally long."""
    sizes = []
    for _, weights, tokens in sides:
        words = np.asarray([token not in _SPECIAL for token in tokens])
        inner = np.where(words[:, None] & words, weights, 0)
        sizes.append(np.maximum(inner.max(axis=0), inner.max(axis=1)))
    if len({len(size) for size in sizes}) == 1:
        sizes = [np.max(sizes, axis=0)] * len(sizes)
    return [shown(size, most) for size in sizes]


def _differs(tokens: list[str], others: list[list[str]], i: int) -> bool:
    return any(i >= len(other) or other[i] != tokens[i] for other in others)
