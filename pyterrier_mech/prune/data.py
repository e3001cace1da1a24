"""The queries and texts that a criterion or a recovery may look at."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from pyterrier_mech.frames import strings
from pyterrier_mech.rankers.ranker import Ranker


@dataclass(frozen=True, eq=False)
class FitData:
    """What `fit` was given, checked.

    Attributes:
        frame: One row a query and text, sorted: qid, query, docno, and the text under the name 'text'; where there
            was one, a second version of the text under 'text_0' (and of the query under 'query_0').
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
        """The queries, as strings."""
        return set(self.frame['qid'].astype(str))

    @property
    def plain(self) -> FitData:
        """The same rows with the texts as they were before an edit: what a ranker will be asked to rank.

        The query is left as it is: where there is a `query_0`, it may be that of a query rewriter.
        """
        if not {'text_0', 'query_0'} & set(self.frame.columns):
            return self
        frame = self.frame.drop(columns=['query_0', 'text_0'], errors='ignore')
        return FitData(frame.assign(text=self.frame.get('text_0', self.frame['text'])), self.qrels)

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
            raise ValueError(_no_judgements(self.frame, self.qrels))
        return labels


def fit_data(frame: pd.DataFrame, qrels: pd.DataFrame | None, model: Ranker, text_field: str) -> FitData:
    """Checks a frame and its judgements, before any work.

    Raises:
        ValueError: If the frame is empty, lacks columns or texts, or the judgements lack columns or are all of other
            queries.
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
    sources = {'qid': 'qid', 'query': 'query', 'docno': 'docno', 'text': text_field}
    optional = {'query_0': 'query_0', 'text_0': f'{text_field}_0'}
    sources |= {name: source for name, source in optional.items() if source in frame.columns}
    for name, source in sources.items():
        if name not in ('qid', 'docno'):
            strings(frame, source, model)
    data = pd.DataFrame({name: frame[source] for name, source in sources.items()})
    # Sums of floating-point numbers depend on their order: nothing shall depend on that of the rows.
    order = data.reset_index(drop=True).astype(str).sort_values(list(sources), kind='stable').index
    data = data.iloc[order].reset_index(drop=True)
    if qrels is not None and not set(data['qid'].astype(str)) & set(qrels['qid'].astype(str)):
        raise ValueError(_no_judgements(data, qrels))
    return FitData(data, qrels)


def _no_judgements(frame: pd.DataFrame, qrels: pd.DataFrame) -> str:
    return (
        f'none of the {len(frame)} rows is judged in the {len(qrels)} qrels '
        f'(qids {sorted(set(frame["qid"].astype(str)))[:3]} … against '
        f'{sorted(set(qrels["qid"].astype(str)))[:3]} …): give the qrels of these topics'
    )
