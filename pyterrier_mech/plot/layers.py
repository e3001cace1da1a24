"""Where in the text: blocks by layer and type of token, over many pairs, or by layer and token of one pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyterrier_mech.columns import SITES, places
from pyterrier_mech.plot import _style
from pyterrier_mech.plot._cells import (
    LABELS,
    cells,
    check_column,
    check_some,
    colour_bar,
    dots,
    handles,
    inks,
    named_axes,
    values,
)
from pyterrier_mech.plot._tokens import dividers, segments, shown, token_ticks
from pyterrier_mech.provenance import ANALYSIS, Analysis
from pyterrier_mech.results import LayerEffects
from pyterrier_mech.results.layer_effects import SINGLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

_NAMES = {'resid_pre': 'residual stream', 'attn_out': 'attention', 'mlp_out': 'feed-forward', 'z': 'heads'}
_TOKENS, _TYPES = 'position_tokens', 'position_types'


def layers(
    effects: LayerEffects | pd.DataFrame | pd.Series | Mapping[str, Any],
    *,
    column: str = 'ratio',
    n_tokens: int = 48,
    figure: Figure | SubFigure | None = None,
    title: str | None = None,
    annotate: int = 3,
) -> Figure:
    """Draws effects of blocks, a panel a site: the residual stream before a layer, attention, feed-forward block.

    Over many pairs, layers are rows, layer 0 on top, and types of tokens are columns; a dot marks what has an interval
    that excludes 0. Of one row of ``PatchLayers(by='position')`` the columns are its tokens, and the numbers logits of
    that pair, or shares if it was patched with ``effect='normalized'``. Blue is positive, and all panels share colours
    that are symmetric around 0. Hatched cells have no data.

    Args:
        effects: `LayerEffects`; the frame of a ``PatchLayers`` stage, which is aggregated with the defaults of
            `LayerEffects.from_frame`; or one row, ``res.iloc[0]``, of effects by position.
        column: 'ratio' or 'mean', of many pairs.
        n_tokens: How many tokens of a row are drawn at most: those with the largest effects. A dotted line stands where
            some are left out.
        figure: Where to draw: an empty figure, or a part of one. Without it, a new figure is made.
        title: Title above the panels.
        annotate: How many of the largest numbers of each panel are written.

    Returns:
        The figure.

    Raises:
        ImportError: If Matplotlib is not installed.
        TypeError: If the effects are of another kind.
        ValueError: If `column` is another one, nothing has a value in it, or the row has no effects by position.
    """
    check_column(column)
    _style.require_matplotlib()
    if isinstance(effects, (pd.Series, Mapping)):
        return _of_row(effects, n_tokens, figure, title)
    if isinstance(effects, pd.DataFrame):
        effects = LayerEffects.from_frame(effects)
    _style.check_kind(effects, LayerEffects, 'LayerEffects, the frame that PatchLayers returned, or one row of it')
    return _of_many(effects, column, figure, title, annotate)


def _of_many(
    effects: LayerEffects, column: str, figure: Figure | SubFigure | None, title: str | None, annotate: int
) -> Figure:
    table = effects.to_frame()
    check_some(table[column].to_numpy(), column, 'block')
    table['row'] = [_row_name(row) for row in table[['layer', 'head', 'name']].to_dict('records')]
    sites = [site for site in SITES if site in set(table['site'])]
    kinds = list(dict.fromkeys(table['type']))
    n_rows = max(table[table['site'] == site]['row'].nunique() for site in sites)
    size = (max(3.4, len(sites) * (0.3 * len(kinds) + 0.45) + 1.0), max(2.6, 0.24 * n_rows + 1.6))
    axes = _style.panels(figure, size, 1, len(sites))
    limit, certain, missing, mesh = np.nanmax(np.abs(table[column])), False, False, None
    for ax, site in zip(axes[0], sites, strict=True):
        of_site = table[table['site'] == site]
        rows = list(dict.fromkeys(of_site['row']))
        names = (column, f'{column}_low', f'{column}_high')
        matrix, low, high = (_pivot(of_site, name, rows, kinds) for name in names)
        mesh = cells(ax, matrix, limit)
        named_axes(ax, rows, [kind or 'all' for kind in kinds])
        ink = inks(mesh, matrix)
        certain |= dots(ax, low, high, ink)
        missing |= bool(np.isnan(matrix).any())
        values(ax, matrix, annotate, ink)
        ax.set_title(_NAMES.get(site, site), fontsize=9)
    of_heads = table['head'].notna().all()
    axes[0, 0].set_ylabel('head' if of_heads else 'layer', fontsize=9)
    what = 'one position (mean)' if effects.positions == SINGLE else 'the head' if of_heads else 'the block'
    bar = colour_bar(mesh, list(axes[0]), LABELS[column].format(what), aspect=25)
    _below(axes, handles(certain, missing, effects.confidence))
    return _style.finish_panels(axes, title, bar)


def _row_name(row: Mapping[Any, Any]) -> str:
    return str(row['layer']) if pd.isna(row['head']) else f'L{row["layer"]}H{row["head"]}'


def _pivot(table: pd.DataFrame, column: str, rows: list[str], kinds: list[str]) -> np.ndarray:
    found = table.pivot(index='row', columns='type', values=column)
    return found.reindex(index=rows, columns=kinds).to_numpy(dtype=np.float64)


def _below(axes: np.ndarray, found: list[Any]) -> None:
    if found:
        axes[0, 0].figure.legend(handles=found, loc='outside lower center', ncols=2, fontsize=8, frameon=False)


# -- one pair


def _of_row(row: Any, n_tokens: int, figure: Figure | SubFigure | None, title: str | None) -> Figure:
    if missing := [name for name in (_TOKENS, _TYPES) if name not in row]:
        raise ValueError(
            f"The row has no {', '.join(map(repr, missing))}: give one that PatchLayers(by='position') returned."
        )
    names = [str(name) for name in (row.index if isinstance(row, pd.Series) else row)]
    found = [place for place in places(pd.DataFrame(columns=names)) if np.ndim(row[place.column]) == 1]
    by_site: dict[str, dict[str, np.ndarray]] = {}
    for place in sorted(found, key=lambda place: (SITES.index(place.site), place.layer, place.unit or ())):
        name = _row_name({'layer': place.layer, 'head': None if place.unit is None else place.unit.index})
        by_site.setdefault(place.site, {})[name] = np.asarray(row[place.column], dtype=np.float64)
    tokens, kinds = list(map(str, row[_TOKENS])), list(row[_TYPES])
    everything = [array for of_site in by_site.values() for array in of_site.values()]
    if not everything or any(len(array) != len(tokens) for array in everything) or len(kinds) != len(tokens):
        raise ValueError('The row has no arrays with one effect for each of its position_tokens and position_types.')
    size = np.nan_to_num(np.abs(np.stack(everything))).max(axis=0)
    if not size.any():
        raise ValueError('All effects of the row are NaN or 0: look at its column patchable.')
    kept = shown(size, n_tokens)
    height = sum(0.14 * len(rows) + 0.3 for rows in by_site.values())
    axes = _style.panels(figure, (max(3.4, 0.125 * len(kept) + 1.2), height + 1.3), len(by_site), 1, sharex=True)
    for ax, (site, rows) in zip(axes[:, 0], by_site.items(), strict=True):
        mesh = cells(ax, np.stack(list(rows.values()))[:, kept], size.max())
        named_axes(ax, list(rows), [''] * len(kept), 7)
        dividers(ax, kept)
        ax.set_ylabel(_NAMES.get(site, site).replace(' ', '\n'), fontsize=8)
    token_ticks(axes[-1, 0], 'x', [tokens[i] for i in kept], [kinds[i] for i in kept])
    segments(axes[0, 0], [kinds[i] for i in kept])
    if len(kept) < len(tokens):
        axes[-1, 0].set_xlabel(f'{len(kept)} of {len(tokens)} positions, those with the largest effects', fontsize=8)
    bar = colour_bar(mesh, list(axes[:, 0]), _unit(row))
    return _style.finish_panels(axes, title, bar)


def _unit(row: Any) -> str:
    settings = Analysis.parse(row[ANALYSIS]).settings if ANALYSIS in row else {}
    return 'share of the score change' if settings.get('effect') == 'normalized' else 'score change'
