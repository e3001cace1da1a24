"""What stands in the place of units for an input without a second version.

Zeros, means over a reference set by position type, or what another row of the reference gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyterrier_mech.anatomy.edits import Columns, columns_of, picking, put
from pyterrier_mech.anatomy.model import Edit, Values
from pyterrier_mech.draws import generator
from pyterrier_mech.inputs.alignment import PROMPT
from pyterrier_mech.inputs.alignment import TYPES as TEXT_TYPES
from pyterrier_mech.inputs.batching import in_batches
from pyterrier_mech.inputs.inputs import Inputs
from pyterrier_mech.units import Site, Units

TYPES = (*TEXT_TYPES, PROMPT)
VALUES = ('zero', 'mean', 'resample')

Asked = Callable[[Site], torch.Tensor]
"""From a site to the values of its columns, broadcastable to [rows, tokens, columns]."""


def check_value(value: str, reference: Any, text_field: str) -> None:
    """Checks the settings `value` and `reference` of a stage, before any work.

    Raises:
        TypeError: If the reference is no frame.
        ValueError: If the value is not known, the reference is missing or empty, lacks a column, or has rows without
            a query or text.
    """
    if value not in VALUES:
        raise ValueError(f'value must be one of {VALUES}; got {value!r}')
    if value == 'zero':
        return
    way = f"give reference=, a frame with the columns 'query' and {text_field!r}, e.g. results of other queries"
    if reference is None:
        raise ValueError(f'value={value!r} needs rows to take values from: {way}')
    if not isinstance(reference, pd.DataFrame):
        raise TypeError(f'reference must be a frame; got {type(reference).__name__}: {way}')
    missing = [column for column in ('query', text_field) if column not in reference.columns]
    if missing or not len(reference):
        found = f'lacks the columns {missing}' if missing else 'has no rows'
        raise ValueError(f'reference= {found}: {way}')
    for column in ('query', text_field):
        bad = [i for i, item in enumerate(reference[column].tolist()) if not isinstance(item, str)]
        if bad:
            raise ValueError(
                f'reference= has {len(bad)} of {len(reference)} rows without a string in column {column!r} (first at '
                f'position {bad[0]}). Remove them with reference.dropna(subset=[{column!r}]).'
            )


class Replacement:
    """The values that replace units of a ranker in a given input.

    Args:
        model: The ranker.
        units: What is replaced.
        value: 'zero'; 'mean', over all positions of the same type (`TYPES`) in the reference, or over all positions
            where the reference has none of that type; or 'resample', the values of another row of the reference.
        reference: Frame with query and text columns, for the two latter. A tower of a bi-encoder has its own means
            and its own other row.
        seed: Of the draw of the other row, which is a function of seed and of the texts that a tower reads, never of
            row order; a row is not drawn for itself where the reference has another. Position k of a type takes the
            other row's k-th position of that type, counted round; where it has none, those of the other kind of
            document token, else all positions stand in.
        text_field: Column of the text in the reference.
    """

    def __init__(
        self, model: Any, units: Units, value: str, reference: pd.DataFrame | None, seed: int, text_field: str
    ):
        """Prepares the reference; means are computed here, in one pass with a batch's memory."""
        self.model = model
        self.columns = columns_of(model.map, units)
        self.value = value
        self.seed = seed
        pairs = [] if value == 'zero' or reference is None else list(zip(reference['query'], reference[text_field]))
        if value == 'mean':
            self._means = _type_means(model, self.columns, Inputs.plain(model, *zip(*pairs), types=True))
        elif value == 'resample':
            # Sorted, so that the draw does not depend on the order of the reference.
            drawn = list(zip(*sorted(set(pairs))))
            self._others = Inputs.plain(model, *drawn, types=True)
            self._rows: list[list[int]] = []
            self._places: list[dict[tuple[str, ...], int]] = []
            for fields in model.towers:
                texts = keys(fields, *drawn)
                first: dict[tuple[str, ...], int] = {}
                for row, key in enumerate(texts):
                    first.setdefault(key, row)
                self._rows.append(list(first.values()))
                self._places.append({key: place for place, key in enumerate(first)})

    def lengths(self, read: Sequence[Sequence[tuple[str, ...]]]) -> np.ndarray:
        """Returns, for every row, the tokens that have to be run for its values.

        Args:
            read: For every tower, the texts of every row that it reads; see `keys`.
        """
        total = np.zeros(len(read[0]), dtype=np.int64)
        if self.value == 'resample':
            for tower, texts in enumerate(read):
                lengths = self._others.towers[tower].lengths
                total += lengths[[self._other(tower, key) for key in texts]]
        return total

    def values(
        self, inputs: Inputs, tower: int, rows: Sequence[int] | np.ndarray, texts: Sequence[tuple[str, ...]]
    ) -> Asked:
        """Returns the values for one tower of some rows, of which the tower reads `texts`."""
        device = self.model.map.device
        if self.value == 'zero':
            return lambda site: torch.zeros(1, device=device)
        # What was inserted counts as what it is: a reference has no such type.
        types = inputs.types(tower, rows, inserted=False)
        if self.value == 'mean':
            index = torch.from_numpy(types).to(device)
            return lambda site: self._means[tower][site].to(device)[index]
        drawn = [self._other(tower, key) for key in texts]
        others, which = np.unique(drawn, return_inverse=True)
        seen = self.model.map.run(self._others.batch(tower, others), record=picking(self.columns)).values
        there = self._others.types(tower, others)[which]
        positions = np.stack([_counterparts(mine, theirs) for mine, theirs in zip(types, there, strict=True)])
        at = torch.from_numpy(which)[:, None].to(device), torch.from_numpy(positions).to(device)
        return lambda site: seen[site][at]

    def edits(
        self, inputs: Inputs, tower: int, rows: Sequence[int] | np.ndarray, texts: Sequence[tuple[str, ...]]
    ) -> dict[Site, Edit]:
        """Returns the edits that replace the units for one tower of some rows."""
        return replacing(self.columns, self.values(inputs, tower, rows, texts))

    def _other(self, tower: int, texts: tuple[str, ...]) -> int:
        """Returns the row of the reference that is drawn for an input."""
        rows, own = self._rows[tower], self._places[tower].get(texts)
        candidates = len(rows) - (own is not None)
        if not candidates:
            return rows[0]
        drawn = int(generator(int(self.seed), *texts).random() * candidates)
        # The row's own place is left out of the count.
        return rows[drawn + (own is not None and drawn >= own)]


def replacing(columns: Columns, values: Asked) -> dict[Site, Edit]:
    """Returns the edits that put values in the place of some columns."""

    def one(site: Site, places: torch.Tensor) -> Edit:
        return put(places, lambda: values(site))

    return {site: one(site, places) for site, places in columns.items()}


def keys(fields: Sequence[str], queries: Sequence[str], texts: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns, for every row, the texts that a tower of these fields reads."""
    values = {'query': queries, 'text': texts}
    return list(zip(*[values[field] for field in fields], strict=True))


def _type_means(model: Any, columns: Columns, inputs: Inputs) -> list[Values]:
    """Returns, for every tower and site, the mean of every type [types + 1, columns]; unseen types have the overall."""
    means = []
    for tower, sequences in enumerate(inputs.towers):
        sums: Values = {}
        counts = np.zeros(len(TYPES) + 1)

        def step(rows: np.ndarray, tower: int = tower) -> tuple[np.ndarray, Values]:
            there = _masks(inputs.types(tower, rows))
            masks = [torch.from_numpy(mask).to(model.map.device) for mask in there]

            def sums_of(places: torch.Tensor) -> Edit:
                return lambda z: torch.stack([z[..., places][m].sum(0, dtype=torch.float64) for m in masks]).cpu()

            record = {site: sums_of(places) for site, places in columns.items()}
            return there.sum((1, 2)), model.map.run(inputs.batch(tower, rows), record=record).values

        with model.computing():
            # A batch that runs out of memory half way must not have been added yet.
            for _, (n, batch) in in_batches(sequences.lengths, model.budget, step, verbose=model.verbose, desc='means'):
                counts += n
                sums = {site: sums[site] + batch[site] if site in sums else batch[site] for site in batch}
        unseen = torch.from_numpy(counts == 0)
        divisor = torch.from_numpy(np.maximum(counts, 1))[:, None]
        averages = {site: total / divisor for site, total in sums.items()}
        means.append({site: torch.where(unseen[:, None], a[-1], a).to(model.map.dtype) for site, a in averages.items()})
    return means


def _masks(types: np.ndarray) -> np.ndarray:
    """Returns where each type stands, and last where there is any token, [types + 1, rows, tokens]."""
    return np.stack([*[types == kind for kind in range(len(TYPES))], types >= 0])


def _counterparts(types: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Returns, for every position of an input, a position of another input, of the same type where it has one."""
    match, other = TYPES.index('doc_match'), TYPES.index('doc_other')
    positions = np.zeros(len(types), dtype=np.int64)
    for kind in set(types[types >= 0].tolist()):
        mine, theirs = np.flatnonzero(types == kind), np.flatnonzero(there == kind)
        if not len(theirs) and kind in (match, other):
            theirs = np.flatnonzero(there == (other if kind == match else match))
        if not len(theirs):
            theirs = np.flatnonzero(there >= 0)
        positions[mine] = theirs[np.arange(len(mine)) % len(theirs)]
    return positions
