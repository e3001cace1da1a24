"""A circuit: the heads and neurons that carry a behaviour, with what is known of each. An Artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt

from pyterrier_mech.provenance import as_qids
from pyterrier_mech.saving import SavedResult
from pyterrier_mech.units import HEADS, KINDS, NEURONS, Units, parse

UNKNOWN = 'unknown'

_HEADS = ('layer', 'head', 'name', 'effect', 'effect_low', 'effect_high', 'role')
_NEURONS = ('layer', 'neuron', 'name', 'effect', 'role')


class Circuit(SavedResult):
    """Heads and neurons with effects and roles, strongest first. Made by `discover_circuit` or `from_units`.

    Every intervention takes it as it is: ``AblatedReranker(model, circuit)``.

    Attributes:
        settings: How it was found.
        qids: Queries that it was found on, sorted, as strings: `faithfulness` refuses to judge it on them.
    """

    ARTIFACT_TYPE = 'circuit'
    TABLES = {'heads': _HEADS, 'neurons': _NEURONS}
    MADE_BY = 'discover_circuit(effects)'

    settings: dict[str, Any]
    qids: list[str]

    @classmethod
    def of_tables(
        cls,
        heads: pd.DataFrame,
        neurons: pd.DataFrame | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        qids: Sequence[str] = (),
    ) -> Circuit:
        """Makes a circuit from one row per unit, in the order that its parts are taken in.

        Args:
            heads: `name`, or `layer` and `head`, and where known `effect`, `effect_low`, `effect_high`, `role`.
            neurons: `name`, or `layer` and `neuron`, and where known `effect`, `role`.
            settings: How it was found, in plain values.
            qids: Queries that it was found on.

        Raises:
            ValueError: If a unit comes twice or a column is missing.
        """
        if neurons is None:
            neurons = pd.DataFrame({'name': []})
        tables = {'heads': _table(heads, HEADS, _HEADS), 'neurons': _table(neurons, NEURONS, _NEURONS)}
        summary = {'settings': dict(settings or {}), 'qids': sorted(as_qids(qids))}
        return cls(pt.Artifact.NO_PATH, tables=tables, summary=summary)

    @classmethod
    def from_units(cls, units: Any, *, qids: Sequence[str] = ()) -> Circuit:
        """Makes a circuit of given units, e.g. those of a publication; effects and roles are unknown.

        Args:
            units: As `Units.of` accepts them. A list keeps its order, which is that of the circuit's parts.
            qids: Queries that it was found on, where they are known.
        """
        given = [parse(unit) for unit in units] if isinstance(units, (list, tuple)) else sorted(Units.of(units))
        names = [[unit.name for unit in given if unit.site.kind == kind] for kind in KINDS]
        return cls.of_tables(*(pd.DataFrame({'name': of_kind}) for of_kind in names), qids=qids)

    @property
    def units(self) -> Units:
        """Heads and neurons as a set."""
        return Units.of([*self._tables['heads']['name'], *self._tables['neurons']['name']])

    @property
    def heads(self) -> pd.DataFrame:
        """One row a head, strongest first.

        Columns: `layer`, `head`, `name`, `effect` (share of the score change that it carries), `effect_low`,
        `effect_high`, `role`; NaN and 'unknown' where that is not known. Where a model has several stacks of layers,
        names tell them apart.
        """
        return self._tables['heads'].copy()

    @property
    def neurons(self) -> pd.DataFrame:
        """One row a neuron, strongest first: `layer`, `neuron`, `name`, `effect` (mean attribution), `role`."""
        return self._tables['neurons'].copy()

    def top(self, size: int) -> Circuit:
        """Returns the part with the `size` first heads and the same share of the neurons, the first ones.

        Of a circuit without heads, `size` counts neurons. A larger part contains every smaller one.

        Raises:
            ValueError: If the circuit is smaller.
        """
        heads, neurons = self._tables['heads'], self._tables['neurons']
        whole = len(heads) or len(neurons)
        if not 0 <= size <= whole:
            raise ValueError(f'size must be between 0 and {whole}, the size of this circuit; got size={size!r}')
        n_neurons = round(len(neurons) * size / whole) if whole else 0
        return Circuit.of_tables(
            heads.head(size if len(heads) else 0), neurons.head(n_neurons), settings=self.settings, qids=self.qids
        )

    def __len__(self) -> int:
        """Number of heads and neurons."""
        return len(self._tables['heads']) + len(self._tables['neurons'])

    def __repr__(self) -> str:
        """Tells what it has and how many queries it was found on."""
        heads = self._tables['heads']
        first = heads.head(5)[['name', 'role']].itertuples(index=False)
        names = [name if role == UNKNOWN else f'{name} ({role})' for name, role in first]
        more = ', …' if len(heads) > 5 else ''
        shown = f': {", ".join(names)}{more}' if names else ''
        return (
            f'Circuit({len(heads)} heads{shown}; {len(self._tables["neurons"])} neurons; '
            f'found on {len(self.qids)} queries)'
        )


def _table(given: pd.DataFrame, kind: str, columns: Sequence[str]) -> pd.DataFrame:
    number = columns[1]
    named = 'name' in given.columns
    if missing := [name for name in ('layer', number) if not named and name not in given.columns]:
        raise ValueError(f'The {kind} have no {", ".join(map(repr, missing))}: give one row a {number}.')
    places = given['name'] if named else given[['layer', number]].astype(int).itertuples(index=False, name=None)
    units = [parse(place, kind) for place in places]
    if strange := Units(units) - Units(units).of_kind(kind):
        raise ValueError(f'{strange.names[0]!r} stands among the {kind}, but is not one of them.')
    names = pd.Series([unit.name for unit in units], dtype='str')
    if names.duplicated().any():
        raise ValueError(f'{names[names.duplicated()].iloc[0]} comes twice: drop the duplicates.')
    filled: dict[str, Any] = {
        'layer': np.asarray([unit.site.layer for unit in units], dtype=np.int64),
        number: np.asarray([unit.index for unit in units], dtype=np.int64),
        'name': names,
    }
    for column in columns[3:]:
        known = given[column] if column in given.columns else pd.Series(np.nan, index=given.index, dtype=object)
        if column == 'role':
            filled[column] = pd.array(known.fillna(UNKNOWN).astype(str).tolist(), dtype='str')
        else:
            filled[column] = known.to_numpy(dtype=np.float64, na_value=np.nan)
    return pd.DataFrame(filled)
