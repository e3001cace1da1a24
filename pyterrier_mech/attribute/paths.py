"""Attribution of paths between heads, exact to the receiver and by a gradient from there, as a pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pyterrier_mech.anatomy.model import Values
from pyterrier_mech.attribute.gradients import with_gradients
from pyterrier_mech.attribute.path import not_finite
from pyterrier_mech.frames import Fields
from pyterrier_mech.inputs.inputs import ORIGINAL, PERTURBED, Inputs
from pyterrier_mech.patch.engine import Engine
from pyterrier_mech.patch.pairs import pair_columns, started
from pyterrier_mech.patch.paths import PatchPaths, Path
from pyterrier_mech.patch.variants import changing, variants_of
from pyterrier_mech.rankers.ranker import as_numpy
from pyterrier_mech.units import Unit


@dataclass(eq=False, repr=False)
class AttributePaths(PatchPaths):
    """How much of each head's effect goes into another head, estimated: `PatchPaths` at a small part of its cost.

    What a sender tells a receiver is exact, as in `PatchPaths`. What that does to the score is a first-order estimate:
    with q what the receiver reads in the original pair, q′ what the sender makes of it, and s the score,
    (q′ − q) · ∂s/∂q, summed over positions and width; so for keys and values. Paths to the score are exact. One
    backward run gives all of this, where `PatchPaths` takes a run for every path.

    **Input columns** and **Output columns** as `PatchPaths` has them. The ranking is kept.

    Args:
        model: A ranker.
        receivers: 'score', a list of receivers, or 'all'; see `PatchPaths`.
        senders: The heads that send; by default all.
        direction: 'perturbed_to_original', or 'original_to_perturbed'; see `PatchPaths`.
        effect: 'difference', or 'normalized': divided by the whole score change in the patching direction.
        filler: Token that stands where one side has none; see `PatchHeads`.
        batch_tokens: Tokens in memory at a time; by default as the model has it.
        text_field: Column of the text; by default as the model has it.
        verbose: Shows a progress bar; by default as the model has it.

    Raises:
        TypeError: If the model is not a ranker.
        ValueError: As `PatchPaths`; if a gradient is not finite.
    """

    def _patch(self, versions: tuple[Fields, Fields], paths: Sequence[Path], names: Sequence[str]) -> dict[str, Any]:
        model = self.model
        inputs = Inputs.pairs(model, *versions, self.filler)
        table = started(model, inputs, versions, len(paths))
        number = {path: i for i, path in enumerate(paths)}
        read = self._read()

        def step(engine: Engine, rows: np.ndarray) -> np.ndarray:
            values: list[Values] = [{} for _ in inputs.towers]
            gradients: list[Values] = list(values)
            if read:
                with model.computing(gradients=True):
                    base = self._ordered([ORIGINAL, PERTURBED])[0]
                    _, values, gradients = with_gradients(model, inputs, rows, base, read)
            vectors, effects = [], torch.zeros(0)
            for tower in range(len(inputs.towers)):
                direct, sent = self._told(engine, inputs, tower, rows, number, values[tower], gradients[tower])
                effects = sent if tower == 0 else effects + sent
                vectors.append(direct)
            scores = model.read(vectors)
            effects[: len(direct) - 2] += scores[2:] - self._ordered(scores[:2])[0]
            return as_numpy(torch.cat([scores[:2], effects]))

        n_senders = len(self.chosen('senders'))
        for rows, values in self._swept(inputs, np.full(len(inputs), n_senders), step):
            if bad := [row for row, ok in zip(rows, np.isfinite(values).all(axis=0), strict=True) if not ok]:
                raise not_finite([f'row {row}' for row in bad], model)
            table[:, rows] = values
        table[2:] /= self._unit(table)
        return pair_columns(table, inputs.problems, names)

    def _told(
        self,
        engine: Engine,
        inputs: Inputs,
        tower: int,
        rows: np.ndarray,
        number: dict[Path, int],
        values: Values,
        gradients: Values,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the vectors [original, perturbed, paths to the score…] x pairs x d, and estimates [paths, pairs]."""
        model, senders = self.model, variants_of(self.chosen('senders'))
        receivers = self._receivers()
        both, (base, source) = self._frozen_sides(engine, inputs, tower, rows)
        to_score = len(senders) if None in receivers else 0
        plain = self._ordered(both)[0]
        vectors = torch.cat([both, plain.expand(to_score, *plain.shape)])
        effects = both.new_zeros(len(number), len(rows))
        active = [senders[i] for i in changing(model.map, base, source.values, senders)]
        if not active:
            return vectors, effects
        for some, site, told in engine.frozen(base, source.values, active, self._read(), self.budget.tokens):
            sent = [Unit(variant.site, variant.unit or 0) for variant in some]
            if site is None:
                if to_score:
                    vectors[[2 + number[unit, None] for unit in sent]] = told
                continue
            products = ((told - values[site]) * gradients[site]).sum(2)
            for receiver in [unit for unit in receivers if unit is not None and unit.site == site]:
                columns = model.map.layers[site.layer].columns(receiver.index)
                effects[[number[unit, receiver] for unit in sent]] = products[..., columns].sum(-1)
        return vectors, effects
