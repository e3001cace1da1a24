"""Criteria from interventions: conductance along a line of inputs, and patching with a second version of each text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyterrier as pt
import torch

from pyterrier_mech.anatomy.model import Edit
from pyterrier_mech.attribute.lines import check_baseline, lines
from pyterrier_mech.attribute.path import Rule, integrate
from pyterrier_mech.frames import row_names, two_versions
from pyterrier_mech.inputs.inputs import PERTURBED, Inputs
from pyterrier_mech.patch.heads import PatchHeads
from pyterrier_mech.perturb.stage import Perturb
from pyterrier_mech.prune.criteria.gates import PASSES, with_gradients
from pyterrier_mech.prune.data import FitData, sample
from pyterrier_mech.prune.protocol import at_least, check_step
from pyterrier_mech.prune.scores import UnitScores
from pyterrier_mech.rankers.ranker import Ranker, as_numpy
from pyterrier_mech.units import HEADS, KINDS, NEURONS, Unit

Perturbing = Callable[[str, str], str] | pt.Transformer


@dataclass(frozen=True)
class Conductance:
    """How much of the score goes through a unit: the mean of its absolute conductance over the pairs.

    The word embeddings go in a straight line from a baseline to the input; the conductance of an activation is
    ∫ ∂s/∂a · da along it, summed over the positions and, for a head, over its width. See `AttributeNeurons` and
    `AttributeHeads`, whose numbers these are. Both kinds are in units of the score, but not joint: absolute
    values do not add up, see `Taylor`. Expect fifty passes over the data and more; `max_pairs` limits them.

    Args:
        baseline: Where the line begins: 'query' (query tokens become padding), 'all', or a function from the input's
            token ids to the baseline's.
        tolerance: The completeness error up to which the grid is refined, row by row. Rows that stay above it with
            `max_points` points enter as they are; `notes` counts them.
        points: Points of the first grid.
        max_points: No row gets more.
        max_pairs: How many pairs are looked at, drawn evenly from the queries; by default all.
        seed: Random seed of the draw.

    Source: Dhamdhere, Sundararajan, Yan, ICLR 2019, arXiv 1805.12233; for rankers Vast et al., ICTIR 2024, arXiv
    2406.19309.
    """

    needs: ClassVar[frozenset[str]] = frozenset({'text'})

    baseline: str | Callable[[np.ndarray], Any] = 'query'
    tolerance: float = 0.05
    points: int = 9
    max_points: int = 257
    max_pairs: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Checks the settings.

        Raises:
            TypeError: If the baseline is nothing that `AttributeNeurons` takes.
            ValueError: If a setting is unknown or out of range.
        """
        self._rule.check()
        check_baseline(self.baseline)
        at_least(1, self, 'max_pairs')

    @property
    def _rule(self) -> Rule:
        return Rule('trapezoid', self.points, self.tolerance, self.max_points)

    def scores(self, model: Ranker, data: FitData) -> UnitScores:
        """Scores every unit of a ranker, in units of the score.

        Raises:
            ValueError: If a setting is not known, the data lacks texts, or a gradient is not finite.
        """
        check_step(self, data)
        some = sample(data.plain, self.max_pairs, self.seed)
        (heads, bad_heads), (neurons, bad_neurons) = (self._means(model, some, kind) for kind in KINDS)
        notes = {'pairs': len(some.frame), 'above_tolerance': max(bad_heads, bad_neurons)}
        # Of the first grids: where these are refined, it takes more.
        passes = PASSES * len(KINDS) * self.points * len(some.frame) / len(data.frame)
        return UnitScores(heads, neurons, passes=passes, notes=notes).check(model)

    def _means(self, model: Ranker, data: FitData, site: str) -> tuple[list[np.ndarray], int]:
        """Returns the means of one kind of unit, and how many rows stay above the tolerance."""
        layers = model.map.layers
        widths = [(layer.n_heads, layer.head_dim) if site == HEADS else (layer.n_neurons, 1) for layer in layers]

        def reduce(line: Any, integrals: list[torch.Tensor]) -> list[np.ndarray]:
            units = [total.sum(0).reshape(shape).sum(1).abs() for total, shape in zip(integrals, widths, strict=True)]
            return [as_numpy(values) for values in units]

        sums, above = [np.zeros(count) for count, _ in widths], 0
        ways = lines(model, {'query': data.queries, 'text': data.texts}, self.baseline, row_names(data.frame))
        shown: dict[str, Any] = {'verbose': model.verbose, 'desc': f'conductance of {site}'}
        for result in integrate(model, ways, site=site, rule=self._rule, reduce=reduce, budget=model.budget, **shown):
            above += result.error > self.tolerance
            for total, values in zip(sums, result.value, strict=True):
                total += values
        return [total / len(data.frame) for total in sums], int(above)


@dataclass(frozen=True)
class Patching:
    """How much of the reaction to an edit a unit carries: the mean of its absolute patching effect over the pairs.

    A head's effect is exact: the score of the original pair with the head's output taken from the other version, less
    the score, as `PatchHeads` measures it. A neuron's is the first-order estimate Σ_t (a′ − a)·∂s/∂a at the original
    pair (attribution patching), since one run for each of thousands of neurons is out of the question; it is poor where
    the score is flat. Both are in units of the score, but not joint: absolute values do not add up, see `Taylor`.

    Pairs that cannot be patched (nothing changed, or no alignment) are left out, and `notes` counts them by reason.

    Args:
        perturbation: What makes the second version: a callable (query, text) -> str, a `Perturb` stage or a pipeline
            of such. By default the data has one, because there is a `Perturb` before the stage.
        max_pairs: How many pairs are looked at, drawn evenly from the queries; by default all.
        seed: Random seed of the draw.

    Source: Chen, Merullo, Eickhoff, SIGIR 2024, arXiv 2405.02503; attribution patching: Syed, Rager, Conmy 2023, arXiv
    2310.10348.
    """

    perturbation: Perturbing | None = None
    max_pairs: int | None = None
    seed: int = 0

    @property
    def needs(self) -> frozenset[str]:
        """What the data must have: texts, and their second versions unless a perturbation makes these."""
        return frozenset({'text', 'text_0'} if self.perturbation is None else {'text'})

    def check(self) -> None:
        """Checks the settings.

        Raises:
            TypeError: If the perturbation is neither a function nor a stage.
            ValueError: If one is out of range.
        """
        check_perturbation(self.perturbation)
        at_least(1, self, 'max_pairs')

    def scores(self, model: Ranker, data: FitData) -> UnitScores:
        """Scores every unit of a ranker, in units of the score.

        Raises:
            ValueError: If the data lacks what is needed, or no pair can be patched.
        """
        check_step(self, data)
        some = sample(data, self.max_pairs, self.seed)
        frame, unpatchable = patchable(model, two_versions_of(some, self.perturbation))
        heads = mean_effects(model, patch_stage(model).transform(frame))
        neurons = _neurons(model, frame)
        notes = {'pairs': len(frame), 'unpatchable': unpatchable}
        # Both sides for the heads and one after another for the neurons, with gradients on one.
        passes = (2 + variants(model) + 4) * len(frame) / len(data.frame)
        return UnitScores(heads, neurons, passes=passes, notes=notes).check(model)


def check_perturbation(perturbation: Any) -> None:
    """Checks what shall make second versions.

    Raises:
        TypeError: If it is neither a function nor a stage, or a class.
    """
    if perturbation is not None and (isinstance(perturbation, type) or not callable(perturbation)):
        raise TypeError(
            'perturbation must be a function (query, text) -> str or a stage, such as TDC(index) or Perturb(TDC(index))'
            f'; got {perturbation!r}'
        )


def two_versions_of(data: FitData, perturbation: Perturbing | None) -> pd.DataFrame:
    """Returns a frame with a second version of each text or query: the data's own, or what a perturbation makes."""
    if perturbation is None:
        return data.frame
    frame = data.plain.frame[['qid', 'query', 'docno', 'text']]
    return (perturbation if isinstance(perturbation, pt.Transformer) else Perturb(perturbation)).transform(frame)


def patch_stage(model: Ranker) -> PatchHeads:
    """Returns the stage that patches every head of the pairs of a criterion's data."""
    return PatchHeads(model, text_field='text')


def patchable(model: Ranker, frame: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, int]]:
    """Returns the rows that can be patched, and how many cannot, counted by reason.

    Raises:
        ValueError: If none can.
    """
    inputs = Inputs.pairs(model, *two_versions(frame, patch_stage(model), 'text'), patch_stage(model).filler)
    reasons = pd.Series([inputs.problems[row] for row in inputs.rest], dtype=object).value_counts()
    unpatchable = {str(reason): int(count) for reason, count in reasons.items()}
    if not len(inputs.good):
        raise ValueError(
            f'none of the {len(frame)} pairs can be patched ({unpatchable}): give a perturbation that changes what '
            f'{model!r} reads of these texts'
        )
    return frame.iloc[inputs.good].reset_index(drop=True), unpatchable


def mean_effects(model: Ranker, frame: pd.DataFrame) -> list[np.ndarray]:
    """Returns the mean absolute effect of every head, layer by layer, from the columns of a stage."""
    return [
        np.asarray([frame[Unit(site, head).name].abs().astype(float).mean() for head in range(count)], dtype=float)
        for site, count in model.counts(HEADS).items()
    ]


def variants(model: Ranker) -> float:
    """Returns about how many forward runs a pair it takes to replace every head once.

    Where the parts of layers may be computed with directly, a run begins at the layer of its head.
    """
    n_layers, direct = model.n_layers, not model.map.why_not_plain()
    counts = model.counts(HEADS).values()
    return sum(count * ((n_layers - i - 0.5) / n_layers if direct else 1) for i, count in enumerate(counts))


def _neurons(model: Ranker, frame: pd.DataFrame) -> list[np.ndarray]:
    """Returns the mean absolute attribution patching effect of every neuron, layer by layer."""
    inputs = Inputs.pairs(model, *two_versions(frame, patch_stage(model), 'text'), patch_stage(model).filler)
    counts, like = model.counts(NEURONS), next(model.map.module.parameters())

    def step(rows: np.ndarray) -> list[np.ndarray]:
        gates = {site: like.new_zeros(len(rows), count).requires_grad_() for site, count in counts.items()}
        edits = []
        for tower in range(len(inputs.towers)):
            with torch.no_grad():
                other = model.map.run(inputs.batch(tower, rows, PERTURBED), record=list(counts)).values
            edits.append({site: _towards(other[site], gates[site]) for site in counts})
        scores = model.run(inputs, rows, edits=edits)
        # The effects themselves: the derivative along the way from a to a′, at a.
        effects = torch.autograd.grad(scores.sum(), list(gates.values()), allow_unused=True, materialize_grads=True)
        return [np.abs(as_numpy(effect)).sum(0, dtype=np.float64) for effect in effects]

    sums = [np.zeros(count) for count in counts.values()]
    for _, effects in with_gradients(model, inputs.lengths, step, verbose=model.verbose):
        sums = [total + values for total, values in zip(sums, effects, strict=True)]
    return [total / len(frame) for total in sums]


def _towards(other: torch.Tensor, gates: torch.Tensor) -> Edit:
    """Returns the edit that moves neurons towards other activations by gates [rows, neurons]."""
    return lambda a: a + gates.unsqueeze(1) * (other - a.detach())
