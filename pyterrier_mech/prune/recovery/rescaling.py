"""Least squares after surgery: what is left of a layer is fitted to what the whole layer gave, without labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from pyterrier_mech.anatomy.layers import Context, Layer
from pyterrier_mech.inputs.batching import in_batches
from pyterrier_mech.inputs.inputs import Inputs
from pyterrier_mech.prune.data import FitData, sample
from pyterrier_mech.prune.protocol import above_zero, at_least
from pyterrier_mech.prune.surgery import check_prunable
from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.units import Site


@dataclass(frozen=True)
class Rescaling:
    """Fits the output projection of every sublayer to the unpruned ranker, from the first layer to the last.

    A sublayer adds W a + b to the residual stream, a being the outputs of its heads or its neurons. Where units are
    gone, W and b are chosen anew by ridge regression, so that the stream is what it was in the unpruned ranker:
    the target contains what earlier layers have missed. Kwon et al. fit one scale a unit; here every remaining
    unit's weights are free, which contains that. Tokens that nobody reads, padding and, where one token is read out,
    the others of the last layer, are left out. Where nothing is missing nothing changes.

    Args:
        max_pairs: How many rows are used, drawn evenly from the queries; None for all.
        ridge: Weight of the squared distance from the weights that surgery left, relative to the mean square of the
            inputs a.
        seed: Random seed of the draw.

    Source: Kwon et al., NeurIPS 2022, arXiv 2204.09656 (mask tuning).
    """

    max_pairs: int | None = 512
    ridge: float = 1e-3
    seed: int = 0

    needs: ClassVar[frozenset[str]] = frozenset({'text'})

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: If one is out of range.
        """
        at_least(1, self, 'max_pairs')
        above_zero(self, 'ridge')

    def recover(self, student: Ranker, teacher: Ranker, data: FitData, validation: FitData | None = None) -> None:
        """Changes the output projections of `student`, a ranker of its own, in place.

        Args:
            student: The pruned ranker.
            teacher: The ranker that it was made from.
            data: Rows to fit on; judgements are not looked at.
            validation: Not looked at.

        Raises:
            ValueError: If a setting is out of range, or units cannot be removed from the rankers.
        """
        self.check()
        check_prunable(teacher)
        check_prunable(student)
        inputs = sample(data, self.max_pairs, self.seed).inputs(teacher)
        with teacher.computing(), student.computing():
            streams = [stream for tower in range(len(inputs.towers)) for stream in _streams(teacher, inputs, tower)]
            for number, (whole, small) in enumerate(zip(teacher.map.layers, student.map.layers, strict=True)):
                if number == teacher.n_layers - 1:
                    for stream in streams:
                        stream.leave_out_unread()
                _fit_layer(whole, small, streams, number, self.ridge)


@dataclass
class _Stream:
    """A batch on its way through both rankers.

    Attributes:
        whole: The residual stream of the unpruned ranker [rows, tokens, d].
        small: That of the pruned one.
        contexts: What each layer is given beside it.
        real: The tokens that are fitted [rows, tokens].
        at: The position of the only token that is read out, or None.
    """

    whole: torch.Tensor
    small: torch.Tensor
    contexts: list[Context]
    real: torch.Tensor
    at: torch.Tensor | int | None

    def leave_out_unread(self) -> None:
        """Has the last layer fitted for what is read out alone."""
        if self.at is not None:
            self.real = torch.zeros_like(self.real)
            self.real[torch.arange(len(self.real), device=self.real.device), self.at] = True


def _streams(teacher: Ranker, inputs: Inputs, tower: int) -> list[_Stream]:
    def step(rows: np.ndarray) -> _Stream:
        batch, first = inputs.batch(tower, rows), Site('resid_pre', 0)
        run = teacher.map.run(batch, record=[first], contexts=True)
        x, real = run.values[first], batch.tensors['attention_mask'].bool()
        return _Stream(x, x, run.contexts, real, teacher.readout.at(batch.scored))

    lengths, verbose = inputs.towers[tower].lengths, teacher.verbose
    return [found for _, found in in_batches(lengths, teacher.budget, step, verbose=verbose, desc='Rescaling')]


def _fit_layer(whole: Layer, small: Layer, streams: list[_Stream], number: int, ridge: float) -> None:
    """Fits both projections of a layer and moves the streams past it."""
    fit = _Fit(small.attention_out, ridge)
    heads = []
    for stream in streams:
        context = stream.contexts[number]
        heads.append(small.z(stream.small, context))
        target = stream.whole + whole.attention_out(whole.z(stream.whole, context))
        fit.add(heads[-1], target - stream.small, stream.real)
        stream.whole = whole.part('norm_attention')(target)
    fit.solve()
    for stream, z in zip(streams, heads, strict=True):
        stream.small = small.part('norm_attention')(stream.small + small.attention_out(z))
    fit = _Fit(small.mlp_out, ridge)
    for stream in streams:
        target = stream.whole + whole.mlp(stream.whole)
        fit.add(small.activate(small.mlp_in(stream.small)), target - stream.small, stream.real)
        stream.whole = whole.part('norm_mlp')(target)
    fit.solve()
    for stream in streams:
        # Neurons are computed twice: those of all batches at once would be most of the memory.
        stream.small = small.part('norm_mlp')(stream.small + small.mlp(stream.small))


class _Fit:
    """Ridge regression of a linear map towards its present weights, from sums over batches, in float64."""

    def __init__(self, linear: nn.Linear, ridge: float):
        self.linear, self.ridge = linear, ridge
        width = linear.in_features + 1
        options: dict[str, Any] = {'dtype': torch.float64, 'device': linear.weight.device}
        self.gram = torch.zeros(width, width, **options)
        self.cross = torch.zeros(width, linear.out_features, **options)

    def add(self, inputs: torch.Tensor, targets: torch.Tensor, real: torch.Tensor) -> None:
        """Adds the tokens of a batch."""
        a, y = inputs[real].double(), targets[real].double()
        a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
        self.gram += a.T @ a
        self.cross += a.T @ y

    def solve(self) -> None:
        """Puts the solution into the map."""
        linear = self.linear
        old = torch.cat([linear.weight, linear.bias[:, None]], dim=1).double().T
        weight = self.ridge * self.gram.diagonal().mean()
        eye = torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device)
        new = old + torch.linalg.solve(self.gram + weight * eye, self.cross - self.gram @ old)
        linear.weight.copy_(new[:-1].T)
        linear.bias.copy_(new[-1])
