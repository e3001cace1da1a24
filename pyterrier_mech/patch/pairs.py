"""The pairs of a frame, aligned for a ranker: where every stage that compares two inputs begins and ends."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt
import torch

from pyterrier_mech.columns import PATCHING, parse_head
from pyterrier_mech.frames import require, strings
from pyterrier_mech.inputs.alignment import UNALIGNED, UNCHANGED, Aligner, Alignment
from pyterrier_mech.rankers.ranker import Ranker

PATCHABLE = 'yes'
DIRECTIONS = ('perturbed_to_original', 'original_to_perturbed')

Fields = dict[str, list[str]]


def two_versions(inp: pd.DataFrame, stage: pt.Transformer, text: str) -> tuple[Fields, Fields]:
    """Returns query and text of the original and of the perturbed pair of every row.

    Args:
        inp: A result frame with text_0, query_0 or both.
        stage: The stage, named in errors.
        text: Column of the text.

    Raises:
        pt.validate.InputValidationError: If a column is missing.
        ValueError: If a text is null.
    """
    require(inp, stage, ['query', text, f'{text}_0'], ['query', text, 'query_0'])
    perturbed = {'query': strings(inp, 'query', stage), 'text': strings(inp, text, stage)}
    original = {
        field: strings(inp, f'{column}_0', stage) if f'{column}_0' in inp.columns else perturbed[field]
        for field, column in (('query', 'query'), ('text', text))
    }
    return original, perturbed


class Pairs:
    """Aligned pairs.

    Attributes:
        towers: For every tower of the ranker, the alignment of every row.
        problems: For every row why it cannot be patched, or ''.
        good: Rows without a problem.
        rest: Rows with one.
    """

    def __init__(self, model: Ranker, original: Fields, perturbed: Fields, filler: str | None):
        """Aligns every row."""
        self.model, self.texts = model, (original, perturbed)
        aligner = Aligner(model.loaded.maker, filler)
        ids = [{field: model.tokenize(field, texts[field]) for field in texts} for texts in self.texts]
        self.towers: list[list[Alignment]] = [
            [
                aligner.align(
                    [ids[0][field].row(i) for field in tower],
                    [ids[1][field].row(i) for field in tower],
                    tower,
                    query=ids[1]['query'].row(i),
                )
                for i in range(len(original['text']))
            ]
            for tower in model.towers
        ]
        self.problems = [_problem([tower[row].problem for tower in self.towers]) for row in range(len(self))]
        self.good = np.asarray([row for row, problem in enumerate(self.problems) if not problem], dtype=np.int64)
        self.rest = np.asarray([row for row, problem in enumerate(self.problems) if problem], dtype=np.int64)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.towers[0])

    def tokens(self) -> np.ndarray:
        """Returns the tokens of every good row, all towers together."""
        return np.asarray([sum(len(tower[row]) for tower in self.towers) for row in self.good], dtype=np.int64)

    def picked(self, batch: np.ndarray) -> list[list[Alignment]]:
        """Returns, tower by tower, the alignments of a batch of good rows, which are counted among the good ones."""
        return [[tower[row] for row in self.good[batch]] for tower in self.towers]

    def table(self, n_effects: int) -> np.ndarray:
        """Returns [original score, perturbed score, effects…] x rows, still NaN where there is no problem.

        The texts of rows with a problem are scored as they are, and a warning counts these rows.
        """
        scores = np.full((2 + n_effects, len(self)), np.nan, dtype=float_type(self.model))
        if not len(self.rest):
            return scores
        for row, texts in enumerate(self.texts):
            scores[row, self.rest] = self.model.score(*[[texts[f][i] for i in self.rest] for f in ('query', 'text')])
        reasons = pd.Series([self.problems[i] for i in self.rest]).value_counts()
        counted = ', '.join(f'{reason}: {count}' for reason, count in reasons.items())
        warnings.warn(
            f'{len(self.rest)} of {len(self)} pairs cannot be patched ({counted}); see the patchable column',
            stacklevel=4,
        )
        return scores

    def columns(self, scores: np.ndarray) -> dict[str, Any]:
        """Returns the columns that every such stage writes, from a table."""
        return {
            'score_original': scores[0],
            'score_perturbed': scores[1],
            'patchable': [problem or PATCHABLE for problem in self.problems],
        }


def no_pairs(names: Sequence[str]) -> dict[str, Any]:
    """Returns the columns of a frame without rows, the effects under `names`."""
    none = np.zeros(0, dtype=np.float32)
    columns = {name: none for name in ['score_original', 'score_perturbed', 'patchable', *names]}
    return columns | {'patchable': np.zeros(0, dtype=object)}


def noted(res: pd.DataFrame, direction: str, effect: str = 'difference') -> pd.DataFrame:
    """Notes in a new frame's `attrs` how its effects were made, for `HeadEffects`: the columns alone do not tell."""
    res.attrs = res.attrs | {PATCHING: {'direction': direction, 'effect': effect}}
    return res


def chosen_heads(model: Ranker, heads: Sequence[str | tuple[int, int]] | None) -> list[tuple[int, int]]:
    """Returns heads as sorted (layer, head); None is all of them.

    Raises:
        ValueError: If a name is none, or the ranker has no such head.
    """
    counts = model.head_counts
    if heads is None:
        return [(layer, head) for layer, count in enumerate(counts) for head in range(count)]
    chosen = {parse_head(head) if isinstance(head, str) else (head[0], head[1]) for head in heads}
    for layer, head in chosen:
        if not (0 <= layer < len(counts) and 0 <= head < counts[layer]):
            raise ValueError(
                f'heads={heads!r}: {model!r} has no head {head} in layer {layer}; it has {counts} heads, layer by layer'
            )
    return sorted(chosen)


def float_type(model: Ranker) -> np.dtype[Any]:
    """Returns the NumPy type of effects: float64 for a float64 model, else float32."""
    return np.dtype('float64' if next(model.encoder.module.parameters()).dtype == torch.float64 else 'float32')


def _problem(problems: Sequence[str]) -> str:
    """Returns why a row cannot be patched, from what each tower says; '' if one of them can and none fails."""
    if UNALIGNED in problems:
        return UNALIGNED
    if '' in problems:
        return ''
    return next((problem for problem in problems if problem != UNCHANGED), UNCHANGED)
