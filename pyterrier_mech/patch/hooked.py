"""Exact head patching through the model's own forward, where the wavefront does not apply."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from pyterrier_mech.anatomy.model import Edit, ModelMap, Run, Values
from pyterrier_mech.anatomy.readouts import Readout
from pyterrier_mech.patch.variants import PATTERN, Received, Variant, chunks, target_of
from pyterrier_mech.units import HEADS, Site


class Hooked:
    """Patches sites of any encoder whose output projections are known."""

    def __init__(self, model: ModelMap, readout: Readout):
        """Stores the map and what is read."""
        self.map = model
        self.readout = readout

    def recorded(self, kinds: Sequence[str]) -> list[str]:
        """See `Engine`."""
        if PATTERN in kinds:
            raise ValueError(
                'attention weights are made from the parts of the layers, which is not allowed here: '
                f"{self.map.why_not_plain()}. Patch site='q' and site='k', or merge adapters and remove hooks"
            )
        return list(kinds)

    def vectors(self, base: Run, targets: Values, variants: Sequence[Variant], batch_tokens: int) -> torch.Tensor:
        """See `Engine`: by one full forward a variant, many variants in a batch."""
        return torch.cat([self._chunk(base, targets, chunk) for chunk in chunks(base, variants, batch_tokens)])

    def frozen(
        self, base: Run, targets: Values, senders: Sequence[Variant], read: Sequence[Site], batch_tokens: int
    ) -> Iterator[Received]:
        """See `Engine`: by one full forward a sender, in which every head but the sender is put back."""
        for chunk in chunks(base, senders, batch_tokens):
            run = self._run(base, self.map.sites(HEADS), targets, chunk, read, frozen=True)
            for site in read:
                active = [i for i, sender in enumerate(chunk) if sender.site.layer < site.layer]
                if active:
                    values = run.values[site].unflatten(0, (len(chunk), -1))
                    yield [chunk[i] for i in active], site, values[active]
            yield chunk, None, self._represented(run, len(chunk))

    def _chunk(self, base: Run, targets: Values, variants: Sequence[Variant]) -> torch.Tensor:
        sites = list(dict.fromkeys(variant.site for variant in variants))
        return self._represented(self._run(base, sites, targets, variants), len(variants))

    def _run(
        self,
        base: Run,
        sites: Sequence[Site],
        targets: Values,
        variants: Sequence[Variant],
        read: Sequence[Site] = (),
        frozen: bool = False,
    ) -> Run:
        edits = {site: self._swap(site, targets, variants, base.values[site] if frozen else None) for site in sites}
        return self.map.run(base.batch.repeated(len(variants)), edits=edits, record=read)

    def _represented(self, run: Run, count: int) -> torch.Tensor:
        return self.readout.represent(run.hidden, run.batch.scored).unflatten(0, (count, -1))

    def _swap(self, site: Site, targets: Values, variants: Sequence[Variant], start: torch.Tensor | None) -> Edit:
        layer = self.map.layers[site.layer]

        def edit(tensor: torch.Tensor) -> torch.Tensor:
            patched = tensor.clone().unflatten(0, (len(variants), -1))
            if start is not None:
                patched[:] = start
            for one, variant in zip(patched, variants, strict=True):
                if variant.site == site:
                    mine = one if variant.unit is None else one[..., layer.columns(variant.unit)]
                    theirs, where = target_of(variant, targets, layer).expand_as(mine), variant.where
                    mine.copy_(theirs if where is None else torch.where(where[..., None], theirs, mine))
            return patched.flatten(0, 1)

        return edit
