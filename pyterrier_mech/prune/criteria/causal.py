"""Criteria from interventions: conductance along a line of inputs, and patching with a second version of each text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyterrier as pt
import torch
from torch import nn

from pyterrier_mech.anatomy.encoder import Encoder, Layer, hooked
from pyterrier_mech.attribute.lines import check_baseline, lines
from pyterrier_mech.attribute.path import Rule, integrate
from pyterrier_mech.attribute.points import GRAPH
from pyterrier_mech.attribute.stage import row_names
from pyterrier_mech.inputs.batching import in_batches
from pyterrier_mech.patch.heads import PatchHeads
from pyterrier_mech.patch.interventions import columns_of, recorded
from pyterrier_mech.patch.pairs import Pairs, two_versions
from pyterrier_mech.patch.runs import side_inputs
from pyterrier_mech.perturb.stage import Perturb
from pyterrier_mech.prune.data import FitData
from pyterrier_mech.prune.protocol import check_needs, sample
from pyterrier_mech.prune.scores import UnitScores
from pyterrier_mech.rankers.ranker import Ranker, as_numpy
from pyterrier_mech.units import Units

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
        seed: Of that draw.

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

    def scores(self, model: Ranker, data: FitData) -> UnitScores:
        """Scores every unit of a ranker, in units of the score.

        Raises:
            ValueError: If a setting is not known, the data lacks texts, or a gradient is not finite.
        """
        rule = Rule('trapezoid', self.points, self.tolerance, self.max_points)
        rule.check()
        check_baseline(self.baseline)
        check_needs(self, data)
        some = sample(data.plain, self.max_pairs, self.seed)
        with _counting(model.encoder) as count:
            heads, bad_heads = self._means(model, some, rule, 'heads')
            neurons, bad_neurons = self._means(model, some, rule, 'neurons')
        notes = {'pairs': len(some.frame), 'above_tolerance': max(bad_heads, bad_neurons)}
        passes = 3 * count() / (len(data.frame) * len(model.towers))
        return UnitScores(heads, neurons, passes=passes, notes=notes).check(model)

    def _means(self, model: Ranker, data: FitData, rule: Rule, site: str) -> tuple[list[np.ndarray], int]:
        """Returns the means of one kind of unit, and how many rows stay above the tolerance."""
        layers = model.encoder.layers
        widths = [(layer.n_heads, layer.head_dim) if site == 'heads' else (layer.n_neurons, 1) for layer in layers]

        def reduce(line: Any, integrals: list[torch.Tensor]) -> list[np.ndarray]:
            units = [total.sum(0).reshape(shape).sum(1).abs() for total, shape in zip(integrals, widths, strict=True)]
            return [as_numpy(values) for values in units]

        sums = [np.zeros(count) for count, _ in widths]
        above = 0
        for result in integrate(
            model,
            lines(model, data.queries, data.texts, self.baseline, row_names(data.frame)),
            site=site,
            rule=rule,
            reduce=reduce,
            budget=model.loaded.budget,
            verbose=model.verbose,
            desc=f'conductance of {site}',
        ):
            above += result.error > rule.tolerance
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
        seed: Of that draw.

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

    def scores(self, model: Ranker, data: FitData) -> UnitScores:
        """Scores every unit of a ranker, in units of the score.

        Raises:
            ValueError: If the data lacks what is needed, or no pair can be patched.
        """
        check_needs(self, data)
        some = sample(data, self.max_pairs, self.seed)
        frame, unpatchable = patchable(model, two_versions_of(some, self.perturbation))
        heads = mean_effects(model, patch_stage(model).transform(frame))
        neurons = _neurons(model, frame)
        notes = {'pairs': len(frame), 'unpatchable': unpatchable}
        # Both sides for the heads and one after another for the neurons, with gradients on one.
        passes = (2 + variants(model) + 4) * len(frame) / len(data.frame)
        return UnitScores(heads, neurons, passes=passes, notes=notes).check(model)


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
    pairs = Pairs(model, *two_versions(frame, patch_stage(model), 'text'), 'a')
    reasons = pd.Series([pairs.problems[row] for row in pairs.rest], dtype=object).value_counts()
    unpatchable = {str(reason): int(count) for reason, count in reasons.items()}
    if not len(pairs.good):
        raise ValueError(
            f'none of the {len(frame)} pairs can be patched ({unpatchable}): give a perturbation that changes what '
            f'{model!r} reads of these texts'
        )
    return frame.iloc[pairs.good].reset_index(drop=True), unpatchable


def mean_effects(model: Ranker, frame: pd.DataFrame) -> list[np.ndarray]:
    """Returns the mean absolute effect of every head, layer by layer, from the columns of a stage."""
    return [
        np.asarray([frame[f'L{layer}H{head}'].abs().astype(float).mean() for head in range(count)], dtype=np.float64)
        for layer, count in enumerate(model.head_counts)
    ]


def variants(model: Ranker) -> float:
    """Returns about how many forward runs a pair it takes to replace every head once.

    Where the family is described, a run begins at the layer of its head.
    """
    n_layers, described = model.n_layers, model.encoder.family.described
    return sum(
        count * ((n_layers - i - 0.5) / n_layers if described else 1) for i, count in enumerate(model.head_counts)
    )


def _neurons(model: Ranker, frame: pd.DataFrame) -> list[np.ndarray]:
    """Returns the mean absolute attribution patching effect of every neuron, layer by layer."""
    encoder = model.encoder
    counts = [layer.n_neurons for layer in encoder.layers]
    pairs = Pairs(model, *two_versions(frame, patch_stage(model), 'text'), 'a')
    columns = columns_of(encoder, Units(neurons=Units.all(model).neurons))
    like = next(encoder.module.parameters())
    segments = model.loaded.maker.uses_segments

    def step(batch: np.ndarray) -> list[np.ndarray]:
        gates = [like.new_zeros(len(batch), count).requires_grad_() for count in counts]
        vectors = []
        for tower in pairs.picked(batch):
            inputs = [side_inputs(encoder, tower, side, segments) for side in ('original', 'perturbed')]
            with model.computing():
                other = recorded(encoder, inputs[1], columns)
            with ExitStack() as hooks:
                for i, layer in enumerate(encoder.layers):
                    if ('neurons', i) in other:
                        hooks.enter_context(_towards(layer, other['neurons', i], gates[i]))
                vectors.append(encoder.pooled(inputs[0], model.pooling_))
        scores = model.read(vectors)
        # The effects themselves: the derivative along the way from a to a′, at a.
        effects = torch.autograd.grad(scores.sum(), gates, allow_unused=True, materialize_grads=True)
        return [np.abs(as_numpy(effect)) for effect in effects]

    sums = [np.zeros(count) for count in counts]
    with model.computing(gradients=True):
        for _, effects in in_batches(
            GRAPH * pairs.tokens(), model.loaded.budget, step, verbose=model.verbose, desc='neurons'
        ):
            for total, values in zip(sums, effects, strict=True):
                total += values.sum(0, dtype=np.float64)
    return [total / len(frame) for total in sums]


@contextmanager
def _towards(layer: Layer, other: torch.Tensor, gates: torch.Tensor) -> Iterator[None]:
    """Moves a layer's neurons towards other activations by gates [rows, neurons], for the length of the block."""

    def pre(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # The last layer may work for the first token alone.
        a, target = args[0], other[:, : args[0].shape[1]]
        return (a + gates.unsqueeze(1) * (target - a.detach()), *args[1:]), kwargs

    with hooked(layer.mlp_out, pre=pre):
        yield


@contextmanager
def _counting(encoder: Encoder) -> Iterator[Callable[[], int]]:
    """Counts the rows of all forwards in the block; yields a function that returns how many there were."""
    seen = [0]

    def pre(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[0] += len(args[0] if args else kwargs['hidden_states'])

    with hooked(encoder.layers[0].module, pre=pre):
        yield lambda: seen[0]
