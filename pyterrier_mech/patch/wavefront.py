"""Exact head patching that runs every layer once on a growing batch of variants.

A variant that patches a head of layer l shares everything below l with the base run. It starts where its head writes:
its attention output is the base run's plus the head's difference taken through the output projection. From there it
joins the variants of earlier layers, which enter layer l + 1 with it. Where only one token is read out, the last layer
computes that token alone; of a causal model, every layer computes the tokens behind the first difference: see
`suffix`.

The difference that starts a variant has the rank of one head, and a post-norm LayerNorm is affine once mean and
variance are known. So the first feed-forward product of a starting variant is that of the base run plus a product of
a head's width, scaled row by row: with y the sum before the norm, W LN(y) = (Wγ y − μ Wγ 1) / σ + Wβ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from pyterrier_mech.anatomy.layers import Context, Layer
from pyterrier_mech.anatomy.model import ModelMap, Run, Values
from pyterrier_mech.anatomy.readouts import Readout, picked
from pyterrier_mech.patch.suffix import shortened
from pyterrier_mech.patch.variants import PATTERN, PROJECTIONS, Received, Variant, changes, chunks, into_stream
from pyterrier_mech.units import HEADS, Site

# On a CPU the work of a layer is cut into blocks whose intermediate values stay in the cache.
_BLOCK_TOKENS = 1024

_BLOCKS = ('attn_out', 'mlp_out', 'resid_post')
_NEEDED = {'attn_out': _BLOCKS, 'mlp_out': _BLOCKS, **dict.fromkeys((*PROJECTIONS, PATTERN), (HEADS, *PROJECTIONS))}

At = torch.Tensor | int | None


class Wavefront:
    """Patches sites of a plain model. Holds what depends on the weights alone, so keep one for many batches."""

    def __init__(self, model: ModelMap, readout: Readout):
        """Stores the map and what is read."""
        self.map = model
        self.readout = readout
        self._folded: dict[int, _Folded] = {}

    def recorded(self, kinds: Sequence[str]) -> list[str]:
        """See `Engine`."""
        kept = ['k', 'v'] if self.map.family.causal else []
        return [*kept, *(needed for kind in kinds for needed in _NEEDED.get(kind, (kind,)))]

    def vectors(self, base: Run, targets: Values, variants: Sequence[Variant], batch_tokens: int) -> torch.Tensor:
        """See `Engine`."""
        if self.map.family.causal:
            base, targets, variants, _ = shortened(self.map, self.readout, base, targets, variants)
        return torch.cat([self._chunk(base, targets, chunk) for chunk in chunks(base, variants, batch_tokens)])

    def frozen(
        self, base: Run, targets: Values, senders: Sequence[Variant], read: Sequence[Site], batch_tokens: int
    ) -> Iterator[Received]:
        """See `Engine`: no attention is computed, for what every head gives is known."""
        suffix, whole = None, base
        if self.map.family.causal:
            base, targets, senders, suffix = shortened(self.map, self.readout, base, targets, senders)
        for chunk in chunks(base, senders, batch_tokens):
            for some, site, told in self._frozen_chunk(base, targets, chunk, read):
                yield some, site, told if site is None or suffix is None else suffix.spread(told, whole.values[site])

    def _chunk(self, base: Run, targets: Values, variants: Sequence[Variant]) -> torch.Tensor:
        states, started = self._room(base, variants), 0
        for index in range(variants[0].site.layer, len(self.map.layers)):
            layer, at = self.map.layers[index], self._at(base, index)
            for rows in self._blocks(base, started):
                _set(states, rows, at, _go_on(layer, states[rows], base.contexts[index], at))
            started = self._all_start(base, targets, variants, states, started, index)
        return self._represented(base, states)

    def _frozen_chunk(
        self, base: Run, targets: Values, senders: Sequence[Variant], read: Sequence[Site]
    ) -> Iterator[Received]:
        states, started = self._room(base, senders), 0
        for index in range(senders[0].site.layer, len(self.map.layers)):
            layer, at = self.map.layers[index], self._at(base, index)
            for site in [site for site in read if site.layer == index and started]:
                yield senders[:started], site, layer.projected(states[:started], PROJECTIONS.index(site.kind))
            attention = base.values[Site('attn_out', index)]
            attention = attention if at is None else picked(attention, at)
            for rows in self._blocks(base, started):
                x = states[rows] if at is None else torch.stack([picked(one, at) for one in states[rows]])
                _set(states, rows, at, layer.after_attention(x, attention.repeat(len(x), 1, 1, 1)))
            started = self._all_start(base, targets, senders, states, started, index)
        yield senders, None, self._represented(base, states)

    def _room(self, base: Run, variants: Sequence[Variant]) -> torch.Tensor:
        like = base.values[Site('resid_pre', 0)]
        return like.new_empty(len(variants), *like.shape)

    def _at(self, base: Run, index: int) -> At:
        return self.readout.at(base.batch.scored) if index == len(self.map.layers) - 1 else None

    def _blocks(self, base: Run, stop: int, start: int = 0) -> Iterator[slice]:
        """Yields the variants in parts whose work stays in the cache."""
        n_pairs, n_tokens = base.batch.shape
        on_cpu = base.batch.scored.device.type == 'cpu'
        size = max(1, _BLOCK_TOKENS // (n_pairs * n_tokens) if on_cpu else stop - start)
        for first in range(start, stop, size):
            yield slice(first, min(first + size, stop))

    def _all_start(
        self, base: Run, targets: Values, variants: Sequence[Variant], states: torch.Tensor, started: int, index: int
    ) -> int:
        """Starts the variants of a layer; returns how many have started."""
        starting = [variant for variant in variants if variant.site.layer == index]
        for _, alike in groupby(starting, lambda variant: variant.site.kind):
            last = started + len(list(alike))
            for rows in self._blocks(base, last, started):
                at = self._at(base, index)
                _set(states, rows, at, self._start(base, targets, self.map.layers[index], variants[rows], at))
            started = last
        return started

    def _represented(self, base: Run, states: torch.Tensor) -> torch.Tensor:
        if self.readout.at(base.batch.scored) is not None:
            return self.map.final_norm(states[:, :, :1])[:, :, 0]
        return self.readout.represent(self.map.final_norm(states), base.batch.scored)

    def _start(self, base: Run, targets: Values, layer: Layer, block: Sequence[Variant], at: At) -> torch.Tensor:
        """Returns the layer's output with each variant of one site patched, [variants, pairs, tokens, d]."""
        site = block[0].site
        if block[0].unit is not None:
            return self._start_heads(base, changes(base, targets, layer, block), layer, block, at)
        where = torch.stack([_everywhere(base) if variant.where is None else variant.where for variant in block])

        def of(kind: str) -> torch.Tensor:
            value = base.values[Site(kind, site.layer)]
            return value if at is None else picked(value, at)

        if site.kind == 'resid_pre':
            states = torch.where(where.unsqueeze(-1), targets[site], base.values[site])
            return _go_on(layer, states, base.contexts[site.layer], at)
        target = targets[site] if at is None else picked(targets[site], at)
        # What becomes of a position does not depend on the others: once for all variants.
        if site.kind == 'attn_out':
            out = layer.after_attention(of('resid_pre'), target.clone())
        else:
            out = layer.after_mlp(layer.attended(of('resid_pre'), of('attn_out').clone()), target.clone())
        mask = where if at is None else torch.stack([picked(one, at) for one in where])
        return torch.where(mask.unsqueeze(-1), out, of('resid_post'))

    def _start_heads(
        self, base: Run, per_head: torch.Tensor, layer: Layer, block: Sequence[Variant], at: At
    ) -> torch.Tensor:
        """Returns the layer's output where the outputs of heads change by [variants, pairs, tokens, d_h]."""
        index = block[0].site.layer
        x, z = base.values[Site('resid_pre', index)], base.values[Site(HEADS, index)]
        if at is not None:
            x, z, per_head = picked(x, at), picked(z, at), torch.stack([picked(one, at) for one in per_head])
        heads = [variant.unit or 0 for variant in block]
        moved = into_stream(layer, per_head, block[0].site.kind, heads)
        if at is not None or layer.family.norm_first or layer.family.gated:
            return layer.after_attention(x, moved.add_(layer.attention_out(z)))
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
    norm, linear = layer.part('norm_attention'), layer.mlp_in
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
    norm = layer.part('norm_attention')
    n_rows = total.shape[0] * total.shape[1]
    base = total.view(n_rows, -1) @ folded.scaled
    a, mean, scale = torch.native_layer_norm(moved.add_(total), norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    left = torch.cat([per_head, mean], dim=-1).flatten(1, 2)
    hidden = torch.baddbmm(base.expand(len(heads), -1, -1), left, folded.heads[list(heads)])
    torch.addcmul(folded.constant, hidden, scale.flatten(1, 2), out=hidden)
    out = layer.mlp_out(layer.activate(hidden)).view_as(a)
    return layer.part('norm_mlp')(out.add_(a))


def _set(states: torch.Tensor, rows: slice, at: At, values: torch.Tensor) -> None:
    states[rows, :, slice(None) if at is None else slice(0, 1)] = values


def _everywhere(base: Run) -> torch.Tensor:
    return torch.ones(base.batch.shape, dtype=torch.bool, device=base.batch.scored.device)


def _go_on(layer: Layer, states: torch.Tensor, context: Context, at: At) -> torch.Tensor:
    """Takes variants [variants, pairs, tokens, d] through a whole layer."""
    n_variants, n_pairs = states.shape[:2]
    repeated = context.rows(lambda tensor: tensor.repeat(n_variants, *[1] * (tensor.dim() - 1)))
    at = at.repeat(n_variants) if isinstance(at, torch.Tensor) else at
    return layer.output(states.flatten(0, 1), repeated, at).unflatten(0, (n_variants, n_pairs))
