"""Chooses how single heads are replaced: by the wavefront where all parts are as described, else by hooks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from pyterrier_mech.anatomy.model import ModelMap, Run, Values
from pyterrier_mech.inputs.inputs import ORIGINAL, PERTURBED, Inputs
from pyterrier_mech.patch.hooked import Hooked
from pyterrier_mech.patch.wavefront import Wavefront
from pyterrier_mech.units import HEADS, Unit

_logger = logging.getLogger('pyterrier_mech')
_told: set[str] = set()


class Engine(Protocol):
    """Replaces the outputs of heads, one head at a time."""

    def vectors(self, base: Run, targets: Values, heads: Sequence[Unit], batch_tokens: int) -> torch.Tensor:
        """Returns the vectors [heads, pairs, d] of the base run with one head at a time replaced.

        Args:
            base: A run by `traced`.
            targets: For the sites of the heads, joined head outputs to take a head's from, broadcastable to
                [pairs, tokens, heads·d_h].
            heads: The heads, sorted.
            batch_tokens: Tokens of the variants that are in memory at a time, padding included.
        """


def engine_for(model: Any) -> Engine:
    """Returns an engine to keep for one call of a stage; says once where there is no fast one."""
    reason = model.map.why_not_plain()
    if not reason:
        return Wavefront(model.map, model.readout)
    if reason not in _told:
        _told.add(reason)
        _logger.info('no fast engine (%s); replacing heads by one full forward each', reason)
    return Hooked(model.map, model.readout)


def traced(model: ModelMap, inputs: Inputs, tower: int, rows: np.ndarray, side: str = ORIGINAL) -> Run:
    """Runs one side of some rows and records what engines need: inputs, head outputs and contexts of all layers."""
    return model.run(inputs.batch(tower, rows, side), record=_sites(model), contexts=True)


def traced_sides(model: ModelMap, inputs: Inputs, tower: int, rows: np.ndarray) -> tuple[Run, Run]:
    """As `traced`, both sides at once; returns the original and the perturbed run."""
    sides = [inputs.batch(tower, rows, side) for side in (ORIGINAL, PERTURBED)]
    if sides[0].tensors.keys() != sides[1].tensors.keys():
        # Only one side hides positions; the other keeps the numbers that the model gives by itself.
        original, perturbed = (model.run(side, record=_sites(model), contexts=True) for side in sides)
        return original, perturbed
    both = model.run(sides[0].joined(sides[1]), record=_sites(model), contexts=True)
    return both.rows(slice(0, len(rows))), both.rows(slice(len(rows), None))


def _sites(model: ModelMap) -> list[Any]:
    return [*model.sites('resid_pre'), *model.sites(HEADS)]
