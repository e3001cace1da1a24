"""What heads and neurons cost: parameters, operations or time, layer by layer and width by width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from pyterrier_mech.anatomy.encoder import Layer
from pyterrier_mech.rankers.ranker import Ranker


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
        theirs = [model.head_counts, [model.n_neurons(layer) for layer in range(model.n_layers)]]
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
    every = sum(p.numel() for layer in model.encoder.layers for p in layer.module.parameters())
    for layer in model.encoder.layers:
        # The biases of the output maps stay when all units are gone.
        one_head = layer.head_dim * (sum(map(_of_a_row, layer.qkv_parts)) + layer.attention_out.out_features)
        one_neuron = _of_a_row(layer.mlp_in) + layer.mlp_out.out_features
        heads.append(one_head * np.arange(layer.n_heads + 1, dtype=float))
        neurons.append(one_neuron * np.arange(layer.n_neurons + 1, dtype=float))
        owned += one_head * layer.n_heads + one_neuron * layer.n_neurons
    return Costs(heads, neurons, every - owned, 'parameters')


def flop_costs(model: Ranker, tokens: float) -> Costs:
    """Returns the floating-point operations that scoring executes in the layers for a sequence of `tokens` tokens.

    They are those of matrix products, two for a multiplication and addition. Where the ranker reads the first token
    alone, its last layer works for that token alone, and its heads and neurons cost next to nothing. Where it reads
    query and text apart, they are those of one of the two sequences.
    """
    first_only = model.pooling_ == 'cls' and model.encoder.family.described
    heads, neurons = [], []
    for number, layer in enumerate(model.encoder.layers):
        last = first_only and number == model.n_layers - 1
        one_head, one_neuron = _first_token(layer, tokens) if last else _all_tokens(layer, tokens)
        heads.append(one_head * np.arange(layer.n_heads + 1))
        neurons.append(one_neuron * np.arange(layer.n_neurons + 1))
    return Costs(heads, neurons, 0.0, f'FLOPs at {tokens:.0f} tokens')


def _of_a_row(part: nn.Linear) -> int:
    return part.in_features + (part.bias is not None)


def _all_tokens(layer: Layer, tokens: float) -> tuple[float, float]:
    d = layer.attention_out.out_features
    return 8 * tokens * d * layer.head_dim + 4 * tokens**2 * layer.head_dim, 4 * tokens * d


def _first_token(layer: Layer, tokens: float) -> tuple[float, float]:
    """As `Layer.z_first` computes it: keys and values are absorbed into the one query."""
    d = layer.attention_out.out_features
    return 8 * d * layer.head_dim + 4 * tokens * d, 4 * d
