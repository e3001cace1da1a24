"""The line that is integrated along: from the word embeddings of a baseline to those of the input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pyterrier_mech.frames import Fields
from pyterrier_mech.inputs.alignment import PROMPT
from pyterrier_mech.inputs.inputs import Inputs, Tower

Baseline = str | np.ndarray | Sequence[int] | Callable[[np.ndarray], Any]

BASELINES = ('query', 'all')


@dataclass(frozen=True, eq=False)
class Line:
    """The line of one row. Positions, segments and the attention mask are those of the input at every point.

    Attributes:
        inputs: The inputs of all rows.
        row: Which row.
        baseline: Token ids where the line begins [tokens].
        tower: Which tower of the ranker moves.
        others: Vectors [d] of the other towers, which stay as they are.
        name: What an error calls the row.
    """

    inputs: Inputs
    row: int
    baseline: np.ndarray
    tower: int
    others: tuple[torch.Tensor, ...]
    name: str

    @property
    def ids(self) -> np.ndarray:
        """Token ids of the input [tokens]."""
        return self.inputs.towers[self.tower].ids(self.row)

    @property
    def types(self) -> np.ndarray:
        """Type of every position [tokens]."""
        return np.asarray(self.inputs.towers[self.tower].types(self.row))

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.baseline)

    @property
    def constant(self) -> bool:
        """Whether the baseline is the input."""
        return np.array_equal(self.baseline, self.ids)


def check_baseline(baseline: Any) -> None:
    """Checks a setting as far as that goes without a row.

    Raises:
        ValueError: If it is an unknown name.
        TypeError: If it is no name, no array of ids and no callable.
    """
    if isinstance(baseline, str):
        if baseline not in BASELINES:
            raise ValueError(f'baseline must be one of {BASELINES}, token ids, or a function of them; got {baseline!r}')
    elif not callable(baseline) and np.ndim(baseline) != 1:
        raise TypeError(f'baseline must be one of {BASELINES}, token ids, or a function of them; got {baseline!r}')


def moving_tower(model: Any, baseline: Baseline) -> int:
    """Returns which tower the baseline is of: the query's for 'query', the text's for every other."""
    field = 'query' if isinstance(baseline, str) and baseline == 'query' else 'text'
    return next(i for i, fields in enumerate(model.towers) if field in fields)


def lines(model: Any, fields: Fields, baseline: Baseline, names: Sequence[str]) -> list[Line]:
    """Returns the line of every row.

    Args:
        model: A ranker.
        fields: Query and text of every row.
        baseline: 'query' (query tokens become padding tokens, all else stays), 'all' (all but special tokens and
            prompts do), token ids, or a function from the input's token ids to the baseline's.
        names: What an error calls each row.

    Raises:
        ValueError: If a baseline has another length than its input, or the tokenizer has no padding token.
    """
    tower = moving_tower(model, baseline)
    inputs = Inputs.plain(model, fields['query'], fields['text'], types=True)
    with model.computing():
        others = [model.vectors(of[0], fields[of[0]]) for i, of in enumerate(model.towers) if i != tower]
    result = []
    for row, name in enumerate(names):
        still = tuple(vectors[row] for vectors in others)
        start = _baseline_ids(model, inputs.towers[tower], row, baseline, name)
        result.append(Line(inputs, row, start, tower, still, name))
    return result


def _baseline_ids(model: Any, tower: Tower, row: int, baseline: Baseline, name: str) -> np.ndarray:
    ids = tower.ids(row)
    if isinstance(baseline, str):
        pad = model.maker.tokenizer.pad_token_id
        if pad is None:
            raise ValueError(f'baseline={baseline!r} needs a padding token, which this tokenizer has not: give ids')
        types = np.asarray(tower.types(row))
        moves = types == 'query' if baseline == 'query' else ~np.isin(types, ['cls', 'sep', PROMPT])
        return np.where(moves, pad, ids)
    given = np.asarray(baseline(ids.copy()) if callable(baseline) else baseline)
    if given.shape != ids.shape:
        raise ValueError(
            f'{name}: the baseline has shape {given.shape} but the input has {len(ids)} tokens, special tokens '
            'included: give one id a token, e.g. by a function of the input ids'
        )
    size = model.map.base.get_input_embeddings().weight.shape[0]
    if given.dtype.kind not in 'iu' or given.min() < 0 or given.max() >= size:
        raise ValueError(
            f'{name}: the baseline {given[:5]}… is not made of token ids, whole numbers from 0 to {size - 1}'
        )
    return given.astype(np.int64)
