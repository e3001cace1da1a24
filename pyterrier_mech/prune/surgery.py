"""Heads and neurons physically removed: a smaller ranker that is faster without special kernels.

Removing a head or a neuron leaves exactly what setting its output to zero leaves (Michel, Levy and Neubig, NeurIPS
2019, arXiv:1905.10650, mask heads so and then remove them).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from pyterrier_mech.anatomy.resizing import check_resizable, keep_units
from pyterrier_mech.rankers.bi_encoder import BiEncoder
from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.units import Units


def prune_units(model: Ranker, heads: Sequence[Sequence[int]], neurons: Sequence[Sequence[int]]) -> Ranker:
    """Returns a ranker with only some of the heads and neurons of another, which stays as it is.

    Args:
        model: The ranker; a pruned one can be pruned again.
        heads: For each layer, the sorted numbers of the heads that stay; a layer may have none.
        neurons: For each layer, the sorted numbers of the neurons that stay; a layer may have none.

    Returns:
        A ranker of the same class and settings, around a smaller module of its own.

    Raises:
        TypeError: If the model is no ranker.
        ValueError: If units of the model's family cannot be removed, or it has no such units.
    """
    if not isinstance(model, Ranker):
        raise TypeError(f'{model!r} is no ranker whose units could be removed: give a CrossEncoder or BiEncoder')
    check_resizable(model.encoder.base.config.model_type)
    module = copy.deepcopy(model.encoder.module)
    keep_units(module, heads, neurons)
    return around(model, module)


def remove_units(model: Ranker, units: Any) -> Ranker:
    """Returns a ranker without some heads and neurons of another, which stays as it is.

    Args:
        model: The ranker.
        units: What is removed: what `Units.of` accepts, as in ``['L3H7', 'L3N120']``.

    Raises:
        TypeError: If the units are nothing that `Units.of` accepts, or the model is no ranker.
        ValueError: If the model has not all of these units, or units of its family cannot be removed.
    """
    if not isinstance(model, Ranker):
        raise TypeError(f'{model!r} is no ranker whose units could be removed: give a CrossEncoder or BiEncoder')
    units = Units.of(units).check(model)
    layers = range(model.n_layers)
    heads = [[h for h in range(model.n_heads(layer)) if (layer, h) not in units.heads] for layer in layers]
    neurons = [[n for n in range(model.n_neurons(layer)) if (layer, n) not in units.neurons] for layer in layers]
    return prune_units(model, heads, neurons)


def around(model: Ranker, module: nn.Module) -> Ranker:
    """Returns a ranker of the same class and settings around another module, with the same tokenizer.

    Settings that a ranker reads from files beside its model, which a module has not, are those in use.
    """
    settings = model._settings()
    settings.update(
        model=module,
        tokenizer=model.loaded.maker.tokenizer,
        max_length=model.loaded.maker.max_length,
        device=None,
        dtype='tf32' if model.dtype == 'tf32' else None,
    )
    if isinstance(model, BiEncoder):
        prefixes = model.prefixes_
        settings.update(
            pooling=model.pooling_,
            similarity=model.similarity_,
            query_prefix=prefixes['query'],
            text_prefix=prefixes['text'],
        )
    return type(model)(**settings)
