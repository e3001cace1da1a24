"""Rows of query and text as model inputs, tokenised once, in any batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pyterrier_mech.anatomy.encoder import pool
from pyterrier_mech.inputs.tokens import Ragged
from pyterrier_mech.rankers.ranker import Ranker


@dataclass(frozen=True, eq=False)
class Encoded:
    """Token ids of the rows, as a ranker reads them.

    Attributes:
        model: The ranker whose tokenizer and truncation made them; its pruned copies read the same.
        towers: For each tower, its parts, cut to their length.
    """

    model: Ranker
    towers: list[list[Ragged]]

    @classmethod
    def of(cls, model: Ranker, queries: Sequence[str], texts: Sequence[str]) -> Encoded:
        """Tokenises and truncates as the ranker does."""
        fields = {'query': list(queries), 'text': list(texts)}
        return cls(model, [model.cut([model.tokenize(field, fields[field]) for field in t]) for t in model.towers])

    def lengths(self, tower: int) -> np.ndarray:
        """Returns the tokens of every row in a tower, special tokens included."""
        parts = self.towers[tower]
        return np.sum([part.lengths for part in parts], axis=0) + self.model.loaded.maker.template(len(parts)).n_special

    @property
    def mean_length(self) -> float:
        """The mean length of a sequence, over rows and towers."""
        return float(np.mean([self.lengths(tower) for tower in range(len(self.towers))]))

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of every row, over all towers."""
        return np.sum([self.lengths(tower) for tower in range(len(self.towers))], axis=0)

    def inputs(self, tower: int, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Returns the model inputs of a tower for some rows, padded to the longest of them."""
        parts = [part.take(rows) for part in self.towers[tower]]
        return self.model.loaded.maker.batch(parts, self.model.encoder.device)

    def scores(self, ranker: Ranker, rows: np.ndarray) -> torch.Tensor:
        """Returns the scores [rows] that a ranker gives, with a graph where gradients are on.

        Args:
            ranker: The ranker that made the inputs, or a pruned copy of it.
            rows: Which rows.
        """
        vectors = []
        for tower in range(len(self.towers)):
            inputs = self.inputs(tower, rows)
            # Every layer runs whole: the shortcut for the first token is no faster with its graph.
            vectors.append(pool(ranker.encoder.run(inputs), inputs['attention_mask'], ranker.pooling_))
        return ranker.read(vectors)
