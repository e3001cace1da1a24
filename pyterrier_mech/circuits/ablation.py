"""Scores of aligned pairs with sets of units ablated, many sets in one pass over the pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from pyterrier_mech.anatomy.encoder import pool
from pyterrier_mech.inputs.alignment import Alignment
from pyterrier_mech.inputs.batching import in_batches
from pyterrier_mech.patch.interventions import Columns, PlainInputs, Replacement, Site, Values, columns_of, replaced
from pyterrier_mech.patch.pairs import Pairs, float_type
from pyterrier_mech.rankers.ranker import Ranker, as_numpy
from pyterrier_mech.units import Units


def ablated_scores(
    model: Ranker,
    pairs: Pairs,
    sets: Sequence[Units],
    value: str,
    reference: pd.DataFrame | None,
    seed: int,
    text_field: str,
) -> np.ndarray:
    """Returns the scores [sets, original or perturbed, good pairs] with each set of units ablated in both inputs.

    The two inputs of a pair get the same values at the same positions: with 'mean' both count the position as of one
    type, and with 'resample' both take from the same row. Otherwise the ablation would itself tell them apart.
    """
    original, perturbed = sides(pairs)
    every = Units.all(model)
    touched = Units(*(frozenset().union(*kinds) for kinds in zip(*((one.heads, one.neurons) for one in sets))))
    layers = {kind: {layer for layer, _ in getattr(touched, kind)} for kind in ('heads', 'neurons')}
    # Whole layers, so that a column's number is its place among the values.
    whole = Units(*(frozenset(u for u in getattr(every, kind) if u[0] in layers[kind]) for kind in layers))
    columns = [columns_of(model.encoder, units) for units in sets]
    scores: np.ndarray = np.empty((len(sets), 2, len(pairs.good)), dtype=float_type(model))

    with model.computing():
        replacement = Replacement(model, whole, value, reference, seed, text_field)

        def step(rows: np.ndarray) -> np.ndarray:
            values = [_kept(replacement.values(original, tower, rows)) for tower in range(len(model.towers))]
            return np.stack(
                [[_scores(model, side, rows, c, values) for side in (original, perturbed)] for c in columns]
            )

        lengths = original.lengths + replacement.lengths(original)
        for rows, batch in in_batches(lengths, model.loaded.budget, step, verbose=model.verbose, desc='faithfulness'):
            scores[:, :, rows] = batch
    return scores


def sides(pairs: Pairs) -> tuple[PlainInputs, PlainInputs]:
    """Returns original and perturbed inputs of the good pairs, both with the position types of the perturbed one."""
    model, towers = pairs.model, pairs.picked(np.arange(len(pairs.good)))
    queries = model.tokenize('query', pairs.texts[1]['query'])
    words = [set(queries.row(row).tolist()) for row in pairs.good]
    # A row of the reference is drawn by the original texts, so that a pair is not replaced by itself.
    texts = [[tuple(pairs.texts[0][field][row] for field in fields) for row in pairs.good] for fields in model.towers]
    typed = [
        [replace(pair, types=_types(pair, fields, known)) for pair, known in zip(tower, words, strict=True)]
        for tower, fields in zip(towers, model.towers, strict=True)
    ]
    swapped = [[replace(p, original=p.perturbed, original_mask=p.perturbed_mask) for p in tower] for tower in typed]
    return PlainInputs(typed, texts), PlainInputs(swapped, texts)


def _types(pair: Alignment, fields: Sequence[str], query: set[int]) -> tuple[str, ...]:
    """Returns the position types with what was inserted counted as what it is: a query word or a document word."""
    # Of a query and a text in one input, the first separator ends the query.
    end = pair.types.index('sep') if 'text' in fields else len(pair)
    start = end if 'query' in fields else 0
    return tuple(
        kind
        if kind != 'inserted'
        else 'query'
        if place < start or 'text' not in fields
        else 'doc_match'
        if int(token) in query
        else 'doc_other'
        for place, (kind, token) in enumerate(zip(pair.types, pair.perturbed, strict=True))
    )


def _kept(values: Values) -> Values:
    """Asks for the values of a site once and keeps them for all sets."""
    seen: dict[Site, torch.Tensor] = {}

    def of(site: Site) -> torch.Tensor:
        if site not in seen:
            seen[site] = values(site)
        return seen[site]

    return of


def _scores(
    model: Ranker, inputs: PlainInputs, rows: np.ndarray, columns: Columns, values: Sequence[Values]
) -> np.ndarray:
    """Returns the scores [rows] of one side with some columns replaced."""

    def vectors(tower: int) -> torch.Tensor:
        def chosen(site: Site) -> torch.Tensor:
            whole = values[tower](site)
            return whole if whole.dim() == 1 else whole[..., columns[site]]

        model_inputs = inputs.model_inputs(model, tower, rows)
        with replaced(model.encoder, columns, chosen):
            hidden = model.encoder.run(model_inputs)
        return pool(hidden, model_inputs['attention_mask'], model.pooling_)

    return as_numpy(model.read([vectors(tower) for tower in range(len(model.towers))]))
