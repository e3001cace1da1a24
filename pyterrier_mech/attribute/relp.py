"""A forward with the same values as the model's and simpler gradients, for RelP (arXiv 2508.21258).

Each part is replaced by the linear map that it is at this input: a norm divides by a constant, an activation
multiplies by the constant ratio of its output and input, attention averages with constant weights; a gate and what it
multiplies each get half the gradient of their product.
"""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import nn

from pyterrier_mech.anatomy.encoder import Context, Encoder, Layer, Trace, rotate


def linearised(encoder: Encoder, trace: Trace) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Runs the layers on the first layer's input of a trace; returns the last hidden states and every layer's z.

    Args:
        encoder: A described encoder.
        trace: A run of it; needs no gradients.

    Raises:
        ValueError: If the family is not described, or a norm is no LayerNorm.
    """
    if not encoder.family.described:
        raise ValueError(
            f"method='relp' needs the parts of the layers, which the description of {encoder.base.config.model_type!r} "
            "does not name; use method='attribution_patching'"
        )
    x = trace.x[0].detach().requires_grad_()
    outputs = []
    for layer, context in zip(encoder.layers, trace.contexts, strict=True):
        z = _z(layer, x, context)
        outputs.append(z)
        x = _after_attention(layer, x, layer.attention_out(z))
    if encoder.family.final_norm:
        x = _norm(attrgetter(encoder.family.final_norm)(encoder.base), x)
    return x, outputs


def _z(layer: Layer, x: torch.Tensor, context: Context) -> torch.Tensor:
    if not layer.n_heads:
        return x.new_zeros(*x.shape[:-1], 0, requires_grad=True)
    q, k, v = layer.projections(_norm(layer.norm_attention, x) if layer.family.norm_first else x)
    if context.rotary is not None:
        q, k = rotate(q, *context.rotary), rotate(k, *context.rotary)
    scores = (q @ k.transpose(-2, -1) * layer.head_dim**-0.5).detach()
    if context.mask is not None and context.mask.dtype == torch.bool:
        scores = scores.masked_fill(~context.mask, float('-inf'))
    elif context.mask is not None:
        scores = scores + context.mask
    # A padding token that may attend to nothing has no probabilities; nobody reads it.
    probabilities = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    return (probabilities @ v).transpose(1, 2).reshape(*x.shape[:-1], -1)


def _after_attention(layer: Layer, x: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    if layer.family.norm_first:
        a = x + attention
        return a + _mlp(layer, _norm(layer.norm_mlp, a))
    a = _norm(layer.norm_attention, x + attention)
    return _norm(layer.norm_mlp, a + _mlp(layer, a))


def _mlp(layer: Layer, a: torch.Tensor) -> torch.Tensor:
    hidden = layer.mlp_in(a)
    if not layer.family.gated:
        return layer.mlp_out(_activation(layer, hidden))
    hidden, gate = hidden.chunk(2, dim=-1)
    active = _activation(layer, hidden)
    return layer.mlp_out((active * gate.detach() + active.detach() * gate) / 2)


def _activation(layer: Layer, u: torch.Tensor) -> torch.Tensor:
    fixed = u.detach()
    ratio = layer.activation(fixed) / fixed
    return u * torch.where(fixed == 0, torch.zeros_like(ratio), ratio)


def _norm(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(module, nn.Identity):
        return x
    if not isinstance(module, nn.LayerNorm):
        raise ValueError(
            f"method='relp' knows LayerNorm, not {type(module).__name__}; use method='attribution_patching'"
        )
    centred = x - x.mean(-1, keepdim=True)
    scale = (x.detach().var(-1, correction=0, keepdim=True) + module.eps).rsqrt()
    out = centred * scale
    if module.weight is not None:
        out = out * module.weight
    return out if module.bias is None else out + module.bias
