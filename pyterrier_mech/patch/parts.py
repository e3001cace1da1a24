"""What a score is the sum of, and which part of it an edit moves: query tokens of ColBERT, terms of Splade."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyterrier_mech.frames import Fields, two_versions, with_columns
from pyterrier_mech.inputs.inputs import ORIGINAL, PERTURBED, Inputs
from pyterrier_mech.patch.engine import Engine, patched
from pyterrier_mech.patch.pairs import no_pairs, pair_columns, started
from pyterrier_mech.patch.patching import Patching
from pyterrier_mech.patch.variants import variants_of
from pyterrier_mech.rankers import ColBERT, Splade
from pyterrier_mech.rankers.ranker import as_numpy
from pyterrier_mech.stage import units
from pyterrier_mech.units import HEADS

EDIT = 'edit'
Row = dict[str, Any]
"""The names of the parts of a pair, and arrays [1 + heads, parts] or lists of names, by column."""


@dataclass(eq=False, repr=False)
class PatchParts(Patching):
    """Which parts of a score react to an edit: which query tokens of ColBERT, or which terms of Splade.

    A score of these rankers is a sum over parts, so an effect on it is one, too, exactly. Of ColBERT a part is a query
    token with its best match, markers and masks included; its effect is the sum of what happens at the old match and
    of what a better match adds (`rematch`, the rest). Of Splade a part is a term of the vocabulary, query weight times
    text weight.

    **Input columns**: qid, query, docno, text and the other version that `Perturb` wrote: text_0, query_0, or both.

    **Output columns**: the same and `score_original`, `score_perturbed`, `patchable` as `PatchHeads` writes them;
    `parts`, the names of the parts of a row; `parts.edit`, an array [parts]: how the edit as a whole moves each, whose
    sum is the change of the score; for each of the `heads` one array `parts.L2H9`, whose sum is the head's effect in
    `PatchHeads`; and `analysis`. For ColBERT beside each of these `rematch.edit`, `rematch.L2H9` [parts], which is not
    negative unless the old match is no longer compared, and `match_original` and `match_perturbed`, the tokens of the
    text that match. For Splade `switched.edit`, `switched.L2H9` [parts]: 1 where a term is switched on, −1 where off;
    parts are those terms that anything moves, those most moved by the edit first. Rows that cannot be patched have no
    parts. The ranking is kept.

    Args:
        model: A `ColBERT` or a `Splade`.
        heads: Heads to patch as well, as `Units.of` accepts them; None is all.
        direction: 'perturbed_to_original', or 'original_to_perturbed': what is moved is the perturbed pair.
        effect: 'difference', or 'normalized': divided by the whole score change in the patching direction.
        filler: Token that stands where one side has none; see `PatchHeads`.
        batch_tokens: Tokens in memory at a time, over all patched variants; by default as the model has it.
        text_field: Column of the text; by default as the model has it.
        verbose: Shows a progress bar; by default as the model has it.

    Raises:
        TypeError: If the model is not one of these two, whose scores have such parts.
        ValueError: If a setting is not known, or a score is not finite.
    """

    _: KW_ONLY
    heads: Any = units([HEADS], default=())

    def check(self) -> None:
        """Checks the settings, before any work."""
        super().check()
        if not isinstance(self.model, (ColBERT, Splade)):
            raise TypeError(
                f'model must be a ColBERT or a Splade, whose scores are sums over query tokens or terms; got '
                f'{self.model!r}: use PatchHeads, or PatchLayers for positions'
            )

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Patches every pair of a frame."""
        self.check()
        versions = two_versions(inp, self, self.text)
        names = self._names()
        columns = self._patch(versions, names) if len(inp) else no_pairs([]) | dict.fromkeys(names, np.zeros(0, object))
        return with_columns(inp, columns, self._analysis([name for name in names if '.' in name]))

    def _names(self) -> list[str]:
        """Returns the columns of parts."""
        late = isinstance(self.model, ColBERT)
        whole = [EDIT, *(unit.name for unit in self.chosen('heads'))]
        kinds = ['parts', 'rematch' if late else 'switched']
        more = ['match_original', 'match_perturbed'] if late else []
        return ['parts', *more, *(f'{kind}.{name}' for name in whole for kind in kinds)]

    def _patch(self, versions: tuple[Fields, Fields], names: Sequence[str]) -> dict[str, Any]:
        inputs, heads = Inputs.pairs(self.model, *versions, self.filler), self.chosen('heads')
        table = started(self.model, inputs, versions, 0)
        nothing: Row = {name: np.zeros(0, table.dtype) if '.' in name else [] for name in names}
        rows = [dict(nothing) for _ in range(len(inputs))]

        def step(engine: Engine, batch: np.ndarray) -> tuple[np.ndarray, list[Row]]:
            vectors = [self._vectors(engine, inputs, tower, batch) for tower in range(len(inputs.towers))]
            scores = as_numpy(self.model.read([part[:2] for part in vectors]))
            split = self._of_tokens if isinstance(self.model, ColBERT) else self._of_terms
            return scores, list(split(inputs, batch, vectors, self._unit(scores)))

        for batch, (scores, found) in self._swept(inputs, np.full(len(inputs), len(heads)), step):
            table[:, batch] = self.model.finite(scores)
            for row, values in zip(batch, found, strict=True):
                rows[row] = values
        columns = {name: pd.Series([row[name] for row in rows], dtype=object).to_numpy() for name in names}
        return pair_columns(table, inputs.problems, []) | columns

    def _vectors(self, engine: Engine, inputs: Inputs, tower: int, rows: np.ndarray) -> torch.Tensor:
        """Returns what is read out of a tower, [original, perturbed, heads…]."""
        heads = self.chosen('heads')
        sites = list(dict.fromkeys(unit.site for unit in heads))
        both, (base, source) = self._both(engine, inputs, tower, rows, sites)
        if not heads:
            return both
        plain, tokens = self._ordered(both)[0], self.budget.tokens
        return torch.cat(
            [both, patched(engine, self.model.map, base, source.values, variants_of(heads), tokens, plain)]
        )

    def _moves(self, values: torch.Tensor) -> torch.Tensor:
        """From values [original, perturbed, heads…] to their changes [edit, heads…]."""
        base, other = self._ordered(values[:2])
        return torch.cat([other[None], values[2:]]) - base

    def _row(self, kinds: dict[str, np.ndarray]) -> Row:
        whole = [EDIT, *(unit.name for unit in self.chosen('heads'))]
        return {f'{kind}.{name}': values[i] for kind, values in kinds.items() for i, name in enumerate(whole)}

    def _of_tokens(
        self, inputs: Inputs, rows: np.ndarray, vectors: Sequence[torch.Tensor], unit: np.ndarray
    ) -> Iterator[Row]:
        products, counts = self.model.similarities(vectors), vectors[0][..., -1]
        weights = counts / counts.sum(-1, keepdim=True) if self.model.stated_.mean else counts
        best, at = products.max(-1)
        old = products.gather(-1, self._ordered(at[:2])[0].expand(len(products), -1, -1)[..., None])[..., 0]
        # What is no longer compared is lost as a match.
        kept = torch.where(old.isfinite(), old, 0)
        moved, stayed = self._moves(best * weights), self._moves(kept * weights)
        compared, places = (counts[:2] > 0).any(0), as_numpy(at[:2])
        query, text = inputs.towers
        tokens = self.model.maker.tokenizer.convert_ids_to_tokens
        side = self._ordered([ORIGINAL, PERTURBED])[0]
        for i, row in enumerate(rows):
            there = compared[i].nonzero().squeeze(-1)
            at_query = there.cpu().numpy()
            one = np.asarray([row])
            names = {which: text.arrays(one, which)[0][0] for which in (ORIGINAL, PERTURBED)}
            matches = {
                f'match_{which}': tokens(names[which][places[k, i][at_query]].tolist())
                for k, which in enumerate((ORIGINAL, PERTURBED))
            }
            effects, same = as_numpy(moved[:, i, there]) / unit[i], as_numpy(stayed[:, i, there]) / unit[i]
            ids = query.arrays(one, side)[0][0][at_query]
            yield {
                'parts': tokens(ids.tolist()),
                **matches,
                **self._row({'parts': effects, 'rematch': effects - same}),
            }

    def _of_terms(
        self, inputs: Inputs, rows: np.ndarray, vectors: Sequence[torch.Tensor], unit: np.ndarray
    ) -> Iterator[Row]:
        shape, tokens = (len(vectors[0]), -1), self.model.maker.tokenizer.convert_ids_to_tokens
        for i, (query, text, terms) in enumerate(self.model.terms(vectors)):
            values = (query * text).expand(*shape)
            moved, switched = self._moves(values), self._moves((values > 0).to(values.dtype))
            order = moved[0].abs().argsort(descending=True, stable=True)
            order = order[(moved[:, order] != 0).any(0)]
            kinds = {'parts': as_numpy(moved[:, order]) / unit[i], 'switched': as_numpy(switched[:, order]).astype(int)}
            yield {'parts': tokens(terms[order].tolist()), **self._row(kinds)}
