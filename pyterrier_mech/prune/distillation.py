"""Recoveries that train: from the unpruned ranker's scores, or from judgements."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import ir_measures
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from pyterrier_mech.prune.data import FitData
from pyterrier_mech.prune.encoded import Encoded
from pyterrier_mech.prune.plan import fingerprint
from pyterrier_mech.prune.protocol import sample
from pyterrier_mech.prune.training import Schedule, train
from pyterrier_mech.rankers.encoder import hooked
from pyterrier_mech.rankers.ranker import Ranker

# More validation rows than this make training slower, not stops better.
_VALIDATED = 1000
_NAMES = {'qid': 'query_id', 'docno': 'doc_id', 'label': 'relevance'}


@dataclass(frozen=True)
class Distillation:
    """Trains the pruned ranker to order texts with the margins of the unpruned one; needs no labels.

    The loss is margin-MSE: for all pairs of texts of one query in a batch, the squared difference between the
    student's and the teacher's difference of scores; and, weighted by `hidden`, the mean squared difference between
    their residual streams after every layer, which pruning leaves equally wide. Texts of other queries join
    as negatives. Where there is validation data, the weights with the least margin error on it are kept.

    Args:
        epochs: How often the rows are gone through.
        learning_rate: Highest step size of AdamW.
        hidden: Weight of the residual streams; 0 leaves them out.
        negatives: For each query, so many texts of other queries are added, as a share of its own.
        texts_per_query: Texts of a query that are compared with each other.
        queries_per_batch: Queries of a batch.
        patience: Validations without improvement after which training ends.
        validations: How often an epoch is validated.
        keep_zeros: Whether weights that are zero stay zero (for unstructured masks).
        seed: Of the order of the data.
        checkpoint: File in which progress is kept; a killed run with the same settings and data goes on from it and
            ends as if it had not been. It is deleted at the end.
        checkpoint_every: Steps between two writes.

    Source: Hofstätter et al. 2020, arXiv 2010.02666 (margin-MSE); Jiao et al., EMNLP Findings 2020, arXiv 1909.10351
    (hidden states).
    """

    epochs: int = 3
    learning_rate: float = 1e-4
    hidden: float = 1.0
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
        schedule = _schedule(self)
        if self.hidden < 0 or self.negatives < 0:
            raise ValueError(f'hidden={self.hidden!r} and negatives={self.negatives!r} may not be negative')
        data = with_negatives(data, self.negatives, self.seed)
        encoded = Encoded.of(teacher, data.queries, data.texts)
        targets = _scores(teacher, data)
        streams = self.hidden > 0

        def loss(rows: np.ndarray, group: np.ndarray) -> torch.Tensor:
            scores, small = _run(student, encoded, rows, streams)
            value = margin_error(scores - targets[rows], group)
            if streams:
                with torch.no_grad():
                    whole = _run(teacher, encoded, rows, True)[1]
                value = value + self.hidden * _distance(small, whole, encoded, rows)
            return value

        return train(
            student,
            data,
            loss,
            None if validation is None else _margins(student, teacher, validation, self.seed),
            schedule,
            keep_zeros=self.keep_zeros,
            identity=f'{_settings(self)} {fingerprint(teacher)} {fingerprint(student)}',
            desc='Distillation',
        )


@dataclass(frozen=True)
class FineTuning:
    """Trains the pruned ranker on judgements: of two texts of a query, the one with the higher label shall win.

    The loss is the pairwise logistic one (RankNet) over all pairs of a query's texts in a batch whose labels differ;
    rows without a judgement are left out. Where there are judged validation topics, the weights with the highest mean
    nDCG@10 on them are kept.

    Args:
        epochs: How often the rows are gone through.
        learning_rate: Highest step size of AdamW.
        texts_per_query: Texts of a query that are compared with each other.
        queries_per_batch: Queries of a batch.
        patience: Validations without improvement after which training ends.
        validations: How often an epoch is validated.
        keep_zeros: Whether weights that are zero stay zero.
        seed: Of the order of the data.
        checkpoint: File in which progress is kept; see `Distillation`.
        checkpoint_every: Steps between two writes.

    Source: Burges et al., ICML 2005 (RankNet).
    """

    epochs: int = 2
    learning_rate: float = 5e-5
    texts_per_query: int = 8
    queries_per_batch: int = 4
    patience: int = 3
    validations: int = 1
    keep_zeros: bool = False
    seed: int = 0
    checkpoint: str | None = None
    checkpoint_every: int = 100

    needs: ClassVar[frozenset[str]] = frozenset({'text', 'qrels'})

    def recover(
        self, student: Ranker, teacher: Ranker, data: FitData, validation: FitData | None = None
    ) -> pd.DataFrame:
        """Trains `student` in place; see `Distillation.recover`. The teacher is not asked."""
        schedule = _schedule(self)
        labels = data.labels()
        judged = FitData(data.frame[labels.notna().to_numpy()].reset_index(drop=True), data.qrels)
        gains = torch.from_numpy(labels.dropna().to_numpy()).to(student.encoder.device)
        encoded = Encoded.of(student, judged.queries, judged.texts)

        def loss(rows: np.ndarray, group: np.ndarray) -> torch.Tensor:
            scores = encoded.scores(student, rows)
            better = (gains[rows][:, None] > gains[rows][None, :]) & _same(group, scores)
            losses = F.softplus(scores[None, :] - scores[:, None])[better]
            return losses.mean() if len(losses) else scores.sum() * 0.0

        return train(
            student,
            judged,
            loss,
            None if validation is None or validation.qrels is None else _lost_ndcg(student, validation),
            schedule,
            keep_zeros=self.keep_zeros,
            identity=f'{_settings(self)} {fingerprint(student)} {labels.tolist()}',
            desc='FineTuning',
        )


def margin_error(errors: torch.Tensor, group: np.ndarray) -> torch.Tensor:
    """Returns the mean over all pairs of a group of the squared difference of their errors: margin-MSE."""
    same = _same(group, errors)
    pairs = same & ~torch.eye(len(errors), dtype=torch.bool, device=errors.device)
    return ((errors[:, None] - errors[None, :]) ** 2)[pairs].mean()


def _same(group: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    group_of = torch.from_numpy(group).to(like.device)
    return group_of[:, None] == group_of[None, :]


def _schedule(recovery: Any) -> Schedule:
    schedule = Schedule(**{field.name: getattr(recovery, field.name) for field in fields(Schedule)})
    schedule.check()
    return schedule


def _settings(recovery: Any) -> str:
    neutral = ('checkpoint', 'checkpoint_every')
    return repr({name: value for name, value in asdict(recovery).items() if name not in neutral})


def _scores(ranker: Ranker, data: FitData) -> torch.Tensor:
    return torch.from_numpy(np.asarray(ranker.score(data.queries, data.texts))).to(ranker.encoder.device)


def with_negatives(data: FitData, share: float, seed: int) -> FitData:
    """Returns the rows and, for each query, texts of other queries, as a share of its own rows.

    They are drawn by seed, query and content, and have the docno of their text.
    """
    if not share:
        return data
    frame = data.frame.sort_values(['qid', 'docno', 'text'], kind='stable').reset_index(drop=True)
    added = [frame]
    for number, (qid, rows) in enumerate(frame.groupby('qid', sort=True)):
        others = frame[(frame['qid'] != qid) & ~frame['docno'].isin(rows['docno'])].drop_duplicates('docno')
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


def _margins(student: Ranker, teacher: Ranker, validation: FitData, seed: int) -> Callable[[], float]:
    """Returns the function that tells the margin error on the validation rows, mean over their queries."""
    rows = sample(validation, _VALIDATED, seed)
    targets = _scores(teacher, rows)
    group, _ = pd.factorize(rows.frame['qid'].astype(str))

    def error() -> float:
        errors = _scores(student, rows) - targets
        values = [float(errors[torch.from_numpy(group == g)].var(correction=0)) for g in np.unique(group)]
        return float(np.mean(values))

    return error


def _lost_ndcg(student: Ranker, validation: FitData) -> Callable[[], float]:
    """Returns the function that tells one less the mean nDCG@10 on the validation rows."""
    qrels = validation.qrels
    assert qrels is not None
    named = qrels.astype({'qid': str, 'docno': str}).rename(columns=_NAMES)
    frame = validation.frame[['qid', 'docno']].astype(str).rename(columns=_NAMES)
    named = named[named['query_id'].isin(frame['query_id'])]

    def lost() -> float:
        run = frame.assign(score=student.score(validation.queries, validation.texts))
        return 1 - ir_measures.calc_aggregate([ir_measures.nDCG @ 10], named, run)[ir_measures.nDCG @ 10]

    return lost
