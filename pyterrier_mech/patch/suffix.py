"""Causal models: tokens before the first difference are the same in every run, so only those behind it are computed.

No token sees a later one. So what precedes the first token that differs has the same activations in both runs, and no
patch reaches it: its keys and values are those of the base run. Behind the token that is read nothing matters either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from pyterrier_mech.anatomy.attention import attend, attend_after
from pyterrier_mech.anatomy.layers import Context, Layer
from pyterrier_mech.anatomy.model import Batch, ModelMap, Run, Values
from pyterrier_mech.anatomy.readouts import Readout
from pyterrier_mech.patch.variants import PATTERN, PROJECTIONS, Variant
from pyterrier_mech.units import HEADS, Site


@dataclass(frozen=True)
class Suffix:
    """Which tokens of every pair are computed: as many of each, up to the one that is read.

    Attributes:
        start: Where they begin [pairs].
        width: How many there are.
    """

    start: torch.Tensor
    width: int

    @classmethod
    def between(cls, first: torch.Tensor, at: torch.Tensor | int) -> Suffix:
        """Returns the tokens from the first changed one [pairs] to the one that is read."""
        last = torch.as_tensor(at, device=first.device).expand(first.shape)
        width = int((last + 1 - torch.minimum(first, last)).max())
        return cls((last + 1 - width).clamp(min=0), width)

    @property
    def before(self) -> int:
        """The most tokens that stand before those of a pair."""
        return int(self.start.max())

    @cached_property
    def _places(self) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.start.device
        rows = torch.arange(len(self.start), device=device)[:, None]
        return rows, self.start[:, None] + torch.arange(self.width, device=device)

    def pick(self, tensor: torch.Tensor) -> torch.Tensor:
        """From [pairs, tokens, …] to [pairs, width, …]."""
        return tensor[self._places]

    def spread(self, short: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Returns […, pairs, tokens, d] with the tokens of the suffix from `short` […, pairs, width, d]."""
        whole = whole.expand(*short.shape[:-2], *whole.shape[-2:]).clone()
        whole[(..., *self._places, slice(None))] = short
        return whole

    def contexts(self, model: ModelMap, base: Run) -> list[Context]:
        """Returns what the layers are given for these tokens, earlier keys and values included."""
        rows, places = self._places
        masks: dict[int, torch.Tensor] = {}
        found = []
        for index, (layer, context) in enumerate(zip(model.layers, base.contexts, strict=True)):
            if id(context.mask) not in masks:
                masks[id(context.mask)] = self._mask(layer, context, base.batch.shape)
            cos_sin: Any = context.rotary  # all described decoders have rotary positions
            whole = [part.expand(len(rows), *part.shape[1:]) for part in cos_sin]
            past = None
            if self.before:
                k, v = (layer.split(base.values[Site(kind, index)][:, : self.before]) for kind in ('k', 'v'))
                past = layer.turned('k', k, (whole[0][:, : self.before], whole[1][:, : self.before])), v
            found.append(Context(masks[id(context.mask)], (whole[0][rows, places], whole[1][rows, places]), past))
        return found

    def _mask(self, layer: Layer, context: Context, shape: tuple[int, int]) -> torch.Tensor:
        """Returns the mask [pairs, 1, width, before + width] of these tokens."""
        rows, places = self._places
        mask: Any = layer.mask(context, shape[1], self.start.device)  # a causal layer has one
        mask = mask.expand(shape[0], *mask.shape[1:])[rows, :, places].transpose(1, 2)
        own = mask.gather(-1, places[:, None, None, :].expand(*mask.shape[:-1], -1))
        # Of a pair that begins earlier than others, tokens of its own would stand among the earlier ones.
        none = torch.arange(self.before, device=mask.device) >= self.start[:, None, None, None]
        least = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return torch.cat([mask[..., : self.before].masked_fill(none, least), own], dim=-1)


def shortened(
    model: ModelMap, readout: Readout, base: Run, targets: Values, variants: Sequence[Variant]
) -> tuple[Run, Values, list[Variant], Suffix | None]:
    """Returns a base run of the tokens that variants can change, with targets and variants for it."""
    at = readout.at(base.batch.scored)
    if at is None or any(variant.site.kind == PATTERN for variant in variants):
        return base, targets, list(variants), None
    suffix = Suffix.between(_first_changed(base, targets, variants), at)
    n_pairs, n_tokens = base.batch.shape

    def of(tensor: torch.Tensor) -> torch.Tensor:
        return suffix.pick(tensor.expand(n_pairs, n_tokens, *tensor.shape[2:]))

    values = {site: of(value) for site, value in base.values.items() if site.kind != PATTERN}
    run = Run(base.batch.picked(of), base.hidden, values, suffix.contexts(model, base))
    short = {site: of(targets[site]) for site in {variant.site for variant in variants if variant.value is None}}
    some = [
        variant._replace(
            where=None if variant.where is None else of(variant.where),
            value=None if variant.value is None else of(variant.value),
        )
        for variant in variants
    ]
    return run, short, some, suffix


def _first_changed(base: Run, targets: Values, variants: Sequence[Variant]) -> torch.Tensor:
    """Returns the first position that any variant changes [pairs]; the number of tokens where none does."""
    changed = torch.zeros(base.batch.shape, dtype=torch.bool, device=base.batch.scored.device)
    seen: Values = {}
    for variant in variants:
        if variant.value is None:
            if variant.site not in seen:
                seen[variant.site] = (targets[variant.site] != base.values[variant.site]).any(-1)
            there = seen[variant.site]
        else:
            width = variant.value.shape[-1]
            number = variant.unit or 0
            own = base.values[variant.site][..., number * width : (number + 1) * width]
            there = (variant.value != own).any(-1)
        changed |= there if variant.where is None else there & variant.where
    return torch.where(changed.any(1), changed.int().argmax(1), changed.shape[1])


def resumed(model: ModelMap, readout: Readout, base: Run, batch: Batch) -> Run | None:
    """Returns the run of other inputs that begin as those of a run; None where that has to be run as a whole.

    Args:
        model: A plain causal model.
        readout: What is read.
        base: A run with keys and values.
        batch: Inputs of the same shape, and with the same attention mask.
    """
    at, ids = readout.at(batch.scored), batch.tensors['input_ids']
    others = [name for name in batch.tensors if name != 'input_ids']
    same = all(torch.equal(batch.tensors[name], base.batch.tensors[name]) for name in others)
    if at is None or not same or not torch.equal(batch.scored, base.batch.scored):
        return None
    differs = ids != base.batch.tensors['input_ids']
    first = torch.where(differs.any(1), differs.int().argmax(1), differs.shape[1])
    suffix, embed = Suffix.between(first, at), model.base.get_input_embeddings()
    start = Site('resid_pre', 0)
    if not torch.equal(suffix.pick(embed(base.batch.tensors['input_ids'])), suffix.pick(base.values[start])):
        return None  # something stands between embeddings and the first layer
    x, values = embed(suffix.pick(ids)), {}
    for index, (layer, context) in enumerate(zip(model.layers, suffix.contexts(model, base), strict=True)):
        seen = _through(layer, x, context)
        x = seen['resid_post']
        for kind, value in seen.items():
            site = Site(kind, index)
            if site in base.values:
                values[site] = suffix.spread(value, base.values[site])
    return Run(batch, suffix.spread(model.final_norm(x), base.hidden), values, base.contexts)


def _through(layer: Layer, x: torch.Tensor, context: Context) -> dict[str, torch.Tensor]:
    """Takes tokens through a layer; returns what passes at all kinds of sites."""
    h = layer.attention_input(x)
    raw = {kind: part(h) for kind, part in zip(PROJECTIONS, layer.qkv_parts, strict=True)}
    q, k, v = (layer.split(part) for part in raw.values())
    q, k = layer.turned('q', q, context.rotary), layer.turned('k', k, context.rotary)
    past = context.past
    z = attend(q, k, v, context.mask) if past is None else attend_after(q, k, v, context.mask, past)
    z = z.transpose(1, 2).reshape(*x.shape[:-1], -1)
    attention = layer.attention_out(z)
    a = layer.attended(x, attention.clone())
    mlp = layer.mlp(layer.part('norm_mlp')(a))
    post = layer.after_mlp(a, mlp.clone())
    return {'resid_pre': x, **raw, HEADS: z, 'attn_out': attention, 'mlp_out': mlp, 'resid_post': post}
