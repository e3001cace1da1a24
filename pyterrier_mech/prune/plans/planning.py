"""From scores to a plan: the units that stay under a budget."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np

from pyterrier_mech.prune.plans.allocation import ALLOCATIONS, Stack, fill, least_cost, stacks
from pyterrier_mech.prune.plans.costs import Costs, flop_costs, parameter_costs
from pyterrier_mech.prune.plans.plan import Plan, plan_keeping
from pyterrier_mech.prune.protocol import check_share
from pyterrier_mech.prune.scores import UnitScores
from pyterrier_mech.prune.surgery import check_prunable
from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.units import HEADS, KINDS, NEURONS, Site, Unit, Units

BUDGETS = ('flops', 'parameters', 'latency')

Number = float | None


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
        ValueError: If a setting is not known or out of range, the scores or times are not for this ranker, it has no
            units or they cannot be removed, or what must stay costs more than the budget.
    """
    settings = {'budget': budget, 'speedup': speedup, 'protect': protect, 'multiple': multiple}
    protected = check_plan_settings(model, sparsity, allocation=allocation, **settings)
    costs = _costs(model, budget, tokens, latency)
    made, room = _stacked(scores.check(model), costs, _target(sparsity, speedup, budget), protected, multiple)
    prioritise, skip = ALLOCATIONS[allocation]
    share = room / (costs.whole - costs.fixed)
    taken, spent = fill(made, prioritise(made, scores.joint, share), room, skip=skip)
    kept = Units(
        Unit(Site(stack.kind, stack.layer), number)
        for stack, blocks in zip(made, taken, strict=True)
        for number in stack.order[: stack.edges[blocks]].tolist()
    )
    asked = {'sparsity': sparsity, 'speedup': speedup, 'budget': budget, 'allocation': allocation}
    found = {'tokens': tokens, 'protected': protected.names, 'kept_share': (spent + costs.fixed) / costs.whole}
    return plan_keeping(model, kept, {**asked, 'multiple': multiple, **found})


def check_plan_settings(
    model: Ranker, sparsity: Number, *, budget: str, speedup: Number, allocation: str, protect: Any, multiple: int
) -> Units:
    """Checks the settings of `make_plan`, and returns the protected units.

    Raises:
        ValueError: If one is not known or out of range, or the model has no units or they cannot be removed.
    """
    _target(sparsity, speedup, budget)
    if allocation not in ALLOCATIONS:
        raise ValueError(f'allocation must be one of {tuple(ALLOCATIONS)}; got allocation={allocation!r}')
    if not isinstance(multiple, Integral) or multiple < 1:
        raise ValueError(f'multiple must be a whole number from 1; got multiple={multiple!r}')
    check_prunable(model)
    if not any(count for kind in KINDS for count in model.counts(kind).values()):
        raise ValueError(f'{model!r} has no heads and no neurons left: there is nothing to prune')
    return Units.of(protect).check(model)


def check_budget(model: Ranker, sparsity: float | None, **settings: Any) -> None:
    """Checks that what must stay fits into the budget, which needs no scores.

    Args:
        model: The ranker.
        sparsity: As for `make_plan`.
        settings: `budget`, `speedup`, `protect`, `multiple`, `tokens` and `latency`, as for `make_plan`.

    Raises:
        ValueError: If not.
    """
    heads, neurons = ([np.zeros(count) for count in model.counts(kind).values()] for kind in KINDS)
    costs = _costs(model, settings['budget'], settings['tokens'], settings['latency'])
    target = _target(sparsity, settings['speedup'], settings['budget'])
    _stacked(UnitScores(heads, neurons), costs, target, Units.of(settings['protect']), settings['multiple'])


def _target(sparsity: float | None, speedup: float | None, budget: str) -> tuple[float, str]:
    """Returns the share of the cost that stays, and what was asked for."""
    if budget not in BUDGETS:
        raise ValueError(f'budget must be one of {BUDGETS}; got budget={budget!r}')
    if speedup is not None:
        if budget != 'latency' or sparsity is not None:
            raise ValueError(
                f"speedup={speedup!r} goes with budget='latency' and without sparsity, not with "
                f'budget={budget!r} and sparsity={sparsity!r}'
            )
        if not speedup > 1:
            raise ValueError(f'speedup must be above 1; got speedup={speedup!r}. For twice as fast give 2.')
        return 1 / speedup, f'speedup={speedup!r}'
    check_share('sparsity', sparsity, 'To take half away give 0.5.')
    return 1 - (sparsity or 0.0), f'sparsity={sparsity!r}'


def _stacked(
    scores: UnitScores, costs: Costs, asked: tuple[float, str], protected: Units, multiple: int
) -> tuple[list[Stack], float]:
    """Returns the units of all layers in blocks, and what they may cost together.

    Raises:
        ValueError: If what must stay costs more.
    """
    made = stacks(scores, costs, protected, {HEADS: 1, NEURONS: multiple})
    target, wanted = asked
    room, least = target * costs.whole - costs.fixed, least_cost(made)
    if least > room + 1e-9 * costs.whole:
        raise ValueError(
            f'{wanted} leaves {target:.1%} of the {costs.unit}, but what must stay takes '
            f'{(least + costs.fixed) / costs.whole:.1%}: {len(protected)} protected units '
            f'{least / costs.whole:.1%}, what no unit owns {costs.fixed / costs.whole:.1%}. '
            f'{"Protect fewer, or ask" if protected else "Ask"} for less'
        )
    return made, room


def _costs(model: Ranker, budget: str, tokens: float, latency: Costs | None) -> Costs:
    if budget == 'latency':
        if latency is None:
            raise ValueError("budget='latency' needs times: give latency=latency_costs(model, frame)")
        return latency.check(model)
    if not tokens > 0:
        raise ValueError(f'tokens must be the length of a sequence; got tokens={tokens!r}')
    return parameter_costs(model) if budget == 'parameters' else flop_costs(model, tokens)
