"""Single weights set to zero, for comparison with whole units: no smaller and no faster."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import rankdata
from torch import nn

from pyterrier_mech.anatomy.layers import Layer
from pyterrier_mech.prune.protocol import check_share
from pyterrier_mech.prune.scores import UnitScores
from pyterrier_mech.prune.surgery import check_prunable
from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.units import HEADS, NEURONS


def mask_weights(model: Ranker, sparsity: float, scores: UnitScores | None = None) -> Ranker:
    """Returns a copy of a ranker in which single weights of the encoder's linear maps are zero.

    It is there for comparison alone: the copy is as large as the ranker and no faster, since dense products do not
    skip zeros. Training fills the zeros again, unless `Distillation(keep_zeros=True)` or `FineTuning(keep_zeros=True)`
    masks their gradients. Their `recover` takes the copy as student and the ranker as teacher.

    The smallest `|w|` of all layers go first. With `scores`, `|w|` is multiplied by the importance of the unit that the
    weight belongs to: (rank − ½) / n of its score among all n units of its kind, between 0 and 1. To a head belong
    its rows of the query, key and value maps and its columns of the output map; to a neuron its row of the first map
    of the feed-forward block and its column of the last. Biases stay.

    Args:
        model: The ranker, which stays as it is; of a family whose units can be removed.
        sparsity: The share of these weights that is zero, between 0 and 1. Exactly round(sparsity · n) of the n
            weights are; of equal ones those of earlier layers and places.
        scores: What a criterion said of the units, e.g. `SMA().scores(model, data)`.

    Raises:
        TypeError: If the model is not a ranker.
        ValueError: If the sparsity is out of range, the scores are not for this ranker, or units cannot be removed.

    Source: Han, Pool, Tran, Dally, NeurIPS 2015, arXiv 1506.02626.
    """
    check_share('sparsity', sparsity, 'To set half to zero give 0.5.')
    check_prunable(model)
    if scores is not None:
        scores.check(model)
    copied = model.around(model.map.copied())
    heads = _importance(None if scores is None else scores.heads, list(model.counts(HEADS).values()))
    neurons = _importance(None if scores is None else scores.neurons, list(model.counts(NEURONS).values()))
    parts = [
        part for layer, h, n in zip(copied.map.layers, heads, neurons, strict=True) for part in _parts(layer, h, n)
    ]
    sizes = torch.cat([(part.weight.detach().abs().double() * factors).flatten() for part, factors in parts])
    gone = torch.zeros(len(sizes), dtype=torch.bool, device=sizes.device)
    gone[sizes.argsort(stable=True)[: round(sparsity * len(sizes))]] = True
    with torch.no_grad():
        for (linear, _), mask in zip(parts, gone.split([part.weight.numel() for part, _ in parts]), strict=True):
            linear.weight.masked_fill_(mask.view_as(linear.weight), 0.0)
    return copied


def _importance(scores: Sequence[np.ndarray] | None, counts: Sequence[int]) -> list[np.ndarray]:
    """Returns a factor in (0, 1] for every unit of a kind, layer by layer."""
    if scores is None:
        return [np.ones(count) for count in counts]
    # Less a half: so the mean factor is ½ for either kind, however many units there are.
    ranks = (rankdata(np.concatenate(scores)) - 0.5) / max(1, sum(counts))
    return np.split(ranks, np.cumsum(counts)[:-1])


def _parts(layer: Layer, heads: np.ndarray, neurons: np.ndarray) -> list[tuple[nn.Linear, torch.Tensor]]:
    """Returns the linear maps of a layer, each with the factors of the units that its weights belong to."""
    device = layer.mlp_out.weight.device
    of_heads, of_neurons = (torch.from_numpy(values).to(device) for values in (heads.repeat(layer.head_dim), neurons))
    return [
        *((part, of_heads[:, None]) for part in layer.qkv_parts),
        (layer.attention_out, of_heads),
        (layer.mlp_in, of_neurons[:, None]),
        (layer.mlp_out, of_neurons),
    ]
