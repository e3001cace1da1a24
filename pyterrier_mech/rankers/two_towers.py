"""Rankers that read query and text in two sequences, and compare what is read out of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from pyterrier_mech.inputs.batching import in_batches
from pyterrier_mech.inputs.inputs import Inputs, checked_rows
from pyterrier_mech.rankers.ranker import Edits, Ranker, as_numpy


@dataclass(eq=False, repr=False)
class TwoTowers(Ranker):
    """Base of the rankers that encode query and text apart."""

    towers = (('query',), ('text',))
    classifier = False

    def score(self, queries: Sequence[str], texts: Sequence[str], *, edits: Edits | None = None) -> np.ndarray:
        """Returns the score of every pair, [pairs]: float32, or float64 for a float64 model.

        Equal queries and equal texts are encoded once, and texts are compared as soon as they are.
        """
        if not len(queries) and not len(texts):
            return np.zeros(0, dtype=np.float32)
        values = checked_rows(queries, texts)
        (of_query, distinct_queries), (of_text, distinct) = (
            pd.factorize(np.asarray(v, dtype=object)) for v in values.values()
        )
        pairs = np.argsort(of_text, kind='stable')
        ends = np.searchsorted(of_text[pairs], np.arange(len(distinct) + 1))
        with self.computing():
            query = self.vectors('query', list(distinct_queries), edits)

            def step(rows: np.ndarray, text: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
                mine = np.concatenate([pairs[ends[row] : ends[row + 1]] for row in rows])
                place = np.repeat(np.arange(len(rows)), ends[rows + 1] - ends[rows])
                order = np.argsort(of_query[mine], kind='stable')  # equal queries together
                parts = np.array_split(order, -(-len(order) // len(rows)))
                read = [self.read([query[of_query[mine[part]]], text[place[part]]]) for part in parts]
                return mine[order], as_numpy(torch.cat(read))

            done = [found for _, found in self._encoded('text', list(distinct), edits, step)]
        rows = np.concatenate([found for found, _ in done])
        return self.finite(np.concatenate([scores for _, scores in done])[np.argsort(rows)])

    def vectors(self, field: str, texts: Sequence[str], edits: Edits | None = None) -> torch.Tensor:
        """Returns what is read out of the texts of a field, 'query' or 'text', on the device; equal texts once.

        Where a sequence is read out as many vectors, all have as many as the longest; the others' last entries are 0.
        """
        rows, distinct = pd.factorize(np.asarray(texts, dtype=object))
        done = list(self._encoded(field, list(distinct), edits, lambda _, vectors: vectors))
        order = np.concatenate([batch for batch, _ in done])
        width = max(values.shape[1] for _, values in done)
        padded = [
            values if self.one_vector else F.pad(values, (0, 0, 0, width - values.shape[1])) for _, values in done
        ]
        return torch.cat(padded)[torch.from_numpy(np.argsort(order)[rows])]

    def _encoded(
        self, field: str, texts: list[str], edits: Edits | None, then: Any
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """Yields numbers of texts, in batches, and what `then` makes of these and of what is read out of them."""
        inputs = Inputs.of_field(self, field, texts)

        def step(batch: np.ndarray) -> Any:
            return then(batch, self.represent(inputs, 0, batch, edits=edits))

        shown: dict[str, Any] = {'verbose': self.verbose, 'desc': f'{type(self).__name__} {field}', 'unit': 'text'}
        yield from in_batches(inputs.lengths, self.budget, step, **shown)
