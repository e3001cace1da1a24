"""The queries and texts that a criterion or a recovery may look at, and a fair sample of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from pyterrier_mech.draws import digest
from pyterrier_mech.evaluation.runs import judgements, with_ids
from pyterrier_mech.frames import EDITED, edited_columns, strings, two_versions
from pyterrier_mech.inputs.inputs import Inputs
from pyterrier_mech.provenance import as_qids
from pyterrier_mech.rankers.ranker import Ranker

_KEYS = ['qid', 'docno']
_SECOND = ['text_0', 'query_0', EDITED]


@dataclass(frozen=True, eq=False)
class FitData:
    """What `fit` was given, checked.

    Attributes:
        frame: One row a query and text, sorted: qid, query, docno, and the text under the name 'text'. Where an edit
            made a second version, the original of what it edited under 'text_0' or 'query_0'.
        qrels: Judgements (qid, docno, label), or None.
    """

    frame: pd.DataFrame
    qrels: pd.DataFrame | None = None

    @property
    def queries(self) -> list[str]:
        """The query of every row."""
        return self.frame['query'].tolist()

    @property
    def texts(self) -> list[str]:
        """The text of every row."""
        return self.frame['text'].tolist()

    @property
    def qids(self) -> set[str]:
        """The queries, as text."""
        return as_qids(self.frame['qid'].tolist())

    @property
    def paired(self) -> bool:
        """Whether there are two versions of every row."""
        return bool({'text_0', EDITED} & set(self.frame.columns))

    def has(self, need: str) -> bool:
        """Whether there is what a step needs: 'text', 'text_0' or 'qrels'."""
        texts = len(self.frame) > 0 and {'query', 'text'} <= set(self.frame.columns)
        return {'text': texts, 'text_0': self.paired, 'qrels': self.qrels is not None}[need]

    @cached_property
    def plain(self) -> FitData:
        """The same rows as they were before an edit: what a ranker will be asked to rank.

        Raises:
            ValueError: If it is unclear what was edited, see `two_versions`.
        """
        if not self.paired:
            return self
        original, _ = two_versions(self.frame, self, 'text')  # type: ignore[arg-type]
        return FitData(self.frame.drop(columns=_SECOND, errors='ignore').assign(**original), self.qrels)

    def inputs(self, model: Ranker) -> Inputs:
        """Returns the rows as a ranker, or a pruned copy of it, reads them."""
        return Inputs.plain(model, self.queries, self.texts)

    def labels(self) -> pd.Series:
        """Returns the judgement of every row, NaN where there is none.

        Raises:
            ValueError: If there are no judgements, or none of these rows, or two of one row that differ.
        """
        if self.qrels is None:
            raise ValueError('there are no judgements: give qrels_tr to fit')
        known = judgements(self.qrels[[*_KEYS, 'label']]).set_index(_KEYS)['label']
        wanted = pd.MultiIndex.from_frame(with_ids(self.frame[_KEYS], 'the frame'))
        labels = pd.Series(known.reindex(wanted).to_numpy(dtype=float), index=self.frame.index, name='label')
        if labels.isna().all():
            raise ValueError(_no_judgements(self.frame, self.qrels))
        return labels


def fit_data(frame: pd.DataFrame, qrels: pd.DataFrame | None, model: Ranker, text_field: str) -> FitData:
    """Checks a frame and its judgements, before any work.

    Raises:
        ValueError: If the frame is empty, lacks columns or texts, or does not say what was edited; if the judgements
            lack columns, contradict each other, or are all of other queries.
    """
    if missing := [name for name in ('qid', 'query', 'docno', text_field) if name not in frame.columns]:
        raise ValueError(
            f'the frame to fit on has no {", ".join(map(repr, missing))}: put a first stage and a text loader before, '
            'as in (bm25 % 50 >> text >> pruned).fit(topics, qrels, …)'
        )
    if not len(frame):
        raise ValueError('the frame to fit on has no rows')
    sources = {'qid': 'qid', 'query': 'query', 'docno': 'docno', 'text': text_field}
    if EDITED in frame.columns or f'{text_field}_0' in frame.columns:
        # A query_0 alone is that of a query rewriter.
        second = {'query_0': 'query_0', 'text_0': f'{text_field}_0'}
        sources |= {name: source for name, source in second.items() if source in frame.columns}
    for source in ('query', text_field):
        strings(frame, source, model)
    data = with_ids(pd.DataFrame({name: frame[source] for name, source in sources.items()}), 'the frame to fit on')
    if EDITED in frame.columns:
        edited = [{'text' if name == text_field else name for name in row} for row in edited_columns(frame, text_field)]
        data[EDITED] = [' '.join(sorted(names)) for names in edited]
    # Sums of floating-point numbers depend on their order: nothing shall depend on that of the rows.
    order = data.reset_index(drop=True).astype(str).sort_values(list(sources), kind='stable').index
    if qrels is not None:
        qrels = judgements(qrels.drop(columns='iteration', errors='ignore'))
    found = FitData(data.iloc[order].reset_index(drop=True), qrels)
    if found.qrels is not None and not found.qids & set(found.qrels['qid']):
        raise ValueError(_no_judgements(found.frame, found.qrels))
    _ = found.plain  # refuses a second version that is unclear or has gaps
    return found


def _no_judgements(frame: pd.DataFrame, qrels: pd.DataFrame) -> str:
    return (
        f'none of the {len(frame)} rows is judged in the {len(qrels)} qrels '
        f'(qids {sorted(as_qids(frame["qid"].tolist()))[:3]} … against '
        f'{sorted(as_qids(qrels["qid"].tolist()))[:3]} …): give the qrels of these topics'
    )


# -- a sample of the rows


def sample(data: FitData, count: int | None, seed: int) -> FitData:
    """Returns at most `count` rows, as evenly spread over the queries as can be.

    Which rows are drawn is a function of the seed and of the rows themselves, not of their order, and a larger draw
    contains every smaller one.

    Args:
        data: The data.
        count: How many rows; None leaves all.
        seed: Random seed.
    """
    if count is None or count >= len(data.frame):
        return data
    return take(data, np.sort(drawn_order(data, seed)[:count]))


def drawn_order(data: FitData, seed: int) -> np.ndarray:
    """Returns all row numbers in a random order that takes one row of every query before the second of any."""
    frame = data.frame
    names = [name for name in ('qid', 'docno', 'query', 'text', 'text_0', 'query_0') if name in frame.columns]
    keys = [digest(seed, *row) for row in frame[names].astype(str).itertuples(index=False, name=None)]
    qids = frame['qid'].astype(str).tolist()
    seen: dict[str, int] = {}
    turns = np.zeros(len(frame), dtype=np.int64)
    for row in sorted(range(len(frame)), key=keys.__getitem__):
        turns[row] = seen.get(qids[row], 0)
        seen[qids[row]] = turns[row] + 1
    queries = {qid: digest(seed, qid) for qid in seen}
    order = sorted(range(len(frame)), key=lambda row: (turns[row], queries[qids[row]], keys[row]))
    return np.asarray(order, dtype=np.int64)


def take(data: FitData, rows: np.ndarray) -> FitData:
    """Returns some rows of the data, with the same judgements."""
    return FitData(data.frame.iloc[rows].reset_index(drop=True), data.qrels)
