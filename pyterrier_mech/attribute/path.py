"""Integrals along a line of inputs: what every recorded activation contributes to the change of the score.

With x(α) from the baseline (α = 0) to the input (α = 1), the contribution of an activation a is
∫ ∂s/∂a(x(α)) · da/dα dα. Its sum over a full cut of the network, such as all outputs of a layer, is s(x) − s(baseline).
One forward and one backward a point give the activations and gradients of all sites. The trapezoid in the activation,
Σ (a_{k+1} − a_k)(g_k + g_{k+1}) / 2, needs both of neighbouring points, so these are kept until a row is done.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import pairwise
from typing import Any, Generic, TypeVar

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from pyterrier_mech.attribute.lines import Baseline, Line, check_baseline, lines
from pyterrier_mech.attribute.points import GRAPH, Node, Points, Values
from pyterrier_mech.frames import row_names, texts_of
from pyterrier_mech.inputs.batching import Budget, in_batches
from pyterrier_mech.stage import Keeping, ModelStage, choice

_T = TypeVar('_T')
Reduce = Callable[[Line, list[torch.Tensor]], _T]

RULES = ('trapezoid', 'left')


@dataclass(frozen=True)
class Rule:
    """Where a line is evaluated and how the values become an integral.

    Attributes:
        name: 'trapezoid': a uniform grid with both ends, whose intervals are halved until the error is within the
            tolerance. 'left': Gauss–Legendre nodes and Σ (a_{k+1} − a_k) g_k, as captum's `LayerConductance`.
        points: Points of the first grid; for 'left' the number of steps, one less than the nodes.
        tolerance: The completeness error that is good enough.
        max_points: No grid gets more points.
    """

    name: str
    points: int
    tolerance: float
    max_points: int

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: If one is unknown or out of range.
        """
        if self.name not in RULES:
            raise ValueError(f'rule must be one of {RULES}; got {self.name!r}')
        if self.points < 2:
            raise ValueError(f'points must be 2 or more, for a grid has two ends; got {self.points}')
        if self.name == 'trapezoid' and self.max_points < self.points:
            raise ValueError(f'max_points must not be below points={self.points}; got {self.max_points}')
        if not self.tolerance > 0:
            raise ValueError(f'tolerance must be positive, e.g. 0.05; got {self.tolerance}')

    def first(self) -> np.ndarray:
        """Returns the points of the first grid."""
        if self.name == 'left':
            # The ends are no nodes: they give the change of the score that the error is measured against.
            return np.concatenate([[0.0], (1 + np.polynomial.legendre.leggauss(self.points + 1)[0]) / 2, [1.0]])
        return np.linspace(0, 1, self.points)

    def can_refine(self, n_points: int) -> bool:
        """Whether a grid may get another point in each interval."""
        return self.name == 'trapezoid' and 2 * n_points - 1 <= self.max_points

    def integral(self, curve: Sequence[Values]) -> torch.Tensor:
        """Returns the integral from the activation and gradient at every point."""
        total = torch.zeros_like(curve[0][0])
        if self.name == 'left':
            for (a, g), (b, _) in pairwise(curve[1:-1]):
                total += (b - a) * g
            return total
        for (a, g), (b, h) in pairwise(curve):
            total += (b - a) * (g + h)
        return total / 2


@dataclass(frozen=True)
class Integral(Generic[_T]):
    """What came out for one row.

    Attributes:
        row: Its number.
        value: What `reduce` made of the integrals.
        error: The completeness error.
        score: The score of the input.
    """

    row: int
    value: _T
    error: float
    score: float


@dataclass
class _Walk:
    """One row on its way: its number among all and in its batch, and the points so far."""

    row: int
    place: int
    line: Line
    alphas: np.ndarray
    nodes: list[Node] = field(default_factory=list)

    def places(self, alphas: np.ndarray) -> list[tuple[int, float]]:
        """Returns points as the batch wants them."""
        return [(self.place, float(alpha)) for alpha in alphas]

    def between(self) -> np.ndarray:
        """Returns the middle of every interval."""
        return (self.alphas[1:] + self.alphas[:-1]) / 2

    def refine(self, middles: Sequence[Node]) -> None:
        """Puts new points between the old ones."""
        self.alphas = np.sort(np.concatenate([self.alphas, self.between()]))
        self.nodes = [node for pair in zip(self.nodes, middles, strict=False) for node in pair] + self.nodes[-1:]

    def integrals(self, rule: Rule, kind: str) -> list[torch.Tensor]:
        """Returns the integrals at all 'sites' or 'cuts'."""
        return [rule.integral(curve) for curve in zip(*[getattr(node, kind) for node in self.nodes], strict=True)]

    def error(self, rule: Rule) -> float:
        """Returns the completeness error; see `integrate`."""
        if self.line.constant:
            return 0.0
        scores = np.asarray([node.score for node in self.nodes])
        whole = scores[-1] - scores[0]
        # A change below the precision of the scores is none: it must not be divided by.
        rounding = float(torch.finfo(self.nodes[0].sites[0][0].dtype).eps * np.abs(scores).max())
        scale = max(abs(whole), 0.1 * float(np.abs(np.diff(scores)).sum()), rounding)
        sums = [float(total.sum()) for total in self.integrals(rule, 'cuts' if self.nodes[0].cuts else 'sites')]
        worst = max(abs(total - whole) for total in sums)
        return worst / scale if worst > 0 else worst


def integrate(
    model: Any,
    lines: Sequence[Line],
    *,
    site: str,
    rule: Rule,
    reduce: Reduce[_T],
    budget: Budget,
    verbose: bool = False,
    desc: str = '',
) -> Iterator[Integral[_T]]:
    """Integrates along the line of every row, in batches of points of one or several rows.

    The completeness error of a row is the largest, over the full cuts of the network, of
    |Σ contributions − (s(x) − s(baseline))|, divided by |s(x) − s(baseline)|, or by a tenth of the way that the score
    goes from point to point, Σ |s_{k+1} − s_k|, where that is more: there and back again is no small change. The cuts
    are the outputs of the layers, or the embeddings where these are the site. Where the baseline is the input, it is 0.

    Args:
        model: A ranker.
        lines: The line of every row.
        site: 'neurons' (input of the last linear map of each feed-forward block), 'heads' (input of each attention
            output projection) or 'embeddings'.
        rule: The grid.
        reduce: From a row's line and its integrals, one [tokens, width] a layer, to what is kept of them.
        budget: Tokens of one batch, which count `GRAPH` times, and about how many are kept over all rows on their
            way and all their points; one row is kept whole, whatever its points.
        verbose: Shows a progress bar.
        desc: Its label.

    Yields:
        The rows, in any order.

    Raises:
        ValueError: If a score or gradient is not finite (the message names the row), or a layer's site is not passed
            exactly once.
    """
    tokens = np.asarray([len(line) for line in lines], dtype=np.int64)
    alphas = rule.first()

    def step(rows: np.ndarray) -> list[Integral[_T]]:
        walks = [_Walk(int(row), place, lines[row], alphas) for place, row in enumerate(rows)]
        batch = Points(model, [walk.line for walk in walks], site, budget)
        nodes = batch.evaluate([place for walk in walks for place in walk.places(alphas)])
        for walk in walks:
            walk.nodes = [next(nodes) for _ in alphas]
        return list(_finish(walks, batch, rule, reduce))

    with model.computing(gradients=True):
        for _, results in in_batches(
            tokens * len(alphas), budget, step, smallest=GRAPH * tokens, verbose=verbose, desc=desc, unit='row'
        ):
            yield from results


def _finish(walks: Sequence[_Walk], batch: Points, rule: Rule, reduce: Reduce[_T]) -> Iterator[Integral[_T]]:
    """Closes the rows that are within the tolerance and halves the intervals of the others, some rows at a time."""
    unfinished = []
    for walk in walks:
        error = walk.error(rule)
        if error > rule.tolerance and rule.can_refine(len(walk.nodes)):
            unfinished.append(walk)
            continue
        yield _close(walk, error, batch.model, rule, reduce)
        walk.nodes = []
    while unfinished:
        kept = len(unfinished[0].line) * (2 * len(unfinished[0].nodes) - 1)
        size = max(1, batch.budget.tokens // kept)
        some, unfinished = unfinished[:size], unfinished[size:]
        nodes = batch.evaluate([place for walk in some for place in walk.places(walk.between())])
        for walk in some:
            walk.refine([next(nodes) for _ in walk.between()])
        yield from _finish(some, batch, rule, reduce)


def _close(walk: _Walk, error: float, model: Any, rule: Rule, reduce: Reduce[_T]) -> Integral[_T]:
    integrals = [F.pad(total, (0, 0, 0, len(walk.line) - len(total))) for total in walk.integrals(rule, 'sites')]
    if not np.isfinite(error) or not all(bool(total.isfinite().all()) for total in integrals):
        raise not_finite([walk.line.name], model)
    return Integral(walk.row, reduce(walk.line, integrals), error, walk.nodes[-1].score)


@dataclass(eq=False, repr=False)
class Integrating(Keeping, ModelStage):
    """What the stages share that walk lines until the completeness error is small."""

    _: KW_ONLY
    baseline: Baseline = 'query'
    rule: str = choice(RULES)
    points: int = 9
    tolerance: float = 0.05
    max_points: int = 257

    def check(self) -> None:
        """Checks the settings, before any work."""
        super().check()
        self.grid.check()
        check_baseline(self.baseline)

    @property
    def grid(self) -> Rule:
        """Where lines are evaluated."""
        return Rule(self.rule, self.points, self.tolerance, self.max_points)

    def lines(self, inp: pd.DataFrame) -> list[Line]:
        """Returns the line of every row, from its baseline to its input."""
        return lines(self.model, texts_of(inp, self, self.text), self.baseline, row_names(inp))

    def walking(self) -> dict[str, Any]:
        """Returns the arguments of `integrate` that follow from the settings."""
        return {'rule': self.grid, 'budget': self.budget, 'verbose': self.shows, 'desc': type(self).__name__}


def not_finite(names: Sequence[str], model: Any) -> ValueError:
    """Returns the error for rows whose scores or gradients are not finite."""
    return ValueError(
        f'{len(names)} rows have scores or gradients that are not finite ({", ".join(names[:3])}): {model!r} has '
        "weights that are NaN or infinite, or its half precision overflows there; use dtype='float32'"
    )


def warn_of(errors: np.ndarray, rule: Rule) -> None:
    """Warns, once, of the rows whose completeness error is above the tolerance."""
    above = int((errors > rule.tolerance).sum())
    if above:
        way_out = 'raise max_points' if rule.name == 'trapezoid' else "use rule='trapezoid' or more points"
        warnings.warn(
            f'{above} of {len(errors)} rows have a completeness error above tolerance={rule.tolerance}, at most '
            f'{errors.max():.3g}; {way_out}, or see the column of completeness errors',
            stacklevel=3,
        )
