"""A gate on every head and neuron, and what the score says of it: one forward and one backward for all units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pyterrier_mech.anatomy.encoder import Encoder, hooked
from pyterrier_mech.attribute.path import not_finite
from pyterrier_mech.attribute.points import GRAPH
from pyterrier_mech.attribute.stage import row_names
from pyterrier_mech.inputs.batching import in_batches
from pyterrier_mech.patch.interventions import PlainInputs
from pyterrier_mech.prune.data import FitData
from pyterrier_mech.rankers.ranker import Ranker, as_numpy

Gates = Sequence[torch.Tensor]


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


@contextmanager
def gated(encoder: Encoder, heads: Gates, neurons: Gates) -> Iterator[None]:
    """Multiplies the output of every head and neuron by its gate in every forward of the block.

    Args:
        encoder: An encoder; its weights are left alone.
        heads: For each layer, gates [heads] or [rows, heads].
        neurons: For each layer, gates [neurons] or [rows, neurons].
    """
    with ExitStack() as hooks:
        for layer, of_heads, of_neurons in zip(encoder.layers, heads, neurons, strict=True):
            hooks.enter_context(hooked(layer.attention_out, pre=_multiply(of_heads, layer.head_dim)))
            hooks.enter_context(hooked(layer.mlp_out, pre=_multiply(of_neurons, 1)))
        yield


def _multiply(gates: torch.Tensor, width: int) -> Callable[..., Any]:
    def pre(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        factors = gates.repeat_interleave(width, dim=-1) if width > 1 else gates
        return (args[0] * factors.unsqueeze(-2).to(args[0].dtype), *args[1:]), kwargs

    return pre


def score_rows(model: Ranker, inputs: PlainInputs, rows: np.ndarray) -> torch.Tensor:
    """Returns the scores [rows] of some rows, with their graph where gradients are on."""
    towers = range(len(model.towers))
    return model.read([model.encoder.pooled(inputs.model_inputs(model, i, rows), model.pooling_) for i in towers])


def unit_gradients(model: Ranker, data: FitData) -> Iterator[UnitGradients]:
    """Yields the derivatives of the scores by the gates of all units, a batch of rows at a time.

    Raises:
        ValueError: If one is not finite; the message names the row.
    """
    inputs = PlainInputs.of(model, data.queries, data.texts)
    encoder = model.encoder
    like = next(encoder.module.parameters())

    def step(rows: np.ndarray) -> UnitGradients:
        widths = [layer.n_heads for layer in encoder.layers], [layer.n_neurons for layer in encoder.layers]
        heads, neurons = [[like.new_ones(len(rows), n).requires_grad_() for n in kind] for kind in widths]
        with gated(encoder, heads, neurons):
            scores = score_rows(model, inputs, rows)
        # A layer without heads or neurons may leave its maps out.
        gradients = torch.autograd.grad(scores.sum(), [*heads, *neurons], allow_unused=True, materialize_grads=True)
        values = [as_numpy(gradient) for gradient in gradients]
        return UnitGradients(rows, as_numpy(scores), values[: len(heads)], values[len(heads) :])

    with model.computing(gradients=True):
        budget, verbose = model.loaded.budget, model.verbose
        for rows, result in in_batches(GRAPH * inputs.lengths, budget, step, verbose=verbose, desc='gradients'):
            _check_finite(model, data, rows, result)
            yield result


def _check_finite(model: Ranker, data: FitData, rows: np.ndarray, result: UnitGradients) -> None:
    good = np.isfinite(result.scores)
    for values in [*result.heads, *result.neurons]:
        good &= np.isfinite(values).all(axis=1)
    if not good.all():
        raise not_finite(row_names(data.frame.iloc[rows[~good]]), model)
