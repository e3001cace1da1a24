"""Exact head patching through the model's own forward, where the wavefront does not apply."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyterrier_mech.anatomy.model import Edit, ModelMap, Run, Values
from pyterrier_mech.anatomy.readouts import Readout
from pyterrier_mech.units import Site, Unit


class Hooked:
    """Patches heads of any encoder whose output projections are known."""

    def __init__(self, model: ModelMap, readout: Readout):
        """Stores the map and what is read."""
        self.map = model
        self.readout = readout

    def vectors(self, base: Run, targets: Values, heads: Sequence[Unit], batch_tokens: int) -> torch.Tensor:
        """See `Engine`: by one full forward a head, many heads in a batch."""
        n_pairs, n_tokens = base.batch.shape
        size = max(1, batch_tokens // (n_pairs * n_tokens))
        chunks = [heads[start : start + size] for start in range(0, len(heads), size)]
        return torch.cat([self._chunk(base, targets, chunk) for chunk in chunks])

    def _chunk(self, base: Run, targets: Values, heads: Sequence[Unit]) -> torch.Tensor:
        batch = base.batch.repeated(len(heads))
        edits = {site: self._swap(site, targets[site], heads) for site in dict.fromkeys(unit.site for unit in heads)}
        vectors = self.readout.represent(self.map.run(batch, edits=edits).hidden, batch.scored)
        return vectors.unflatten(0, (len(heads), base.batch.shape[0]))

    def _swap(self, site: Site, target: torch.Tensor, heads: Sequence[Unit]) -> Edit:
        layer = self.map.layers[site.layer]
        columns = [(i, layer.columns(unit.index)) for i, unit in enumerate(heads) if unit.site == site]

        def edit(z: torch.Tensor) -> torch.Tensor:
            patched = z.clone().unflatten(0, (len(heads), -1))
            values = target.expand_as(patched[0])
            for i, places in columns:
                patched[i][..., places] = values[..., places]
            return patched.flatten(0, 1)

        return edit
