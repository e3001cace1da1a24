"""Scores of aligned pairs with sets of units ablated, many sets in one pass over the pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pyterrier_mech.anatomy.edits import Columns, columns_of
from pyterrier_mech.frames import Fields
from pyterrier_mech.inputs.batching import collected
from pyterrier_mech.inputs.inputs import ORIGINAL, PERTURBED, Inputs
from pyterrier_mech.patch.replacement import Asked, Replacement, keys, replacing
from pyterrier_mech.rankers.ranker import as_numpy
from pyterrier_mech.units import Site, Units


def ablated_scores(
    model: Any, inputs: Inputs, original: Fields, sets: Sequence[Units], made: Callable[[Units], Replacement]
) -> np.ndarray:
    """Returns the scores [sets, original or perturbed, good rows] with each set of units ablated in both inputs.

    The two inputs of a pair get the same values at the same positions: with 'mean' both count the position as of one
    type, and with 'resample' both take from the same row. Otherwise the ablation would itself tell them apart.

    Args:
        model: The ranker.
        inputs: Aligned pairs.
        original: Their original queries and texts: a row of the reference is drawn by them, so that a pair is not
            replaced by itself.
        sets: The sets of units.
        made: Makes what stands in the place of ablated units, of whole layers.
    """
    # Whole layers, so that a column's number is its place among the values.
    touched = {unit.site for units in sets for unit in units}
    whole = Units.all(model, sorted({site.kind for site in touched})).at(*touched)
    columns = [columns_of(model.map, units) for units in sets]
    read = [
        keys(tower, *([original[f][row] for row in inputs.good] for f in ('query', 'text'))) for tower in model.towers
    ]
    replacement = made(whole)

    def step(batch: np.ndarray) -> np.ndarray:
        rows = inputs.good[batch]
        values = [
            _kept(replacement.values(inputs, tower, rows, [texts[i] for i in batch]))
            for tower, texts in enumerate(read)
        ]

        def score(side: str, places: Columns) -> np.ndarray:
            edits = [replacing(places, _some(asked, places)) for asked in values]
            return as_numpy(model.run(inputs, rows, side=side, edits=edits))

        return np.stack([[score(side, places) for side in (ORIGINAL, PERTURBED)] for places in columns])

    lengths = inputs.lengths[inputs.good] + replacement.lengths(read)
    with model.computing():
        return model.finite(collected(lengths, model.budget, step, verbose=model.verbose, desc='faithfulness'))


def _kept(values: Asked) -> Asked:
    """Asks for the values of a site once and keeps them for all sets."""
    seen: dict[Site, torch.Tensor] = {}

    def of(site: Site) -> torch.Tensor:
        if site not in seen:
            seen[site] = values(site)
        return seen[site]

    return of


def _some(values: Asked, places: Columns) -> Asked:
    """Asks for the values of some columns of each site."""

    def of(site: Site) -> torch.Tensor:
        whole = values(site)
        return whole if whole.dim() == 1 else whole[..., places[site]]

    return of
