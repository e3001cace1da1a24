"""A plan: which heads and neurons a pruned ranker keeps. A value that can be read, compared and written as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from pyterrier_mech.patch.units import Units
from pyterrier_mech.prune.allocation import ALLOCATIONS, fill, stacks
from pyterrier_mech.prune.costs import Costs, flop_costs, parameter_costs
from pyterrier_mech.prune.scores import UnitScores
from pyterrier_mech.rankers.ranker import Ranker

Indices = tuple[tuple[int, ...], ...]

BUDGETS = ('flops', 'parameters', 'latency')


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
        return _plan(model, kept, {'units': Units.of(units).names})

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
            layers = {name: tuple(tuple(layer) for layer in values[name]) for name in ('heads', 'neurons')}
            counts = {name: tuple(values[name]) for name in ('of_heads', 'of_neurons')}
            return cls(**layers, **counts, model=values['model'], settings=values['settings'])  # type: ignore[arg-type]
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


def make_plan(
    model: Ranker,
    scores: UnitScores,
    sparsity: float | None = None,
    *,
    budget: str = 'flops',
    speedup: float | None = None,
    allocation: str = 'global',
    protect: Any = (),
    multiple: int = 32,
    tokens: float = 128,
    latency: Costs | None = None,
) -> Plan:
    """Chooses the units that stay under a budget.

    Args:
        model: The ranker.
        scores: What a criterion said of its units.
        sparsity: The share of the cost of the encoder's layers that goes, between 0 and 1.
        budget: What the cost is: 'flops' (that scoring executes), 'parameters', or 'latency' (time of the whole
            ranker, tokenisation included).
        speedup: For 'latency', instead of a sparsity: how many times as fast the ranker shall be.
        allocation: 'uniform' (every layer keeps the same share), 'adaptive' (a layer keeps more where the mean score of
            its units is higher, within half and twice) or 'global' (the best units for their cost, of any layer; whole
            sublayers may go).
        protect: Units that stay whatever their score, as `Units.of` accepts them; e.g. a `Circuit`.
        multiple: Layers keep a multiple of so many neurons, or all or none; narrower products are no faster.
        tokens: Length of the sequences that operations are counted for.
        latency: The times that `latency_costs` measured; needed for 'latency'.

    Raises:
        ValueError: If a setting is not known or out of range, or what must stay costs more than the budget.
    """
    protected = check_plan_settings(model, sparsity, budget, speedup, allocation, protect, multiple)
    target, wanted = _target(sparsity, speedup, budget)
    scores.check(model)
    costs = _costs(model, budget, tokens, latency)
    allowed = target * costs.whole - costs.fixed
    made = stacks(scores, costs, protected, {'heads': 1, 'neurons': multiple})
    taken, spent = fill(made, ALLOCATIONS[allocation](made, scores.joint), allowed)
    if spent > allowed * (1 + 1e-9):
        least = (spent + costs.fixed) / costs.whole
        raise ValueError(
            f'{wanted} leaves {target:.1%} of the {costs.unit}, but what must stay (the {len(protected)} protected '
            f'units, and what no unit owns) takes {least:.1%}: protect fewer, or ask for less'
        )
    kinds: dict[str, set[tuple[int, int]]] = {'heads': set(), 'neurons': set()}
    for stack, blocks in zip(made, taken, strict=True):
        chosen = stack.order[: stack.edges[blocks]].tolist()
        kinds[stack.kind].update((stack.layer, unit) for unit in chosen)
    settings = {
        'sparsity': sparsity,
        'speedup': speedup,
        'budget': budget,
        'allocation': allocation,
        'multiple': multiple,
        'tokens': float(tokens),
        'protected': protected.names,
        'kept_share': (spent + costs.fixed) / costs.whole,
    }
    return _plan(model, Units(frozenset(kinds['heads']), frozenset(kinds['neurons'])), settings)


def check_plan_settings(
    model: Ranker,
    sparsity: float | None,
    budget: str,
    speedup: float | None,
    allocation: str,
    protect: Any,
    multiple: int,
) -> Units:
    """Checks the settings of `make_plan`, and returns the protected units.

    Raises:
        ValueError: If one is not known or out of range.
    """
    _target(sparsity, speedup, budget)
    if allocation not in ALLOCATIONS:
        raise ValueError(f'allocation={allocation!r} is none of {tuple(ALLOCATIONS)}')
    if multiple < 1:
        raise ValueError(f'multiple={multiple!r} is no width; use 1 or more')
    return Units.of(protect).check(model)


def fingerprint(model: Ranker) -> str:
    """Returns a name for the weights of a ranker's module: equal weights, equal name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.encoder.module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _target(sparsity: float | None, speedup: float | None, budget: str) -> tuple[float, str]:
    """Returns the share of the cost that stays, and what was asked for."""
    if budget not in BUDGETS:
        raise ValueError(f'budget={budget!r} is none of {BUDGETS}')
    if speedup is not None:
        if budget != 'latency' or sparsity is not None:
            raise ValueError(
                f"speedup={speedup!r} goes with budget='latency' and without sparsity, not with "
                f'budget={budget!r} and sparsity={sparsity!r}'
            )
        if not speedup > 1:
            raise ValueError(f'speedup={speedup!r} is not above 1; for twice as fast give 2')
        return 1 / speedup, f'speedup={speedup!r}'
    if sparsity is None or not 0 < sparsity < 1:
        raise ValueError(f'sparsity={sparsity!r} is no share between 0 and 1; to take half away give 0.5')
    return 1 - sparsity, f'sparsity={sparsity!r}'


def _costs(model: Ranker, budget: str, tokens: float, latency: Costs | None) -> Costs:
    if budget == 'latency':
        if latency is None:
            raise ValueError("budget='latency' needs times: give latency=latency_costs(model, frame)")
        return latency
    return parameter_costs(model) if budget == 'parameters' else flop_costs(model, tokens)


def _plan(model: Ranker, kept: Units, settings: Mapping[str, Any]) -> Plan:
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
