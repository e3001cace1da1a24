"""What heads and neurons cost: parameters, operations or time, layer by layer and width by width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pyterrier_mech.anatomy.layers import Layer
from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.units import KINDS


@dataclass(frozen=True, eq=False)
class Costs:
    """The cost of a ranker as a sum over layers, in any one unit.

    Attributes:
        heads: For each layer, the cost of its attention with 0, 1, … all of its heads, [heads + 1].
        neurons: For each layer, the cost of its feed-forward block with 0, 1, … all of its neurons, [neurons + 1].
        fixed: What is left when both are gone everywhere.
        unit: In what it is measured, e.g. 'FLOPs a pair'.
    """

    heads: Sequence[np.ndarray]
    neurons: Sequence[np.ndarray]
    fixed: float
    unit: str

    def total(self, heads: Sequence[int], neurons: Sequence[int]) -> float:
        """Returns the cost with a number of heads and neurons in each layer."""
        parts = [costs[width] for costs, width in zip(self.heads, heads, strict=True)]
        parts += [costs[width] for costs, width in zip(self.neurons, neurons, strict=True)]
        return float(self.fixed + sum(parts))

    def check(self, model: Ranker) -> Costs:
        """Returns these costs if they are for the widths of a ranker.

        Raises:
            ValueError: If not.
        """
        ours = [[len(costs) - 1 for costs in kind] for kind in (self.heads, self.neurons)]
        theirs = [list(model.counts(kind).values()) for kind in KINDS]
        if ours != theirs:
            raise ValueError(
                f'these costs are for a model with {ours[0]} heads and {ours[1]} neurons; {model!r} has {theirs[0]} '
                f'and {theirs[1]}'
            )
        return self

    @property
    def whole(self) -> float:
        """The cost with all heads and neurons."""
        return self.total([len(c) - 1 for c in self.heads], [len(c) - 1 for c in self.neurons])


def parameter_costs(model: Ranker) -> Costs:
    """Returns the parameters of the encoder's layers; what no unit owns (norms, output biases) is fixed."""
    heads, neurons, owned = [], [], 0
    layers = model.map.layers
    every = sum(p.numel() for layer in layers for p in layer.module.parameters())
    for layer in layers:
        # The biases of the output maps stay when all units are gone.
        one_head = layer.head_dim * (sum(map(_of_a_row, layer.qkv_parts)) + layer.attention_out.out_features)
        one_neuron = _of_a_row(layer.mlp_in) + layer.mlp_out.out_features
        heads.append(one_head * np.arange(layer.n_heads + 1, dtype=float))
        neurons.append(one_neuron * np.arange(layer.n_neurons + 1, dtype=float))
        owned += one_head * layer.n_heads + one_neuron * layer.n_neurons
    return Costs(heads, neurons, every - owned, 'parameters')


def flop_costs(model: Ranker, tokens: float) -> Costs:
    """Returns the floating-point operations that scoring executes in the layers for a sequence of `tokens` tokens.

    They are those of matrix products, two for a multiplication and addition. Where the ranker reads one token alone,
    its last layer works for that token alone, and its heads and neurons cost next to nothing. Where it reads query and
    text apart, they are those of one of the two sequences.
    """
    heads, neurons = [], []
    whole = layers_of_all_tokens(model)
    for number, layer in enumerate(model.map.layers):
        one_head, one_neuron = (_all_tokens if number in whole else _one_token)(layer, tokens)
        heads.append(one_head * np.arange(layer.n_heads + 1))
        neurons.append(one_neuron * np.arange(layer.n_neurons + 1))
    return Costs(heads, neurons, 0.0, f'FLOPs at {tokens:.0f} tokens')


def layers_of_all_tokens(model: Ranker) -> range:
    """Returns the layers that work for all tokens: the last does not where one token alone is read."""
    short = model.readout.at(torch.ones(1, 1, dtype=torch.long)) is not None and not model.map.why_not_plain()
    return range(model.n_layers - short)


def _of_a_row(part: nn.Linear) -> int:
    return part.in_features + (part.bias is not None)


def _all_tokens(layer: Layer, tokens: float) -> tuple[float, float]:
    d = layer.attention_out.out_features
    return 8 * tokens * d * layer.head_dim + 4 * tokens**2 * layer.head_dim, 4 * tokens * d


def _one_token(layer: Layer, tokens: float) -> tuple[float, float]:
    """As `Layer.z_at` computes it: keys and values are absorbed into the one query."""
    d = layer.attention_out.out_features
    return 8 * d * layer.head_dim + 4 * tokens * d, 4 * d
