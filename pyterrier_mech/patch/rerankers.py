"""Rankers with an intervention, as re-ranking stages: its effect is then judged by `pt.Experiment`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt

from pyterrier_mech.anatomy.edits import columns_of, picking, zeros
from pyterrier_mech.frames import Fields, texts_of, two_versions
from pyterrier_mech.inputs.batching import collected
from pyterrier_mech.inputs.inputs import ORIGINAL, PERTURBED, Inputs, checked_rows
from pyterrier_mech.patch.ablate import Ablation
from pyterrier_mech.patch.pairs import no_pairs, pair_columns, started
from pyterrier_mech.patch.replacement import keys, replacing
from pyterrier_mech.provenance import with_seen
from pyterrier_mech.rankers.ranker import as_numpy
from pyterrier_mech.stage import ModelStage, units
from pyterrier_mech.units import Units


@dataclass(eq=False, repr=False)
class AblatedReranker(Ablation):
    """Re-ranks with a ranker from which heads and neurons are taken, all together in one forward.

    **Input columns**: qid, query, docno, text. **Output columns**: the same with score and rank.

    Without units it is the ranker. Everything but a circuit is ablated by
    ``AblatedReranker(model, circuit.units.complement(model), …)``. The queries that the units were found on, where they
    know them, go with the result: `stats.compare` refuses to judge on these.

    Args:
        model: A ranker; its weights are left alone.
        units: Heads and neurons, as `Units.of` accepts them: names ('L3H7', 'L3N120'), `Units`, or what has them.
        value: 'zero', which is the same as zeroing their columns of the next linear map; 'mean' or 'resample' from
            the reference. See `Replacement`.
        reference: Frame with query and text columns, for 'mean' and 'resample': usually rows of other queries.
        seed: Random seed of the draw of the other row, which is a function of seed, query and text.
        text_field: Column of the text, here and in the reference; by default as the model has it.
        batch_tokens: Tokens of one batch; by default as the model has it.
        verbose: Shows a progress bar; by default as the model has it.

    Raises:
        TypeError: If the model is not a ranker, or the reference is not a frame.
        ValueError: If a setting is not known, a unit does not exist, or the reference is missing, empty or has rows
            without text; if a score is not finite.
    """

    units: Any = units()

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Scores and ranks the rows of a result frame."""
        self.check()
        values = texts_of(inp, self, self.text)
        res = pt.model.add_ranks(inp.assign(score=self.score(values['query'], values['text'])))
        return with_seen(res, [*getattr(self.units, 'qids', ()), *self.model.seen]) if len(inp) else res

    def score(self, queries: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        """Returns one raw score for every query and text, as the ranker's own `score` does."""
        model = self.model
        self.check()
        # Units are looked up in the weights, which a frame without rows shall not load.
        if not len(queries):
            return np.zeros(0, dtype=np.float32)
        chosen = Units.of(self.units).check(model)
        if not chosen:
            return model.score(queries, texts)
        if self.value == 'zero':
            return model.score(queries, texts, edits=zeros(columns_of(model.map, chosen)))
        values = checked_rows(queries, texts)
        replacement = self._replacement(chosen)
        inputs = Inputs.plain(model, *values.values(), types=True)
        read = [keys(tower, *values.values()) for tower in model.towers]

        def step(rows: np.ndarray) -> np.ndarray:
            edits = [
                replacement.edits(inputs, tower, rows, [texts[row] for row in rows]) for tower, texts in enumerate(read)
            ]
            return as_numpy(model.run(inputs, rows, edits=edits))

        lengths = inputs.lengths + replacement.lengths(read)
        with model.computing():
            return model.finite(collected(lengths, self.budget, step, verbose=self.shows, desc='AblatedReranker'))


@dataclass(eq=False, repr=False)
class PatchedReranker(ModelStage):
    """Re-ranks with a ranker that reads the original pair, with chosen heads as the perturbed pair makes them.

    **Input columns**: qid, query, docno, text and the other version that `Perturb` wrote: text_0, query_0, or both.

    **Output columns**: the same with score, rank, and `patchable` ('yes', or why the pair cannot be patched: then the
    score is that of the original).

    All units are patched together; without any the score is `score_original` of `PatchHeads`, filler included.

    Args:
        model: A ranker; its weights are left alone.
        units: Heads and neurons, as `Units.of` accepts them: names ('L3H7', 'L3N120'), `Units`, or what has them.
        filler: Token that stands where one side has none, 'mask', or None: as in `PatchHeads`.
        text_field: Column of the text; by default as the model has it.
        batch_tokens: Tokens of one batch; by default as the model has it.
        verbose: Shows a progress bar; by default as the model has it.

    Raises:
        TypeError: If the model is not a ranker.
        ValueError: If a unit does not exist, the filler is not a single token, or a score is not finite.
    """

    units: Any = units()
    _: KW_ONLY
    filler: str | None = 'a'

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Scores and ranks the rows of a result frame."""
        self.check()
        versions = two_versions(inp, self, self.text)
        columns = self._patch(versions, Units.of(self.units).check(self.model)) if len(inp) else no_pairs([])
        res = pt.model.add_ranks(inp.assign(score=columns['score_original'], patchable=columns['patchable']))
        return with_seen(res, [*getattr(self.units, 'qids', ()), *self.model.seen]) if len(inp) else res

    def _patch(self, versions: tuple[Fields, Fields], chosen: Units) -> dict[str, Any]:
        model = self.model
        inputs = Inputs.pairs(model, *versions, self.filler)
        table = started(model, inputs, versions, 0)
        columns = columns_of(model.map, chosen)

        def step(batch: np.ndarray) -> np.ndarray:
            rows = inputs.good[batch]
            edits = []
            for tower in range(len(inputs.towers)):
                source = inputs.batch(tower, rows, PERTURBED)
                seen = model.map.run(source, record=picking(columns)).values if columns else {}
                edits.append(replacing(columns, seen.__getitem__))
            return as_numpy(model.run(inputs, rows, side=ORIGINAL, edits=edits))

        if len(inputs.good):
            with model.computing():
                lengths = 2 * inputs.lengths[inputs.good]
                scores = collected(lengths, self.budget, step, verbose=self.shows, desc='PatchedReranker')
            table[0, inputs.good] = model.finite(scores)
        return pair_columns(table, inputs.problems, [])
