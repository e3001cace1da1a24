"""Criteria from gradients: how the score answers to the removal of a unit, to first and to second order.

Both read g[i, u] = Σ_t z·∂s_i/∂z, the derivative of the score of pair i by a factor on unit u: see `unit_gradients`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from pyterrier_mech.prune.criteria.gates import PASSES, unit_gradients
from pyterrier_mech.prune.data import FitData, sample, take
from pyterrier_mech.prune.protocol import at_least, check_step
from pyterrier_mech.prune.scores import UnitScores
from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.units import KINDS

LOSSES = ('score', 'labels')


@dataclass(frozen=True)
class _Gradient:
    """What the criteria from gradients share."""

    loss: str = 'score'
    min_rel: int = 1
    max_pairs: int | None = None
    seed: int = 0

    @property
    def needs(self) -> frozenset[str]:
        """What the data must have: texts, and judgements where the loss is of labels."""
        return frozenset({'text', 'qrels'} if self.loss == 'labels' else {'text'})

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: If one is unknown or out of range.
        """
        at_least(1, self, 'max_pairs')
        if self.loss not in LOSSES:
            raise ValueError(f'loss must be one of {LOSSES}; got loss={self.loss!r}')

    def _scores(
        self, model: Ranker, data: FitData, power: Callable[[np.ndarray], np.ndarray], joint: bool = False
    ) -> UnitScores:
        """Returns the means over pairs of `power` of w·g."""
        check_step(self, data)
        if self.loss == 'labels' and len(model.towers) > 1:
            raise ValueError(f"{model!r} gives similarities, no logits of relevance: use loss='score', not 'labels'")
        n_rows, data, notes = len(data.frame), data.plain, {}
        if self.loss == 'labels':
            judged = np.flatnonzero(data.labels().notna().to_numpy())
            notes['unjudged'] = n_rows - len(judged)
            data = take(data, judged)
        data = sample(data, self.max_pairs, self.seed)
        notes['pairs'] = len(data.frame)
        relevant = (data.labels() >= self.min_rel).to_numpy() if self.loss == 'labels' else None
        sums: dict[str, list[np.ndarray]] = {}
        for batch in unit_gradients(model, data):
            weights = np.ones(len(batch.rows))
            if relevant is not None:
                # The logistic function by tanh, which does not overflow.
                weights = 0.5 * (1 + np.tanh(batch.scores.astype(np.float64) / 2)) - relevant[batch.rows]
            for kind in KINDS:
                added = [power(weights[:, None] * g).sum(0) for g in getattr(batch, kind)]
                sums[kind] = [a + b for a, b in zip(sums[kind], added, strict=True)] if kind in sums else added
        heads, neurons = ([total / len(data.frame) for total in sums[kind]] for kind in KINDS)
        passes = PASSES * notes['pairs'] / n_rows
        return UnitScores(heads, neurons, joint, passes, dict(notes)).check(model)


@dataclass(frozen=True)
class Taylor(_Gradient):
    """How far the score moves when a unit is removed, to first order: the mean of `|w·g|` over the pairs.

    With `loss='score'` it is the score itself (w = 1), and no labels are needed. With `loss='labels'` it is the binary
    cross-entropy of the logit against whether the pair is relevant: w = σ(s) − y; pairs that are not judged are left
    out.

    Heads and neurons are not joint, though both are in units of the score: absolute effects do not add up, since the
    small effects of thousands of neurons cancel in part, so that heads would go first. Squares add up: see `Fisher`.

    Args:
        loss: 'score' or 'labels'.
        min_rel: The lowest label that is relevant.
        max_pairs: How many pairs are looked at, drawn evenly from the queries; by default all.
        seed: Random seed of the draw.
        normalize: Whether the scores of every layer, heads and neurons apart, are divided by their L2 norm, so that
            every layer counts the same.

    Source: Michel, Levy, Neubig, NeurIPS 2019, arXiv 1905.10650; Molchanov et al., ICLR 2017, arXiv 1611.06440.
    """

    normalize: bool = False

    def scores(self, model: Ranker, data: FitData) -> UnitScores:
        """Scores every unit of a ranker, in units of the score (or of the loss).

        Raises:
            ValueError: If a setting is not known, the data lacks what is needed, or a gradient is not finite.
        """
        found = self._scores(model, data, np.abs)
        if not self.normalize:
            return found
        heads, neurons = ([_unit_norm(layer) for layer in layers] for layers in (found.heads, found.neurons))
        return replace(found, heads=heads, neurons=neurons)


@dataclass(frozen=True)
class Fisher(_Gradient):
    """The curvature of the loss along a unit's gate: the mean of (w·g)² over the pairs.

    With `loss='score'` (w = 1) it is the Gauss–Newton curvature of the squared distance to the scores of the unpruned
    ranker, which needs no labels: to second order, half of it is what the removal of the unit alone adds to half the
    mean squared error. With `loss='labels'`, w = σ(s) − y, as `Taylor`: the diagonal of the empirical Fisher
    information.

    Args:
        loss: 'score' or 'labels'.
        min_rel: The lowest label that is relevant.
        max_pairs: How many pairs are looked at, drawn evenly from the queries; by default all.
        seed: Random seed of the draw.

    Source: Kwon et al., NeurIPS 2022, arXiv 2204.09656.
    """

    def scores(self, model: Ranker, data: FitData) -> UnitScores:
        """Scores every unit of a ranker, in squared units of the score (or of the loss).

        Raises:
            ValueError: If a setting is not known, the data lacks what is needed, or a gradient is not finite.
        """
        return self._scores(model, data, np.square, joint=True)


def _unit_norm(values: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(values)
    return values / norm if norm else values
