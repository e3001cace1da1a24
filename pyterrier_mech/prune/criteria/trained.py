"""Criteria that train: gates that learn to close, and weights that move away from zero."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyterrier as pt
import torch
import torch.nn.functional as F

from pyterrier_mech.inputs.inputs import Inputs
from pyterrier_mech.prune.criteria.basic import head_weights, neuron_weights
from pyterrier_mech.prune.criteria.gates import PASSES, gating, with_gradients
from pyterrier_mech.prune.data import FitData, drawn_order, take
from pyterrier_mech.prune.plans.costs import flop_costs
from pyterrier_mech.prune.protocol import above_zero, at_least, check_logits, check_share, check_step
from pyterrier_mech.prune.scores import UnitScores
from pyterrier_mech.prune.surgery import check_weights
from pyterrier_mech.rankers.ranker import Ranker, as_numpy

Tensors = list[torch.Tensor]

# The hard concrete distribution of Louizos et al.: temperature, and the interval that it is stretched to.
_BETA, _LOW, _HIGH = 2 / 3, -0.1, 1.1
_SHIFT = _BETA * math.log(-_LOW / _HIGH)
# Nearly open: a gate is shut with probability 0.03 at first.
_START = 2.0
# Uniform noise keeps off the ends, where its logit is infinite.
_EDGE = 1e-6


@dataclass(frozen=True)
class L0:
    """What learned gates keep: the probability that a unit's hard concrete gate is open after training.

    Every head and neuron gets a stochastic gate with its own parameter log α; the weights are frozen. Training
    minimises the squared error to the scores of the unpruned ranker, divided by their variance, plus
    λ₁(k − k*) + λ₂(k − k*)², with k the expected share of the operations that is kept and k* falling from 1 to `target`
    over the first half of the steps; λ₁ and λ₂ rise with the violation (augmented Lagrangian). log α and the λ have
    Adam. No labels are needed.

    The score is P(gate > 0) = σ(log α − β·log(−γ/ζ)), which orders units as log α does. Training has weighed heads
    and neurons against each other with their costs; so that a plan does not count costs twice, they are not joint.

    Args:
        steps: Steps of the optimizer.
        learning_rate: Step size of Adam, for log α and λ.
        target: The share of the operations of the layers that is to be kept.
        batch_pairs: Pairs of a step.
        seed: Random seed of the draw of pairs and of the noise. Neither depends on row order or `batch_tokens`.

    Source: Louizos, Welling, Kingma, ICLR 2018, arXiv 1712.01312; the Lagrangian: Wang, Wohlwend, Lei, EMNLP 2020,
    arXiv 1910.04732.
    """

    needs: ClassVar[frozenset[str]] = frozenset({'text'})

    steps: int = 200
    learning_rate: float = 0.1
    target: float = 0.5
    batch_pairs: int = 16
    seed: int = 0

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: If one is out of range.
        """
        at_least(1, self, 'steps', 'batch_pairs')
        above_zero(self, 'learning_rate')
        check_share('target', self.target, 'To keep half give 0.5.')

    def scores(self, model: Ranker, data: FitData) -> UnitScores:
        """Scores every unit of a ranker by the probability that its gate is open.

        Raises:
            ValueError: If a setting is out of range, or the data lacks texts.
        """
        check_step(self, data)
        data = data.plain
        chosen = drawn_order(data, self.seed)[: self.steps * self.batch_pairs]
        some = take(data, chosen)
        alphas, share = self._train(model, some)
        kept = [as_numpy(torch.sigmoid(alpha.double() - _SHIFT)) for alpha in alphas]
        passes = (len(chosen) + PASSES * self.steps * min(self.batch_pairs, len(chosen))) / len(data.frame)
        notes = {'kept': share, 'pairs': len(chosen)}
        return UnitScores(kept[: model.n_layers], kept[model.n_layers :], passes=passes, notes=notes).check(model)

    def _train(self, model: Ranker, data: FitData) -> tuple[Tensors, float]:
        """Returns log α of the heads and then of the neurons, layer by layer, and the expected share that is kept."""
        dense = torch.from_numpy(model.score(data.queries, data.texts)).to(model.map.device)
        variance = float(dense.double().var(correction=0)) or 1.0
        inputs = data.inputs(model)
        costs = _cost_shares(model, float(inputs.lengths.mean()))
        alphas = [torch.full_like(cost, _START).requires_grad_() for cost in costs]
        multipliers = torch.zeros(2, device=model.map.device, requires_grad=True)
        optimizer = torch.optim.Adam(alphas, lr=self.learning_rate)
        ascent = torch.optim.Adam([multipliers], lr=self.learning_rate, maximize=True)
        generator = torch.Generator().manual_seed(self.seed)
        for step in pt.tqdm(range(self.steps), desc='L0', disable=not model.verbose):
            rows = _turn(len(dense), self.batch_pairs, step)
            noise = [_noise(len(rows), alpha, generator) for alpha in alphas]

            def error(part: np.ndarray, rows: np.ndarray = rows, noise: Tensors = noise) -> torch.Tensor:
                gates = [_gate(alpha, uniform[part]) for alpha, uniform in zip(alphas, noise, strict=True)]
                scores = model.run(inputs, rows[part], edits=gating(model, gates))
                return (scores - dense[rows[part]]).double().square().sum() / (len(rows) * variance)

            gradients = _gradients(model, inputs.lengths[rows], alphas, error)
            wanted = 1 - (1 - self.target) * min(1.0, 2 * (step + 1) / self.steps)
            with torch.enable_grad():
                excess = _expected(alphas, costs) - wanted
                penalty = multipliers[0] * excess + multipliers[1] * excess.square()
            *of_penalty, upwards = torch.autograd.grad(penalty, [*alphas, multipliers])
            for alpha, gradient, more in zip(alphas, gradients, of_penalty, strict=True):
                alpha.grad = gradient + more
            multipliers.grad = upwards
            optimizer.step()
            ascent.step()
        return [alpha.detach() for alpha in alphas], float(_expected(alphas, costs).detach())


@dataclass(frozen=True)
class Movement:
    """Whether fine-tuning moves a unit's weights away from zero: −Σ w·∂L/∂w over its weights and all steps.

    A copy of the ranker is fine-tuned on the judgements by Adam, dropout off. Each step draws queries and, of each, two
    judged texts with different labels; the loss is log(1 + exp(s_lower − s_higher)). Weights that grow count for a
    unit, weights that shrink against it. What the weights of a unit are, `Magnitude` says; a unit with more of them
    sums over more, so heads and neurons are not joint.

    Args:
        steps: Steps of the optimizer. The gradient of each is taken before the step.
        learning_rate: Step size of Adam.
        batch_pairs: Pairs of texts of a step.
        seed: Random seed of the draw of queries and texts, which does not depend on row order or `batch_tokens`.

    Source: Sanh, Wolf, Rush, NeurIPS 2020, arXiv 2005.07683; there the score also masks the weights in training, here
    the weights stay whole.
    """

    needs: ClassVar[frozenset[str]] = frozenset({'text', 'qrels'})
    logistic: ClassVar[bool] = True

    steps: int = 100
    learning_rate: float = 2e-5
    batch_pairs: int = 8
    seed: int = 0

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: If one is out of range.
        """
        at_least(1, self, 'steps', 'batch_pairs')
        above_zero(self, 'learning_rate')

    def scores(self, model: Ranker, data: FitData) -> UnitScores:
        """Scores every unit of a ranker; the copy is thrown away.

        Raises:
            ValueError: If a setting is out of range, the data lacks texts or judgements, no query has two texts with
                different labels, the scores are probabilities, or the ranker's linear maps do not hold its weights.
        """
        check_step(self, data)
        check_logits(self, model)
        check_weights(model)
        data = data.plain
        contrasts = _contrasts(data, drawn_order(data, self.seed))
        pairs = _draw_pairs(contrasts, self.steps * self.batch_pairs, self.seed)
        rows, places = np.unique(pairs, return_inverse=True)
        pairs = places.reshape(pairs.shape)
        some = take(data, rows)
        twin = _twin(model)
        inputs, parameters = some.inputs(twin), list(twin.map.module.parameters())
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)
        layers = twin.map.layers
        heads, neurons = [np.zeros(layer.n_heads) for layer in layers], [np.zeros(layer.n_neurons) for layer in layers]
        for step in pt.tqdm(range(self.steps), desc='Movement', disable=not model.verbose):
            _set_gradients(twin, inputs, pairs[step * self.batch_pairs : (step + 1) * self.batch_pairs], parameters)
            for i, layer in enumerate(layers):
                heads[i] += _summed(head_weights(layer, _movement))
                neurons[i] += _summed(neuron_weights(layer, _movement))
            optimizer.step()
        notes = {'queries': len(contrasts)}
        return UnitScores(heads, neurons, passes=2 * PASSES * len(pairs) / len(data.frame), notes=notes).check(model)


def _turn(n_rows: int, size: int, step: int) -> np.ndarray:
    """Returns the rows of a step: the next ones, round and round."""
    size = min(size, n_rows)
    return (step * size + np.arange(size)) % n_rows


# -- gates


def _cost_shares(model: Ranker, tokens: float) -> Tensors:
    """Returns the share of every unit in the operations of the layers: heads, then neurons, layer by layer."""
    costs = flop_costs(model, tokens)
    dtype = torch.promote_types(model.map.dtype, torch.float32)
    return [
        torch.as_tensor(np.diff(layer) / (costs.whole - costs.fixed), dtype=dtype, device=model.map.device)
        for layer in [*costs.heads, *costs.neurons]
    ]


def _noise(n_rows: int, alpha: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns uniform noise [rows, units], the same on every device."""
    uniform = torch.rand(n_rows, len(alpha), generator=generator, dtype=torch.float64)
    return uniform.clamp(_EDGE, 1 - _EDGE).to(alpha)


def _gate(alpha: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    concrete = torch.sigmoid((uniform.log() - (-uniform).log1p() + alpha) / _BETA)
    return (concrete * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def _expected(alphas: Tensors, costs: Tensors) -> torch.Tensor:
    """Returns the expected share of the operations that is kept."""
    kept = [(cost * torch.sigmoid(alpha - _SHIFT)).sum() for alpha, cost in zip(alphas, costs, strict=True)]
    return torch.stack(kept).sum()


def _gradients(
    model: Ranker, lengths: np.ndarray, wanted: Tensors, loss: Callable[[np.ndarray], torch.Tensor]
) -> Tensors:
    """Returns the gradients of a loss that is a sum over rows, by some tensors, summed over batches."""

    def step(part: np.ndarray) -> Tensors:
        return list(torch.autograd.grad(loss(part), wanted, allow_unused=True, materialize_grads=True))

    total: Tensors = []
    for _, found in with_gradients(model, lengths, step, verbose=False):
        total = [a + b for a, b in zip(total, found, strict=True)] if total else found
    return total


# -- movement


def _contrasts(data: FitData, order: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns rows and labels of every query that has judged texts with different labels, in the order of `order`."""
    labels = data.labels().to_numpy()
    rows: dict[str, list[int]] = {}
    qids = data.frame['qid'].astype(str).tolist()
    for row in order.tolist():
        if not np.isnan(labels[row]):
            rows.setdefault(qids[row], []).append(row)
    contrasts = [(np.asarray(some), labels[some]) for some in rows.values() if np.ptp(labels[some]) > 0]
    if not contrasts:
        raise ValueError(
            f'none of the {len(set(qids))} queries has two texts with different labels, so nothing can be learned: '
            'fit on more texts a query, or on qrels that tell relevant texts from others'
        )
    return contrasts


def _draw_pairs(contrasts: list[tuple[np.ndarray, np.ndarray]], count: int, seed: int) -> np.ndarray:
    """Returns rows [pairs, 2], the one with the higher label first."""
    # Of the methods of Random only random() is promised to draw the same in every version of Python.
    draw = random.Random(seed).random
    pairs = np.empty((count, 2), dtype=np.int64)
    for pair in pairs:
        rows, labels = contrasts[int(draw() * len(contrasts))]
        first = int(draw() * len(rows))
        others = np.flatnonzero(labels != labels[first])
        second = others[int(draw() * len(others))]
        pair[:] = rows[[first, second] if labels[first] > labels[second] else [second, first]]
    return pairs


def _twin(model: Ranker) -> Ranker:
    """Returns a ranker with weights of its own, in float32 where they were of half precision."""
    module = model.map.copied().requires_grad_(True)
    return model.around(module.float() if model.map.dtype in (torch.float16, torch.bfloat16) else module)


def _set_gradients(twin: Ranker, inputs: Inputs, pairs: np.ndarray, parameters: Tensors) -> None:
    """Sets the gradients of the pairwise logistic loss of some pairs of rows."""

    def loss(part: np.ndarray) -> torch.Tensor:
        higher, lower = twin.run(inputs, pairs[part].T.ravel()).chunk(2)
        return F.softplus(lower - higher).sum() / len(pairs)

    gradients = _gradients(twin, inputs.lengths[pairs].max(1) * 2, parameters, loss)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def _movement(parameter: torch.Tensor) -> torch.Tensor:
    return -parameter.detach() * parameter.grad  # type: ignore[operator]


def _summed(parts: Tensors) -> np.ndarray:
    """Returns the sum over each unit's weights, from matrices [units, weights of a unit]."""
    return as_numpy(torch.stack([part.double().sum(1) for part in parts]).sum(0))
