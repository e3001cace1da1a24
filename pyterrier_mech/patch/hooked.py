"""Exact head patching through the model's own forward, for families that the wavefront does not describe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from pyterrier_mech.anatomy.encoder import Encoder, hooked, pool
from pyterrier_mech.patch.runs import Head, Side


class Hooked:
    """Patches heads of any encoder whose output projections are known."""

    def __init__(self, encoder: Encoder, pooling: str):
        """Stores encoder and pooling ('cls' or 'mean')."""
        self.encoder = encoder
        self.pooling = pooling

    def vectors(
        self, base: Side, targets: Sequence[torch.Tensor], heads: Sequence[Head], batch_tokens: int
    ) -> torch.Tensor:
        """As `Wavefront.vectors`: [heads, pairs, d], by one full forward a head, many heads in a batch."""
        n_pairs, n_tokens = base.inputs['input_ids'].shape
        size = max(1, batch_tokens // (n_pairs * n_tokens))
        chunks = [heads[start : start + size] for start in range(0, len(heads), size)]
        return torch.cat([self._chunk(base, targets, chunk) for chunk in chunks])

    def _chunk(self, base: Side, targets: Sequence[torch.Tensor], heads: Sequence[Head]) -> torch.Tensor:
        n_pairs = len(base.inputs['input_ids'])
        inputs = {name: tensor.repeat(len(heads), 1) for name, tensor in base.inputs.items()}
        with ExitStack() as hooks:
            for index in {layer for layer, _ in heads}:
                layer = self.encoder.layers[index]
                places = [
                    (slice(i * n_pairs, (i + 1) * n_pairs), layer.columns(head))
                    for i, (where, head) in enumerate(heads)
                    if where == index
                ]
                swap = _swap(places, targets[index].expand_as(base.trace.z[index]))
                hooks.enter_context(hooked(layer.attention_out, pre=swap))
            hidden = self.encoder.run(inputs)
        return pool(hidden, inputs['attention_mask'], self.pooling).unflatten(0, (len(heads), n_pairs))


def _swap(places: Sequence[tuple[slice, slice]], z: torch.Tensor) -> Callable[..., Any]:
    def pre(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        patched = args[0].clone()
        for rows, columns in places:
            patched[rows, :, columns] = z[..., columns]
        return (patched, *args[1:]), kwargs

    return pre
