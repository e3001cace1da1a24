"""The stage that applies a perturbation to every row, and the decorator that makes one from a function."""

from __future__ import annotations

import functools
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import pandas as pd

from pyterrier_mech.frames import EDITED, check_not_rewritten, require, row_name, strings
from pyterrier_mech.perturb.arguments import as_edit
from pyterrier_mech.stage import Keeping, Stage, choice

_ADDED, _BEFORE = 'term_added', 'term_before'


class Perturbation:
    """A perturbation made from a function by ``perturbation``: equal if the function is, printed as its name."""

    def __init__(self, function: Callable[..., str]) -> None:
        """Wraps a function ``(query, text) -> str`` or ``(text) -> str``; takes over its name and docstring."""
        _check_callable(function)
        self.function = function
        functools.update_wrapper(self, function)

    @property
    def name(self) -> str:
        """Name of the function."""
        return _name(self.function)

    def __call__(self, query: str, text: str) -> str:
        """Returns the perturbed text (or query)."""
        return as_edit(self.function)(query, text)

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


def perturbation(function: Callable[..., str]) -> Perturbation:
    """Makes a perturbation from a function ``(query, text) -> str`` or ``(text) -> str``.

    Raises:
        TypeError: If it cannot be called so, or its arguments are named in the other order, see ``Perturb``.

    Example:
        >>> @perturbation
        ... def shout(query, text):
        ...     return text.upper()
        >>> bm25 >> Perturb(shout) >> model
    """
    return Perturbation(function)


@dataclass(eq=False, repr=False)
class Perturb(Stage, Keeping):
    """Replaces the text (or the query) of every row by its perturbed version and keeps the original beside it.

    Rows, order, index and all other columns stay. A second ``Perturb`` perturbs the perturbed text and leaves
    ``text_0`` as it is, so that ``text_0`` is always the first original. A ``query_0`` that a query rewriter left
    becomes ``query_0_before`` when the query is edited. Where the perturbation changes nothing (for an
    axiom: it found no term to add), the row stays as it is and one warning counts such rows.

    A score cache placed after this stage must not key on query and docno alone: the text is no longer the docno's.

    **Input columns**: ``qid``, ``docno``, ``query``, ``text``.

    **Output columns**: ``text`` perturbed and ``text_0`` original; with ``field='query'``, ``query`` and ``query_0``.
    ``edited`` names the columns that were edited so far: ``'text'``, ``'query'`` or ``'query text'``. Where the
    perturbation says which terms it adds, as axioms do, also ``term_added`` (the terms, one space apart) and
    ``term_before``: whether they were in the text before this edit, ``'yes'``, ``'no'`` or, of several, ``'some'``.
    Both are missing values in rows to which nothing was added.

    Args:
        perturbation: A callable ``(query, text) -> str``: an axiom, a decorated function, a lambda. Or one with a
            single argument: it gets the query if its argument is named like a query (``query``, ``q``, ``question``,
            …), the text if it is named like a text (``text``, ``t``, ``doc``, ``passage``, …), else what is edited. A
            function whose two arguments are named in the other order, ``(text, query)``, is refused and not called
            with them exchanged: names decide whether, but only its author knows, and a silent exchange would make
            the same code mean two things. Other names, as in ``(a, b)``, are called with query and text.
        field: What the result replaces, ``'text'`` or ``'query'``.
        text_field: The column that holds the text; the original goes to the same name with ``_0``.

    Raises:
        TypeError: If the perturbation is not callable, or a class, or has its arguments in the other order, or returns
            anything but a string.
        ValueError: If ``field`` is neither, a query or text is missing, or another column has the name ``text_0``,
            ``edited``, ``term_added`` or ``term_before``.
        RuntimeError: If the perturbation raises; the message names the row, the cause is the original exception.
    """

    perturbation: Callable[..., str]
    _: KW_ONLY
    field: str = choice(('text', 'query'))
    text_field: str = 'text'

    def __post_init__(self) -> None:
        """Checks the settings."""
        self.check()

    def check(self) -> None:
        """Checks the settings, before any work.

        Raises:
            TypeError: If the perturbation cannot be called with a query and a text.
            ValueError: If a setting is not among its options.
        """
        _check_callable(self.perturbation)
        super().check()

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Returns ``inp`` with the perturbed column and the original beside it."""
        self.check()
        require(inp, self, ['query', self.text_field])
        queries, texts = strings(inp, 'query', self), strings(inp, self.text_field, self)
        column, before = ('query', queries) if self.field == 'query' else (self.text_field, texts)
        edited = _edited(inp)
        inp = _made_room(inp, column, edited)
        edit = as_edit(_plain(self.perturbation), self.field)
        pairs = list(zip(queries, texts))
        perturbed = [self._perturbed(edit, inp, row, query, text) for row, (query, text) in enumerate(pairs)]
        if rows := [row for row, pair in enumerate(zip(before, perturbed)) if pair[0] == pair[1]]:
            warnings.warn(
                f'{self!r} left {len(rows)} of {len(inp)} rows unchanged, the first at {row_name(inp, rows[0])}: '
                'the perturbation found nothing to do there.',
                stacklevel=2,
            )
        first = inp.get(f'{column}_0', inp[column])
        originals = [old if column in names else now for old, now, names in zip(first, before, edited)]
        new: dict[str, list[Any]] = {
            column: perturbed,
            f'{column}_0': originals,
            EDITED: [' '.join(sorted({*names, column})) for names in edited],
            **self._added(inp, queries, texts, perturbed),
        }
        return inp.assign(**{name: pd.Series(values, index=inp.index, dtype='str') for name, values in new.items()})

    def _added(
        self, inp: pd.DataFrame, queries: list[str], texts: list[str], perturbed: list[str]
    ) -> dict[str, list[Any]]:
        """Returns the columns about added terms, none where the perturbation does not say which."""
        if self.field == 'query' or not all(hasattr(self.perturbation, name) for name in ('terms', 'has')):
            return {}
        if theirs := [name for name in (_ADDED, _BEFORE) if name in inp.columns and EDITED not in inp.columns]:
            raise ValueError(
                f'the frame has a column {theirs[0]!r} that Perturb did not write. '
                f'Rename it: {_renamed(theirs[0], "my_" + theirs[0])}'
            )
        edit: Any = self.perturbation
        added, before = [], []
        for query, text, new in zip(queries, texts, perturbed):
            terms = edit.terms(query, text) if new != text else []
            there = {edit.has(text, term) for term in terms}
            added.append(' '.join(terms) or None)
            before.append('some' if len(there) > 1 else {True: 'yes', False: 'no'}[there.pop()] if there else None)
        return {_ADDED: added, _BEFORE: before}

    def _perturbed(self, edit: Callable[[str, str], str], inp: pd.DataFrame, row: int, query: str, text: str) -> str:
        try:
            result = edit(query, text)
        except Exception as error:
            raise RuntimeError(f'{self!r} failed at {row_name(inp, row)}: {error!r}') from error
        if not isinstance(result, str):
            raise TypeError(f'{self!r} got {result!r} at {row_name(inp, row)}: a perturbation returns a string.')
        return result

    def _label(self) -> str:
        return f'Perturb {_name(self.perturbation)}'


def _edited(inp: pd.DataFrame) -> list[set[str]]:
    """Returns the columns of every row that were edited before."""
    if EDITED not in inp.columns:
        return [set() for _ in range(len(inp))]
    # A row that comes from a frame without the column, put together with others, is not edited.
    edited = [set() if pd.isna(said) else set(str(said).split()) for said in inp[EDITED]]
    for name in sorted(set().union(*edited)):
        if f'{name}_0' not in inp.columns:
            raise ValueError(
                f'the column {EDITED!r} must hold the names of the columns that Perturb has edited; got {name!r}, and '
                f"there is no '{name}_0'. Rename yours: {_renamed(EDITED, 'edited_before')}"
            )
    check_not_rewritten(inp, edited)
    return edited


def _made_room(inp: pd.DataFrame, column: str, edited: list[set[str]]) -> pd.DataFrame:
    """Returns the frame with the column of the original free, but for the originals of earlier edits."""
    backup = f'{column}_0'
    if backup not in inp.columns:
        return inp
    ours = any(column in names for names in edited) or (not len(inp) and EDITED in inp.columns)
    if column == 'query' and not ours:
        # Out of PyTerrier's numbers: a `query_1` then says that a rewriter came after the edit.
        return inp.rename(columns=lambda name: f'{name}_before' if re.fullmatch(r'query_\d+', str(name)) else name)
    if any(column not in names and there for names, there in zip(edited, inp[backup].notna())):
        raise ValueError(
            f'the frame has a column {backup!r} that Perturb did not write: the original would not fit beside it. '
            f'Rename it: {_renamed(backup, column + "_before")}'
        )
    return inp


def _renamed(column: str, to: str) -> str:
    return f'frame.rename(columns={{{column!r}: {to!r}}})'


def _check_callable(function: Any) -> None:
    if isinstance(function, type):
        raise TypeError(
            f'perturbation={_name(function)} is a class: give one made of it, such as {_name(function)}() or, where it '
            f'needs a collection, {_name(function)}(index).'
        )
    if not callable(function):
        raise TypeError(f'perturbation={function!r} is not callable: give a callable (query, text) -> str.')
    as_edit(_plain(function))


def _plain(function: Any) -> Any:
    return function.function if isinstance(function, Perturbation) else function


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, '__name__', type(function).__name__)
