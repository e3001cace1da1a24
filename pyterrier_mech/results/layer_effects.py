"""What patching says about each block of a layer and type of token, over many pairs: an Artifact."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from pyterrier_mech.columns import SITES, Place, places
from pyterrier_mech.results._aggregate import ABSENT, NUMBERS, Kind, Reading, arrays, floats, has_arrays
from pyterrier_mech.results.effects import Effects

KEYS = ('site', 'layer', 'head', 'type', 'name')
JOINT, SINGLE, ALL = 'patched together', 'mean of single positions', 'all'

_POSITION_TYPES = 'position_types'
# One order for the types of both schemes.
_TYPES = (
    'cls query query_same query_other sep sep_first sep_last doc_match doc_same doc_query doc_other inserted prompt'
)
_ORDER = {kind: place for place, kind in enumerate(_TYPES.split())}
_BLOCKS = SITES[:3]


class LayerEffects(Effects):
    """Effect of each block of a layer, at each type of token, over all rows of a patching run.

    Made by `from_frame` from the frame of ``PatchLayers``, or of ``PatchHeads`` with heads by type of token or by
    position. How the positions of a type were put together is a different question each time, and stands in
    ``positions``:

    - ``by='token_type'``, columns ``resid_pre.L3.inserted``, ``L2H9.inserted``: all positions of a type were patched
      together (``'patched together'``);
    - ``by='position'``, columns of arrays beside ``position_types``: one position was patched at a time, and the effect
      of a type in a row is the mean over its positions (``'mean of single positions'``), as in the figures of Chen,
      Merullo and Eickhoff (SIGIR 2024). These means are smaller where a type has many positions;
    - ``by=None``, columns ``attn_out.L3``: all positions were patched together (``'all'``).

    Columns of `to_frame`, one row per block and type: ``site`` ('resid_pre', 'attn_out', 'mlp_out'; for heads 'z', 'q',
    'k', 'v', 'pattern'), ``layer``, ``head`` (missing for blocks), ``type`` ('' for all positions), ``name``,
    ``ratio``, ``ratio_low``, ``ratio_high``, ``mean``, ``mean_low``, ``mean_high``, ``n`` (rows that entered),
    ``n_queries`` (their queries), ``n_absent`` (rows that have no such token: they enter nowhere). What entered is
    counted by the attributes of `Effects`.

    Attributes:
        positions: How the positions of a type were put together.
    """

    ARTIFACT_TYPE = 'layer_effects'
    TABLES = {'layers': (*KEYS, *NUMBERS, ABSENT)}
    MADE_BY = 'LayerEffects.from_frame(frame)'
    KIND = Kind(
        'LayerEffects',
        ('PatchLayers', 'AttributeLayers', 'PatchHeads'),
        'blocks',
        "columns of blocks such as 'attn_out.L0' or 'resid_pre.L0.inserted'",
    )

    positions: str

    @classmethod
    def _reading(cls, frame: pd.DataFrame) -> Reading:
        there = places(frame)
        found = [place for place in there if place.unit is None or _way(frame, place) != ALL]
        if there and not found:
            raise ValueError('The heads of this frame were patched as a whole: use HeadEffects.from_frame(frame).')
        if len(ways := sorted({_way(frame, place) for place in found})) > 1:
            raise ValueError(f'The columns of the frame were made in several ways ({", ".join(ways)}): keep one.')
        by_position = ways == [SINGLE]
        if by_position and _POSITION_TYPES not in frame.columns:
            raise ValueError(
                f'The frame has effects by position and no column {_POSITION_TYPES!r}: pass the whole frame.'
            )
        types = sorted({kind for cell in frame[_POSITION_TYPES] for kind in _listed(cell)}) if by_position else []
        types = _ordered(types or (place.type for place in found))
        found.sort(key=lambda place: _order(place, types))
        named = [place.of_type(kind) for place in found for kind in types] if by_position else found
        columns = [place.column for place in found]

        def values(rows: pd.DataFrame) -> np.ndarray:
            return _means(rows, columns, types) if by_position else floats(rows, columns)

        return Reading(_keys(named), columns, values, _absent(named, types), {'positions': ways[0] if ways else ''})


def _way(frame: pd.DataFrame, place: Place) -> str:
    return JOINT if place.type else SINGLE if has_arrays(frame, place.column) else ALL


def _listed(cell: Any) -> list[str]:
    """Returns the types of a row's positions; Parquet gives lists back as arrays."""
    return [] if cell is None or np.ndim(cell) == 0 else list(cell)


def _ordered(types: Iterable[str]) -> list[str]:
    """Returns each type once: those that alignments know in their order, then the others as they come."""
    return sorted(dict.fromkeys(types), key=lambda kind: _ORDER.get(kind, len(_ORDER)))


def _order(place: Place, types: list[str]) -> tuple[Any, ...]:
    unit = () if place.unit is None else (place.unit,)
    return SITES.index(place.site), place.layer, unit, types.index(place.type) if place.type else 0


def _keys(named: list[Place]) -> pd.DataFrame:
    rows = [(p.site, p.layer, None if p.unit is None else p.unit.index, p.type, p.column) for p in named]
    return pd.DataFrame(rows, columns=list(KEYS)).astype({'layer': 'int64', 'head': 'Int64'})


def _absent(named: list[Place], types: list[str]) -> Any:
    """Returns a function that tells where a row has no token of a type: no effect of that type is there."""
    groups = [[i for i, place in enumerate(named) if place.type == kind] for kind in types if kind]

    def absent(effects: np.ndarray) -> np.ndarray:
        there = np.ones(effects.shape, dtype=bool)
        for group in groups:
            there[:, group] = ~np.isnan(effects[:, group]).all(axis=1, keepdims=True)
        return ~there

    return absent


def _means(rows: pd.DataFrame, columns: list[str], types: list[str]) -> np.ndarray:
    """Returns the mean over the positions of each type [rows, columns x types], NaN where there is none."""
    kinds = [np.asarray(_listed(cell), dtype=object) for cell in rows[_POSITION_TYPES]]
    cells = [arrays(rows, column, [len(kind) for kind in kinds]) for column in columns]
    means = np.full((len(rows), len(columns), len(types)), np.nan)
    for row, kind in enumerate(kinds):
        effects = np.stack([column[row] for column in cells])
        for number, name in enumerate(types):
            if (there := kind == name).any():
                means[row, :, number] = effects[:, there].mean(axis=1)
    return means.reshape(len(rows), -1)
