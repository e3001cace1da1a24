"""A layer of a Hugging Face model: its parts, found by the names of its family, and what they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from transformers.activations import GELUActivation

from pyterrier_mech.anatomy.attention import Past, Rotary, absorbed, attend, attend_after, rotate, weights
from pyterrier_mech.anatomy.families import Family
from pyterrier_mech.anatomy.readouts import picked

Pick = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Context:
    """What a layer is given beside its input.

    Attributes:
        mask: Attention mask as the Hugging Face layer gets it (boolean or additive, broadcastable to
            [rows, heads, tokens, tokens]), or None.
        rotary: Cosines and sines of rotary positions [rows or 1, tokens, head width], or None.
        past: Keys, rotated, and values of tokens before those of the input, or None. The mask then has columns for
            these, and for those of the input behind them.
    """

    mask: torch.Tensor | None = None
    rotary: Rotary | None = None
    past: Past | None = None

    def rows(self, pick: Pick) -> Context:
        """Returns the context with `pick` applied to everything that has one entry a row; the past is shared."""

        def of(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if tensor.shape[0] == 1 else pick(tensor)

        return Context(
            None if self.mask is None else of(self.mask),
            None if self.rotary is None else (of(self.rotary[0]), of(self.rotary[1])),
            self.past,
        )


class Layer:
    """One layer. Shapes: x [rows, tokens, d]; z, the joined head outputs, [rows, tokens, heads·d_h].

    Parts are looked up when they are asked for, so that a part that was replaced later is not missed.
    """

    def __init__(self, module: nn.Module, family: Family):
        """Keeps the module and the names of its parts."""
        self.module = module
        self.family = family

    def part(self, name: str) -> Any:
        """Returns the part that the family describes under a name."""
        return attrgetter(getattr(self.family, name))(self.module)

    @property
    def attention_out(self) -> Any:
        """The attention output projection."""
        return self.part('attention_out')

    @property
    def mlp_in(self) -> Any:
        """The first linear map of the feed-forward block."""
        return self.part('mlp_in')

    @property
    def mlp_out(self) -> Any:
        """The last linear map of the feed-forward block."""
        return self.part('mlp_out')

    @property
    def qkv_parts(self) -> list[Any]:
        """The query, key and value projections, or the one that joins them."""
        return [attrgetter(path)(self.module) for path in self.family.qkv]

    @property
    def linear_parts(self) -> list[Any]:
        """All linear maps of a described layer."""
        gates = [self.part('mlp_gate')] if self.family.mlp_gate else []
        return [*self.qkv_parts, self.attention_out, self.mlp_in, *gates, self.mlp_out]

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.part('head_dim')

    @property
    def n_heads(self) -> int:
        """Number of heads."""
        return self.attention_out.in_features // self.head_dim

    @property
    def n_neurons(self) -> int:
        """Number of neurons."""
        return self.mlp_out.in_features

    def n_heads_of(self, kind: str) -> int:
        """Number of heads of a site inside heads: keys and values may have fewer than queries."""
        if kind not in ('k', 'v') or len(self.family.qkv) != 3 or not self.n_heads:
            return self.n_heads
        return self.qkv_parts[1].out_features // self.head_dim

    def columns(self, head: int) -> slice:
        """Returns where a head's output stands in z."""
        width = self.head_dim
        return slice(head * width, (head + 1) * width)

    def reach(self, kind: str, head: int) -> slice:
        """Returns which columns of z one head of a kind of site enters: several where keys and values are shared."""
        width = self.n_heads // (self.n_heads_of(kind) or 1) * self.head_dim
        return slice(head * width, (head + 1) * width)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """From [rows, tokens, heads·d_h] to [rows, heads, tokens, d_h]."""
        return x.unflatten(-1, (x.shape[-1] // self.head_dim, self.head_dim)).transpose(-3, -2)

    def attention_input(self, x: torch.Tensor) -> torch.Tensor:
        """What the query, key and value projections read."""
        return self.part('norm_attention')(x) if self.family.norm_first else x

    def projections(self, h: torch.Tensor, rotary: Rotary | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and keys, positions applied, and values, each [rows, heads, tokens, d_h]."""
        parts = self.qkv_parts
        q, k, v = parts[0](h).chunk(3, dim=-1) if len(parts) == 1 else (part(h) for part in parts)
        return self.turned('q', self.split(q), rotary), self.turned('k', self.split(k), rotary), self.split(v)

    def turned(self, kind: str, x: torch.Tensor, rotary: Rotary | None) -> torch.Tensor:
        """From queries ('q') or keys ('k') as the maps give them to those that are multiplied: normed, rotated.

        Args:
            kind: Which of both.
            x: [rows, heads, tokens, d_h].
            rotary: Rotary positions, where the layer has some.
        """
        if self.family.qk_norms:
            x = attrgetter(self.family.qk_norms[kind == 'k'])(self.module)(x)
        return rotate(x, rotary, self.family.rotary_float32)

    def mask(self, context: Context, tokens: int, device: torch.device) -> torch.Tensor | None:
        """Returns the mask of the context; of a causal layer also where Hugging Face leaves it to the kernel."""
        if context.mask is None and self.family.causal:
            return torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=device).tril()
        return context.mask

    def projected(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """Queries (0), keys (1) or values (2) of the layer's input, joined, before positions are applied."""
        h, parts = self.attention_input(x), self.qkv_parts
        return parts[0](h).chunk(3, dim=-1)[number] if len(parts) == 1 else parts[number](h)

    def z(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """Head outputs, joined."""
        if not self.n_heads:
            return x.new_zeros(*x.shape[:-1], 0)
        q, k, v = self.projections(self.attention_input(x), context.rotary)
        mask = self.mask(context, x.shape[1], x.device)
        z = attend(q, k, v, mask) if context.past is None else attend_after(q, k, v, mask, context.past)
        return z.transpose(1, 2).reshape(*x.shape[:-1], -1)

    def z_at(self, x: torch.Tensor, context: Context, at: torch.Tensor | int) -> torch.Tensor:
        """Head outputs of one token a row alone, [rows, 1, heads·d_h].

        Args:
            x: Input of the layer.
            context: What else the layer is given.
            at: The token's position, one for all rows or [rows].
        """
        if not self.n_heads:
            return x.new_zeros(x.shape[0], 1, 0)
        h, mask = self.attention_input(x), self.mask(context, x.shape[1], x.device)
        if mask is not None and mask.shape[-2] > 1:
            mask = picked(mask.expand(x.shape[0], *mask.shape[1:]).transpose(1, 2), at).transpose(1, 2)
        if context.rotary is not None or len(self.qkv_parts) == 1:
            q, k, v = self._projections_at(h, context.rotary, at)
            z = attend(q, k, v, mask) if context.past is None else attend_after(q, k, v, mask, context.past)
            return z.transpose(1, 2).reshape(x.shape[0], 1, -1)
        query, key, value = self.qkv_parts
        heads = (self.n_heads, self.head_dim)
        q = query(picked(h, at)[:, 0]).view(-1, *heads)
        z = absorbed(
            q, h, key.weight.view(*heads, -1), value.weight.view(*heads, -1), None if mask is None else mask.squeeze(-2)
        ).reshape(x.shape[0], -1)
        return (z if value.bias is None else z + value.bias).unsqueeze(1)

    def _projections_at(
        self, h: torch.Tensor, rotary: Rotary | None, at: torch.Tensor | int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `projections`, with the queries of one token a row."""
        if len(self.qkv_parts) == 1:
            q, k, v = self.projections(h, rotary)
            return picked(q.transpose(1, 2), at).transpose(1, 2), k, v
        query, key, value = self.qkv_parts
        there = None
        if rotary is not None:
            cos, sin = (picked(part.expand(h.shape[0], *part.shape[1:]), at) for part in rotary)
            there = cos, sin
        q = self.turned('q', self.split(query(picked(h, at))), there)
        return q, self.turned('k', self.split(key(h)), rotary), self.split(value(h))

    def pattern(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """Attention weights [rows, heads, tokens, tokens], in float32 at least."""
        q, k, _ = self.projections(self.attention_input(x), context.rotary)
        return weights(q, k, self.mask(context, x.shape[1], x.device))

    def mlp(self, a: torch.Tensor) -> torch.Tensor:
        """The feed-forward block without its norm and residual sum."""
        hidden, gate = self.mlp_inputs(a)
        return self.mlp_out(self.activate(hidden) if gate is None else self.part('activation')(hidden) * gate)

    def mlp_inputs(self, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the activation function reads, and the gates, where there are some."""
        hidden = self.mlp_in(a)
        if not self.family.gated:
            return hidden, None
        if self.family.mlp_gate:
            return hidden, self.part('mlp_gate')(a)
        hidden, gate = hidden.chunk(2, dim=-1)
        return hidden, gate

    def activate(self, hidden: torch.Tensor) -> torch.Tensor:
        """Applies the activation function; GELU overwrites its input where no gradients are kept."""
        activation = self.part('activation')
        if isinstance(activation, GELUActivation) and not torch.is_grad_enabled():
            return torch.ops.aten.gelu_(hidden)
        return activation(hidden)

    def after_attention(self, x: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """The layer's output from its input and the attention output; any rows of tokens.

        Without gradients `attention` is overwritten.
        """
        a = self.attended(x, attention)
        return self.after_mlp(a, self.mlp(self.part('norm_mlp')(a) if self.family.norm_first else a))

    def attended(self, x: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """The stream between the two blocks. Without gradients `attention` is overwritten."""
        total = _add(attention, x)
        return total if self.family.norm_first else self.part('norm_attention')(total)

    def after_mlp(self, a: torch.Tensor, mlp: torch.Tensor) -> torch.Tensor:
        """The layer's output from the stream between the blocks. Without gradients `mlp` is overwritten."""
        total = _add(mlp, a)
        return total if self.family.norm_first else self.part('norm_mlp')(total)

    def output(self, x: torch.Tensor, context: Context, at: torch.Tensor | int | None = None) -> torch.Tensor:
        """The layer's output, of all tokens, or of one a row alone [rows, 1, d]."""
        if at is None:
            return self.after_attention(x, self.attention_out(self.z(x, context)))
        return self.after_attention(picked(x, at), self.attention_out(self.z_at(x, context, at)))


def _add(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return out + x if torch.is_grad_enabled() else out.add_(x)
