"""Interventions on a batch: outputs of heads and activations of neurons replaced, and what replaces them.

`replaced` puts values in the place of units for the length of a `with` block, by hooks on the unmodified module.
`Replacement` makes the values for an input without a second version of it: zeros, means over a reference set by
position type, or what another row of the reference gives.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from pyterrier_mech.anatomy.encoder import Encoder, hooked
from pyterrier_mech.inputs.alignment import Aligner, Alignment
from pyterrier_mech.inputs.batching import in_batches
from pyterrier_mech.patch.runs import side_inputs
from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.units import Units

VALUES = ('zero', 'mean', 'resample')
TYPES = ('cls', 'query', 'sep', 'doc_match', 'doc_other')

Site = tuple[str, int]
"""('heads' or 'neurons', layer): the input of the layer's attention output projection, or of its last MLP map."""

Columns = dict[Site, torch.Tensor]
"""For every site that is touched, where the values of the units stand in its last dimension."""

Values = Callable[[Site], torch.Tensor]
"""From a site to the values of its columns, broadcastable to [rows, tokens, columns]."""


# -- replacing and recording


def columns_of(encoder: Encoder, units: Units) -> Columns:
    """Returns where the values of units stand, site by site, in the order of (layer, unit)."""
    places: dict[Site, list[int]] = {}
    for layer, head in sorted(units.heads):
        columns = encoder.layers[layer].columns(head)
        places.setdefault(('heads', layer), []).extend(range(columns.start, columns.stop))
    for layer, neuron in sorted(units.neurons):
        places.setdefault(('neurons', layer), []).append(neuron)
    return {site: torch.tensor(columns, device=encoder.device) for site, columns in places.items()}


@contextmanager
def replaced(encoder: Encoder, columns: Columns, values: Values) -> Iterator[None]:
    """Replaces the values of units in every forward of the block; the hooks are gone after an exception too.

    Args:
        encoder: The encoder; its weights are left alone.
        columns: From `columns_of`.
        values: Asked for a site when the forward reaches it, so that not all sites' values exist at a time.
    """
    with ExitStack() as hooks:
        for site, places in columns.items():
            hooks.enter_context(hooked(_module(encoder, site), pre=_replace(site, places, values)))
        yield


def recorded(
    encoder: Encoder,
    inputs: dict[str, torch.Tensor],
    columns: Columns,
    keep: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
) -> dict[Site, torch.Tensor]:
    """Runs the base model and returns, for every site, `keep` of the values [rows, tokens, columns] of its units."""
    seen: dict[Site, torch.Tensor] = {}
    with ExitStack() as hooks:
        for site, places in columns.items():
            hooks.enter_context(hooked(_module(encoder, site), pre=_record(site, places, seen, keep)))
        encoder.run(inputs)
    return seen


def zeros(encoder: Encoder) -> Values:
    """Returns values that are zero at every site."""
    return lambda site: torch.zeros(1, device=encoder.device)


def _module(encoder: Encoder, site: Site) -> nn.Module:
    kind, layer = site
    return encoder.layers[layer].attention_out if kind == 'heads' else encoder.layers[layer].mlp_out


def _replace(site: Site, places: torch.Tensor, values: Values) -> Callable[..., Any]:
    def pre(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        changed = args[0].clone()
        changed[..., places] = values(site).to(changed.dtype)
        return (changed, *args[1:]), kwargs

    return pre


def _record(
    site: Site, places: torch.Tensor, seen: dict[Site, torch.Tensor], keep: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[..., None]:
    def pre(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[site] = keep(args[0][..., places])

    return pre


# -- inputs without a second version


@dataclass(frozen=True)
class PlainInputs:
    """Rows of query and text as a ranker reads them.

    Attributes:
        towers: For every tower of the ranker, every row aligned with itself, which gives its position types.
        texts: For every tower, the texts of every row that the tower reads.
    """

    towers: list[list[Alignment]]
    texts: list[list[tuple[str, ...]]]

    @classmethod
    def of(cls, model: Ranker, queries: Sequence[str], texts: Sequence[str]) -> PlainInputs:
        """Tokenises and truncates as the ranker does."""
        aligner = Aligner(model.loaded.maker)
        fields = {'query': queries, 'text': texts}
        ids = {field: model.tokenize(field, list(values)) for field, values in fields.items()}
        towers = []
        for tower in model.towers:
            parts = [[ids[field].row(i) for field in tower] for i in range(len(queries))]
            aligned = [aligner.align(p, p, tower, query=ids['query'].row(i)) for i, p in enumerate(parts)]
            towers.append(aligned)
        return cls(towers, [list(zip(*[fields[field] for field in tower], strict=True)) for tower in model.towers])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row, over all towers."""
        return np.asarray([[len(pair) for pair in tower] for tower in self.towers], dtype=np.int64).sum(0)

    def model_inputs(self, model: Ranker, tower: int, rows: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """Returns the model inputs of one tower of some rows, [rows, tokens] each."""
        pairs = [self.towers[tower][row] for row in rows]
        return side_inputs(model.encoder, pairs, 'original', model.loaded.maker.uses_segments)

    def types(self, tower: int, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the position types of one tower of some rows as places in `TYPES`, -1 for padding, [rows, tokens]."""
        pairs = [self.towers[tower][row] for row in rows]
        types = np.full((len(pairs), max(map(len, pairs))), -1, dtype=np.int64)
        for row, pair in zip(types, pairs, strict=True):
            row[: len(pair)] = [TYPES.index(kind) for kind in pair.types]
        return types


# -- what replaces


def check_value(value: str, reference: Any, text_field: str) -> None:
    """Checks the settings `value` and `reference` of a stage, before any work.

    Raises:
        TypeError: If the reference is no frame.
        ValueError: If the value is not known, the reference is missing or empty, lacks a column, or has rows without
            a query or text.
    """
    if value not in VALUES:
        raise ValueError(f'value={value!r} is none of {VALUES}')
    if value == 'zero':
        return
    way = f"give reference=, a frame with the columns 'query' and {text_field!r}, e.g. results of other queries"
    if reference is None:
        raise ValueError(f'value={value!r} needs rows to take values from: {way}')
    if not isinstance(reference, pd.DataFrame):
        raise TypeError(f'reference={type(reference).__name__} is no frame: {way}')
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
        self, model: Ranker, units: Units, value: str, reference: pd.DataFrame | None, seed: int, text_field: str
    ):
        """Prepares the reference; means are computed here, in one pass with a batch's memory."""
        self.model = model
        self.columns = columns_of(model.encoder, units)
        self.value = value
        self.seed = seed
        pairs = [] if value == 'zero' or reference is None else list(zip(reference['query'], reference[text_field]))
        if value == 'mean':
            self._means = _type_means(model, self.columns, PlainInputs.of(model, *zip(*pairs)))
        elif value == 'resample':
            # Sorted, so that the draw does not depend on the order of the reference.
            self._others = PlainInputs.of(model, *zip(*sorted(set(pairs))))
            self._rows: list[list[int]] = []
            self._places: list[dict[tuple[str, ...], int]] = []
            for texts in self._others.texts:
                first: dict[tuple[str, ...], int] = {}
                for row, key in enumerate(texts):
                    first.setdefault(key, row)
                self._rows.append(list(first.values()))
                self._places.append({key: place for place, key in enumerate(first)})

    def lengths(self, inputs: PlainInputs) -> np.ndarray:
        """Returns, for every row, the tokens that have to be run for its values."""
        total = np.zeros(len(inputs.texts[0]), dtype=np.int64)
        if self.value == 'resample':
            for tower, texts in enumerate(inputs.texts):
                total += [len(self._others.towers[tower][self._other(tower, key)]) for key in texts]
        return total

    def values(self, inputs: PlainInputs, tower: int, rows: Sequence[int] | np.ndarray) -> Values:
        """Returns the values for one tower of some rows."""
        if self.value == 'zero':
            return zeros(self.model.encoder)
        device, types = self.model.encoder.device, inputs.types(tower, rows)
        if self.value == 'mean':
            index = torch.from_numpy(types).to(device)
            return lambda site: self._means[tower][site].to(device)[index]
        drawn = [self._other(tower, inputs.texts[tower][row]) for row in rows]
        others, which = np.unique(drawn, return_inverse=True)
        seen = recorded(self.model.encoder, self._others.model_inputs(self.model, tower, others), self.columns)
        there = self._others.types(tower, others)[which]
        positions = np.stack([_counterparts(mine, theirs) for mine, theirs in zip(types, there, strict=True)])
        at = torch.from_numpy(which)[:, None].to(device), torch.from_numpy(positions).to(device)
        return lambda site: seen[site][at]

    def _other(self, tower: int, texts: tuple[str, ...]) -> int:
        """Returns the row of the reference that is drawn for an input."""
        rows, own = self._rows[tower], self._places[tower].get(texts)
        candidates = len(rows) - (own is not None)
        if not candidates:
            return rows[0]
        digest = hashlib.sha256(repr((int(self.seed), *texts)).encode()).digest()
        drawn = int(random.Random(int.from_bytes(digest, 'big')).random() * candidates)
        # The row's own place is left out of the count.
        return rows[drawn + (own is not None and drawn >= own)]


def _type_means(model: Ranker, columns: Columns, inputs: PlainInputs) -> list[dict[Site, torch.Tensor]]:
    """Returns, for every tower and site, the mean of every type [types + 1, columns]; unseen types have the overall."""
    means = []
    for tower in range(len(model.towers)):
        sums: dict[Site, torch.Tensor] = {}
        counts = np.zeros(len(TYPES) + 1)

        def step(rows: np.ndarray, tower: int = tower) -> tuple[np.ndarray, dict[Site, torch.Tensor]]:
            there = _masks(inputs.types(tower, rows))
            masks = [torch.from_numpy(mask).to(model.encoder.device) for mask in there]

            def keep(values: torch.Tensor) -> torch.Tensor:
                return torch.stack([values[mask].sum(0, dtype=torch.float64) for mask in masks]).cpu()

            model_inputs = inputs.model_inputs(model, tower, rows)
            return there.sum((1, 2)), recorded(model.encoder, model_inputs, columns, keep)

        lengths = np.asarray([len(pair) for pair in inputs.towers[tower]], dtype=np.int64)
        with model.computing():
            # A batch that runs out of memory half way must not have been added yet.
            for _, (n, batch) in in_batches(lengths, model.loaded.budget, step, verbose=model.verbose, desc='means'):
                counts += n
                sums = {site: sums[site] + batch[site] if site in sums else batch[site] for site in batch}
        unseen = torch.from_numpy(counts == 0)
        divisor = torch.from_numpy(np.maximum(counts, 1))[:, None]
        dtype = next(model.encoder.module.parameters()).dtype
        averages = {site: total / divisor for site, total in sums.items()}
        means.append({site: torch.where(unseen[:, None], a[-1], a).to(dtype) for site, a in averages.items()})
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
