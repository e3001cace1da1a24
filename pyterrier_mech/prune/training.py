"""The loop behind the recoveries that train: batches by seed, early stopping, and checkpoints that survive a kill."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyterrier as pt
import torch
from torch import nn

from pyterrier_mech.prune.data import FitData
from pyterrier_mech.rankers.ranker import Ranker

Loss = Callable[[np.ndarray, np.ndarray], torch.Tensor]
"""From the rows of a batch and the group of each row to a loss with its graph."""


@dataclass(frozen=True)
class Schedule:
    """How a ranker is trained.

    Attributes:
        epochs: How often the data is gone through.
        learning_rate: Highest step size of AdamW; it rises over the first tenth of the steps and falls to 0.
        texts_per_query: Texts of one query that are compared with each other.
        queries_per_batch: Such groups in a batch.
        patience: Validations without improvement after which training ends; the best weights are kept in any case.
        validations: How often an epoch is validated.
        seed: Of the order of the data.
        checkpoint: File in which progress is kept.
        checkpoint_every: Steps between two writes.
    """

    epochs: int
    learning_rate: float
    texts_per_query: int
    queries_per_batch: int
    patience: int
    validations: int
    seed: int
    checkpoint: str | None
    checkpoint_every: int

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: If one is out of range.
        """
        for name in ('epochs', 'queries_per_batch', 'patience', 'validations', 'checkpoint_every'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)!r} must be 1 or more')
        if self.texts_per_query < 2:
            raise ValueError(f'texts_per_query={self.texts_per_query!r} leaves nothing to compare; use 2 or more')
        if not self.learning_rate > 0:
            raise ValueError(f'learning_rate={self.learning_rate!r} is not positive')


def groups(data: FitData, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Returns groups of rows of one query each, in a random order that seed, epoch and content determine.

    A query's rows are spread over groups of nearly equal size, at most `size`; queries with one row have no group.
    """
    rng = np.random.default_rng([seed, epoch])
    keys = data.frame[['qid', 'docno', 'text']].astype(str)
    order = keys.sort_values(['qid', 'docno', 'text']).index.to_numpy()
    made = []
    for _, rows in keys.loc[order].groupby('qid', sort=True):
        if len(rows) > 1:
            mixed = rng.permutation(rows.index.to_numpy())
            made += [part for part in np.array_split(mixed, -(-len(mixed) // size)) if len(part) > 1]
    return [made[i] for i in rng.permutation(len(made))]


def batches(data: FitData, schedule: Schedule) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the rows of every batch of every epoch, and which group each row is of."""
    for epoch in range(schedule.epochs):
        made = groups(data, schedule.texts_per_query, schedule.seed, epoch)
        for start in range(0, len(made), schedule.queries_per_batch):
            batch = made[start : start + schedule.queries_per_batch]
            yield np.concatenate(batch), np.repeat(np.arange(len(batch)), list(map(len, batch)))


def train(
    student: Ranker,
    data: FitData,
    loss: Loss,
    validate: Callable[[], float] | None,
    schedule: Schedule,
    *,
    keep_zeros: bool = False,
    identity: str = '',
    desc: str = '',
) -> pd.DataFrame:
    """Trains a ranker's layers and head in place; embeddings stay, dropout is off.

    Args:
        student: The ranker; its module is changed.
        data: The rows.
        loss: Of a batch.
        validate: What is to become small, if there is validation data. The weights that gave the least are kept.
        schedule: How.
        keep_zeros: Whether weights that are zero now stay zero.
        identity: What else determines the result, for the checkpoint.
        desc: Label of the progress bar.

    Returns:
        The history, one row a validation (or the last step): `step`, `loss` (mean since the row before), `validation`.

    Raises:
        ValueError: If no query has two rows, the loss is not finite, or the checkpoint is of another run.
    """
    plan = list(batches(data, schedule))
    if not plan:
        raise ValueError(f'none of the {data.frame["qid"].nunique()} queries has two texts to compare: retrieve more')
    names = trainable(student.encoder.module, student.encoder.base.get_input_embeddings())
    run = _Run(student, names, schedule, len(plan), _key(schedule, data, identity), keep_zeros)
    every = max(1, len(plan) // (schedule.epochs * schedule.validations))
    with (
        student.computing(gradients=True),
        pt.tqdm(total=len(plan), initial=run.step, desc=desc, unit='step', disable=not student.verbose) as bar,
    ):
        while run.step < len(plan) and run.stale < schedule.patience:
            value = run.advance(loss(*plan[run.step]))
            bar.update(1)
            bar.set_postfix(loss=f'{value:.4g}')
            if run.step % every == 0 or run.step == len(plan):
                run.note(validate)
            if schedule.checkpoint is not None and run.step % schedule.checkpoint_every == 0:
                run.save()
    run.finish(validate is not None)
    return pd.DataFrame(run.history, columns=['step', 'loss', 'validation'])


def trainable(module: nn.Module, embeddings: nn.Module) -> list[str]:
    """Returns the names of the parameters that training changes: all that do not make the embeddings."""
    frozen = {id(p) for p in embeddings.parameters()}
    return [n for n, p in module.named_parameters() if id(p) not in frozen and 'embeddings.' not in n]


class _Run:
    """Weights, optimiser and history on their way."""

    def __init__(self, student: Ranker, names: list[str], schedule: Schedule, total: int, key: str, keep_zeros: bool):
        every = dict(student.encoder.module.named_parameters())
        self.parameters = {name: every[name] for name in names}
        self.schedule, self.key = schedule, key
        self.zeros = {n: p == 0 for n, p in self.parameters.items() if keep_zeros and p.dim() > 1}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=schedule.learning_rate, weight_decay=0.0)
        warm = max(1, total // 10)
        self.rates = [min((i + 1) / warm, (total - i) / max(1, total - warm)) for i in range(total)]
        self.step, self.stale, self.best = 0, 0, float('inf')
        self.history: list[tuple[int, float, float]] = []
        self.losses: list[float] = []
        self.kept = self._copy()
        if schedule.checkpoint is not None and Path(schedule.checkpoint).exists():
            self._resume(Path(schedule.checkpoint))

    def advance(self, loss: torch.Tensor) -> float:
        """Takes one step down a loss."""
        if not torch.isfinite(loss):
            raise ValueError(f'the loss is {loss.item()} at step {self.step}: use a smaller learning_rate')
        gradients = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        for (name, parameter), gradient in zip(self.parameters.items(), gradients, strict=True):
            if gradient is not None and name in self.zeros:
                gradient = gradient.masked_fill(self.zeros[name], 0.0)
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for group in self.optimizer.param_groups:
            group['lr'] = self.schedule.learning_rate * self.rates[self.step]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.losses.append(loss.item())
        return self.losses[-1]

    def note(self, validate: Callable[[], float] | None) -> None:
        """Validates, and keeps the weights if they are the best so far."""
        value = float('nan')
        if validate is not None:
            with torch.no_grad():
                value = validate()
            self.stale += 1
            if value < self.best:
                self.best, self.stale, self.kept = value, 0, self._copy()
        self.history.append((self.step, float(np.mean(self.losses)), value))
        self.losses = []

    def finish(self, validated: bool) -> None:
        """Leaves the best weights in the module, or the last ones, and no checkpoint."""
        if validated:
            self._fill(self.kept)
        if self.schedule.checkpoint is not None:
            Path(self.schedule.checkpoint).unlink(missing_ok=True)

    def save(self) -> None:
        """Writes all that is needed to go on; the file is complete or absent."""
        path = Path(str(self.schedule.checkpoint))
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f'.{path.name}.new')
        state = {name: getattr(self, name) for name in _STATE}
        torch.save(state | {'weights': self._copy(), 'optimizer': self.optimizer.state_dict()}, new)
        os.replace(new, path)

    def _resume(self, path: Path) -> None:
        device = next(iter(self.parameters.values())).device
        state = torch.load(path, map_location=device, weights_only=True)
        if state['key'] != self.key:
            raise ValueError(
                f'{str(path)!r} is the checkpoint of another run (other settings, data, or model): give another file, '
                'or delete it'
            )
        for name in _STATE:
            setattr(self, name, state[name])
        self._fill(state['weights'])
        self.optimizer.load_state_dict(state['optimizer'])

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def _fill(self, weights: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])


_STATE = ('key', 'step', 'stale', 'best', 'history', 'losses', 'kept')


def _key(schedule: Schedule, data: FitData, identity: str) -> str:
    """Returns a name for all that determines the result."""
    digest = hashlib.sha256(repr((schedule, identity)).encode())
    for row in data.frame[['qid', 'query', 'docno', 'text']].astype(str).itertuples(index=False):
        digest.update(repr(tuple(row)).encode())
    return digest.hexdigest()
