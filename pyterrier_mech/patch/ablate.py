"""Ablation of attention heads, one at a time, as a pipeline stage."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyterrier_mech.frames import Fields, texts_of, with_columns
from pyterrier_mech.inputs.batching import collected
from pyterrier_mech.inputs.inputs import Inputs
from pyterrier_mech.patch.engine import engine_for, traced
from pyterrier_mech.patch.replacement import VALUES, Replacement, check_value, keys
from pyterrier_mech.patch.variants import variants_of
from pyterrier_mech.provenance import Analysis, noted
from pyterrier_mech.rankers.ranker import as_numpy
from pyterrier_mech.stage import Keeping, ModelStage, choice, units
from pyterrier_mech.units import HEADS, Unit, Units


@dataclass(eq=False, repr=False)
class Ablation(ModelStage):
    """What the stages share that replace units without a second version of the input."""

    _: KW_ONLY
    value: str = choice(VALUES)
    reference: pd.DataFrame | None = None
    seed: int = 0

    def check(self) -> None:
        """Checks the settings, before any work."""
        super().check()
        check_value(self.value, self.reference, self.text)

    def _replacement(self, chosen: Units) -> Replacement:
        """Returns what replaces some units; made once for the settings and the weights that it depends on."""

        def make() -> Replacement:
            return Replacement(self.model, chosen, self.value, self.reference, self.seed, self.text)

        model, score = self.model, b''
        if self.value != 'zero' and self.reference is not None:
            # What leaves the weights as they are, such as a hook or an adapter that is switched off, shows in a score.
            row = self.reference.iloc[:1]
            score = model.score(row['query'], row[self.text]).tobytes()
        return self.cached('replacement', (self.key(), chosen, model.map.version(), score), make)


@dataclass(eq=False, repr=False)
class AblateHeads(Keeping, Ablation):
    """How much each attention head carries of a score: the score without what the head says, one head at a time.

    **Input columns**: qid, query, docno, text.

    **Output columns**: the same and `score_plain` (the ranker's score), one float column a head,
    `L{layer}H{head}`: ablated score − score_plain, in raw logits; and `analysis`, which says how they were made. The
    ranking is kept.

    A bi-encoder's head is ablated in both towers, of which each has its own reference values.

    Args:
        model: A ranker.
        value: What stands in the place of the head's output: 'zero'; 'mean', over all positions of the reference of
            the same type (cls, query, sep, doc_match, doc_other); 'resample', the head's output for another row of
            the reference. See `Replacement`.
        reference: Frame with query and text columns, for 'mean' and 'resample': usually rows of other queries.
        heads: The heads to ablate, as `Units.of` accepts them: names ('L3H7'), (layer, head), `Units`, a circuit; by
            default all.
        seed: Random seed of the draw of the other row, which is a function of seed, query and text.
        batch_tokens: Tokens in memory at a time, over all ablated variants; by default as the model has it.
        text_field: Column of the text, here and in the reference; by default as the model has it.
        verbose: Shows a progress bar; by default as the model has it.

    Raises:
        TypeError: If the model is not a ranker, or the reference is not a frame.
        ValueError: If a setting is not known, a head does not exist, or the reference is missing, empty or has rows
            without text, before any work; if a score is not finite.

    Source: Michel, Levy, Neubig, NeurIPS 2019 (zero); Wang et al. 2022, arXiv 2211.00593 (mean); Chan et al. 2022
    (resample).
    """

    value: str = choice(VALUES)
    _: KW_ONLY
    heads: Any = units([HEADS], default=None)

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Ablates every head for every row of a frame."""
        self.check()
        values = texts_of(inp, self, self.text)
        heads = self.chosen('heads')
        if len(inp):
            scores = self.model.finite(self._ablate(values, heads))
        else:
            scores = np.zeros((1 + len(heads), 0), dtype=np.float32)
        effects = {unit.name: scores[1 + i] - scores[0] for i, unit in enumerate(heads)}
        settings = {'value': self.value, 'seed': self.seed, 'model': noted(self.model)}
        return with_columns(
            inp, {'score_plain': scores[0], **effects}, Analysis('AblateHeads', settings, list(effects))
        )

    def _ablate(self, fields: Fields, heads: list[Unit]) -> np.ndarray:
        """Returns the scores [original, heads…] x rows."""
        model, budget = self.model, self.budget
        inputs = Inputs.plain(model, fields['query'], fields['text'], types=True)
        read = [keys(tower, fields['query'], fields['text']) for tower in model.towers]
        # The engines read a layer's head outputs joined, so a layer is replaced as a whole or not at all.
        touched = {unit.site for unit in heads}
        replacement = self._replacement(Units.all(model, [HEADS]).at(*touched))
        others = replacement.lengths(read)
        with model.computing():
            engine = engine_for(model)

            def vectors(tower: int, rows: np.ndarray) -> torch.Tensor:
                base = traced(model.map, inputs, tower, rows, kinds=engine.recorded([HEADS]))
                original = model.readout.represent(base.hidden, base.batch.scored)[None]
                if not heads:
                    return original
                values = replacement.values(inputs, tower, rows, [read[tower][row] for row in rows])
                targets = {site: values(site).to(original.dtype).expand_as(base.values[site]) for site in touched}
                return torch.cat([original, engine.vectors(base, targets, variants_of(heads), budget.tokens)])

            def step(rows: np.ndarray) -> np.ndarray:
                return as_numpy(model.read([vectors(tower, rows) for tower in range(len(model.towers))]))

            return collected(
                inputs.lengths * (1 + len(heads)) + others,
                budget,
                step,
                smallest=inputs.lengths + others,
                verbose=self.shows,
                desc='AblateHeads',
            )
