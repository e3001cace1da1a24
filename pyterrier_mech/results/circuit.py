"""A circuit: the heads and neurons that carry a behaviour, with what is known of each. An Artifact."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt

from pyterrier_mech.columns import path_of
from pyterrier_mech.provenance import as_qids
from pyterrier_mech.saving import SavedResult, plain, write_atomic
from pyterrier_mech.units import HEADS, KINDS, NEURONS, Units, parse

UNKNOWN = 'unknown'

_HEADS = ('layer', 'head', 'name', 'effect', 'effect_low', 'effect_high', 'role')
_NEURONS = ('layer', 'neuron', 'name', 'effect', 'role')
_EDGES = ('sender', 'receiver', 'name', 'effect', 'effect_low', 'effect_high')


class Circuit(SavedResult):
    """Heads and neurons with effects and roles, strongest first. Made by `discover_circuit` or `from_units`.

    Every intervention takes it as it is: ``AblatedReranker(model, circuit)``. Edges say how its heads are connected;
    no intervention reads them.

    Attributes:
        settings: How it was found.
        qids: Queries that it was found on, sorted, as strings: `faithfulness` refuses to judge it on them.
    """

    ARTIFACT_TYPE = 'circuit'
    TABLES = {'heads': _HEADS, 'neurons': _NEURONS, 'edges': _EDGES}
    MADE_BY = 'discover_circuit(effects)'

    settings: dict[str, Any]
    qids: list[str]

    @classmethod
    def of_tables(
        cls,
        heads: pd.DataFrame,
        neurons: pd.DataFrame | None = None,
        *,
        edges: pd.DataFrame | None = None,
        settings: Mapping[str, Any] | None = None,
        qids: Sequence[str] = (),
    ) -> Circuit:
        """Makes a circuit from one row per unit, in the order that its parts are taken in.

        Args:
            heads: `name`, or `layer` and `head`, and where known `effect`, `effect_low`, `effect_high`, `role`.
            neurons: `name`, or `layer` and `neuron`, and where known `effect`, `role`.
            edges: `name`, such as 'L0H4>score' or 'L1H1>L2H9.k', between heads of the circuit, and where known
                `effect`, `effect_low`, `effect_high`.
            settings: How it was found, in plain values.
            qids: Queries that it was found on.

        Raises:
            ValueError: If a unit or an edge comes twice, a column is missing, or an edge has an end elsewhere.
        """
        none = pd.DataFrame({'name': []})
        tables = {'heads': _table(heads, HEADS, _HEADS)}
        tables['neurons'] = _table(none if neurons is None else neurons, NEURONS, _NEURONS)
        tables['edges'] = _edge_table(none if edges is None else edges, set(tables['heads']['name']))
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

    @property
    def edges(self) -> pd.DataFrame:
        """One row a path between its heads, or from one of them to the score, strongest first.

        Columns: `sender`, `receiver` ('score', or a head and its input: 'L2H9.k'), `name`, `effect` (share of the score
        change that the path carries), `effect_low`, `effect_high`.
        """
        return self._tables['edges'].copy()

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
        heads, edges = heads.head(size if len(heads) else 0), self._tables['edges']
        within = edges['name'].map(lambda name: path_of(name).heads <= set(heads['name'])).astype(bool)
        return Circuit.of_tables(
            heads, neurons.head(n_neurons), edges=edges[within], settings=self.settings, qids=self.qids
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """Returns the circuit as JSON, for other programs and for people; `from_json` reads it back.

        Args:
            path: A file to write it to as well.
        """
        tables = {name: table.to_dict('records') for name, table in self._tables.items()}
        content = json.dumps(plain({**tables, 'settings': self.settings, 'qids': self.qids}), indent=2) + '\n'
        if path is not None:
            write_atomic(Path(path), content)
        return content

    @classmethod
    def from_json(cls, source: str | Path) -> Circuit:
        """Makes a circuit from what `to_json` returned, or from the file that it wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is something else.
        """
        text = str(source)
        content = text if text.lstrip().startswith('{') else Path(source).read_text(encoding='utf-8')
        try:
            values = json.loads(content)
            tables = {name: pd.DataFrame(values[name], columns=list(of)) for name, of in cls.TABLES.items()}
            settings, qids = values['settings'], values['qids']
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f'Give what Circuit.to_json() returned, or its file; got {text[:60]!r} ({error!r}).'
            ) from error
        return cls.of_tables(tables['heads'], tables['neurons'], edges=tables['edges'], settings=settings, qids=qids)

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
        edges = f'{len(self._tables["edges"])} edges; ' if len(self._tables['edges']) else ''
        return (
            f'Circuit({len(heads)} heads{shown}; {len(self._tables["neurons"])} neurons; {edges}'
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


def _edge_table(given: pd.DataFrame, heads: set[str]) -> pd.DataFrame:
    if 'name' not in given.columns:
        raise ValueError("The edges have no 'name': give one row an edge, such as 'L0H4>score' or 'L1H1>L2H9.k'.")
    paths = [path_of(name) for name in given['name']]
    if outside := next((path for path in paths if not path.heads <= heads), None):
        raise ValueError(f'{outside.name} has an end that is not among the heads of the circuit.')
    if given['name'].duplicated().any():
        raise ValueError(f'{given["name"][given["name"].duplicated()].iloc[0]} comes twice: drop the duplicates.')
    parts = [[path.sender for path in paths], [path.receiver for path in paths], [path.name for path in paths]]
    filled = {column: pd.Series(part, dtype='str') for column, part in zip(_EDGES[:3], parts, strict=True)}
    for column in _EDGES[3:]:
        known = given[column].to_numpy(dtype=np.float64, na_value=np.nan) if column in given.columns else np.nan
        filled[column] = pd.Series(known, index=range(len(paths)), dtype=np.float64)
    return pd.DataFrame(filled)
