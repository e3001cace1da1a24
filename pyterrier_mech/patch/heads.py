"""Activation patching of attention heads, as a pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyterrier_mech.frames import Fields, two_versions, with_columns
from pyterrier_mech.inputs.batching import collected
from pyterrier_mech.inputs.inputs import Inputs
from pyterrier_mech.patch.engine import Engine, engine_for, variants_of
from pyterrier_mech.patch.pairs import no_pairs, pair_columns, started
from pyterrier_mech.patch.patching import Patching
from pyterrier_mech.rankers.ranker import as_numpy
from pyterrier_mech.stage import units
from pyterrier_mech.units import HEADS, Unit


@dataclass(eq=False, repr=False)
class PatchHeads(Patching):
    """How much each attention head carries the reaction of a ranker to an edit: exact activation patching.

    The ranker reads the original pair with the output of one head, at every position, replaced by what the head gives
    for the perturbed pair. The head's effect is how far that moves the score.

    **Input columns**: qid, query, docno, text and the other version that `Perturb` wrote: text_0, query_0, or both.

    **Output columns**: the same and `score_original`, `score_perturbed` (raw logits of the aligned inputs),
    `patchable` ('yes', or why the pair cannot be patched: then its effects are NaN), one float column a head,
    `L{layer}H{head}`: patched score − score_original, in raw logits; and `analysis`, which says how they were made. The
    ranking is kept.

    Both inputs have the same length, position by position: see `Aligner`. So `score_original` is the score of the
    original with filler tokens where the perturbed text has more.

    Args:
        model: A ranker.
        heads: The heads to patch, as `Units.of` accepts them: names ('L3H7'), (layer, head), `Units`, a circuit; by
            default all.
        direction: 'perturbed_to_original' (as above), or 'original_to_perturbed': the perturbed pair is read with a
            head of the original, and a column holds patched score − score_perturbed.
        effect: 'difference', or 'normalized': divided by the whole score change in the patching direction; NaN where
            there is none. For one row only: `HeadEffects` wants differences.
        filler: Token that stands where one side has none; 'mask' hides these positions from attention instead, so that
            `score_original` is the score of the plain text, unless one of the texts is truncated; None marks pairs of
            unequal length as not patchable.
        batch_tokens: Tokens in memory at a time, over all patched variants; by default as the model has it. Peak
            memory grows with this number and with the layers times the tokens of one batch of pairs.
        text_field: Column of the text; by default as the model has it.
        verbose: Shows a progress bar; by default as the model has it.

    Raises:
        TypeError: If the model is not a ranker.
        ValueError: If a setting is not known or a head does not exist, before any work; if a score is not finite.

    Source: Chen, Merullo, Eickhoff, SIGIR 2024, arXiv 2405.02503; Vig et al., NeurIPS 2020.
    """

    _: KW_ONLY
    heads: Any = units([HEADS], default=None)

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Patches every pair of a frame."""
        self.check()
        versions = two_versions(inp, self, self.text)
        heads = self.chosen('heads')
        names = [unit.name for unit in heads]
        columns = self._patch(versions, heads, names) if len(inp) else no_pairs(names)
        return with_columns(inp, columns, self._analysis(names))

    def _patch(self, versions: tuple[Fields, Fields], heads: list[Unit], names: Sequence[str]) -> dict[str, Any]:
        inputs = Inputs.pairs(self.model, *versions, self.filler)
        table = started(self.model, inputs, versions, len(heads))
        if len(inputs.good):
            table[:, inputs.good] = self.model.finite(self._scores(inputs, heads))
        table[2:] = self._effects(table)
        return pair_columns(table, inputs.problems, names)

    def _scores(self, inputs: Inputs, heads: list[Unit]) -> np.ndarray:
        """Returns the scores [original, perturbed, heads…] x good rows."""
        model, budget = self.model, self.budget
        tokens = inputs.lengths[inputs.good]
        with model.computing():
            engine = engine_for(model)

            def step(batch: np.ndarray) -> np.ndarray:
                rows = inputs.good[batch]
                towers = range(len(inputs.towers))
                return as_numpy(
                    model.read([self._vectors(engine, inputs, tower, rows, heads, budget.tokens) for tower in towers])
                )

            return collected(
                tokens * (2 + len(heads)), budget, step, smallest=2 * tokens, verbose=self.shows, desc='PatchHeads'
            )

    def _vectors(
        self, engine: Engine, inputs: Inputs, tower: int, rows: np.ndarray, heads: list[Unit], batch_tokens: int
    ) -> torch.Tensor:
        """Returns the vectors of one tower [original, perturbed, heads…] x pairs x d."""
        both, (base, source) = self._both(inputs, tower, rows, [HEADS])
        if not heads:
            return both
        if all(inputs.towers[tower].unchanged(row) for row in rows):
            same = self.model.readout.represent(base.hidden, base.batch.scored)
            return torch.cat([both, same.expand(len(heads), -1, -1)])
        return torch.cat([both, engine.vectors(base, source.values, variants_of(heads), batch_tokens)])
