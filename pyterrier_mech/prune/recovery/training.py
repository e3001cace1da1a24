"""The loop behind the recoveries that train: batches by seed, early stopping, and checkpoints that survive a kill."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyterrier as pt
import torch
from torch import nn

from pyterrier_mech.draws import digest
from pyterrier_mech.prune.data import FitData
from pyterrier_mech.prune.protocol import above_zero, at_least
from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.saving import write_atomic

Loss = Callable[[np.ndarray, np.ndarray], torch.Tensor]
"""From the rows of a batch and the group of each row to a loss with its graph."""
Validate = Callable[[], float] | None
"""Tells what is to become small, if there is validation data."""


@dataclass(frozen=True)
class Schedule:
    """How a ranker is trained: what the recoveries that train share.

    Attributes:
        epochs: How often the data is gone through.
        learning_rate: Highest step size of AdamW; it rises over the first tenth of the steps and falls to 0.
        texts_per_query: Texts of one query that are compared with each other.
        queries_per_batch: Such groups in a batch.
        patience: Validations without improvement after which training ends; the best weights are kept in any case.
        validations: How often an epoch is validated; at most after every step.
        keep_zeros: Whether weights that are zero stay zero (for unstructured masks).
        seed: Random seed of the order of the data, and of what else is drawn.
        checkpoint: File in which progress is kept; a killed run with the same settings and data goes on from it and
            ends as if it had not been. It is deleted at the end.
        checkpoint_every: Steps between two writes.
    """

    epochs: int
    learning_rate: float
    texts_per_query: int = 8
    queries_per_batch: int = 4
    patience: int = 3
    validations: int = 1
    keep_zeros: bool = False
    seed: int = 0
    checkpoint: str | None = None
    checkpoint_every: int = 100

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: If one is out of range.
        """
        at_least(1, self, 'epochs', 'queries_per_batch', 'patience', 'validations', 'checkpoint_every')
        at_least(2, self, 'texts_per_query')
        above_zero(self, 'learning_rate')


def check_comparable(data: FitData) -> None:
    """Checks that there are texts to compare.

    Raises:
        ValueError: If no query has two rows.
    """
    qids = data.frame['qid'].astype(str)
    if not qids.duplicated().any():
        raise ValueError(f'none of the {len(qids)} queries has two texts to compare: retrieve more')


def groups(data: FitData, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Returns groups of rows of one query each, in a random order that seed, epoch and content determine.

    A query's rows are spread over groups of nearly equal size, at most `size`, or three where two would leave one row
    alone; queries with one row have no group.
    """
    rng = np.random.default_rng([seed, epoch])
    keys = data.frame[['qid', 'docno', 'text']].astype(str).reset_index(drop=True)
    order = keys.sort_values(['qid', 'docno', 'text']).index.to_numpy()
    made = []
    for _, rows in keys.loc[order].groupby('qid', sort=True):
        if len(rows) > 1:
            mixed = rng.permutation(rows.index.to_numpy())
            made += np.array_split(mixed, min(-(-len(mixed) // size), len(mixed) // 2))
    return [made[i] for i in rng.permutation(len(made))]


def batches(data: FitData, schedule: Schedule) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the rows of every batch of every epoch, and which group each row is of."""
    for epoch in range(schedule.epochs):
        made = groups(data, schedule.texts_per_query, schedule.seed, epoch)
        for start in range(0, len(made), schedule.queries_per_batch):
            batch = made[start : start + schedule.queries_per_batch]
            yield np.concatenate(batch), np.repeat(np.arange(len(batch)), list(map(len, batch)))


def train(
    student: Ranker, data: FitData, loss: Loss, validate: Validate, schedule: Schedule, identity: object = ''
) -> pd.DataFrame:
    """Trains a ranker's layers and head in place; embeddings stay, dropout is off.

    Weights are trained whether or not they require gradients; which do, and what gradients they hold, is afterwards
    as it was.

    Args:
        student: The ranker; its module is changed.
        data: The rows.
        loss: Of a batch.
        validate: What is to become small, if there is validation data. The weights that gave the least are kept, be
            they those from before training.
        schedule: How.
        identity: What else determines the result, in plain values, for the checkpoint.

    Returns:
        The history, one row whenever validation is due: `step`, `loss` (mean since the row before), `validation` (NaN
        without validation data).

    Raises:
        ValueError: If no query has two rows, the loss or its gradient is not finite, or the checkpoint is of another
            run or none.
    """
    check_comparable(data)
    plan = list(batches(data, schedule))
    parameters = trainable(student.map.module, student.map.base.get_input_embeddings())
    # Where and how often progress is written does not change the result.
    settings = repr(replace(schedule, checkpoint=None, checkpoint_every=1))
    run = _Run(parameters, schedule, len(plan), digest(settings, name_of(data.frame), identity).hex())
    count = schedule.epochs * schedule.validations
    due = {round(len(plan) * (i + 1) / count) for i in range(count)}
    shown = {'desc': type(schedule).__name__, 'unit': 'step', 'disable': not student.verbose}
    with (
        student.computing(gradients=True),
        _requiring(student.map.module, parameters),
        pt.tqdm(total=len(plan), initial=run.step, **shown) as bar,
    ):
        if run.step == 0 and validate is not None:
            # Training that only harms then changes nothing.
            run.note(validate)
        while run.step < len(plan) and run.stale < schedule.patience:
            value = run.advance(loss(*plan[run.step]))
            bar.update(1)
            bar.set_postfix(loss=f'{value:.4g}')
            if run.step in due:
                run.note(validate)
            if schedule.checkpoint is not None and run.step % schedule.checkpoint_every == 0:
                run.save()
    run.finish(validate is not None)
    return pd.DataFrame(run.history, columns=['step', 'loss', 'validation'])


def trainable(module: nn.Module, embeddings: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that training changes, by name: all that do not make the embeddings."""
    frozen = {id(p) for p in embeddings.parameters()}
    # ELECTRA widens its embeddings in a module beside them, 'embeddings_project'.
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if id(parameter) not in frozen and not any(part.startswith('embeddings') for part in name.split('.'))
    }


@contextmanager
def _requiring(module: nn.Module, wanted: Collection[str]) -> Iterator[None]:
    """Has the named parameters, and no others, require gradients in the block."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in module.parameters()]
    try:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in wanted)
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


class _Run:
    """Weights, optimiser and history on their way."""

    def __init__(self, parameters: dict[str, nn.Parameter], schedule: Schedule, total: int, key: str):
        self.parameters, self.schedule, self.key = parameters, schedule, key
        self.zeros = {n: p == 0 for n, p in self.parameters.items() if schedule.keep_zeros and p.dim() > 1}
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
        value = loss.item()
        gradients = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        for (name, parameter), gradient in zip(self.parameters.items(), gradients, strict=True):
            if gradient is not None and name in self.zeros:
                gradient = gradient.masked_fill(self.zeros[name], 0.0)
            parameter.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0).item()
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise ValueError(
                f'at step {self.step} the loss is {value} and its gradient has the norm {norm}: use a learning_rate '
                f"smaller than {self.schedule.learning_rate!r}, or dtype='float32' if the ranker's is narrower"
            )
        for group in self.optimizer.param_groups:
            group['lr'] = self.schedule.learning_rate * self.rates[self.step]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.losses.append(value)
        return value

    def note(self, validate: Validate) -> None:
        """Validates, and keeps the weights if they are the best so far."""
        value = float('nan')
        if validate is not None:
            with torch.no_grad():
                value = validate()
            self.stale += 1
            if value < self.best:
                self.best, self.stale, self.kept = value, 0, self._copy()
        self.history.append((self.step, float(np.mean(self.losses)) if self.losses else float('nan'), value))
        self.losses = []

    def finish(self, validated: bool) -> None:
        """Leaves the best weights in the module, or the last ones, and no checkpoint."""
        if validated:
            self._fill(self.kept)
        if self.schedule.checkpoint is not None:
            Path(self.schedule.checkpoint).unlink(missing_ok=True)

    def save(self) -> None:
        """Writes all that is needed to go on; the file is what it was before, or complete."""
        path = Path(str(self.schedule.checkpoint))
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: getattr(self, name) for name in _STATE}
        weights = {name: parameter.detach() for name, parameter in self.parameters.items()}
        file = io.BytesIO()
        torch.save(state | {'weights': weights, 'optimizer': self.optimizer.state_dict()}, file)
        write_atomic(path, file.getvalue())

    def _resume(self, path: Path) -> None:
        try:
            # The optimiser takes its state to the device itself, and wants its step counts on the CPU.
            state = torch.load(path, map_location='cpu', weights_only=True)
            key = state['key']
        except (EOFError, KeyError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
            raise ValueError(
                f'checkpoint must be a file that training wrote, or none yet; got {str(path)!r}: give another file, or '
                'delete it'
            ) from error
        if key != self.key:
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


def name_of(frame: pd.DataFrame) -> str:
    """Returns a name for the queries, texts and judgements in a frame, whatever the order of its rows."""
    names = [name for name in ('qid', 'query', 'docno', 'text', 'label') if name in frame.columns]
    return digest(*sorted(frame[names].astype(str).itertuples(index=False, name=None))).hex()
