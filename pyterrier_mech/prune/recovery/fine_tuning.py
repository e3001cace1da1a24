"""The recovery that trains on judgements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import ir_measures
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from pyterrier_mech.prune.data import FitData
from pyterrier_mech.prune.encoded import Encoded
from pyterrier_mech.prune.recovery.distillation import identity_of, same_group, schedule_of, settings_of
from pyterrier_mech.prune.recovery.training import digest, train
from pyterrier_mech.rankers.ranker import Ranker

_NAMES = {'qid': 'query_id', 'docno': 'doc_id', 'label': 'relevance'}


@dataclass(frozen=True)
class FineTuning:
    """Trains the pruned ranker on judgements: of two texts of a query, the one with the higher label shall win.

    The loss is the pairwise logistic one (RankNet), mean over all pairs of texts of one query that a batch holds
    together and whose labels differ; rows without a judgement are left out. Where there are judged validation topics,
    the weights with the highest mean nDCG@10 on them are kept.

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

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: If one is out of range.
        """
        schedule_of(self)

    def recover(
        self, student: Ranker, teacher: Ranker, data: FitData, validation: FitData | None = None
    ) -> pd.DataFrame:
        """Trains `student` in place.

        Args:
            student: The pruned ranker.
            teacher: Not asked.
            data: Rows to train on, with judgements.
            validation: Rows of other queries, for early stopping if they have judgements.

        Returns:
            The history: `step`, `loss`, and, as `validation`, what the nDCG@10 lacks to 1; see `train`.

        Raises:
            ValueError: If a setting is out of range, no query has texts of different labels, the validation queries
                are not judged, or the checkpoint is of another run.
        """
        schedule = schedule_of(self)
        labels = data.labels()
        frame = data.frame.assign(label=labels)[labels.notna()].reset_index(drop=True)
        if not (frame.groupby('qid')['label'].nunique() > 1).any():
            raise ValueError(f'none of the {frame["qid"].nunique()} judged queries has texts of different labels')
        validate, checked = None, ''
        if validation is not None and validation.qrels is not None:
            judgements = _judgements(validation)
            validate = _lost_ndcg(student, validation, judgements)
            checked = digest(validation.frame) + digest(judgements.rename(columns={v: k for k, v in _NAMES.items()}))
        judged, gains = FitData(frame, data.qrels), frame['label'].to_numpy()
        encoded = Encoded.of(student, judged.queries, judged.texts)

        def loss(rows: np.ndarray, group: np.ndarray) -> torch.Tensor:
            scores = encoded.scores(student, rows)
            better = same_group(group) & (gains[rows][:, None] > gains[rows])
            winners, losers = (torch.from_numpy(side).to(scores.device) for side in np.nonzero(better))
            return F.softplus(scores[losers] - scores[winners]).sum() / max(1, len(winners))

        return train(
            student,
            judged,
            loss,
            validate,
            schedule,
            keep_zeros=self.keep_zeros,
            identity=repr((settings_of(self), identity_of(student), checked)),
            desc='FineTuning',
        )


def _judgements(validation: FitData) -> pd.DataFrame:
    """Returns the judgements of the validation queries, as `ir_measures` reads them."""
    validation.labels()
    qrels = (
        pd.DataFrame(validation.qrels)[list(_NAMES)]
        .astype({'qid': str, 'docno': str, 'label': int})
        .rename(columns=_NAMES)
    )
    return qrels[qrels['query_id'].isin(validation.frame['qid'].astype(str))]


def _lost_ndcg(student: Ranker, validation: FitData, judgements: pd.DataFrame) -> Callable[[], float]:
    """Returns the function that tells what the mean nDCG@10 on the validation rows lacks to 1."""
    frame = validation.frame[['qid', 'docno']].astype(str).rename(columns=_NAMES)
    measure = ir_measures.nDCG @ 10

    def lost() -> float:
        run = frame.assign(score=student.score(validation.queries, validation.texts))
        return 1 - ir_measures.calc_aggregate([measure], judgements, run)[measure]

    return lost
