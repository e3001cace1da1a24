"""A forward with the same values as the model's and simpler gradients, for RelP (arXiv 2508.21258).

Each part is replaced by the linear map that it is at this input: a norm divides by a constant, an activation
multiplies by the constant ratio of its output and input, attention averages with constant weights; a gate and what it
multiplies each get half the gradient of their product.
"""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import nn

from pyterrier_mech.anatomy.attention import weights
from pyterrier_mech.anatomy.layers import Context, Layer
from pyterrier_mech.anatomy.model import ModelMap, Run
from pyterrier_mech.units import Site

_WAY_OUT = "use method='attribution_patching'"


def linearised(model: ModelMap, run: Run) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Runs the layers on the first layer's input of a run; returns the last hidden states and every layer's z.

    Args:
        model: A plain encoder.
        run: A run of it with the first layer's input and all contexts; needs no gradients.

    Raises:
        ValueError: If the encoder is not plain, or a norm is not a LayerNorm.
    """
    reason = model.why_not_plain()
    if reason:
        raise ValueError(f"method='relp' computes with the parts of the layers, but {reason}: {_WAY_OUT}")
    x = run.values[Site('resid_pre', 0)].detach().requires_grad_()
    outputs = []
    for layer, context in zip(model.layers, run.contexts, strict=True):
        z = _z(layer, x, context)
        outputs.append(z)
        x = _after_attention(layer, x, layer.attention_out(z))
    if model.family.final_norm:
        x = _norm(attrgetter(model.family.final_norm)(model.base), x)
    return x, outputs


def _z(layer: Layer, x: torch.Tensor, context: Context) -> torch.Tensor:
    if not layer.n_heads:
        return x.new_zeros(*x.shape[:-1], 0, requires_grad=True)
    h = _norm(layer.part('norm_attention'), x) if layer.family.norm_first else x
    q, k, v = layer.projections(h, context.rotary)
    return (weights(q, k, context.mask).detach().to(v.dtype) @ v).transpose(1, 2).reshape(*x.shape[:-1], -1)


def _after_attention(layer: Layer, x: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    if layer.family.norm_first:
        a = x + attention
        return a + _mlp(layer, _norm(layer.part('norm_mlp'), a))
    a = _norm(layer.part('norm_attention'), x + attention)
    return _norm(layer.part('norm_mlp'), a + _mlp(layer, a))


def _mlp(layer: Layer, a: torch.Tensor) -> torch.Tensor:
    hidden, gate = layer.mlp_inputs(a)
    if gate is None:
        return layer.mlp_out(_activation(layer, hidden))
    active = _activation(layer, hidden)
    return layer.mlp_out((active * gate.detach() + active.detach() * gate) / 2)


def _activation(layer: Layer, u: torch.Tensor) -> torch.Tensor:
    fixed = u.detach()
    ratio = layer.part('activation')(fixed) / fixed
    return u * torch.where(fixed == 0, torch.zeros_like(ratio), ratio)


def _norm(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(module, nn.Identity):
        return x
    if not isinstance(module, nn.LayerNorm):
        raise ValueError(f"method='relp' knows LayerNorm; got {type(module).__name__}: {_WAY_OUT}")
    centred = x - x.mean(-1, keepdim=True)
    scale = (x.detach().var(-1, correction=0, keepdim=True) + module.eps).rsqrt()
    out = centred * scale
    if module.weight is not None:
        out = out * module.weight
    return out if module.bias is None else out + module.bias
