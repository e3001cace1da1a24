"""Activation patching of attention heads, as a pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt
import torch

from pyterrier_mech.columns import head_name
from pyterrier_mech.frames import with_columns
from pyterrier_mech.inputs.alignment import Alignment
from pyterrier_mech.inputs.batching import Budget, in_batches
from pyterrier_mech.patch.engine import Engine, engine_for
from pyterrier_mech.patch.pairs import DIRECTIONS, Fields, Pairs, chosen_heads, no_pairs, noted, two_versions
from pyterrier_mech.patch.runs import Head, run_sides
from pyterrier_mech.rankers.ranker import Ranker, as_numpy

EFFECTS = ('difference', 'normalized')


class PatchHeads(pt.Transformer):
    """How much each attention head carries the reaction of a ranker to an edit: exact activation patching.

    The ranker reads the original pair with the output of one head, at every position, replaced by what the head gives
    for the perturbed pair. The head's effect is how far that moves the score.

    **Input columns**: qid, query, docno, text and the other version that `Perturb` wrote: text_0, query_0, or both.

    **Output columns**: the same and `score_original`, `score_perturbed` (raw logits of the aligned inputs),
    `patchable` ('yes', or why the pair cannot be patched: then its effects are NaN), and one float column a head,
    `L{layer}H{head}`: patched score − score_original, in raw logits. The ranking is kept.

    Both inputs have the same length, position by position: see `Aligner`. So `score_original` is the score of the
    original with filler tokens where the perturbed text has more.

    Args:
        model: A ranker.
        heads: The heads to patch, as names ('L3H7') or (layer, head); by default all.
        direction: 'perturbed_to_original' (as above), or 'original_to_perturbed': the perturbed pair is read with a
            head of the original, and a column holds patched score − score_perturbed.
        effect: 'difference', or 'normalized': divided by the whole score change in the patching direction; NaN where
            there is none. For one row only: `HeadEffects` wants differences.
        filler: Token that stands where one side has none; 'mask' hides these positions from attention instead; None
            marks pairs of unequal length as not patchable.
        batch_tokens: Tokens in memory at a time, over all patched variants; by default as the model has it. Peak
            memory grows with this number and with the layers times the tokens of one batch of pairs.
        text_field: Column of the text; by default as the model has it.
        verbose: Shows a progress bar; by default as the model has it.

    Raises:
        ValueError: If a setting is not known or a head does not exist, before any work.

    Source: Chen, Merullo, Eickhoff, SIGIR 2024, arXiv 2405.02503; Vig et al., NeurIPS 2020.
    """

    def __init__(
        self,
        model: Ranker,
        *,
        heads: Sequence[str | tuple[int, int]] | None = None,
        direction: str = 'perturbed_to_original',
        effect: str = 'difference',
        filler: str | None = 'a',
        batch_tokens: int | None = None,
        text_field: str | None = None,
        verbose: bool | None = None,
    ):
        """Stores the settings."""
        super().__init__()
        self.model = model
        self.heads = heads
        self.direction = direction
        self.effect = effect
        self.filler = filler
        self.batch_tokens = batch_tokens
        self.text_field = text_field
        self.verbose = verbose

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Patches every pair of a frame."""
        self._check_settings()
        text = self.text_field if self.text_field is not None else self.model.text_field
        original, perturbed = two_versions(inp, self, text)
        heads = chosen_heads(self.model, self.heads)
        if not len(inp):
            return with_columns(inp, no_pairs([head_name(*head) for head in heads]))
        return noted(with_columns(inp, self._patch(original, perturbed, heads)), self.direction, self.effect)

    def fuse_rank_cutoff(self, k: int) -> pt.Transformer:
        """Cuts before patching: the ranking is the same."""
        return pt.RankCutoff(k) >> self

    def _check_settings(self) -> None:
        for name, known in (('direction', DIRECTIONS), ('effect', EFFECTS)):
            if getattr(self, name) not in known:
                raise ValueError(f'{name}={getattr(self, name)!r} is none of {known}')

    def _patch(self, original: Fields, perturbed: Fields, heads: list[Head]) -> dict[str, Any]:
        pairs = Pairs(self.model, original, perturbed, self.filler)
        scores = pairs.table(len(heads))
        for rows, values in self._sweeps(pairs, heads):
            scores[:, pairs.good[rows]] = values
        base, whole = self._base_and_change(scores[0], scores[1])
        effects = scores[2:] - base
        if self.effect == 'normalized':
            effects = effects / np.where(whole == 0, np.nan, whole)
        return pairs.columns(scores) | {head_name(*head): effects[i] for i, head in enumerate(heads)}

    def _base_and_change(self, original: np.ndarray, perturbed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the scores of the run that is patched and the change that patching everything would make."""
        if self.direction == 'perturbed_to_original':
            return original, perturbed - original
        return perturbed, original - perturbed

    def _sweeps(self, pairs: Pairs, heads: list[Head]) -> Any:
        """Yields positions among the good rows and their scores [original, perturbed, heads…] x pairs."""
        model, engine = self.model, engine_for(self.model)
        budget = model.loaded.budget if self.batch_tokens is None else Budget(self.batch_tokens)
        tokens = pairs.tokens()

        def step(batch: np.ndarray) -> np.ndarray:
            return as_numpy(
                model.read([self._vectors(engine, tower, heads, budget.tokens) for tower in pairs.picked(batch)])
            )

        verbose = model.verbose if self.verbose is None else self.verbose
        with model.computing():
            yield from in_batches(
                tokens * (2 + len(heads)), budget, step, smallest=2 * tokens, verbose=verbose, desc='PatchHeads'
            )

    def _vectors(self, engine: Engine, pairs: list[Alignment], heads: list[Head], batch_tokens: int) -> torch.Tensor:
        """Returns the vectors of one tower [original, perturbed, heads…] x pairs x d."""
        encoder, pooling = self.model.encoder, self.model.pooling_
        sides = run_sides(encoder, pairs, self.model.loaded.maker.uses_segments)
        both = torch.stack([side.pooled(pooling) for side in sides])
        base, source = sides if self.direction == 'perturbed_to_original' else sides[::-1]
        if not heads:
            return both
        if all(pair.problem for pair in pairs):
            return torch.cat([both, base.pooled(pooling).expand(len(heads), -1, -1)])
        return torch.cat([both, engine.vectors(base, source.trace.z, heads, batch_tokens)])

    # -- how the stage is compared and shown

    def _settings(self) -> dict[str, Any]:
        heads = None if self.heads is None else tuple(self.heads)
        return {
            'heads': heads,
            'direction': self.direction,
            'effect': self.effect,
            'filler': self.filler,
            'text_field': self.text_field,
        }

    def __eq__(self, other: object) -> bool:
        """Equal stages give equal columns."""
        return isinstance(other, PatchHeads) and self.model == other.model and self._settings() == other._settings()

    def __hash__(self) -> int:
        """Fits `__eq__`."""
        return hash((PatchHeads, self.model, tuple(self._settings().values())))

    def __repr__(self) -> str:
        """Rebuilds the stage."""
        defaults = {'heads': None, 'direction': DIRECTIONS[0], 'effect': EFFECTS[0], 'filler': 'a', 'text_field': None}
        options = [f'{name}={value!r}' for name, value in self._settings().items() if value != defaults[name]]
        return f'PatchHeads({", ".join([repr(self.model), *options])})'

    def subtransformers(self) -> dict[str, pt.Transformer]:
        """Shows no parts in a drawn pipeline."""
        return {}

    @property
    def schematic(self) -> dict[str, Any]:
        """How PyTerrier draws the stage."""
        return {'label': 'PatchHeads', 'help_url': None}
