"""The recovery that trains on what the unpruned ranker says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import pandas as pd
import torch

from pyterrier_mech.anatomy.model import Edit, Values
from pyterrier_mech.anatomy.readouts import picked
from pyterrier_mech.inputs.inputs import Inputs
from pyterrier_mech.prune.data import FitData, sample, take
from pyterrier_mech.prune.plans.plan import fingerprint
from pyterrier_mech.prune.protocol import at_least
from pyterrier_mech.prune.recovery.training import Schedule, check_comparable, name_of, train
from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.units import Site

# More validation rows than this make training slower, not stops better.
_VALIDATED = 1000
# Fewer rows of a query than this say little of its margins: of more queries, some are left out.
_VALIDATED_PER_QUERY = 4


@dataclass(frozen=True)
class Distillation(Schedule):
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
        seed: Random seed of the order of the data, of the negatives, and of the validation rows where there are too
            many for all.
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

    needs: ClassVar[frozenset[str]] = frozenset({'text'})

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: If one is out of range.
        """
        super().check()
        at_least(0, self, 'hidden', 'negatives')

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
        checked = None if validation is None else _comparable(validation, self.seed)
        data = with_negatives(data, self.negatives, self.seed)
        check_comparable(data)
        inputs = data.inputs(teacher)
        # Not before the first batch: a checkpoint that does not fit is refused before this work.
        targets = cache(lambda: torch.from_numpy(teacher.score(data.queries, data.texts)).to(teacher.map.device))
        streams = self.hidden > 0

        def loss(rows: np.ndarray, group: np.ndarray) -> torch.Tensor:
            scores, small = _run(student, inputs, rows, streams)
            value = margin_error(scores - targets()[rows], group)
            if streams:
                with teacher.computing():
                    whole = _run(teacher, inputs, rows, streams)[1]
                value = value + self.hidden * _distance(small, whole, teacher, inputs, rows)
            return value

        validate = None if checked is None else _margins(student, teacher, checked)
        others = identity_of(teacher), identity_of(student), checked and name_of(checked.frame)
        return train(student, data, loss, validate, self, others)


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


def identity_of(ranker: Ranker) -> tuple[object, ...]:
    """Returns what determines the scores of a ranker, but not the memory address of anything."""
    score = tuple(getattr(ranker, name, None) for name in ('label', 'target'))
    return fingerprint(ranker), score, ranker.maker.max_length, ranker.dtype, ranker.stated_


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


def _run(ranker: Ranker, inputs: Inputs, rows: np.ndarray, streams: bool) -> tuple[torch.Tensor, list[Values]]:
    """Returns the scores of some rows and, if asked for, the residual stream after each layer, tower by tower."""
    seen: list[Values] = [{} for _ in inputs.towers]

    def keep(values: Values, site: Site) -> Edit:
        # An edit that changes nothing.
        return lambda tensor: values.setdefault(site, tensor)

    sites = ranker.map.sites('resid_post') if streams else []
    edits = [{site: keep(values, site) for site in sites} for values in seen]
    return ranker.run(inputs, rows, edits=edits), seen


def _distance(
    small: list[Values], whole: list[Values], ranker: Ranker, inputs: Inputs, rows: np.ndarray
) -> torch.Tensor:
    """Returns the squared distance of two residual streams relative to the size of the second, mean over layers."""
    parts = []
    for tower, streams in enumerate(small):
        batch = inputs.batch(tower, rows)
        real, at = batch.tensors['attention_mask'].bool(), ranker.readout.at(batch.scored)
        for site, ours in streams.items():
            # Of the last layer only what is read out matters.
            read = None if site.layer < ranker.n_layers - 1 else at
            a, b = (x[real] if read is None else picked(x, read) for x in (ours, whole[tower][site]))
            parts.append(((a - b) ** 2).sum() / (b**2).sum())
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
