"""Where the sites of a model are: which module they pass, and at which end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pyterrier_mech.anatomy.layers import Layer


@dataclass(frozen=True)
class Place:
    """Where a site is.

    Attributes:
        module: The module that its tensor enters or leaves.
        end: 'input' or 'output'.
        rowwise: Whether an edit of one token does not reach other tokens within the layer, so that a layer that
            computes a single token may be edited too.
        share: Which of how many equal shares of the last dimension, where a map gives several tensors joined.
    """

    module: nn.Module
    end: str
    rowwise: bool = False
    share: tuple[int, int] = (0, 1)

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> torch.Tensor:
        """Returns the tensor from a call of the module."""
        if self.end == 'input':
            return args[0] if args else kwargs['hidden_states']
        whole = output if isinstance(output, torch.Tensor) else output[0]
        return whole if self.share[1] == 1 else whole.chunk(self.share[1], dim=-1)[self.share[0]]

    def written(self, output: Any, tensor: torch.Tensor) -> Any:
        """Returns the output of a call with another tensor at the place."""
        number, count = self.share
        if count > 1:
            whole = output if isinstance(output, torch.Tensor) else output[0]
            parts = list(whole.chunk(count, dim=-1))
            parts[number] = tensor
            tensor = torch.cat(parts, dim=-1)
        return tensor if isinstance(output, torch.Tensor) else (tensor, *output[1:])


def _projection(number: int) -> Callable[[Layer], Place]:
    def place(layer: Layer) -> Place:
        parts = layer.qkv_parts
        if not parts:
            raise ValueError(
                'the query, key and value projections of this family are not described: name them with qkv= by '
                'pyterrier_mech.rankers.register_family(Family(...))'
            )
        return Place(parts[0], 'output', share=(number, 3)) if len(parts) == 1 else Place(parts[number], 'output')

    return place


PLACES: dict[str, Callable[[Layer], Place]] = {
    'heads': lambda layer: Place(layer.attention_out, 'input', rowwise=True),
    'neurons': lambda layer: Place(layer.mlp_out, 'input', rowwise=True),
    'q': _projection(0),
    'k': _projection(1),
    'v': _projection(2),
    'resid_pre': lambda layer: Place(layer.module, 'input'),
    'attn_out': lambda layer: Place(layer.attention_out, 'output', rowwise=True),
    'mlp_out': lambda layer: Place(layer.mlp_out, 'output', rowwise=True),
    'resid_post': lambda layer: Place(layer.module, 'output'),
}
"""From a kind of site to its place in a layer. A new kind is one entry."""
