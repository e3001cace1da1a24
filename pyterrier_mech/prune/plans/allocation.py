"""How a budget is spread: which blocks of units come first.

A layer's heads, and its neurons, are ordered by score and cut into blocks as wide as the hardware likes. Blocks of a
layer are only ever taken from the best one on; an allocation says in which order those of different layers come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pyterrier_mech.prune.plans.costs import Costs
from pyterrier_mech.prune.scores import UnitScores
from pyterrier_mech.units import KINDS, Site, Units

# How far an adaptive allocation may go from the uniform one: a layer keeps at most twice, at least half of its share.
_FACTOR = 2.0
# Steps between priorities of blocks that come before, within and after what scores decide.
_TIER = 100.0


@dataclass(frozen=True, eq=False)
class Stack:
    """The units of one kind in one layer, best first, cut into blocks.

    Attributes:
        kind: 'heads' or 'neurons'.
        layer: Its number.
        order: Units, those that must stay first, then by falling score.
        edges: Widths at which it may be cut, from 0 to all.
        required: How many of the widths are taken before anything else.
        values: Sum of the scores of each block.
        costs: Cost of each block.
    """

    kind: str
    layer: int
    order: np.ndarray
    edges: np.ndarray
    required: int
    values: np.ndarray
    costs: np.ndarray


def stacks(scores: UnitScores, costs: Costs, protected: Units, multiples: dict[str, int]) -> list[Stack]:
    """Returns the stacks of all layers, heads and neurons in turn."""
    made = []
    for layer in range(len(scores.heads)):
        for kind in KINDS:
            values = np.asarray(getattr(scores, kind)[layer], dtype=float)
            kept = [unit.index for unit in protected.at(Site(kind, layer))]
            must = np.isin(np.arange(len(values)), kept)
            order = np.lexsort((np.arange(len(values)), -values, ~must))
            edges = np.unique(np.append(np.arange(0, len(values), multiples[kind]), len(values)))
            # Sums block by block: differences of running sums would break ties by rounding.
            sums = np.add.reduceat(values[order], edges[:-1])
            cumulated = np.asarray(getattr(costs, kind)[layer], dtype=float)
            required = int(np.searchsorted(edges, len(kept)))
            made.append(Stack(kind, layer, order, edges, required, sums, np.diff(cumulated[edges])))
    return made


def fill(
    made: Sequence[Stack], priorities: Sequence[np.ndarray], budget: float, *, skip: bool
) -> tuple[list[int], float]:
    """Takes blocks in the order of their priority while the budget lasts.

    Args:
        made: The stacks.
        priorities: For each stack, a number a block; higher is taken earlier.
        budget: What the blocks may cost together.
        skip: Whether smaller blocks of other stacks are taken when the next one is too large; else it ends there.

    Returns:
        The number of blocks taken of each stack, and their cost. What must stay is taken whatever it costs.
    """
    taken = [stack.required for stack in made]
    spent = least_cost(made)
    queue = [
        (-priority, place, stack.required + further)
        for place, (stack, values) in enumerate(zip(made, priorities, strict=True))
        for further, priority in enumerate(falling(values[stack.required :]))
    ]
    closed: set[int] = set()
    for _, place, block in sorted(queue):
        if place in closed:
            continue
        cost = float(made[place].costs[block])
        if spent + cost > budget:
            if not skip:
                break
            closed.add(place)
            continue
        spent += cost
        taken[place] += 1
    return taken, spent


def least_cost(made: Sequence[Stack]) -> float:
    """Returns the cost of what must stay."""
    return sum(float(stack.costs[: stack.required].sum()) for stack in made)


def falling(values: np.ndarray) -> np.ndarray:
    """Returns priorities in which no block of a stack comes before one that is above it."""
    return np.minimum.accumulate(values)


def uniform(made: Sequence[Stack], joint: bool, share: float) -> list[np.ndarray]:
    """Every layer keeps the same share of its heads and of its neurons."""
    return [-_depths(stack) for stack in made]


def adaptive(made: Sequence[Stack], joint: bool, share: float) -> list[np.ndarray]:
    """A layer keeps a share that grows with the mean score of its units, between half and twice the uniform one.

    The share grows with the square root, so that it takes four times the score to keep twice as many.
    """
    means = {kind: float(np.mean([_mean(stack) for stack in made if stack.kind == kind])) for kind in KINDS}
    priorities = []
    for stack in made:
        of_all = means[stack.kind]
        relative = np.clip(np.sqrt(max(_mean(stack), 0.0) / of_all), 0.1, 10.0) if of_all > 0 else 1.0
        depths = _depths(stack)
        tier = np.where(depths < share / _FACTOR, _TIER, np.where(depths > share * _FACTOR, -_TIER, 0.0))
        priorities.append(tier - depths / relative)
    return priorities


def unrestricted(made: Sequence[Stack], joint: bool, share: float) -> list[np.ndarray]:
    """The blocks with the highest score for their cost, of any layer; whole sublayers may go.

    Where heads and neurons are not measured in the same unit they are compared among themselves, and both give up the
    same share of their cost.
    """
    # Measured times may be the same for two widths.
    least = 1e-9 * sum(float(stack.costs.sum()) for stack in made)
    worth = [stack.values / np.maximum(stack.costs, least) for stack in made]
    if joint:
        return worth
    priorities = [np.zeros(len(values)) for values in worth]
    for kind in KINDS:
        places = [place for place, stack in enumerate(made) if stack.kind == kind]
        blocks = []
        for place in places:
            required = made[place].required
            order = np.append(np.full(required, np.inf), falling(worth[place][required:]))
            blocks += [(-value, place, block) for block, value in enumerate(order)]
        whole = sum(float(made[place].costs.sum()) for place in places) or 1.0
        before = 0.0
        for _, place, block in sorted(blocks):
            priorities[place][block] = -before / whole
            before += float(made[place].costs[block])
    return priorities


# How blocks of a kind of allocation are ordered, and whether smaller blocks may fill up what is left: where layers
# keep shares, the cheap ones would be kept whole.
ALLOCATIONS: dict[str, tuple[Callable[[Sequence[Stack], bool, float], list[np.ndarray]], bool]] = {
    'uniform': (uniform, False),
    'adaptive': (adaptive, False),
    'global': (unrestricted, True),
}


def _depths(stack: Stack) -> np.ndarray:
    """Returns, for each block, the middle of the shares of units that are kept with and without it."""
    whole = max(1, stack.edges[-1])
    return (stack.edges[1:] + stack.edges[:-1]) / (2 * whole)


def _mean(stack: Stack) -> float:
    return float(stack.values.sum() / max(1, stack.edges[-1]))
