"""A plan: which heads and neurons a pruned ranker keeps. A value that can be read, compared and written as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from operator import index
from pathlib import Path
from typing import Any

import pandas as pd

from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.units import Units

Indices = tuple[tuple[int, ...], ...]


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
        """Makes tuples of what is given.

        Raises:
            ValueError: If a unit is not among those that the model has, or comes twice.
        """
        for kind in ('heads', 'neurons'):
            kept = tuple(tuple(sorted(map(index, layer))) for layer in getattr(self, kind))
            counts = tuple(map(index, getattr(self, f'of_{kind}')))
            if len(kept) != len(counts):
                raise ValueError(f'{kind} of {len(kept)} layers do not fit the counts of {len(counts)}')
            for number, (layer, count) in enumerate(zip(kept, counts, strict=True)):
                if len(set(layer)) < len(layer) or not set(layer) <= set(range(count)):
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
        kept = Units.of(units).complement(model)
        return plan_keeping(model, kept, {'units': Units.of(units).names})

    @property
    def kept(self) -> Units:
        """The units that stay."""
        return Units(_pairs(self.heads), _pairs(self.neurons))

    @property
    def removed(self) -> Units:
        """The units that go."""
        every = Units(_pairs(map(range, self.of_heads)), _pairs(map(range, self.of_neurons)))
        return every - self.kept

    def check(self, model: Ranker) -> Plan:
        """Returns this plan if it is for a ranker.

        Raises:
            ValueError: If it is for another; the message says what differs.
        """
        counts = tuple(model.head_counts), tuple(model.n_neurons(layer) for layer in range(model.n_layers))
        if counts != (self.of_heads, self.of_neurons):
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
        return pd.DataFrame(
            {
                'layer': range(len(self.heads)),
                'heads': list(map(len, self.heads)),
                'of_heads': self.of_heads,
                'neurons': list(map(len, self.neurons)),
                'of_neurons': self.of_neurons,
            }
        )

    def to_json(self) -> str:
        """Returns the plan as JSON; `from_json` reads it back."""
        values = {
            'heads': self.heads,
            'neurons': self.neurons,
            'of_heads': self.of_heads,
            'of_neurons': self.of_neurons,
            'model': self.model,
            'settings': dict(self.settings),
        }
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Makes a plan from what `to_json` returned.

        Raises:
            ValueError: If it is no plan.
        """
        try:
            values = json.loads(text)
            return cls(**{field.name: values[field.name] for field in fields(cls)})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{text[:60]!r} is no plan ({error!r}): give what Plan.to_json() returned') from error

    def save(self, path: str | Path) -> None:
        """Writes the JSON to a file."""
        Path(path).write_text(self.to_json() + '\n', encoding='utf-8')

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads the JSON from a file."""
        return cls.from_json(Path(path).read_text(encoding='utf-8'))

    def __hash__(self) -> int:
        """Fits the comparison."""
        return hash((self.heads, self.neurons, self.of_heads, self.of_neurons, self.model))

    def __repr__(self) -> str:
        """Tells what stays of how much."""
        heads, neurons = (' '.join(str(len(layer)) for layer in layers) for layers in (self.heads, self.neurons))
        return (
            f'Plan(heads {heads} of {sum(self.of_heads)}, neurons {neurons} of {sum(self.of_neurons)}, '
            f'model {self.model})'
        )


def fingerprint(model: Ranker) -> str:
    """Returns a name for the weights of a ranker's module: equal weights (as float32), equal name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.encoder.module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def plan_keeping(model: Ranker, kept: Units, settings: Mapping[str, Any]) -> Plan:
    """Returns the plan that keeps some units of a ranker."""
    layers = range(model.n_layers)
    return Plan(
        tuple(tuple(sorted(unit for at, unit in kept.heads if at == layer)) for layer in layers),
        tuple(tuple(sorted(unit for at, unit in kept.neurons if at == layer)) for layer in layers),
        tuple(model.head_counts),
        tuple(model.n_neurons(layer) for layer in layers),
        fingerprint(model),
        settings,
    )


def _pairs(layers: Any) -> frozenset[tuple[int, int]]:
    return frozenset((layer, unit) for layer, units in enumerate(layers) for unit in units)
