"""The one language for places in a model: names, sites, units, and sets of units.

A site is a tensor that passes through a model: the head outputs of layer 3, the residual stream before layer 3. A unit
is one entry of a site: a head or a neuron. `L3H7` is a head, `L3N120` a neuron; where a model has several stacks of
layers, the stack stands first: `enc.L3H7`, `dec.L3H7`, `cross.L3H7`. Layers and units are counted from 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import index
from typing import Any, NamedTuple, Protocol

import pandas as pd

from pyterrier_mech.draws import shuffled

HEADS, NEURONS = 'heads', 'neurons'
LETTERS = {HEADS: 'H', NEURONS: 'N'}
KINDS = tuple(LETTERS)
INSIDE = ('q', 'k', 'v', 'pattern')
"""What is inside a head: its queries, keys, values and attention weights. `L3H7.k` are the keys of a head."""
STACKS = ('enc', 'dec', 'cross')

_KIND_OF = {letter: kind for kind, letter in LETTERS.items()}
_NAME = re.compile(rf'(?:({"|".join(STACKS)})\.)?L(0|[1-9][0-9]*)([HN])(0|[1-9][0-9]*)(?:\.({"|".join(INSIDE)}))?')
_SITE = re.compile(rf'([a-z][a-z_]*)\.(?:({"|".join(STACKS)})\.)?L(0|[1-9][0-9]*)')
_FORMS = "Write 'L3H7' for a head, 'L3N120' for a neuron, (3, 7) for a head; layers and units are counted from 0."


class Site(NamedTuple):
    """A tensor of a model: `kind` ('heads', 'neurons', 'resid_pre', …), layer, and stack ('' where there is one)."""

    kind: str
    layer: int
    stack: str = ''

    @property
    def prefix(self) -> str:
        """How the names of its units begin: 'L3', 'cross.L3'."""
        return f'{self.stack}.L{self.layer}' if self.stack else f'L{self.layer}'

    @property
    def name(self) -> str:
        """Its name: 'resid_pre.L3'."""
        return f'{self.kind}.{self.prefix}'


class Unit(NamedTuple):
    """One head or neuron of a site."""

    site: Site
    index: int  # type: ignore[assignment]

    @property
    def name(self) -> str:
        """Its name: 'L3H7', or 'L3H7.k' of what is inside a head."""
        kind = self.site.kind
        letter, end = (LETTERS[HEADS], f'.{kind}') if kind in INSIDE else (LETTERS[kind], '')
        return f'{self.site.prefix}{letter}{self.index}{end}'


class Countable(Protocol):
    """What has units: a ranker."""

    def counts(self, kind: str) -> Mapping[Site, int]:
        """Returns how many units each site of a kind has."""


def head(layer: int, number: int) -> Unit:
    """Returns a head of a model with one stack."""
    return Unit(Site(HEADS, layer), number)


def neuron(layer: int, number: int) -> Unit:
    """Returns a neuron of a model with one stack."""
    return Unit(Site(NEURONS, layer), number)


def parse(name: Any, kind: str = HEADS) -> Unit:
    """Returns the unit of a name, of a `Unit`, or of a tuple (layer, number) of the given kind.

    Raises:
        ValueError: If it does not name a unit.
    """
    if isinstance(name, str):
        match = _NAME.fullmatch(name)
        if match is not None:
            stack, layer, letter, number, inside = match.groups()
            if inside is None or letter == LETTERS[HEADS]:
                return Unit(Site(inside or _KIND_OF[letter], int(layer), stack or ''), int(number))
    elif isinstance(name, Unit):
        return name
    else:
        try:
            layer, number = (index(part) for part in name)
        except (TypeError, ValueError):
            layer = number = -1
        if layer >= 0 and number >= 0:
            return Unit(Site(kind, layer), number)
    raise ValueError(f'{name!r} does not name a head or a neuron. {_FORMS}')


def sites_of(names: Any, there: Mapping[str, Sequence[Site]]) -> list[Site]:
    """Returns the sites that names stand for, in their order, each once.

    Args:
        names: A name, a `Site`, or a list of such: 'resid_pre.L3' is one site, 'resid_pre' all of its kind.
        there: The sites of a model, kind by kind.

    Raises:
        TypeError: If it is something else.
        ValueError: If a name does not name a site, or the model does not have it.
    """
    if isinstance(names, (str, Site)):
        names = [names]
    if not isinstance(names, Iterable):
        raise TypeError(f"sites must be a list of names, such as ['resid_pre', 'mlp_out.L3']; got {names!r}")
    found: dict[Site, None] = {}
    for name in names:
        match = _SITE.fullmatch(name) if isinstance(name, str) else None
        site = Site(match[1], int(match[3]), match[2] or '') if match else name
        kind = site.kind if isinstance(site, Site) else site
        if kind not in there:
            raise ValueError(f"sites must name kinds, of {list(there)}, or single ones, as 'mlp_out.L3'; got {name!r}")
        if isinstance(site, Site) and site not in there[kind]:
            raise ValueError(f'{site.name}: there is no such site; there are {[one.name for one in there[kind]]}')
        found |= dict.fromkeys([site] if isinstance(site, Site) else there[kind])
    return list(found)


def unit_columns(frame: pd.DataFrame, kind: str = HEADS) -> list[Unit]:
    """Returns the units of a kind that have a column in a frame, sorted, whatever the order of the columns."""
    found = (_NAME.fullmatch(column) for column in frame.columns if isinstance(column, str))
    named = (parse(match[0]) for match in found if match is not None and (match[5] is None or match[3] != 'N'))
    return sorted(unit for unit in named if unit.site.kind == kind)


class Units(frozenset[Unit]):
    """A set of attention heads and of neurons (entries of what the last linear map of a feed-forward block reads).

    A set as any other, of `Unit`; `|`, `&` and `-` give `Units`. Sort it where an order is needed.
    """

    @classmethod
    def of(cls, units: Any) -> Units:
        """Makes a set of units from what names them.

        Args:
            units: `Units`; an object that has them as `.units`, such as a circuit; a name or an iterable of names and
                of tuples (layer, head), as in ``['L3H7', 'L3N120', (0, 2)]``; or ``{'heads': [...], 'neurons':
                [...]}``, where a tuple is a head or a neuron after its key.

        Raises:
            TypeError: If it is none of these.
            ValueError: If a name or tuple does not name a unit.
        """
        if isinstance(units, Units):
            return units
        if hasattr(units, 'units'):
            return cls.of(units.units)
        if isinstance(units, (str, Unit)):
            return cls([_whole(units)])
        if isinstance(units, Mapping):
            return cls(_from_mapping(units))
        if not isinstance(units, Iterable):
            raise TypeError(f'units must be a list of names; got {units!r}. {_FORMS}')
        return cls(_whole(unit) for unit in units)

    @classmethod
    def all(cls, model: Countable, kinds: Sequence[str] = KINDS) -> Units:
        """Returns every unit of a ranker, of some kinds."""
        counts = [model.counts(kind) for kind in kinds]
        return cls(Unit(site, number) for sites in counts for site, count in sites.items() for number in range(count))

    @classmethod
    def random(cls, like: Any, model: Countable, seed: int, per_layer: bool = True) -> Units:
        """Draws as many heads and neurons as another set has.

        With one seed, a larger draw contains every smaller one, so that a curve over sizes follows one random order.

        Args:
            like: What `of` accepts; its units may be drawn too.
            model: The ranker whose units are drawn.
            seed: Random seed.
            per_layer: Whether every layer gives as many as in `like`; otherwise only the totals are the same.

        Raises:
            ValueError: If `like` has a unit that the ranker does not have.
        """
        wanted = cls.of(like).check(model)
        drawn: list[Unit] = []
        for kind in KINDS:
            counts = model.counts(kind)
            for sites in [[site] for site in counts] if per_layer else [sorted(counts)]:
                key = (int(seed), kind, sites[0].layer if per_layer else None, *filter(None, [sites[0].stack]))
                there = [Unit(site, number) for site in sites for number in range(counts[site])]
                drawn += shuffled(there, *key)[: len(wanted.at(*sites))]
        return cls(drawn)

    def at(self, *sites: Site) -> Units:
        """Returns the units of some sites."""
        return Units(unit for unit in self if unit.site in sites)

    def of_kind(self, kind: str) -> Units:
        """Returns the units of a kind, 'heads' or 'neurons'."""
        return Units(unit for unit in self if unit.site.kind == kind)

    @property
    def heads(self) -> Units:
        """The heads."""
        return self.of_kind(HEADS)

    @property
    def neurons(self) -> Units:
        """The neurons."""
        return self.of_kind(NEURONS)

    def by_site(self) -> dict[Site, list[int]]:
        """Returns the sorted unit numbers of every site that has one, sites sorted."""
        sites: dict[Site, list[int]] = {}
        for unit in sorted(self):
            sites.setdefault(unit.site, []).append(unit.index)
        return sites

    def complement(self, model: Countable) -> Units:
        """Returns all other heads and neurons of a ranker.

        Raises:
            ValueError: If the ranker does not have all of these units.
        """
        return self.all(model) - self.check(model)

    def check(self, model: Countable) -> Units:
        """Returns these units if a ranker has them all.

        Raises:
            ValueError: If not; the message names the first unit and how many the ranker has.
        """
        for kind in {unit.site.kind for unit in self}:
            counts = model.counts(kind)
            for unit in sorted(self.of_kind(kind)):
                if not 0 <= unit.index < counts.get(unit.site, 0):
                    there = list(counts.values())
                    raise ValueError(f'{unit.name}: {model!r} does not have it; it has {there} {kind}, layer by layer')
        return self

    @property
    def names(self) -> list[str]:
        """Names of the heads, then of the neurons, each in the order of (layer, unit)."""
        return [unit.name for unit in sorted(self)]

    def __or__(self, other: Any) -> Units:
        """Union."""
        return Units(frozenset.__or__(self, other)) if isinstance(other, Units) else NotImplemented

    def __and__(self, other: Any) -> Units:
        """Intersection."""
        return Units(frozenset.__and__(self, other)) if isinstance(other, Units) else NotImplemented

    def __sub__(self, other: Any) -> Units:
        """Difference."""
        return Units(frozenset.__sub__(self, other)) if isinstance(other, Units) else NotImplemented

    def __repr__(self) -> str:
        """Rebuilds the set."""
        return f'Units.of({self.names!r})'


def _whole(name: Any) -> Unit:
    unit = parse(name)
    if unit.site.kind not in KINDS:
        raise ValueError(f'{name!r} names what is inside a head; here whole heads and neurons are meant. {_FORMS}')
    return unit


def _from_mapping(units: Mapping[Any, Any]) -> Iterator[Unit]:
    for kind, members in units.items():
        if kind not in KINDS:
            raise ValueError(f"the keys must be 'heads' and 'neurons'; got {kind!r}")
        for member in members:
            unit = parse(member, kind)
            if unit.site.kind != kind:
                raise ValueError(f'{member!r} stands among the {kind}, but is not one of them. {_FORMS}')
            yield unit
