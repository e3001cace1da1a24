"""Exact head patching through the model's own forward, where the wavefront does not apply."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyterrier_mech.anatomy.model import Edit, ModelMap, Run, Values
from pyterrier_mech.anatomy.readouts import Readout
from pyterrier_mech.patch.wavefront import Variant
from pyterrier_mech.units import Site


class Hooked:
    """Patches sites of any encoder whose output projections are known."""

    def __init__(self, model: ModelMap, readout: Readout):
        """Stores the map and what is read."""
        self.map = model
        self.readout = readout

    def vectors(self, base: Run, targets: Values, variants: Sequence[Variant], batch_tokens: int) -> torch.Tensor:
        """See `Engine`: by one full forward a variant, many variants in a batch."""
        n_pairs, n_tokens = base.batch.shape
        size = max(1, batch_tokens // (n_pairs * n_tokens))
        chunks = [variants[start : start + size] for start in range(0, len(variants), size)]
        return torch.cat([self._chunk(base, targets, chunk) for chunk in chunks])

    def _chunk(self, base: Run, targets: Values, variants: Sequence[Variant]) -> torch.Tensor:
        batch = base.batch.repeated(len(variants))
        sites = dict.fromkeys(variant.site for variant in variants)
        edits = {site: self._swap(site, targets[site], variants) for site in sites}
        vectors = self.readout.represent(self.map.run(batch, edits=edits).hidden, batch.scored)
        return vectors.unflatten(0, (len(variants), base.batch.shape[0]))

    def _swap(self, site: Site, target: torch.Tensor, variants: Sequence[Variant]) -> Edit:
        layer = self.map.layers[site.layer]

        def edit(tensor: torch.Tensor) -> torch.Tensor:
            patched = tensor.clone().unflatten(0, (len(variants), -1))
            values = target.expand_as(patched[0])
            for i, (where_from, unit, where) in enumerate(variants):
                if where_from == site:
                    columns = slice(None) if unit is None else layer.columns(unit)
                    mine, theirs = patched[i][..., columns], values[..., columns]
                    patched[i][..., columns] = theirs if where is None else torch.where(where[..., None], theirs, mine)
            return patched.flatten(0, 1)

        return edit
