"""Sets of heads and neurons: what an intervention acts on."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

from pyterrier_mech.columns import head_name, parse_head
from pyterrier_mech.rankers.ranker import Ranker

Unit = tuple[int, int]

_NEURON = re.compile(r'L(0|[1-9][0-9]*)N(0|[1-9][0-9]*)')
_FORMS = "'L3H7' is a head, 'L3N120' a neuron, (3, 7) a head; layers and units are counted from 0."


def neuron_name(layer: int, neuron: int) -> str:
    """Returns the name of a neuron: ``neuron_name(3, 120) == 'L3N120'``."""
    return f'L{layer}N{neuron}'


@dataclass(frozen=True, repr=False)
class Units:
    """A set of attention heads and of neurons (entries of what the last linear map of a feed-forward block reads).

    Equal sets are equal and hash alike. `|`, `&` and `-` are those of sets; iteration gives the names, heads first,
    in the order of (layer, unit).

    Attributes:
        heads: (layer, head), both counted from 0.
        neurons: (layer, neuron), both counted from 0.
    """

    heads: frozenset[Unit] = frozenset()
    neurons: frozenset[Unit] = frozenset()

    @classmethod
    def of(cls, units: Any) -> Units:
        """Makes a set of units from what names them.

        Args:
            units: `Units`; an object that has them as `.units`; a name or an iterable of names and of tuples
                (layer, head), as in ``['L3H7', 'L3N120', (0, 2)]``; or ``{'heads': [...], 'neurons': [...]}``, where
                a tuple is a head or a neuron after its key.

        Raises:
            TypeError: If it is none of these.
            ValueError: If a name or tuple names no unit.
        """
        if isinstance(units, Units):
            return units
        if hasattr(units, 'units'):
            return cls.of(units.units)
        if isinstance(units, Mapping):
            return _from_mapping(units)
        if isinstance(units, str):
            units = [units]
        if not isinstance(units, Iterable):
            raise TypeError(f'{units!r} names no heads and neurons: give a list of them. {_FORMS}')
        kinds: dict[str, set[Unit]] = {'heads': set(), 'neurons': set()}
        for unit in units:
            kind, pair = _parse(unit, 'heads')
            kinds[kind].add(pair)
        return cls(frozenset(kinds['heads']), frozenset(kinds['neurons']))

    @classmethod
    def all(cls, model: Ranker) -> Units:
        """Returns every head and neuron of a ranker."""
        layers = range(model.n_layers)
        return cls(
            frozenset((layer, head) for layer in layers for head in range(model.n_heads(layer))),
            frozenset((layer, neuron) for layer in layers for neuron in range(model.n_neurons(layer))),
        )

    @classmethod
    def random(cls, like: Any, model: Ranker, seed: int, per_layer: bool = True) -> Units:
        """Draws as many heads and neurons as another set has.

        With one seed, a larger draw contains every smaller one, so that a curve over sizes follows one random order.

        Args:
            like: What `of` accepts; its units may be drawn too.
            model: The ranker whose units are drawn.
            seed: Of the draw.
            per_layer: Whether every layer gives as many as in `like`; otherwise only the totals are the same.

        Raises:
            ValueError: If `like` has a unit that the ranker has not.
        """
        like = cls.of(like).check(model)
        every = cls.all(model)
        drawn: dict[str, frozenset[Unit]] = {}
        for kind in ('heads', 'neurons'):
            wanted, there = getattr(like, kind), getattr(every, kind)
            groups = range(model.n_layers) if per_layer else [None]
            drawn[kind] = frozenset(
                unit
                for layer in groups
                for unit in _draw(_within(there, layer), len(_within(wanted, layer)), (int(seed), kind, layer))
            )
        return cls(**drawn)

    def complement(self, model: Ranker) -> Units:
        """Returns all other heads and neurons of a ranker.

        Raises:
            ValueError: If the ranker has not all of these units.
        """
        return self.all(model) - self.check(model)

    def check(self, model: Ranker) -> Units:
        """Returns these units if a ranker has them all.

        Raises:
            ValueError: If not; the message names the first unit and how many the ranker has.
        """
        _check(sorted(self.heads), 'head', head_name, model.head_counts, model)
        if self.neurons:
            counts = [model.n_neurons(layer) for layer in range(model.n_layers)]
            _check(sorted(self.neurons), 'neuron', neuron_name, counts, model)
        return self

    @property
    def names(self) -> list[str]:
        """Names of the heads, then of the neurons, each in the order of (layer, unit)."""
        return [head_name(*unit) for unit in sorted(self.heads)] + [neuron_name(*unit) for unit in sorted(self.neurons)]

    def __iter__(self) -> Iterator[str]:
        """Gives the names."""
        return iter(self.names)

    def __len__(self) -> int:
        """Number of heads and neurons."""
        return len(self.heads) + len(self.neurons)

    def __or__(self, other: Units) -> Units:
        """Union."""
        if not isinstance(other, Units):
            return NotImplemented
        return Units(self.heads | other.heads, self.neurons | other.neurons)

    def __and__(self, other: Units) -> Units:
        """Intersection."""
        if not isinstance(other, Units):
            return NotImplemented
        return Units(self.heads & other.heads, self.neurons & other.neurons)

    def __sub__(self, other: Units) -> Units:
        """Difference."""
        if not isinstance(other, Units):
            return NotImplemented
        return Units(self.heads - other.heads, self.neurons - other.neurons)

    def __repr__(self) -> str:
        """Rebuilds the set."""
        return f'Units.of({self.names!r})'


def _from_mapping(units: Mapping[Any, Any]) -> Units:
    unknown = [key for key in units if key not in ('heads', 'neurons')]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no kind of unit: the keys are 'heads' and 'neurons'")
    kinds: dict[str, frozenset[Unit]] = {}
    for kind, members in units.items():
        parsed = [(_parse(member, kind), member) for member in members]
        wrong = [member for (found, _), member in parsed if found != kind]
        if wrong:
            raise ValueError(f'{wrong[0]!r} stands among the {kind}, which it is none of. {_FORMS}')
        kinds[kind] = frozenset(pair for (_, pair), _ in parsed)
    return Units(**kinds)


def _parse(unit: Any, kind: str) -> tuple[str, Unit]:
    """Returns the kind and (layer, number) of a name, or of a tuple that is of `kind`."""
    if isinstance(unit, str):
        neuron = _NEURON.fullmatch(unit)
        if neuron is not None:
            return 'neurons', (int(neuron[1]), int(neuron[2]))
        try:
            return 'heads', parse_head(unit)
        except ValueError:
            raise ValueError(f'{unit!r} does not name a head or a neuron. {_FORMS}') from None
    try:
        layer, number = (index(part) for part in unit)
    except (TypeError, ValueError):
        raise ValueError(f'{unit!r} does not name a head or a neuron. {_FORMS}') from None
    if layer < 0 or number < 0:
        raise ValueError(f'{unit!r} does not name a head or a neuron. {_FORMS}')
    return kind, (layer, number)


def _check(
    units: Sequence[Unit], word: str, name: Callable[[int, int], str], counts: Sequence[int], model: Ranker
) -> None:
    for layer, number in units:
        if layer >= len(counts) or number >= counts[layer]:
            raise ValueError(
                f'{name(layer, number)}: {model!r} has no {word} {number} in layer {layer}; it has '
                f'{list(counts)} {word}s, layer by layer'
            )


def _within(units: Iterable[Unit], layer: int | None) -> list[Unit]:
    return sorted(unit for unit in units if layer is None or unit[0] == layer)


def _draw(units: Sequence[Unit], count: int, key: tuple[Any, ...]) -> list[Unit]:
    generator = random.Random(int.from_bytes(hashlib.sha256(repr(key).encode()).digest(), 'big'))
    # Of the methods of Random only random() is promised to draw the same in every version of Python.
    order = sorted((generator.random(), unit) for unit in units)
    return [unit for _, unit in order[:count]]
