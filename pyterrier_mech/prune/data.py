"""The queries and texts that a criterion or a recovery may look at."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from pyterrier_mech._frames import strings
from pyterrier_mech.rankers.ranker import Ranker


@dataclass(frozen=True, eq=False)
class FitData:
    """What `fit` was given, checked.

    Attributes:
        frame: One row a query and text: qid, query, docno, and the text under the name 'text'; where there was one,
            a second version of the text under 'text_0' (and of the query under 'query_0').
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

    def labels(self) -> pd.Series:
        """Returns the judgement of every row, NaN where there is none.

        Raises:
            ValueError: If there are no judgements, or none of these rows.
        """
        if self.qrels is None:
            raise ValueError('there are no judgements: give qrels_tr to fit')
        keys = ['qid', 'docno']
        known = self.qrels.astype(dict.fromkeys(keys, str)).drop_duplicates(keys).set_index(keys)['label']
        wanted = pd.MultiIndex.from_frame(self.frame[keys].astype(str))
        labels = pd.Series(known.reindex(wanted).to_numpy(dtype=float), index=self.frame.index, name='label')
        if labels.isna().all():
            raise ValueError(
                f'none of the {len(self.frame)} rows is judged in the {len(self.qrels)} qrels '
                f'(qids {sorted(set(self.frame["qid"].astype(str)))[:3]} … against '
                f'{sorted(set(self.qrels["qid"].astype(str)))[:3]} …): give the qrels of these topics'
            )
        return labels


def fit_data(frame: pd.DataFrame, qrels: pd.DataFrame | None, model: Ranker, text_field: str) -> FitData:
    """Checks a frame and its judgements, before any work.

    Raises:
        ValueError: If the frame is empty, lacks columns or texts, or the judgements lack columns.
    """
    missing = [name for name in ('qid', 'query', 'docno', text_field) if name not in frame.columns]
    if missing:
        raise ValueError(
            f'the frame to fit on has no {", ".join(map(repr, missing))}: put a first stage and a text loader before, '
            'as in (bm25 % 50 >> text >> pruned).fit(topics, qrels, …)'
        )
    if not len(frame):
        raise ValueError('the frame to fit on has no rows')
    if qrels is not None:
        lacks = [name for name in ('qid', 'docno', 'label') if name not in qrels.columns]
        if lacks:
            raise ValueError(f'the qrels have no {", ".join(map(repr, lacks))}')
    for column in ('query', text_field):
        strings(frame, column, model)
    kept = [name for name in ('qid', 'query', 'docno', 'query_0') if name in frame.columns]
    data = frame[kept].assign(text=frame[text_field])
    if f'{text_field}_0' in frame.columns:
        data = data.assign(text_0=frame[f'{text_field}_0'])
    return FitData(data.reset_index(drop=True), qrels)
