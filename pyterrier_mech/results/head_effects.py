"""What patching says about each head, over many pairs: an Artifact made from the frame of PatchHeads."""

from __future__ import annotations

import numpy as np
import pandas as pd

from pyterrier_mech.columns import Z, places
from pyterrier_mech.results._aggregate import NUMBERS, Kind, Reading, floats, has_arrays
from pyterrier_mech.results.effects import Effects
from pyterrier_mech.units import parse

KEYS = ('layer', 'head', 'name')


class HeadEffects(Effects):
    """Effect of each head over all rows of a patching run, with an interval over queries.

    Made by `from_frame` from the frame of ``PatchHeads``, or of ``AttributeHeads`` with a method that reads two texts:
    one or more columns ``L{layer}H{head}``, or ``L{layer}H{head}.k`` where only the keys of heads were patched (or 'q',
    'v', 'pattern'). Layers may have different numbers of heads. Heads that were patched by type of token, or one
    position at a time, are for `LayerEffects`.

    Columns of `to_frame`, one row per head, sorted by layer and head: ``layer``, ``head``, ``name``, ``ratio``,
    ``ratio_low``, ``ratio_high``, ``mean``, ``mean_low``, ``mean_high``, ``n`` (rows that entered), ``n_queries``
    (their queries). What entered is counted by the attributes of `Effects`.
    """

    ARTIFACT_TYPE = 'head_effects'
    TABLES = {'heads': (*KEYS, *NUMBERS)}
    MADE_BY = 'HeadEffects.from_frame(frame)'
    KIND = Kind('HeadEffects', ('PatchHeads', 'AttributeHeads'), 'heads', "head columns such as 'L0H0'")

    @classmethod
    def _reading(cls, frame: pd.DataFrame) -> Reading:
        found = [(place.unit, place) for place in places(frame) if place.unit is not None]
        whole = [(unit, place) for unit, place in sorted(found) if not place.type]
        by_type = len(found) > len(whole)
        if by_type or any(has_arrays(frame, place.column) for _, place in whole):
            how = 'by type of token' if by_type else 'one position at a time'
            raise ValueError(f'The heads of this frame were patched {how}: use LayerEffects.from_frame(frame).')
        if len(sites := sorted({place.site for _, place in whole})) > 1:
            raise ValueError(
                f'The frame has heads that were patched at {sites}: keep the columns of one of these sites.'
            )
        columns = [place.column for _, place in whole]
        keys = pd.DataFrame([(unit.site.layer, unit.index, unit.name) for unit, _ in whole], columns=list(KEYS))
        notes = {'site': sites[0]} if sites not in ([], [Z]) else {}
        return Reading(keys, columns, lambda rows: floats(rows, columns), notes=notes)

    @property
    def site(self) -> str:
        """What of the heads was patched: 'z', their whole outputs, or 'q', 'k', 'v', 'pattern'."""
        return self._summary.get('site', Z)

    def matrix(self, column: str = 'ratio', stack: str = '') -> np.ndarray:
        """Returns a column of `to_frame` as an array ``[layers, max heads]``, NaN where there is no head.

        Args:
            column: A column of numbers.
            stack: Which stack of layers, where the names of heads begin with one: 'cross' for ``cross.L3H7``.

        Raises:
            ValueError: If the column holds no numbers of heads, or there is no such stack.
        """
        return head_grid(self._table, self._table['name'], column, stack)


def head_grid(table: pd.DataFrame, heads: pd.Series, column: str, stack: str) -> np.ndarray:
    """Returns a column of numbers as an array ``[layers, max heads]``, NaN where there is no head.

    Args:
        table: One row a head.
        heads: Their names.
        column: The column.
        stack: Which stack of layers.

    Raises:
        ValueError: If the column holds no numbers, or there is no such stack.
    """
    if column not in NUMBERS:
        raise ValueError(f'column must be one of {list(NUMBERS)}; got column={column!r}')
    units = [parse(name) for name in heads]
    inside = [unit.site.stack == stack for unit in units]
    if not any(inside):
        raise ValueError(f'stack must be one of {sorted({unit.site.stack for unit in units})}; got stack={stack!r}')
    numbers = np.asarray([(unit.site.layer, unit.index) for unit, here in zip(units, inside, strict=True) if here])
    matrix = np.full(numbers.max(axis=0) + 1, np.nan)
    matrix[tuple(numbers.T)] = table.loc[inside, column]
    return matrix
