"""Heads and neurons physically removed: a smaller ranker that is faster without special kernels.

Removing a head or a neuron leaves exactly what setting its output to zero leaves (Michel, Levy and Neubig, NeurIPS
2019, arXiv:1905.10650, mask heads so and then remove them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from pyterrier_mech.anatomy.resizing import check_resizable, keep_units
from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.units import KINDS, Units


def prune_units(model: Ranker, heads: Sequence[Sequence[int]], neurons: Sequence[Sequence[int]]) -> Ranker:
    """Returns a ranker with only some of the heads and neurons of another, which stays as it is.

    Args:
        model: The ranker; a pruned one can be pruned again.
        heads: For each layer, the sorted numbers of the heads that stay; a layer may have none.
        neurons: For each layer, the sorted numbers of the neurons that stay; a layer may have none.

    Returns:
        A ranker of the same class and settings, around a smaller module of its own.

    Raises:
        TypeError: If the model is not a ranker.
        ValueError: If units cannot be removed from the model, or it has no such units.
    """
    check_prunable(model)
    module = model.map.copied()
    keep_units(module, heads, neurons)
    return model.around(module)


def remove_units(model: Ranker, units: Any) -> Ranker:
    """Returns a ranker without some heads and neurons of another, which stays as it is.

    Args:
        model: The ranker.
        units: What is removed: what `Units.of` accepts, as in ``['L3H7', 'L3N120']``.

    Raises:
        TypeError: If the units are nothing that `Units.of` accepts, or the model is not a ranker.
        ValueError: If the model has not all of these units, or they cannot be removed.
    """
    check_prunable(model)
    left = Units.of(units).complement(model).by_site()
    heads, neurons = ([left.get(site, []) for site in model.counts(kind)] for kind in KINDS)
    return prune_units(model, heads, neurons)


def check_prunable(model: Any) -> None:
    """Checks that units can be removed from a ranker.

    Raises:
        TypeError: If it is not a ranker.
        ValueError: If its family, or what was done to its module, does not allow it.
    """
    if not isinstance(model, Ranker):
        raise TypeError(f'model must be a ranker, such as CrossEncoder(name) or BiEncoder(name); got {model!r}')
    check_resizable(model.map.base.config.model_type)
    check_weights(model)


def check_weights(model: Ranker) -> None:
    """Checks that the weights of units are what the linear maps hold.

    Raises:
        ValueError: If not, as with an adapter; the message says why and what to do.
    """
    reason = model.map.why_not_plain() if model.map.family.described else ''
    for part in [] if reason else [part for layer in model.map.layers for part in (layer.attention_out, layer.mlp_out)]:
        if type(part) is not nn.Linear:
            reason = f'there is a {type(part).__name__} where a Linear was expected'
    if reason:
        raise ValueError(
            f'{model!r} must have the plain module that was loaded, since its weights are read or cut; {reason}. Merge '
            "an adapter first, with peft's merge_and_unload(); remove hooks; load without quantisation, compile() and "
            "with attn_implementation='sdpa'"
        )
