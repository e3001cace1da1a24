"""Exact head patching that runs every layer once on a growing batch of variants.

A variant that patches a head of layer l shares everything below l with the base run. It starts where its head writes:
its attention output is the base run's plus the head's difference taken through the output projection. From there it
joins the variants of earlier layers, which enter layer l + 1 with it. Where only the first token is read out, the
last layer computes that token alone.

The difference that starts a variant has the rank of one head, and a post-norm LayerNorm is affine once mean and
variance are known. So the first feed-forward product of a starting variant is that of the base run plus a product of
a head's width, scaled row by row: with y the sum before the norm, W LN(y) = (Wγ y − μ Wγ 1) / σ + Wβ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pyterrier_mech.anatomy.encoder import Context, Encoder, Layer, activate, pool
from pyterrier_mech.patch.runs import Head, Side

# On a CPU the work of a layer is cut into blocks whose intermediate values stay in the cache.
_BLOCK_TOKENS = 1024


class Wavefront:
    """Patches heads of a described encoder. Holds what depends on the weights alone, so keep one for many batches."""

    def __init__(self, encoder: Encoder, pooling: str):
        """Stores encoder and pooling ('cls' or 'mean')."""
        self.encoder = encoder
        self.pooling = pooling
        self._folded: dict[int, _Folded] = {}

    def vectors(
        self, base: Side, targets: Sequence[torch.Tensor], heads: Sequence[Head], batch_tokens: int
    ) -> torch.Tensor:
        """Returns the pooled vectors of the base run with the output of one head at a time replaced.

        Args:
            base: The run that is patched.
            targets: For each layer, joined head outputs to take a head's from, broadcastable to
                [pairs, tokens, heads·d_h].
            heads: (layer, head), sorted.
            batch_tokens: Tokens of the variants that are in memory at a time, padding included.

        Returns:
            [heads, pairs, d].
        """
        n_pairs, n_tokens = base.inputs['input_ids'].shape
        size = max(1, batch_tokens // (n_pairs * n_tokens))
        chunks = [heads[start : start + size] for start in range(0, len(heads), size)]
        return torch.cat([self._chunk(base, targets, chunk) for chunk in chunks])

    def _chunk(self, base: Side, targets: Sequence[torch.Tensor], heads: Sequence[Head]) -> torch.Tensor:
        n_pairs, n_tokens, d = base.trace.x[0].shape
        layers = self.encoder.layers
        states = base.trace.x[0].new_empty(len(heads), n_pairs, n_tokens, d)
        size = max(1, _BLOCK_TOKENS // (n_pairs * n_tokens)) if states.device.type == 'cpu' else len(heads)
        started = 0
        for index in range(heads[0][0], len(layers)):
            first_only = index == len(layers) - 1 and self.pooling == 'cls'
            read = slice(0, 1) if first_only else slice(None)
            for k in range(0, started, size):
                rows = slice(k, min(k + size, started))
                states[rows, :, read] = _go_on(layers[index], states[rows], base.trace.contexts[index], first_only)
            starting = [head for where, head in heads if where == index]
            for k in range(0, len(starting), size):
                block = starting[k : k + size]
                rows = slice(started, started + len(block))
                states[rows, :, read] = self._start(base, targets[index], index, block, first_only)
                started = rows.stop
            if first_only:
                states = states[:, :, :1]
        hidden = self.encoder.final_norm(states)
        return pool(hidden, base.inputs['attention_mask'], self.pooling)

    def _start(
        self, base: Side, target: torch.Tensor, index: int, heads: Sequence[int], first_only: bool
    ) -> torch.Tensor:
        """Returns the layer's output with each of `heads` patched, [heads, pairs, tokens, d]."""
        layer, read = self.encoder.layers[index], slice(0, 1) if first_only else slice(None)
        x, z = base.trace.x[index][:, read], base.trace.z[index]
        change = (target.expand_as(z) - z)[:, read]
        per_head = torch.stack([change[..., layer.columns(h)] for h in heads])
        weight = torch.stack([layer.attention_out.weight[:, layer.columns(h)].T for h in heads])
        moved = torch.bmm(per_head.flatten(1, 2), weight).view(len(heads), *x.shape)
        if first_only or layer.family.norm_first or layer.family.gated:
            return layer.after_attention(x, moved.add_(layer.attention_out(z[:, read])))
        if index not in self._folded:
            self._folded[index] = _fold(layer)
        return _finish_low_rank(layer, self._folded[index], x + layer.attention_out(z), moved, per_head, heads)


@dataclass
class _Folded:
    """Weights of one layer's first feed-forward product with the norm before it folded in.

    Attributes:
        scaled: Wγ, [d, d_ff].
        heads: For each head its output weights taken through Wγ, and below them −Wγ 1, [heads, d_h + 1, d_ff].
        constant: Wβ plus the bias, [d_ff].
    """

    scaled: torch.Tensor
    heads: torch.Tensor
    constant: torch.Tensor


def _fold(layer: Layer) -> _Folded:
    norm, linear = layer.norm_attention, layer.mlp_in
    scaled = (linear.weight * norm.weight).T.contiguous()
    through = (layer.attention_out.weight.T @ scaled).view(layer.n_heads, layer.head_dim, -1)
    sums = -scaled.sum(0).expand(layer.n_heads, 1, -1)
    constant = torch.nn.functional.linear(norm.bias, linear.weight, linear.bias)
    return _Folded(scaled, torch.cat([through, sums], dim=1), constant)


def _finish_low_rank(
    layer: Layer,
    folded: _Folded,
    total: torch.Tensor,
    moved: torch.Tensor,
    per_head: torch.Tensor,
    heads: Sequence[int],
) -> torch.Tensor:
    """Returns the layer's output for starting variants.

    Args:
        layer: A post-norm layer with a plain feed-forward block.
        folded: Its folded weights.
        total: The base run's sum before the norm [pairs, tokens, d].
        moved: What each head adds to it [heads, pairs, tokens, d]; overwritten.
        per_head: The same before the output projection [heads, pairs, tokens, d_h].
        heads: Which heads.
    """
    norm = layer.norm_attention
    n_rows = total.shape[0] * total.shape[1]
    base = total.view(n_rows, -1) @ folded.scaled
    a, mean, scale = torch.native_layer_norm(moved.add_(total), norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    left = torch.cat([per_head, mean], dim=-1).flatten(1, 2)
    hidden = torch.baddbmm(base.expand(len(heads), -1, -1), left, folded.heads[list(heads)])
    torch.addcmul(folded.constant, hidden, scale.flatten(1, 2), out=hidden)
    out = layer.mlp_out(activate(layer.activation, hidden)).view_as(a)
    return layer.norm_mlp(out.add_(a))


def _go_on(layer: Layer, states: torch.Tensor, context: Context, first_only: bool) -> torch.Tensor:
    """Takes variants [variants, pairs, tokens, d] through a whole layer."""
    n_variants, n_pairs = states.shape[:2]
    x = states.flatten(0, 1)
    repeated = context.rows(lambda tensor: tensor.repeat(n_variants, *[1] * (tensor.dim() - 1)))
    if first_only:
        out = layer.after_attention(x[:, :1], layer.attention_out(layer.z_first(x, repeated)))
    else:
        out = layer.after_attention(x, layer.attention_out(layer.z(x, repeated)))
    return out.unflatten(0, (n_variants, n_pairs))
