"""The recovery that trains on judgements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import ir_measures
import numpy as np
import pandas as pd
import pyterrier as pt
import torch
import torch.nn.functional as F

from pyterrier_mech.evaluation.runs import judgements, with_ids
from pyterrier_mech.prune.data import FitData
from pyterrier_mech.prune.protocol import check_logits
from pyterrier_mech.prune.recovery.distillation import identity_of, same_group
from pyterrier_mech.prune.recovery.training import Schedule, name_of, train
from pyterrier_mech.rankers.ranker import Ranker


@dataclass(frozen=True)
class FineTuning(Schedule):
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
        seed: Random seed of the order of the data.
        checkpoint: File in which progress is kept; see `Distillation`.
        checkpoint_every: Steps between two writes.

    Source: Burges et al., ICML 2005 (RankNet).
    """

    epochs: int = 2
    learning_rate: float = 5e-5

    needs: ClassVar[frozenset[str]] = frozenset({'text', 'qrels'})
    logistic: ClassVar[bool] = True

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
            The history: `step`, `loss`, and, as `validation`, 1 − nDCG@10; see `train`.

        Raises:
            ValueError: If a setting is out of range, no query has texts of different labels, the scores are
                probabilities, the validation queries are not judged, or the checkpoint is of another run.
        """
        self.check()
        check_logits(self, student)
        labels = data.labels()
        frame = data.frame.assign(label=labels)[labels.notna()].reset_index(drop=True)
        if not (frame.groupby('qid')['label'].nunique() > 1).any():
            raise ValueError(f'none of the {frame["qid"].nunique()} judged queries has texts of different labels')
        validate, checked = None, ''
        if validation is not None and validation.qrels is not None:
            wanted = _judgements_of(validation)
            validate = _lost_ndcg(student, validation, wanted)
            checked = name_of(validation.frame) + name_of(wanted)
        judged, gains = FitData(frame, data.qrels), frame['label'].to_numpy()
        inputs = judged.inputs(student)

        def loss(rows: np.ndarray, group: np.ndarray) -> torch.Tensor:
            scores = student.run(inputs, rows)
            better = same_group(group) & (gains[rows][:, None] > gains[rows])
            winners, losers = (torch.from_numpy(side).to(scores.device) for side in np.nonzero(better))
            return F.softplus(scores[losers] - scores[winners]).sum() / max(1, len(winners))

        return train(student, judged, loss, validate, self, (identity_of(student), checked))


def _judgements_of(validation: FitData) -> pd.DataFrame:
    """Returns the judgements of the validation queries.

    Raises:
        ValueError: If none of the rows is judged.
    """
    validation.labels()
    qrels = judgements(pd.DataFrame(validation.qrels)[['qid', 'docno', 'label']])
    return qrels[qrels['qid'].isin(validation.qids)]


def _lost_ndcg(student: Ranker, validation: FitData, qrels: pd.DataFrame) -> Callable[[], float]:
    """Returns the function that tells 1 − mean nDCG@10 on the validation rows."""
    frame = with_ids(validation.frame[['qid', 'docno']], 'the frame')
    judged, measure = pt.model.to_ir_measures(qrels), ir_measures.nDCG @ 10

    def lost() -> float:
        run = frame.assign(score=student.score(validation.queries, validation.texts))
        return 1 - ir_measures.calc_aggregate([measure], judged, pt.model.to_ir_measures(run))[measure]

    return lost
