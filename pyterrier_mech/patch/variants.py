"""What is patched in one run, and what it changes in the outputs of heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from pyterrier_mech.anatomy.attention import attend, weights
from pyterrier_mech.anatomy.layers import Layer
from pyterrier_mech.anatomy.model import ModelMap, Run, Values
from pyterrier_mech.units import HEADS, Site, Unit

PATTERN = 'pattern'
PROJECTIONS = ('q', 'k', 'v')


class Variant(NamedTuple):
    """A run with one thing patched.

    Attributes:
        site: Where.
        unit: Which head of the site; None is the whole of it.
        where: Which positions, True where patched [pairs, tokens]; None is all.
        value: What stands there instead, broadcastable to [pairs, tokens, width]; None is the target of the site.
    """

    site: Site
    unit: int | None = None
    where: torch.Tensor | None = None
    value: torch.Tensor | None = None


Received = tuple[Sequence[Variant], Site | None, torch.Tensor]
"""Senders, and what they make of a site [senders, pairs, tokens, width]; or, of no site, of the vectors."""


def variants_of(heads: Sequence[Unit]) -> list[Variant]:
    """Returns the variants that replace a head each."""
    return [Variant(unit.site, unit.index) for unit in heads]


def chunks(base: Run, variants: Sequence[Variant], batch_tokens: int) -> Iterator[Sequence[Variant]]:
    """Yields variants in parts that fit into a number of tokens."""
    n_pairs, n_tokens = base.batch.shape
    size = max(1, batch_tokens // (n_pairs * n_tokens))
    for start in range(0, len(variants), size):
        yield variants[start : start + size]


def target_of(variant: Variant, targets: Values, layer: Layer) -> torch.Tensor:
    """Returns what a variant puts in the place of its site or head, at all positions."""
    if variant.value is not None:
        return variant.value
    target = targets[variant.site]
    if variant.unit is None:
        return target
    return target[:, variant.unit] if variant.site.kind == PATTERN else target[..., layer.columns(variant.unit)]


def changing(model: ModelMap, base: Run, targets: Values, variants: Sequence[Variant]) -> list[int]:
    """Returns the numbers of the variants that change anything."""
    layers, seen = model.layers, {}

    def different(variant: Variant) -> torch.Tensor:
        layer, there = layers[variant.site.layer], variant._replace(value=None)
        return (target_of(variant, targets, layer) != target_of(there, base.values, layer)).any(-1)

    active = []
    for i, variant in enumerate(variants):
        key = variant[:2] if variant.value is None else None
        if key is None or key not in seen:
            seen[key] = different(variant)
        where = seen[key] if variant.where is None else seen[key] & variant.where
        if bool(where.any()):
            active.append(i)
    return active


def with_patterns(model: ModelMap, run: Run, sites: Sequence[Site]) -> None:
    """Adds the attention weights [pairs, heads, tokens, tokens] of some layers to a run with queries and keys."""
    for site in sites:
        layer, context = model.layers[site.layer], run.contexts[site.layer]
        q, k = (layer.turned(kind, layer.split(run.values[Site(kind, site.layer)]), context.rotary) for kind in 'qk')
        run.values[site] = weights(q, k, layer.mask(context, q.shape[2], q.device)).to(q.dtype)


def changes(base: Run, targets: Values, layer: Layer, block: Sequence[Variant]) -> torch.Tensor:
    """Returns how much the outputs of the patched heads change [variants, pairs, tokens, width].

    The width is that of a head, or of all heads that share the patched keys or values.
    """
    kind, index = block[0].site.kind, block[0].site.layer
    z = base.values[Site(HEADS, index)]
    before = torch.stack([z[..., layer.reach(kind, variant.unit or 0)] for variant in block])
    target = torch.stack([target_of(variant, targets, layer).expand(*z.shape[:2], -1) for variant in block])
    where = [variant.where for variant in block]
    if kind in PROJECTIONS:
        after = _attended(base, layer, block, target)
    elif kind == PATTERN:
        v, shared = base.values[Site('v', index)], layer.n_heads // layer.n_heads_of('v')
        after = target @ torch.stack([v[..., layer.columns((variant.unit or 0) // shared)] for variant in block])
    else:
        after = target
    change = after - before
    # A key or value reaches all positions, anything else its own alone.
    if kind not in ('k', 'v') and any(one is not None for one in where):
        for one, mask in zip(change, where, strict=True):
            if mask is not None:
                one *= mask.unsqueeze(-1)
    return change


def _attended(base: Run, layer: Layer, block: Sequence[Variant], target: torch.Tensor) -> torch.Tensor:
    """Returns head outputs with queries, keys or values replaced [variants, pairs, tokens, width]."""
    kind, index = block[0].site.kind, block[0].site.layer
    count, shared = len(block), layer.n_heads // layer.n_heads_of('k')
    parts = {}
    for name in PROJECTIONS:
        value, columns = base.values[Site(name, index)], _heads_read(layer, kind, name, shared)
        parts[name] = torch.stack([value[..., columns(variant.unit or 0)] for variant in block])
    for own, value, variant in zip(parts[kind], target, block, strict=True):
        own.copy_(value if variant.where is None else torch.where(variant.where.unsqueeze(-1), value, own))
    context = base.contexts[index].rows(lambda tensor: tensor.repeat(count, *[1] * (tensor.dim() - 1)))
    q, k, v = (layer.split(part.flatten(0, 1)) for part in parts.values())
    q, k = layer.turned('q', q, context.rotary), layer.turned('k', k, context.rotary)
    if context.past is not None:
        groups = [variant.unit or 0 if kind != 'q' else (variant.unit or 0) // shared for variant in block]
        k, v = (
            torch.cat([past[:, groups].transpose(0, 1).flatten(0, 1).unsqueeze(1), own], dim=2)
            for past, own in zip(context.past, (k, v), strict=True)
        )
    z = attend(q, k, v, layer.mask(context, q.shape[2], q.device))
    return z.transpose(1, 2).flatten(2).unflatten(0, (count, -1))


def _heads_read(layer: Layer, kind: str, name: str, shared: int) -> Callable[[int], slice]:
    """Returns, for a head of a kind, which columns of queries, keys or values its attention is made of."""
    if name == 'q' and kind != 'q':
        return lambda unit: layer.reach(kind, unit)
    return lambda unit: layer.columns(unit // shared if kind == 'q' and name != 'q' else unit)


def into_stream(layer: Layer, per_head: torch.Tensor, kind: str, heads: Sequence[int]) -> torch.Tensor:
    """Returns what changes of heads [variants, pairs, tokens, width] add to the attention output [..., d]."""
    weight = torch.stack([layer.attention_out.weight[:, layer.reach(kind, head)].T for head in heads])
    return torch.bmm(per_head.flatten(1, 2), weight).view(*per_head.shape[:-1], -1)
