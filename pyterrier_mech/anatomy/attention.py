"""Attention in its forms: all rows, one row, weights, and weights held constant. Shapes: [rows, heads, tokens, d_h].

Keys and values may have fewer heads than queries: each is then read by as many query heads in a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Below this many tokens, many small products are faster than the fused kernel on a CPU.
_FUSED_FROM = 256

Rotary = tuple[torch.Tensor, torch.Tensor]
Past = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of the tokens before, [pairs, heads, tokens, d_h]; rows come in whole sets of pairs."""


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Returns the outputs of scaled dot-product attention, by what is fastest on the device.

    Args:
        q: Queries, of all tokens or of one.
        k: Keys.
        v: Values.
        mask: Boolean or additive, broadcastable to [rows, heads, queries, tokens], or None.
    """
    rows, heads, tokens, width = q.shape
    if heads != k.shape[1]:
        return _grouped(q, k, v, mask)
    if q.device.type != 'cpu' or tokens != k.shape[-2] or tokens >= _FUSED_FROM:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    q, k, v = (part.reshape(rows * heads, tokens, width) for part in (q, k, v))
    scores = torch.baddbmm(q.new_empty(()).expand(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=width**-0.5)
    if mask is not None:
        scores = _masked(scores.view(rows, heads, tokens, tokens), mask).flatten(0, 1)
    return torch.bmm(torch.softmax(scores, dim=-1), v).view(rows, heads, tokens, width)


def attend_after(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, past: Past
) -> torch.Tensor:
    """Returns the outputs of attention to earlier tokens, which rows share, and to the row's own.

    Args:
        q: Queries.
        k: Keys of the row's own tokens.
        v: Their values.
        mask: Boolean or additive, broadcastable to [rows, heads, queries, earlier and own tokens], or None.
        past: Keys and values of the earlier tokens.
    """
    rows, heads, tokens, width = q.shape
    pairs, groups, before, _ = past[0].shape
    # One product a pair and key head, however many variants of the pair there are.
    q = q.contiguous()
    joint = q.view(rows // pairs, pairs, groups, -1, width).permute(1, 2, 0, 3, 4)
    shape = joint.shape
    joint = joint.reshape(pairs, groups, -1, width)

    def apart(values: torch.Tensor) -> torch.Tensor:
        return values.view(*shape[:-1], -1).permute(2, 0, 1, 3, 4).reshape(rows, heads, tokens, -1)

    packed = q.view(rows, groups, -1, width)
    own = (packed @ k.transpose(-1, -2)).view(rows, heads, tokens, -1)
    scores = torch.cat([apart(joint @ past[0].transpose(-1, -2)), own], dim=-1) * width**-0.5
    shares = torch.softmax(_masked(scores, mask), dim=-1)
    earlier = shares[..., :before].view(rows // pairs, pairs, groups, -1, before).permute(1, 2, 0, 3, 4)
    out = apart(earlier.reshape(pairs, groups, -1, before) @ past[1])
    return out + (shares[..., before:].reshape(rows, groups, packed.shape[2], -1) @ v).view_as(out)


def _grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    rows, heads, tokens, width = q.shape
    packed = q.reshape(rows, k.shape[1], -1, width)
    scores = (packed @ k.transpose(-1, -2) * width**-0.5).view(rows, heads, tokens, -1)
    shares = torch.softmax(_masked(scores, mask), dim=-1).view(*packed.shape[:-1], -1)
    return (shares @ v).view(rows, heads, tokens, width)


def _shared(k: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Returns keys or values once for every query head."""
    return k if k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def weights(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Returns the attention weights [rows, heads, tokens, tokens], in float32 at least."""
    scores = _masked(q @ _shared(k, q).transpose(-1, -2) * q.shape[-1] ** -0.5, mask)
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def absorbed(
    q: torch.Tensor, x: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Returns the head outputs [rows, heads, d_h] of one query each, without making keys and values.

    Products with the keys are products of the inputs with the query taken through the key weights, and the weighted
    sum of values is the weighted sum of inputs taken through the value weights. A key bias adds the same to all
    products of a query, which soft-max ignores; a value bias is left to the caller.

    Args:
        q: One query a row [rows, heads, d_h].
        x: What keys and values are made from [rows, tokens, d].
        key: Key weights [heads, d_h, d].
        value: Value weights [heads, d_h, d].
        mask: Boolean or additive, broadcastable to [rows, heads, tokens], or None.
    """
    to_inputs = torch.einsum('rhe,hed->rhd', q, key)
    scores = to_inputs @ x.transpose(-2, -1) * q.shape[-1] ** -0.5
    return torch.einsum('rhd,hed->rhe', torch.softmax(_masked(scores, mask), dim=-1) @ x, value)


def rotate(x: torch.Tensor, rotary: Rotary | None, float32: bool) -> torch.Tensor:
    """Applies rotary positions, where there are some, in the type of `x` or in float32."""
    if rotary is None:
        return x
    cos, sin = rotary
    wide = x.float() if float32 else x
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (wide * cos.unsqueeze(1) + turned * sin.unsqueeze(1)).to(x.dtype)


def _masked(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return scores
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
