"""The base of every stage: its settings are declared once, and the rest follows from them.

A stage is a dataclass whose fields are its settings. From the fields come the constructor, the checks (`choice`,
`units`), equality and hash (what changes the result, and nothing else), `repr`, pickling, and the drawing. What a stage
computes once and keeps is kept by `cached` under the settings that it depends on, so a setting that is changed later
(`set_parameter`, `pt.GridScan`) is never ignored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, Field, dataclass, field, fields
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyterrier as pt

from pyterrier_mech.units import HEADS, KINDS, Unit, Units

_T = TypeVar('_T')

# Settings that change how fast, or where, not what comes out.
_NEUTRAL = frozenset({'batch_tokens', 'device', 'verbose'})
_LABEL = 20
_locks = threading.Lock()


def choice(options: Sequence[str | None], default: Any = MISSING) -> Any:
    """Declares a setting that is one of some options; by default the first."""
    return field(default=options[0] if default is MISSING else default, metadata={'choices': tuple(options)})


def units(kinds: Sequence[str] = KINDS, **options: Any) -> Any:
    """Declares a setting that names units of some kinds, as `Units.of` accepts them."""
    return field(metadata={'units': tuple(kinds)}, **options)


class Stage(pt.Transformer):
    """Base of all stages. Subclasses are declared with `@dataclass(eq=False, repr=False)`."""

    def check(self) -> None:
        """Checks the settings, before any work.

        Raises:
            ValueError: If one is not among its options.
        """
        for one in self._fields():
            value, options = getattr(self, one.name), one.metadata.get('choices')
            if options is not None and value not in options:
                raise ValueError(f'{one.name} must be one of {options}; got {one.name}={value!r}')

    # -- how stages are compared, shown and sent to workers

    def _fields(self) -> Sequence[Field[Any]]:
        return [one for one in fields(self) if one.init]  # type: ignore[arg-type]

    def _key(self, one: Field[Any]) -> Hashable:
        """Returns a setting as a value that equals, and hashes, by what it says."""
        value = getattr(self, one.name)
        if 'units' in one.metadata and value is not None:
            return Units.of(value)
        return hashable(value)

    def key(self) -> tuple[Any, ...]:
        """Returns everything that the result depends on: the class and the settings."""
        return (type(self), *(self._key(one) for one in self._fields() if one.name not in _NEUTRAL))

    def __eq__(self, other: object) -> bool:
        """Equal stages give equal results."""
        return isinstance(other, Stage) and self.key() == other.key()

    def __hash__(self) -> int:
        """Fits `__eq__`."""
        return hash(self.key())

    def __repr__(self) -> str:
        """Returns the call that makes the stage, settings that are not the default included."""
        shown = []
        for one in sorted(self._fields(), key=lambda one: bool(one.kw_only)):
            value = getattr(self, one.name)
            if one.default is MISSING:
                shown.append(_shown(value))
            elif one.name not in _NEUTRAL and hashable(value) != hashable(one.default):
                shown.append(f'{one.name}={_shown(value)}')
        return f'{type(self).__name__}({", ".join(shown)})'

    def __getstate__(self) -> dict[str, Any]:
        """Pickles the settings; what a stage has computed and kept is computed again."""
        return {name: value for name, value in self.__dict__.items() if name != '_kept'}

    def cached(self, name: str, key: Any, make: Callable[[], _T]) -> _T:
        """Returns what `make` makes, made once for a key and, under several threads, by one of them."""
        with _locks:
            lock, kept = self.__dict__.setdefault('_kept', (threading.RLock(), {}))
        with lock:
            if name not in kept or kept[name][0] != key:
                kept[name] = key, make()
            return kept[name][1]

    def kept(self, name: str, key: Any) -> bool:
        """Whether `cached` has something under a name and key."""
        return self.__dict__.get('_kept', (None, {}))[1].get(name, (None,))[0] == key

    def subtransformers(self) -> dict[str, pt.Transformer]:
        """Shows no parts in a drawn pipeline."""
        return {}

    @property
    def schematic(self) -> dict[str, Any]:
        """How PyTerrier draws the stage."""
        label = self._label()
        return {'label': label if len(label) <= _LABEL else f'{label[: _LABEL - 1]}…', 'help_url': None}

    def _label(self) -> str:
        return type(self).__name__


class Keeping:
    """Mixed into the stages that keep the ranking."""

    def fuse_rank_cutoff(self, k: int) -> pt.Transformer:
        """Cuts before the stage: the ranking is the same."""
        return pt.RankCutoff(k) >> self


@dataclass(eq=False, repr=False)
class ModelStage(Stage):
    """Base of the stages that run a ranker. Where a setting is None, it is as the ranker has it.

    Args:
        model: A ranker.
        text_field: Column of the text.
        batch_tokens: Tokens of one batch, padding included.
        verbose: Shows a progress bar.
    """

    model: Any
    _: KW_ONLY
    text_field: str | None = None
    batch_tokens: int | None = None
    verbose: bool | None = None

    def check(self) -> None:
        """Checks the settings, before any work.

        Raises:
            TypeError: If the model is not a ranker.
            ValueError: If a setting is not among its options.
        """
        if isinstance(self.model, type) or not hasattr(self.model, 'counts'):
            raise TypeError(
                f'model must be a ranker, such as CrossEncoder(name) or BiEncoder(name); got {self.model!r}'
            )
        super().check()

    @property
    def text(self) -> str:
        """Column of the text."""
        return self.model.text_field if self.text_field is None else self.text_field

    @property
    def shows(self) -> bool:
        """Whether progress is shown."""
        return bool(self.model.verbose if self.verbose is None else self.verbose)

    @property
    def budget(self) -> Any:
        """Tokens of one batch."""
        return self.model.budget_of(self.batch_tokens)

    def chosen(self, name: str, kind: str = HEADS) -> list[Unit]:
        """Returns the units that a setting names, sorted; None is all of a kind.

        Raises:
            ValueError: If the setting names something else, or the ranker does not have a unit.
        """
        value = getattr(self, name)
        if value is None:
            return sorted(Units.all(self.model, [kind]))
        found = Units.of(value)
        if found - found.of_kind(kind):
            raise ValueError(f'{name} must name {kind} only; got {sorted(found - found.of_kind(kind))[0].name!r}')
        return sorted(found.check(self.model))

    def _key(self, one: Field[Any]) -> Hashable:
        value = getattr(self, one.name)
        if isinstance(value, pd.DataFrame):
            # Of a reference frame only queries and texts are read.
            return hashable(value.reindex(columns=['query', self.text]))
        return super()._key(one)


def hashable(value: Any) -> Hashable:
    """Returns a value that equals, and hashes, by what another says; other objects stand for themselves."""
    if isinstance(value, pd.DataFrame):
        return tuple(value.columns), tuple(value.astype(str).itertuples(index=False, name=None))
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, value.tobytes()
    if isinstance(value, (list, tuple)):
        return tuple(hashable(part) for part in value)
    if isinstance(value, Mapping):
        return tuple((key, hashable(part)) for key, part in value.items())
    if isinstance(value, (set, frozenset)):
        return frozenset(hashable(part) for part in value)
    return value if isinstance(value, Hashable) else id(value)


def _shown(value: Any) -> str:
    if isinstance(value, pd.DataFrame):
        return f'<DataFrame of {len(value)} rows>'
    if hasattr(value, '__name__') and not isinstance(value, type):
        return value.__name__
    plain = isinstance(value, (str, int, float, bool, list, tuple, dict, set, frozenset, Stage, np.ndarray, type(None)))
    own = type(value).__repr__ is not object.__repr__ and not hasattr(value, 'parameters')
    return repr(value) if plain or (own and len(repr(value)) < 200) else f'<{type(value).__name__}>'
