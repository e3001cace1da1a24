"""Least squares after surgery: what is left of a layer is fitted to what the whole layer gave, without labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from pyterrier_mech.anatomy.encoder import Context, Layer
from pyterrier_mech.anatomy.resizing import check_resizable
from pyterrier_mech.inputs.batching import in_batches
from pyterrier_mech.prune.data import FitData
from pyterrier_mech.prune.encoded import Encoded
from pyterrier_mech.prune.protocol import sample
from pyterrier_mech.rankers.ranker import Ranker


@dataclass(frozen=True)
class Rescaling:
    """Fits the output projection of every sublayer to the unpruned ranker, from the first layer to the last.

    A sublayer adds W a + b to the residual stream, a being the outputs of its heads or its neurons. Where units are
    gone, W and b are chosen anew by ridge regression, so that the stream is what it was in the unpruned ranker:
    the target contains what earlier layers have missed. Kwon et al. fit one scale a unit; here every remaining
    unit's weights are free, which contains that. Tokens that nobody reads, padding and, where the first token is
    pooled, the others of the last layer, are left out. Where nothing is missing nothing changes.

    Args:
        max_pairs: How many rows are used, drawn evenly from the queries.
        ridge: Weight of the squared distance from the weights that surgery left, relative to the mean square of the
            inputs a.
        seed: Of the draw.

    Source: Kwon et al., NeurIPS 2022, arXiv 2204.09656 (mask tuning).
    """

    max_pairs: int = 512
    ridge: float = 1e-3
    seed: int = 0

    needs: ClassVar[frozenset[str]] = frozenset({'text'})

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: If one is out of range.
        """
        if self.max_pairs < 1 or not self.ridge > 0:
            raise ValueError(f'max_pairs={self.max_pairs!r} and ridge={self.ridge!r} must be positive')

    def recover(self, student: Ranker, teacher: Ranker, data: FitData, validation: FitData | None = None) -> None:
        """Changes the output projections of `student`, a ranker of its own, in place.

        Args:
            student: The pruned ranker.
            teacher: The ranker that it was made from.
            data: Rows to fit on; judgements are not looked at.
            validation: Not looked at.

        Raises:
            ValueError: If a setting is out of range, or no units of the family can be removed.
        """
        self.check()
        check_resizable(teacher.encoder.base.config.model_type)
        rows = sample(data, self.max_pairs, self.seed).frame
        encoded = Encoded.of(teacher, rows['query'].tolist(), rows['text'].tolist())
        first_only = teacher.pooling_ == 'cls'
        with teacher.computing(), student.computing():
            streams = [stream for tower in range(len(encoded.towers)) for stream in _streams(teacher, encoded, tower)]
            last = teacher.n_layers - 1
            for number, (whole, small) in enumerate(zip(teacher.encoder.layers, student.encoder.layers, strict=True)):
                _fit_layer(whole, small, streams, number, self.ridge, first_only and number == last)


@dataclass
class _Stream:
    """A batch on its way through both rankers.

    Attributes:
        whole: The residual stream of the unpruned ranker [rows, tokens, d].
        small: That of the pruned one.
        contexts: What each layer is given beside it.
        real: Where there is no padding [rows, tokens].
    """

    whole: torch.Tensor
    small: torch.Tensor
    contexts: list[Context]
    real: torch.Tensor


def _streams(teacher: Ranker, encoded: Encoded, tower: int) -> list[_Stream]:
    def step(rows: np.ndarray) -> _Stream:
        inputs = encoded.inputs(tower, rows)
        trace = teacher.encoder.trace(inputs)
        return _Stream(trace.x[0], trace.x[0], trace.contexts, inputs['attention_mask'].bool())

    lengths, verbose = encoded.lengths(tower), teacher.verbose
    return [found for _, found in in_batches(lengths, teacher.loaded.budget, step, verbose=verbose, desc='Rescaling')]


def _fit_layer(whole: Layer, small: Layer, streams: list[_Stream], number: int, ridge: float, first_only: bool) -> None:
    """Fits both projections of a layer and moves the streams past it."""
    fit = _Fit(small.attention_out, ridge)
    heads = []
    for stream in streams:
        context = stream.contexts[number]
        heads.append(small.z(stream.small, context))
        target = stream.whole + whole.attention_out(whole.z(stream.whole, context))
        fit.add(heads[-1], target - stream.small, stream.real, first_only)
        stream.whole = whole.norm_attention(target)
    fit.solve()
    for stream, z in zip(streams, heads, strict=True):
        stream.small = small.norm_attention(stream.small + small.attention_out(z))
    fit = _Fit(small.mlp_out, ridge)
    for stream in streams:
        target = stream.whole + whole.mlp(stream.whole)
        fit.add(small.activation(small.mlp_in(stream.small)), target - stream.small, stream.real, first_only)
        stream.whole = whole.norm_mlp(target)
    fit.solve()
    for stream in streams:
        # Neurons are computed twice: those of all batches at once would be most of the memory.
        stream.small = small.norm_mlp(stream.small + small.mlp(stream.small))


class _Fit:
    """Ridge regression of a linear map towards its present weights, from sums over batches, in float64."""

    def __init__(self, linear: nn.Linear, ridge: float):
        self.linear, self.ridge = linear, ridge
        width = linear.in_features + 1
        options: dict[str, Any] = {'dtype': torch.float64, 'device': linear.weight.device}
        self.gram = torch.zeros(width, width, **options)
        self.cross = torch.zeros(width, linear.out_features, **options)

    def add(self, inputs: torch.Tensor, targets: torch.Tensor, real: torch.Tensor, first_only: bool) -> None:
        """Adds the tokens of a batch, or the first ones alone where no other is read."""
        if first_only:
            inputs, targets, real = inputs[:, :1], targets[:, :1], real[:, :1]
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
