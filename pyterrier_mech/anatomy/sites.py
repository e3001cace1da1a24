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
    """

    module: nn.Module
    end: str
    rowwise: bool = False

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> torch.Tensor:
        """Returns the tensor from a call of the module."""
        if self.end == 'input':
            return args[0] if args else kwargs['hidden_states']
        return output if isinstance(output, torch.Tensor) else output[0]


PLACES: dict[str, Callable[[Layer], Place]] = {
    'heads': lambda layer: Place(layer.attention_out, 'input', rowwise=True),
    'neurons': lambda layer: Place(layer.mlp_out, 'input', rowwise=True),
    'resid_pre': lambda layer: Place(layer.module, 'input'),
    'attn_out': lambda layer: Place(layer.attention_out, 'output', rowwise=True),
    'mlp_out': lambda layer: Place(layer.mlp_out, 'output', rowwise=True),
    'resid_post': lambda layer: Place(layer.module, 'output'),
}
"""From a kind of site to its place in a layer. A new kind is one entry."""
