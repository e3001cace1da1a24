"""The stage that applies a perturbation to every row, and the decorator that makes one from a function."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pandas as pd
import pyterrier as pt

from pyterrier_mech.frames import require, strings


class Perturbation:
    """A perturbation made from a function by ``perturbation``: equal if the function is, printed as its name."""

    def __init__(self, function: Callable[[str, str], str]) -> None:
        """Wraps a function ``(query, text) -> str`` and takes over its name and docstring."""
        if not callable(function):
            raise TypeError(f'{function!r} is not callable: give a function (query, text) -> str.')
        self.function = function
        functools.update_wrapper(self, function)

    @property
    def name(self) -> str:
        """Name of the function."""
        return _name(self.function)

    def __call__(self, query: str, text: str) -> str:
        """Returns the perturbed text (or query)."""
        return self.function(query, text)

    def __eq__(self, other: object) -> bool:
        """Compares the functions."""
        return self.function == other.function if isinstance(other, Perturbation) else NotImplemented

    def __hash__(self) -> int:
        """Hashes the function."""
        return hash((Perturbation, self.function))

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Pickles a decorated function by its name."""
        # After decoration the function's own name leads to this object, so only the name can be pickled.
        if getattr(sys.modules.get(self.__module__), self.name, None) is self:
            return self.name
        return Perturbation, (self.function,)

    def __repr__(self) -> str:
        """Returns the name."""
        return self.name


def perturbation(function: Callable[[str, str], str]) -> Perturbation:
    """Makes a perturbation from a function ``(query, text) -> str``.

    Example:
        >>> @perturbation
        ... def shout(query, text):
        ...     return text.upper()
        >>> bm25 >> Perturb(shout) >> model
    """
    return Perturbation(function)


class Perturb(pt.Transformer):
    """Replaces the text (or the query) of every row by its perturbed version and keeps the original beside it.

    Rows, order, index and all other columns stay. A second ``Perturb`` perturbs the perturbed text and leaves
    ``text_0`` as it is, so that ``text_0`` is always the first original; a ``query_0`` that a query rewriter left is
    kept likewise. Where the perturbation changes nothing (for an axiom: it found no term to add), the row stays as it
    is and one warning counts such rows.

    A score cache placed after this stage must not key on query and docno alone: the text is no longer the docno's.

    **Input columns**: ``qid``, ``docno``, ``query``, ``text``.

    **Output columns**: ``text`` perturbed and ``text_0`` original; with ``field='query'``, ``query`` and ``query_0``.

    Args:
        perturbation: A callable ``(query, text) -> str``: an axiom, a decorated function, a lambda.
        field: What the result replaces, ``'text'`` or ``'query'``.
        text_field: The column that holds the text; the original goes to the same name with ``_0``.

    Raises:
        TypeError: If the perturbation is not callable or returns anything but a string.
        ValueError: If ``field`` is neither, or a query or text is missing.
        RuntimeError: If the perturbation raises; the message names the row, the cause is the original exception.
    """

    def __init__(
        self, perturbation: Callable[[str, str], str], *, field: str = 'text', text_field: str = 'text'
    ) -> None:
        """Stores the settings."""
        if not callable(perturbation):
            raise TypeError(f'perturbation={perturbation!r} is not callable: give a callable (query, text) -> str.')
        if field not in ('text', 'query'):
            raise ValueError(f"field={field!r}: must be 'text' or 'query'; name another text column by text_field=.")
        self.perturbation = perturbation
        self.field = field
        self.text_field = text_field

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Returns ``inp`` with the perturbed column and the original beside it."""
        require(inp, self, ['query', self.text_field])
        queries, texts = strings(inp, 'query', self), strings(inp, self.text_field, self)
        column, originals = ('query', queries) if self.field == 'query' else (self.text_field, texts)
        perturbed = [self._perturbed(inp, row, query, text) for row, (query, text) in enumerate(zip(queries, texts))]
        self._warn_unchanged(inp, [row for row, pair in enumerate(zip(originals, perturbed)) if pair[0] == pair[1]])
        out = inp.assign(**{column: pd.Series(perturbed, index=inp.index, dtype='str')})
        backup = f'{column}_0'
        return out if backup in inp.columns else out.assign(**{backup: inp[column]})

    def _perturbed(self, inp: pd.DataFrame, row: int, query: str, text: str) -> str:
        try:
            result = self.perturbation(query, text)
        except Exception as error:
            raise RuntimeError(f'{self!r} failed at {_row(inp, row)}: {error!r}') from error
        if not isinstance(result, str):
            raise TypeError(f'{self!r} got {result!r} at {_row(inp, row)}: a perturbation returns a string.')
        return result

    def _warn_unchanged(self, inp: pd.DataFrame, rows: list[int]) -> None:
        if rows:
            warnings.warn(
                f'{self!r} left {len(rows)} of {len(inp)} rows unchanged, the first at {_row(inp, rows[0])}: '
                'the perturbation found nothing to do there.',
                stacklevel=3,
            )

    def fuse_rank_cutoff(self, k: int) -> pt.Transformer:
        """Moves a rank cutoff before this stage, which keeps the ranking."""
        return pt.RankCutoff(k) >> self

    def subtransformers(self) -> dict[str, pt.Transformer]:
        """Returns none: there is nothing to draw inside."""
        return {}

    @property
    def schematic(self) -> dict[str, str | None]:
        """How diagrams show the stage."""
        label = f'Perturb {_name(self.perturbation)}'
        return {'label': label if len(label) <= 20 else f'{label[:19]}…', 'help_url': None}

    def _key(self) -> tuple[object, ...]:
        return type(self), self.perturbation, self.field, self.text_field

    def __eq__(self, other: object) -> bool:
        """Compares class and settings."""
        return self._key() == other._key() if isinstance(other, Perturb) else NotImplemented

    def __hash__(self) -> int:
        """Hashes class and settings."""
        return hash(self._key())

    def __repr__(self) -> str:
        """Returns the call that makes the stage."""
        shown = _name(self.perturbation) if hasattr(self.perturbation, '__name__') else repr(self.perturbation)
        field = '' if self.field == 'text' else f', field={self.field!r}'
        text_field = '' if self.text_field == 'text' else f', text_field={self.text_field!r}'
        return f'Perturb({shown}{field}{text_field})'


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, '__name__', type(function).__name__)


def _row(inp: pd.DataFrame, row: int) -> str:
    return f'qid={inp["qid"].iloc[row]!r} docno={inp["docno"].iloc[row]!r}'
