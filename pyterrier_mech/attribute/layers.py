"""Attribution of whole blocks by gradients, by kind of token, by position or everywhere, as a pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyterrier_mech.attribute.gradients import with_gradients, without_gradients
from pyterrier_mech.attribute.heads import EXACT, check_verify, strongest
from pyterrier_mech.attribute.path import not_finite
from pyterrier_mech.attribute.points import GRAPH
from pyterrier_mech.frames import Fields, two_versions
from pyterrier_mech.inputs.batching import in_batches
from pyterrier_mech.inputs.inputs import ORIGINAL, PERTURBED, Inputs
from pyterrier_mech.patch.layers import PatchLayers
from pyterrier_mech.patch.pairs import PATCHABLE, pair_columns, started
from pyterrier_mech.patch.sweep import Part
from pyterrier_mech.rankers.ranker import as_numpy
from pyterrier_mech.stage import choice


@dataclass(eq=False, repr=False)
class AttributeLayers(PatchLayers):
    """Where in the text, and in which block, a reaction is carried, by gradients: an estimate of `PatchLayers`.

    With x what a block gives at a position for the original pair, x′ for the perturbed pair, and s the score, the
    estimate is (x′ − x) · ∂s/∂x, summed over the width and the positions of a type. It takes two forward runs and one
    backward for everything, and it is as poor as `AttributeHeads` where the score is flat. Other than joint patches,
    the estimates of types add up.

    **Input columns** and **Output columns** as `PatchLayers` has them; with `verify` also `resid_pre.L3.inserted.exact`
    and so on, for the columns that were patched too. The ranking is kept.

    Args:
        model: A ranker.
        sites: Which blocks: 'resid_pre', 'attn_out', 'mlp_out'.
        by: 'token_type', 'position' or None; see `PatchLayers`.
        types: 'basic' or 'literature'; see `PatchLayers`.
        method: 'attribution_patching', as above.
        verify: How many columns are patched exactly as well: those with the largest sum of absolute effects over the
            frame. See `agreement`. Not by position.
        direction: 'perturbed_to_original' (as above), or 'original_to_perturbed'.
        effect: 'difference', or 'normalized': divided by the whole score change in the patching direction.
        filler: Token that stands where one side has none; see `PatchHeads`.
        batch_tokens: Tokens of one batch, each counted four times for the memory of its graph; by default as the model
            has it.
        text_field: Column of the text; by default as the model has it.
        verbose: Shows a progress bar; by default as the model has it.

    Raises:
        TypeError: If the model is not a ranker.
        ValueError: If a setting is not known, before any work; if a score or gradient is not finite.

    Source: attribution patching: Syed, Rager, Conmy 2023, arXiv 2310.10348.
    """

    _: KW_ONLY
    method: str = choice(['attribution_patching'])
    verify: int = 0

    def check(self) -> None:
        """Checks the settings, before any work."""
        super().check()
        check_verify(self.verify, self.by != 'position', f'by={self.by!r}')

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Attributes the score change of every row."""
        res = super().transform(inp)
        if not self.verify:
            return res
        parts = self._parts()
        some = [parts[i] for i in strongest(res, [part.name for part in parts], self.verify)]
        good = (res['patchable'] == PATCHABLE).to_numpy()
        table = np.full((len(some), len(res)), np.nan, dtype=self.model.float_type if len(res) else 'float32')
        if good.any():
            exact = PatchLayers._jointly(self, two_versions(inp[good], self, self.text), some)
            table[:, good] = [exact[part.name] for part in some]
        return res.assign(**{part.name + EXACT: values for part, values in zip(some, table, strict=True)})

    def _jointly(self, versions: tuple[Fields, Fields], parts: Sequence[Part]) -> dict[str, Any]:
        inputs, table, effects = self._attributed(versions, len(parts))
        names = [part.name for part in parts]
        types = self._types(inputs) if self.by == 'token_type' else [['']] * len(inputs)
        sites = {site: i for i, site in enumerate(dict.fromkeys(part.site for part in parts))}
        for row, by_position in effects.items():
            kinds = np.asarray(types[row])
            for i, part in enumerate(parts):
                there = kinds == part.type if part.type else slice(None)
                values = by_position[sites[part.site]][there]
                table[2 + i, row] = values.sum() if values.size else np.nan
        return pair_columns(table, inputs.problems, names)

    def _by_position(self, versions: tuple[Fields, Fields], parts: Sequence[Part]) -> dict[str, Any]:
        inputs, table, effects = self._attributed(versions, 0)
        lengths = inputs.lengths
        nothing = [np.full((len(parts), length), np.nan, dtype=table.dtype) for length in lengths]
        cells = [effects.get(row, nothing[row]) for row in range(len(inputs))]
        columns = {part.name: [cell[i] for cell in cells] for i, part in enumerate(parts)}
        return pair_columns(table, inputs.problems, []) | columns | self._positions(inputs)

    def _attributed(
        self, versions: tuple[Fields, Fields], n_effects: int
    ) -> tuple[Inputs, np.ndarray, dict[int, np.ndarray]]:
        """Returns inputs, the table of scores, and for every good row the effects [sites, positions]."""
        model = self.model
        inputs = Inputs.pairs(model, *versions, self.filler)
        table = started(model, inputs, versions, n_effects)
        sites = [part.site for part in self._places()]
        base, source = self._ordered([ORIGINAL, PERTURBED])

        def step(batch: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
            rows = inputs.good[batch]
            score, x, gradients = with_gradients(model, inputs, rows, base, sites)
            with model.computing():
                other, target = without_gradients(model, inputs, rows, source, sites)
            # The order of the sides is its own inverse.
            scores = as_numpy(torch.stack(self._ordered([score, other])))
            towers = zip(x, target, gradients, strict=True)
            found = [torch.stack([((b[s] - a[s]) * g[s]).sum(-1) for s in sites]) for a, b, g in towers]
            return scores, [as_numpy(tower) for tower in found]

        effects: dict[int, np.ndarray] = {}
        if len(inputs.good):
            tokens = inputs.lengths[inputs.good]
            with model.computing(gradients=True):
                settings: dict[str, Any] = {'verbose': self.shows, 'desc': type(self).__name__}
                for batch, (scores, towers) in in_batches(GRAPH * tokens, self.budget, step, **settings):
                    table[:2, inputs.good[batch]] = scores
                    for i, row in enumerate(inputs.good[batch]):
                        lengths = [tower.lengths[row] for tower in inputs.towers]
                        cut = [of[:, i, :n] for of, n in zip(towers, lengths, strict=True)]
                        effects[int(row)] = np.concatenate(cut, axis=1)
        bad = [row for row, found in effects.items() if not np.isfinite(found).all()]
        if bad:
            raise not_finite([f'row {row}' for row in bad], model)
        for row, found in effects.items():
            effects[row] = found / self._unit(table[:2, row])
        return inputs, table, effects
