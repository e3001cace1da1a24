"""A gate on every head and neuron, and what the score says of it: one forward and one backward for all units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from pyterrier_mech.anatomy.edits import scale
from pyterrier_mech.anatomy.model import Edit
from pyterrier_mech.attribute.path import not_finite
from pyterrier_mech.attribute.points import GRAPH
from pyterrier_mech.frames import row_names
from pyterrier_mech.inputs.batching import in_batches
from pyterrier_mech.prune.data import FitData
from pyterrier_mech.rankers.ranker import Ranker, as_numpy
from pyterrier_mech.units import HEADS, KINDS, NEURONS, Site

_T = TypeVar('_T')
# Forward runs that one forward and one backward run, which counts two, are.
PASSES = 3.0


@dataclass(frozen=True, eq=False)
class UnitGradients:
    """How the scores of some rows answer to the gate of every unit.

    Attributes:
        rows: Row numbers.
        scores: Score of each row.
        heads: For each layer [rows, heads], the derivative of the row's score by a factor on the head's output at
            factor 1: Σ_t z·∂s/∂z, over all positions and the head's width.
        neurons: The same of the neurons, for each layer [rows, neurons].
    """

    rows: np.ndarray
    scores: np.ndarray
    heads: list[np.ndarray]
    neurons: list[np.ndarray]


def gating(model: Ranker, gates: Sequence[torch.Tensor]) -> dict[Site, Edit]:
    """Returns the edits that multiply the output of every head and neuron by its gate.

    Args:
        model: A ranker.
        gates: Gates [units] or [rows, units] of the heads and then of the neurons, layer by layer.
    """
    heads = [scale(gate, layer.head_dim) for gate, layer in zip(gates, model.map.layers, strict=False)]
    neurons = [scale(gate) for gate in gates[len(heads) :]]
    return dict(zip([*model.counts(HEADS), *model.counts(NEURONS)], [*heads, *neurons], strict=True))


def unit_gradients(model: Ranker, data: FitData) -> Iterator[UnitGradients]:
    """Yields the derivatives of the scores by the gates of all units, a batch of rows at a time.

    Raises:
        ValueError: If one is not finite; the message names the row.
    """
    inputs = data.inputs(model)
    like = next(model.map.module.parameters())
    counts = [count for kind in KINDS for count in model.counts(kind).values()]

    def step(rows: np.ndarray) -> UnitGradients:
        gates = [like.new_ones(len(rows), count).requires_grad_() for count in counts]
        scores = model.run(inputs, rows, edits=gating(model, gates))
        # A layer without heads or neurons may leave its maps out.
        gradients = torch.autograd.grad(scores.sum(), gates, allow_unused=True, materialize_grads=True)
        values = [as_numpy(gradient) for gradient in gradients]
        return UnitGradients(rows, as_numpy(scores), values[: model.n_layers], values[model.n_layers :])

    for rows, result in with_gradients(model, inputs.lengths, step, verbose=model.verbose):
        good = np.isfinite(result.scores)
        for values in [*result.heads, *result.neurons]:
            good &= np.isfinite(values).all(axis=1)
        if not good.all():
            raise not_finite(row_names(data.frame.iloc[rows[~good]]), model)
        yield result


def with_gradients(
    model: Ranker, lengths: np.ndarray, step: Callable[[np.ndarray], _T], *, verbose: bool
) -> Iterator[tuple[np.ndarray, _T]]:
    """Runs `step` over all rows as `in_batches` does, with gradients on."""
    with model.computing(gradients=True):
        yield from in_batches(GRAPH * lengths, model.budget, step, verbose=verbose, desc='gradients')
