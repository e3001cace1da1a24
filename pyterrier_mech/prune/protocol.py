"""What a criterion is, what it may ask for, and a fair sample of the data."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import numpy as np
import pandas as pd

from pyterrier_mech.prune.data import FitData
from pyterrier_mech.prune.scores import UnitScores
from pyterrier_mech.rankers.ranker import Ranker

_WHAT = {
    'text': 'queries and texts',
    'text_0': 'a second version of each text',
    'qrels': 'judgements',
}
_WAYS_OUT = {
    'text': 'fit on a result frame with texts, as in (bm25 % 50 >> text >> pruned).fit(topics, qrels, …)',
    'text_0': 'put Perturb(...) before the stage, or give perturbation=',
    'qrels': 'give qrels to fit, or take a criterion that does without',
}


class Criterion(Protocol):
    """A rule that says how much every head and neuron is worth keeping.

    Criteria are small values: equal if their settings are, printed as the call that makes them.
    """

    @property
    def needs(self) -> frozenset[str]:
        """What the data must have: some of 'text', 'text_0' and 'qrels'."""

    def scores(self, model: Ranker, data: FitData) -> UnitScores:
        """Scores every unit of a ranker, which is left as it is.

        Args:
            model: A ranker.
            data: What may be looked at; None where nothing is needed.

        Raises:
            ValueError: If the data lacks what the criterion needs, before any work.
        """


class Needing(Protocol):
    """Anything that says what its data must have."""

    @property
    def needs(self) -> frozenset[str]:
        """Some of 'text', 'text_0' and 'qrels'."""


class Recovery(Protocol):
    """What repairs a pruned ranker, which it may change: `Rescaling`, `Distillation`, `FineTuning`."""

    @property
    def needs(self) -> frozenset[str]:
        """What the data must have: some of 'text' and 'qrels'."""

    def check(self) -> None:
        """Checks the settings, before any work.

        Raises:
            ValueError: If one is out of range.
        """

    def recover(
        self, student: Ranker, teacher: Ranker, data: FitData, validation: FitData | None = None
    ) -> pd.DataFrame | None:
        """Changes the weights of `student`; returns a history, if there is one."""


def check_needs(criterion: Needing, data: FitData | None) -> None:
    """Checks that the data has what a criterion needs.

    Raises:
        ValueError: If not; the message names the criterion, what is missing and the way out.
    """
    for need in ('text', 'text_0', 'qrels'):
        if need in criterion.needs and not _has(data, need):
            name = type(criterion).__name__
            raise ValueError(f'{name} needs {_WHAT[need]}: {_WAYS_OUT[need]}. The criterion is {criterion!r}.')


def _has(data: FitData | None, need: str) -> bool:
    if data is None:
        return False
    if need == 'qrels':
        return data.qrels is not None
    if need == 'text_0':
        return 'text_0' in data.frame.columns or 'query_0' in data.frame.columns
    return len(data.frame) > 0 and {'query', 'text'} <= set(data.frame.columns)


def sample(data: FitData, count: int | None, seed: int) -> FitData:
    """Returns at most `count` rows, as evenly spread over the queries as can be.

    Which rows are drawn is a function of the seed and of the rows themselves, not of their order, and a larger draw
    contains every smaller one.

    Args:
        data: The data.
        count: How many rows; None leaves all.
        seed: Of the draw.

    Raises:
        ValueError: If the count is not positive.
    """
    check_count(count)
    if count is None or count >= len(data.frame):
        return data
    return take(data, np.sort(drawn_order(data, seed)[:count]))


def check_count(count: int | None) -> None:
    """Checks a number of pairs.

    Raises:
        ValueError: If it is not positive.
    """
    if count is not None and count < 1:
        raise ValueError(f'max_pairs={count} leaves nothing to look at: give 1 or more, or None for all pairs')


def drawn_order(data: FitData, seed: int) -> np.ndarray:
    """Returns all row numbers in a random order that takes one row of every query before the second of any."""
    frame = data.frame
    names = [name for name in ('qid', 'docno', 'query', 'text', 'text_0', 'query_0') if name in frame.columns]
    keys = [_digest(seed, *row) for row in frame[names].astype(str).itertuples(index=False, name=None)]
    qids = frame['qid'].astype(str).tolist()
    seen: dict[str, int] = {}
    turns = np.zeros(len(frame), dtype=np.int64)
    for row in sorted(range(len(frame)), key=keys.__getitem__):
        turns[row] = seen.get(qids[row], 0)
        seen[qids[row]] = turns[row] + 1
    queries = {qid: _digest(seed, qid) for qid in seen}
    order = sorted(range(len(frame)), key=lambda row: (turns[row], queries[qids[row]], keys[row]))
    return np.asarray(order, dtype=np.int64)


def take(data: FitData, rows: np.ndarray) -> FitData:
    """Returns some rows of the data, with the same judgements."""
    return FitData(data.frame.iloc[rows].reset_index(drop=True), data.qrels)


def _digest(*parts: Any) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()
