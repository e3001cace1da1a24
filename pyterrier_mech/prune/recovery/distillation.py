"""The recovery that trains on what the unpruned ranker says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch

from pyterrier_mech.anatomy.encoder import hooked
from pyterrier_mech.prune.data import FitData
from pyterrier_mech.prune.encoded import Encoded
from pyterrier_mech.prune.plans.plan import fingerprint
from pyterrier_mech.prune.protocol import sample, take
from pyterrier_mech.prune.recovery.training import Schedule, check_comparable, digest, train
from pyterrier_mech.rankers.ranker import Ranker

# More validation rows than this make training slower, not stops better.
_VALIDATED = 1000
# Fewer rows of a query than this say little of its margins: of more queries, some are left out.
_VALIDATED_PER_QUERY = 4


@dataclass(frozen=True)
class Distillation:
    """Trains the pruned ranker to order texts with the margins of the unpruned one; needs no labels.

    The loss is margin-MSE: over all pairs of texts of one query that a batch holds together, the mean squared
    difference between the student's and the teacher's difference of scores; and, weighted by `hidden`, the squared
    distance between their residual streams, which pruning leaves equally wide, relative to the squared size of the
    teacher's, mean over the layers. Texts of other queries join as negatives. Where there is validation data, the
    weights with the least margin error on it are kept.

    Args:
        epochs: How often the rows are gone through.
        learning_rate: Highest step size of AdamW.
        hidden: Weight of the residual streams; 0 leaves them out.
        negatives: How many texts of other queries each query is given, as a share of its own.
        texts_per_query: Texts of a query that are compared with each other.
        queries_per_batch: Queries of a batch.
        patience: Validations without improvement after which training ends.
        validations: How often an epoch is validated.
        keep_zeros: Whether weights that are zero stay zero (for unstructured masks).
        seed: Of the order of the data, the negatives, and the validation rows where there are too many for all.
        checkpoint: File in which progress is kept; a killed run with the same settings and data goes on from it and
            ends as if it had not been. It is deleted at the end.
        checkpoint_every: Steps between two writes.

    Source: Hofstätter et al. 2020, arXiv 2010.02666 (margin-MSE); Jiao et al., EMNLP Findings 2020, arXiv 1909.10351
    (hidden states).
    """

    epochs: int = 3
    learning_rate: float = 1e-4
    hidden: float = 5.0
    negatives: float = 0.25
    texts_per_query: int = 8
    queries_per_batch: int = 4
    patience: int = 3
    validations: int = 1
    keep_zeros: bool = False
    seed: int = 0
    checkpoint: str | None = None
    checkpoint_every: int = 100

    needs: ClassVar[frozenset[str]] = frozenset({'text'})

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: If one is out of range.
        """
        schedule_of(self)
        if self.hidden < 0 or self.negatives < 0:
            raise ValueError(f'hidden={self.hidden!r} and negatives={self.negatives!r} may not be negative')

    def recover(
        self, student: Ranker, teacher: Ranker, data: FitData, validation: FitData | None = None
    ) -> pd.DataFrame:
        """Trains `student` in place.

        Args:
            student: The pruned ranker.
            teacher: The ranker that it was made from.
            data: Rows to train on; judgements are not looked at.
            validation: Rows of other queries, for early stopping.

        Returns:
            The history: `step`, `loss`, `validation`; see `train`.

        Raises:
            ValueError: If a setting is out of range, there is nothing to compare, or the checkpoint is of another run.
        """
        self.check()
        schedule = schedule_of(self)
        checked = None if validation is None else _comparable(validation, self.seed)
        data = with_negatives(data, self.negatives, self.seed)
        check_comparable(data)
        encoded = Encoded.of(teacher, data.queries, data.texts)
        # Not before the first batch: a checkpoint that does not fit is refused before this work.
        targets = cache(lambda: _scores(teacher, data))
        streams = self.hidden > 0

        def loss(rows: np.ndarray, group: np.ndarray) -> torch.Tensor:
            scores, small = _run(student, encoded, rows, streams)
            value = margin_error(scores - targets()[rows], group)
            if streams:
                with teacher.computing():
                    whole = _run(teacher, encoded, rows, True)[1]
                value = value + self.hidden * _distance(small, whole, encoded, rows)
            return value

        return train(
            student,
            data,
            loss,
            None if checked is None else _margins(student, teacher, checked),
            schedule,
            keep_zeros=self.keep_zeros,
            identity=repr(
                (settings_of(self), identity_of(teacher), identity_of(student), checked and digest(checked.frame))
            ),
            desc='Distillation',
        )


def margin_error(errors: torch.Tensor, group: np.ndarray) -> torch.Tensor:
    """Returns the mean, over all pairs of rows of one group, of the squared difference of their errors: margin-MSE.

    Args:
        errors: The student's scores less the teacher's [rows].
        group: The group of every row [rows]; at least one has two rows.
    """
    first, second = (torch.from_numpy(side).to(errors.device) for side in np.nonzero(np.triu(same_group(group), 1)))
    return ((errors[first] - errors[second]) ** 2).mean()


def same_group(group: np.ndarray) -> np.ndarray:
    """Returns which rows of a batch are of the same group, [rows, rows]."""
    return group[:, None] == group[None, :]


def schedule_of(recovery: Any) -> Schedule:
    """Returns the schedule of a recovery, checked."""
    schedule = Schedule(**{field.name: getattr(recovery, field.name) for field in fields(Schedule)})
    schedule.check()
    return schedule


def settings_of(recovery: Any) -> str:
    """Returns the settings of a recovery that determine its result."""
    neutral = ('checkpoint', 'checkpoint_every')
    return repr({name: value for name, value in asdict(recovery).items() if name not in neutral})


def identity_of(ranker: Ranker) -> tuple[Any, ...]:
    """Returns what determines the scores of a ranker, but not the memory address of anything."""
    simple = {name: value for name, value in ranker._settings().items() if isinstance(value, (str, int))}
    for name in ('model', 'tokenizer', 'text_field', 'batch_tokens', 'device', 'verbose'):
        simple.pop(name, None)
    return fingerprint(ranker), sorted(simple.items())


def _scores(ranker: Ranker, data: FitData) -> torch.Tensor:
    return torch.from_numpy(np.asarray(ranker.score(data.queries, data.texts))).to(ranker.encoder.device)


def with_negatives(data: FitData, share: float, seed: int) -> FitData:
    """Returns the rows and, for each query, texts of other queries, as a share of its own rows.

    They are drawn by the seed and the content, not by its order, and keep their docno.
    """
    if not share:
        return data
    names = ['qid', 'query', 'docno', 'text']
    frame = data.frame[names].sort_values(['qid', 'docno', 'text'], kind='stable').reset_index(drop=True)
    pool = frame.drop_duplicates('docno')
    added = [frame]
    for number, (qid, rows) in enumerate(frame.groupby('qid', sort=True)):
        others = pool[~pool['docno'].isin(rows['docno']) & ~pool['text'].isin(rows['text'])]
        count = min(len(others), round(share * len(rows)))
        drawn = others.iloc[np.random.default_rng([seed, number]).permutation(len(others))[:count]]
        added.append(drawn.assign(qid=qid, query=rows['query'].iloc[0]))
    return FitData(pd.concat(added, ignore_index=True), data.qrels)


def _run(
    ranker: Ranker, encoded: Encoded, rows: np.ndarray, streams: bool
) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """Returns the scores of some rows and, if asked for, the residual stream after each layer, call by call."""
    seen: list[list[torch.Tensor]] = [[] for _ in ranker.encoder.layers]

    def keep(layer: int) -> Callable[..., None]:
        def post(module: Any, args: Any, output: Any) -> None:
            seen[layer].append(output if isinstance(output, torch.Tensor) else output[0])

        return post

    with ExitStack() as hooks:
        if streams:
            for number, layer in enumerate(ranker.encoder.layers):
                hooks.enter_context(hooked(layer.module, post=keep(number)))
        scores = encoded.scores(ranker, rows)
    return scores, seen


def _distance(
    small: list[list[torch.Tensor]], whole: list[list[torch.Tensor]], encoded: Encoded, rows: np.ndarray
) -> torch.Tensor:
    """Returns the squared distance of two residual streams relative to the size of the second, mean over layers."""
    first_only = encoded.model.pooling_ == 'cls'
    masks = [encoded.inputs(tower, rows)['attention_mask'].bool() for tower in range(len(encoded.towers))]
    parts = []
    for number, (ours, theirs) in enumerate(zip(small, whole, strict=True)):
        for a, b, mask in zip(ours, theirs, masks, strict=True):
            if first_only and number == len(small) - 1:
                a, b, mask = a[:, :1], b[:, :1], mask[:, :1]
            parts.append(((a - b)[mask] ** 2).sum() / (b[mask] ** 2).sum())
    return torch.stack(parts).mean()


def _comparable(validation: FitData, seed: int) -> FitData:
    """Returns validation rows of which every query has several: all, or a sample that is large enough.

    Raises:
        ValueError: If no query has two rows.
    """
    qids = validation.frame['qid'].astype(str)
    several = sorted(set(qids[qids.duplicated()]))
    if not several:
        raise ValueError(
            f'none of the {qids.nunique()} validation queries has two texts to compare: retrieve more, or give no '
            'validation data'
        )
    chosen = np.random.default_rng(seed).permutation(several)[: _VALIDATED // _VALIDATED_PER_QUERY]
    return sample(take(validation, np.flatnonzero(qids.isin(chosen))), _VALIDATED, seed)


def _margins(student: Ranker, teacher: Ranker, rows: FitData) -> Callable[[], float]:
    """Returns the function that tells the margin error on the validation rows, mean over their queries."""
    targets = teacher.score(rows.queries, rows.texts)
    qids = rows.frame['qid'].astype(str).to_numpy()

    def error() -> float:
        errors = pd.Series(student.score(rows.queries, rows.texts) - targets, dtype=float)
        # The mean squared difference of two values is twice their variance.
        return 2 * float(errors.groupby(qids).var(ddof=1).mean())

    return error
