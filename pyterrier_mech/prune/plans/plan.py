"""A plan: which heads and neurons a pruned ranker keeps. A value that can be read, compared and written as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from operator import index
from pathlib import Path
from typing import Any

import pandas as pd

from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.saving import plain, write_atomic
from pyterrier_mech.units import KINDS, Site, Unit, Units

Indices = tuple[tuple[int, ...], ...]

# No layer has more units of a kind. A file that says so shall not fill the memory.
_MOST = 1_000_000


@dataclass(frozen=True, repr=False)
class Plan:
    """Which units of one model stay.

    Attributes:
        heads: For each layer, the heads that stay, in rising order.
        neurons: For each layer, the neurons that stay, in rising order.
        of_heads: For each layer, how many heads the model has.
        of_neurons: For each layer, how many neurons it has.
        model: Fingerprint of the model's weights, as `fingerprint` makes it.
        settings: How it was made, in plain values; does not count when plans are compared.
    """

    heads: Indices
    neurons: Indices
    of_heads: tuple[int, ...]
    of_neurons: tuple[int, ...]
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Makes tuples and plain values of what is given.

        Raises:
            TypeError: If the settings are not a mapping.
            ValueError: If a unit is not among those that the model has, or comes twice.
        """
        if not isinstance(self.settings, Mapping):
            raise TypeError(f'settings must be a mapping; got {self.settings!r}')
        object.__setattr__(self, 'settings', plain(self.settings))
        for kind in KINDS:
            kept = tuple(tuple(sorted(map(index, layer))) for layer in getattr(self, kind))
            counts = tuple(map(index, getattr(self, f'of_{kind}')))
            if len(kept) != len(counts):
                raise ValueError(f'{kind} of {len(kept)} layers do not fit the counts of {len(counts)}')
            for number, (layer, count) in enumerate(zip(kept, counts, strict=True)):
                if not 0 <= count <= _MOST:
                    raise ValueError(f'of_{kind} must be counts from 0 to {_MOST}; got {count} in layer {number}')
                if len(set(layer)) < len(layer) or any(not 0 <= unit < count for unit in layer):
                    raise ValueError(f'layer {number} has {count} {kind}; {list(layer)} are not some of them')
            object.__setattr__(self, kind, kept)
            object.__setattr__(self, f'of_{kind}', counts)

    @classmethod
    def removing(cls, model: Ranker, units: Any) -> Plan:
        """Makes the plan that takes chosen units away and keeps all others.

        Args:
            model: The ranker.
            units: Heads and neurons, as `Units.of` accepts them.

        Raises:
            ValueError: If the ranker has not all of them.
        """
        units = Units.of(units)
        return plan_keeping(model, units.complement(model), {'units': units.names})

    @property
    def kept(self) -> Units:
        """The units that stay."""
        return _units(self.heads, self.neurons)

    @property
    def removed(self) -> Units:
        """The units that go."""
        return _units(*([range(count) for count in counts] for counts in (self.of_heads, self.of_neurons))) - self.kept

    def check(self, model: Ranker) -> Plan:
        """Returns this plan if it is for a ranker.

        Raises:
            ValueError: If it is for another; the message says what differs.
        """
        counts = [tuple(model.counts(kind).values()) for kind in KINDS]
        if counts != [self.of_heads, self.of_neurons]:
            raise ValueError(
                f'this plan is for a model with {list(self.of_heads)} heads and {list(self.of_neurons)} neurons; '
                f'{model!r} has {list(counts[0])} and {list(counts[1])}: make a plan for it'
            )
        own = fingerprint(model)
        if own != self.model:
            raise ValueError(
                f'this plan is for a model of other weights (fingerprint {self.model}, {model!r} has {own}): '
                'make a plan for it'
            )
        return self

    def to_frame(self) -> pd.DataFrame:
        """Returns one row a layer: `layer`, `heads`, `of_heads`, `neurons`, `of_neurons`."""
        columns: dict[str, Any] = {'layer': range(len(self.heads))}
        for kind in KINDS:
            columns |= {kind: list(map(len, getattr(self, kind))), f'of_{kind}': getattr(self, f'of_{kind}')}
        return pd.DataFrame(columns)

    def to_json(self) -> str:
        """Returns the plan as JSON; `from_json` reads it back."""
        return json.dumps({one.name: getattr(self, one.name) for one in fields(self)})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Makes a plan from what `to_json` returned.

        Raises:
            ValueError: If it is something else, or has counts that no model has.
        """
        try:
            values = json.loads(text)
            return cls(**{one.name: values[one.name] for one in fields(cls)})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f'the text must be what Plan.to_json() returned; got {text[:60]!r} ({error!r}): give what '
                'Plan.to_json() returned'
            ) from error

    def save(self, path: str | Path) -> None:
        """Writes the JSON to a file."""
        write_atomic(Path(path), self.to_json() + '\n')

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads the JSON from a file."""
        return cls.from_json(Path(path).read_text(encoding='utf-8'))

    def __repr__(self) -> str:
        """Tells what stays of how much."""
        heads, neurons = (' '.join(str(len(layer)) for layer in layers) for layers in (self.heads, self.neurons))
        return (
            f'Plan(heads {heads} of {sum(self.of_heads)}, neurons {neurons} of {sum(self.of_neurons)}, '
            f'model {self.model})'
        )


def fingerprint(model: Ranker) -> str:
    """Returns a name for the weights of a ranker's module: equal weights (as float32), equal name."""
    # By hashlib itself, since weights are too large to be one key of `digest`.
    found = hashlib.sha256()
    for name, tensor in sorted(model.map.module.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().float().numpy().tobytes())
    return found.hexdigest()[:16]


def plan_keeping(model: Ranker, kept: Units, settings: Mapping[str, Any]) -> Plan:
    """Returns the plan that keeps some units of a ranker."""
    counts, numbers = [model.counts(kind) for kind in KINDS], kept.by_site()
    heads, neurons = (tuple(tuple(numbers.get(site, ())) for site in of_kind) for of_kind in counts)
    of_heads, of_neurons = (tuple(of_kind.values()) for of_kind in counts)
    return Plan(heads, neurons, of_heads, of_neurons, fingerprint(model), settings)


def _units(*kinds: Iterable[Iterable[int]]) -> Units:
    return Units(
        Unit(Site(kind, layer), number)
        for kind, layers in zip(KINDS, kinds, strict=True)
        for layer, numbers in enumerate(layers)
        for number in numbers
    )
