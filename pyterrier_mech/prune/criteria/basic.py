"""Criteria that look at no data: chance, and the size of the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from pyterrier_mech.anatomy.layers import Layer
from pyterrier_mech.draws import generator
from pyterrier_mech.prune.data import FitData
from pyterrier_mech.prune.scores import UnitScores
from pyterrier_mech.prune.surgery import check_weights
from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.units import KINDS

Of = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Random:
    """Chance: a number in [0, 1) that is a function of seed, kind, layer and unit alone. Needs no data.

    Args:
        seed: Random seed.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    seed: int = 0

    def scores(self, model: Ranker, data: FitData | None = None) -> UnitScores:
        """Draws a number for every unit of a ranker."""
        heads, neurons = (
            [self._draw(site.kind, site.layer, count) for site, count in model.counts(kind).items()] for kind in KINDS
        )
        return UnitScores(heads, neurons).check(model)

    def _draw(self, kind: str, layer: int, count: int) -> np.ndarray:
        drawn = generator(int(self.seed), kind, layer)
        # One after the other, so that a unit's number does not depend on how many there are.
        return np.asarray([drawn.random() for _ in range(count)], dtype=np.float64)


@dataclass(frozen=True)
class Magnitude:
    """The size of a unit's weights: their root mean square. Needs no data.

    The weights of a head are its rows of the query, key and value maps, biases included, and its columns of the
    attention output map; those of a neuron its row of the first map of the feed-forward block (two where the block is
    gated), bias included, and its column of the last. Where the family is not described, its column or columns of the
    output map alone, which `notes` says.

    The L2 norm is divided by the square root of the number of weights, so that a head does not win by having more of
    them. That puts both kinds into one unit but does not make a head's weight worth a neuron's: they are not joint.

    Source: Han, Pool, Tran, Dally, NeurIPS 2015, arXiv 1506.02626; of whole units, Li et al., ICLR 2017, arXiv
    1608.08710.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def scores(self, model: Ranker, data: FitData | None = None) -> UnitScores:
        """Measures the weights of every unit of a ranker.

        Raises:
            ValueError: If its linear maps do not hold the weights that it computes with, as with an adapter.
        """
        check_weights(model)
        heads = [_rms(head_weights(layer)) for layer in model.map.layers]
        neurons = [_rms(neuron_weights(layer)) for layer in model.map.layers]
        notes: dict[str, Any] = {'weights': 'all' if model.map.family.described else 'of the output maps alone'}
        return UnitScores(heads, neurons, notes=notes).check(model)


def _rms(weights: list[torch.Tensor]) -> np.ndarray:
    """Returns the root mean square of each unit's weights, from matrices [units, weights of a unit]."""
    sums = torch.stack([part.double().square().sum(1) for part in weights]).sum(0)
    return (sums / sum(part.shape[1] for part in weights)).sqrt().cpu().numpy()


def head_weights(layer: Layer, of: Of = torch.Tensor.detach) -> list[torch.Tensor]:
    """Returns the weights of the heads of a layer as matrices [heads, weights of a head], one a map.

    Args:
        layer: The layer.
        of: From a parameter to what is taken of it, of the same shape.
    """
    parts = [of(layer.attention_out.weight).t()]
    if layer.family.described:
        # A fused map stacks the rows of queries, keys and values.
        n_parts = 3 // len(layer.qkv_parts)
        parts.extend(part for module in layer.qkv_parts for part in _chunks(module, of, n_parts))
    # Shapes are said in full: a layer may have no heads.
    return [part.reshape(layer.n_heads, layer.head_dim * part.shape[1]) for part in parts]


def neuron_weights(layer: Layer, of: Of = torch.Tensor.detach) -> list[torch.Tensor]:
    """As `head_weights`, of the neurons: matrices [neurons, weights of a neuron]."""
    parts = [of(layer.mlp_out.weight).t()]
    if layer.family.described:
        own_gates = bool(layer.family.mlp_gate)
        parts.extend(_chunks(layer.mlp_in, of, 2 if layer.family.gated and not own_gates else 1))
        parts.extend(_chunks(layer.part('mlp_gate'), of, 1) if own_gates else [])
    return parts


def _chunks(module: Any, of: Of, count: int) -> list[torch.Tensor]:
    """Returns weights [rows, in] and, where there are, biases [rows, 1] of each part of a linear map."""
    tensors = [of(module.weight)] if module.bias is None else [of(module.weight), of(module.bias)[:, None]]
    return [part for tensor in tensors for part in tensor.chunk(count)]
