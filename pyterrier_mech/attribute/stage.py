"""What the attribution stages share: how they are compared, shown, and how they read a frame."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt

from pyterrier_mech.attribute.lines import Baseline, Line, lines
from pyterrier_mech.frames import require, strings
from pyterrier_mech.inputs.batching import Budget
from pyterrier_mech.rankers.ranker import Ranker

# Settings that change how fast, not what comes out.
_NEUTRAL = ('batch_tokens', 'verbose')


class Attribution(pt.Transformer):
    """Base of the stages that keep the ranking and add columns from gradients."""

    model: Ranker
    batch_tokens: int | None
    text_field: str | None
    verbose: bool | None

    def fuse_rank_cutoff(self, k: int) -> pt.Transformer:
        """Cuts before attributing: the ranking is the same."""
        return pt.RankCutoff(k) >> self

    @property
    def _text(self) -> str:
        return self.text_field if self.text_field is not None else self.model.text_field

    @property
    def _verbose(self) -> bool:
        return self.model.verbose if self.verbose is None else self.verbose

    def _budget(self) -> Budget:
        return self.model.loaded.budget if self.batch_tokens is None else Budget(self.batch_tokens)

    def _fields(self, inp: pd.DataFrame) -> tuple[list[str], list[str]]:
        """Returns the queries and texts of a frame."""
        require(inp, self, ['query', self._text])
        return strings(inp, 'query', self), strings(inp, self._text, self)

    def _lines(self, inp: pd.DataFrame, baseline: Baseline) -> list[Line]:
        """Returns the line of every row, from its baseline to its input."""
        queries, texts = self._fields(inp)
        return lines(self.model, queries, texts, baseline, row_names(inp))

    # -- how the stage is compared and shown

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters if name != 'model'}

    def _key(self) -> tuple[Any, ...]:
        return tuple(_hashable(value) for name, value in self._settings().items() if name not in _NEUTRAL)

    def __eq__(self, other: object) -> bool:
        """Equal stages give equal columns."""
        return type(self) is type(other) and self.model == other.model and self._key() == other._key()  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        """Fits `__eq__`."""
        return hash((type(self), self.model, self._key()))

    def __repr__(self) -> str:
        """Rebuilds the stage, where its settings are plain values."""
        defaults = inspect.signature(type(self)).parameters
        options = [
            f'{name}={value!r}'
            for name, value in self._settings().items()
            if name not in _NEUTRAL and _hashable(value) != _hashable(defaults[name].default)
        ]
        return f'{type(self).__name__}({", ".join([repr(self.model), *options])})'

    def subtransformers(self) -> dict[str, pt.Transformer]:
        """Shows no parts in a drawn pipeline."""
        return {}

    @property
    def schematic(self) -> dict[str, Any]:
        """How PyTerrier draws the stage."""
        return {'label': type(self).__name__, 'help_url': None}


def row_names(inp: pd.DataFrame) -> list[str]:
    """Returns what an error calls each row."""
    return [f'qid={qid!r} docno={docno!r}' for qid, docno in zip(inp['qid'], inp['docno'], strict=True)]


def _hashable(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return tuple(value.tolist())
    return tuple(value) if isinstance(value, list) else value
