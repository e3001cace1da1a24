"""Rankers with an intervention, as re-ranking stages: its effect is then judged by `pt.Experiment`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt
import torch

from pyterrier_mech.anatomy.encoder import pool
from pyterrier_mech.frames import require, strings
from pyterrier_mech.inputs.batching import in_batches
from pyterrier_mech.patch.ablate import Intervention
from pyterrier_mech.patch.interventions import (
    Columns,
    PlainInputs,
    Replacement,
    Values,
    check_value,
    columns_of,
    recorded,
    replaced,
    zeros,
)
from pyterrier_mech.patch.pairs import PATCHABLE, Fields, Pairs, two_versions
from pyterrier_mech.patch.runs import side_inputs
from pyterrier_mech.rankers.ranker import Ranker, as_numpy
from pyterrier_mech.units import Units


class AblatedReranker(Intervention):
    """Re-ranks with a ranker from which heads and neurons are taken, all together in one forward.

    **Input columns**: qid, query, docno, text. **Output columns**: the same with score and rank.

    Without units it is the ranker. Everything but a circuit is ablated by
    ``AblatedReranker(model, circuit.complement(model), …)`` with `Units`.

    Args:
        model: A ranker; its weights are left alone.
        units: Heads and neurons, as `Units.of` accepts them: names ('L3H7', 'L3N120'), `Units`, or what has them.
        value: 'zero', which is the same as zeroing their columns of the next linear map; 'mean' or 'resample' from
            the reference. See `Replacement`.
        reference: Frame with query and text columns, for 'mean' and 'resample': usually rows of other queries.
        seed: Of the draw of the other row, which is a function of seed, query and text.
        text_field: Column of the text, here and in the reference; by default as the model has it.

    Raises:
        TypeError: If the reference is no frame.
        ValueError: If a setting is not known, a unit does not exist, or the reference is missing, empty or has rows
            without text.
    """

    def __init__(
        self,
        model: Ranker,
        units: Any,
        *,
        value: str = 'zero',
        reference: pd.DataFrame | None = None,
        seed: int = 0,
        text_field: str | None = None,
    ):
        """Stores the settings; reference values are computed when first needed."""
        super().__init__()
        self.model = model
        self.units = units
        self.value = value
        self.reference = reference
        self.seed = seed
        self.text_field = text_field

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Scores and ranks the rows of a result frame."""
        check_value(self.value, self.reference, self._text)
        require(inp, self, ['query', self._text])
        scores = self.score(strings(inp, 'query', self), strings(inp, self._text, self))
        return pt.model.add_ranks(inp.assign(score=scores))

    def score(self, queries: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        """Returns one raw score for every query and text, as the ranker's own `score` does."""
        model = self.model
        check_value(self.value, self.reference, self._text)
        # Units are looked up in the weights, which a frame without rows shall not load.
        if not len(queries):
            return np.zeros(0, dtype=np.float32)
        units = Units.of(self.units).check(model)
        if not len(units):
            return model.score(queries, texts)
        if self.value == 'zero':
            with replaced(model.encoder, columns_of(model.encoder, units), zeros(model.encoder)):
                return model.score(queries, texts)
        if self._replacement is None:
            self._replacement = Replacement(model, units, self.value, self.reference, self.seed, self._text)
        return self._score_batches(PlainInputs.of(model, queries, texts), self._replacement)

    def _score_batches(self, inputs: PlainInputs, replacement: Replacement) -> np.ndarray:
        model = self.model

        def vectors(tower: int, rows: np.ndarray) -> torch.Tensor:
            values = replacement.values(inputs, tower, rows)
            return _vectors(model, inputs.model_inputs(model, tower, rows), replacement.columns, values)

        def step(rows: np.ndarray) -> np.ndarray:
            return as_numpy(model.read([vectors(tower, rows) for tower in range(len(model.towers))]))

        lengths = inputs.lengths + replacement.lengths(inputs)
        with model.computing():
            done = list(in_batches(lengths, model.loaded.budget, step, verbose=model.verbose, desc='AblatedReranker'))
        order = np.concatenate([rows for rows, _ in done])
        return np.concatenate([values for _, values in done])[np.argsort(order)]


class PatchedReranker(Intervention):
    """Re-ranks with a ranker that reads the original pair, with chosen heads as the perturbed pair makes them.

    **Input columns**: qid, query, docno, text and the other version that `Perturb` wrote: text_0, query_0, or both.

    **Output columns**: the same with score, rank, and `patchable` ('yes', or why the pair cannot be patched: then the
    score is that of the original).

    All heads are patched together; without heads the score is `score_original` of `PatchHeads`, filler included.

    Args:
        model: A ranker; its weights are left alone.
        heads: The heads, as `Units.of` accepts them: names ('L3H7'), (layer, head), `Units`, or what has them;
            neurons ('L3N120') may be among them.
        filler: Token that stands where one side has none, 'mask', or None: as in `PatchHeads`.
        text_field: Column of the text; by default as the model has it.

    Raises:
        ValueError: If a head does not exist, or the filler is not a single token.
    """

    def __init__(self, model: Ranker, heads: Any, *, filler: str | None = 'a', text_field: str | None = None):
        """Stores the settings."""
        super().__init__()
        self.model = model
        self.heads = heads
        self.filler = filler
        self.text_field = text_field

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Scores and ranks the rows of a result frame."""
        original, perturbed = two_versions(inp, self, self._text)
        if not len(inp):
            columns = {'score': np.zeros(0, dtype=np.float32), 'patchable': np.zeros(0, dtype=object)}
        else:
            columns = self._patch(original, perturbed, Units.of(self.heads).check(self.model))
        return pt.model.add_ranks(inp.assign(**columns))

    def _patch(self, original: Fields, perturbed: Fields, units: Units) -> dict[str, Any]:
        model = self.model
        pairs = Pairs(model, original, perturbed, self.filler)
        scores = pairs.table(0)[0]
        columns = columns_of(model.encoder, units)
        segments = model.loaded.maker.uses_segments

        def step(batch: np.ndarray) -> np.ndarray:
            vectors = []
            for tower in pairs.picked(batch):
                base, source = (side_inputs(model.encoder, tower, side, segments) for side in ('original', 'perturbed'))
                seen = recorded(model.encoder, source, columns) if columns else {}
                vectors.append(_vectors(model, base, columns, seen.__getitem__))
            return as_numpy(model.read(vectors))

        with model.computing():
            for rows, values in in_batches(
                2 * pairs.tokens(), model.loaded.budget, step, verbose=model.verbose, desc='PatchedReranker'
            ):
                scores[pairs.good[rows]] = values
        return {'score': scores, 'patchable': [problem or PATCHABLE for problem in pairs.problems]}


def _vectors(model: Ranker, inputs: dict[str, torch.Tensor], columns: Columns, values: Values) -> torch.Tensor:
    """Returns the pooled vectors [rows, d] of a run with values replaced."""
    with replaced(model.encoder, columns, values):
        hidden = model.encoder.run(inputs)
    return pool(hidden, inputs['attention_mask'], model.pooling_)
