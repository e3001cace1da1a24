"""Which stages may be cut into units of work, what they read of a frame, and what one unit gives."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt

from pyterrier_mech.durable.digests import ranker_of, row_digest
from pyterrier_mech.durable.store import ROW
from pyterrier_mech.frames import EDITED, texts_of, two_versions
from pyterrier_mech.inputs.batching import default_budget
from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.stage import ModelStage


def why_not(stage: Any) -> str:
    """Returns why the rows of a stage cannot be computed one unit at a time and stored, or ''."""
    name = type(stage).__name__
    if isinstance(stage, pt.Estimator):
        return f'{name} is fitted, and what it gives depends on that: take the ranker that it has made, its model_'
    if not isinstance(stage, (ModelStage, Ranker)):
        return (
            f'{name} is not a stage of pyterrier_mech that runs a ranker, so one row may depend on others (as a '
            'listwise ranker does), or there is nothing to store: put it before or after, bm25 >> Resumable(stage, …)'
        )
    for one in {type(stage), type(ranker_of(stage))}:
        if not one.__module__.startswith('pyterrier_mech.') and not getattr(one, 'rowwise', False):
            return (
                f'nothing says that a {one.__name__} treats every row by itself: if so, say it in the class with '
                'rowwise = True'
            )
    if verify := getattr(stage, 'verify', 0):
        return (
            f'verify={verify} chooses columns by the sum over the whole frame: use verify=0, and patch the '
            'columns that you choose with another stage'
        )
    return ''


@dataclass(frozen=True)
class Rows:
    """The rows of a frame as a stage reads them; rows of equal texts are one.

    Attributes:
        frame: qid, docno, and the texts, one row for each distinct one: what the stage is given.
        digests: Of the texts of these rows.
        place: For every row of the whole frame, which of these it is.
    """

    frame: pd.DataFrame
    digests: list[bytes]
    place: np.ndarray

    @classmethod
    def of(cls, stage: Any, inp: pd.DataFrame) -> Rows:
        """Reads a frame, and checks it as the stage does.

        Raises:
            ValueError: If a text is null, or it is unclear what was edited.
        """
        text = ranker_of(stage).text_field if isinstance(stage, Ranker) else stage.text
        versions = two_versions(inp, stage, text) if _reads_pairs(stage, text) else (texts_of(inp, stage, text),)
        # The last version is what query and text are now; the first of two is the original.
        columns = {'query': versions[-1]['query'], text: versions[-1]['text']}
        if len(versions) > 1:
            columns |= {f'{text}_0': versions[0]['text'], 'query_0': versions[0]['query']}
        digests = [row_digest(texts) for texts in zip(*columns.values(), strict=True)]
        if len(versions) > 1 and versions[0]['query'] == versions[1]['query']:
            del columns['query_0']
        place, distinct = pd.factorize(pd.Series(digests, dtype=object))
        first = np.zeros(len(distinct), dtype=np.int64)
        first[place[::-1]] = np.arange(len(inp))[::-1]
        frame = pd.DataFrame({name: inp[name].to_numpy() for name in ('qid', 'docno')} | columns).iloc[first]
        if 'query_0' in columns:
            frame = frame.assign(**{EDITED: f'query {text}'})
        return cls(frame.reset_index(drop=True), list(distinct), place)

    def units(self, size: int) -> list[np.ndarray]:
        """Cuts the distinct rows into runs of whole queries, of `size` rows at most; only longer queries are cut."""
        found: list[list[int]] = [[]]
        queries, _ = pd.factorize(self.frame['qid'], use_na_sentinel=False)
        for rows in np.split(np.argsort(queries, kind='stable'), np.cumsum(np.bincount(queries))[:-1]):
            if len(found[-1]) + len(rows) > size and found[-1]:
                found.append([])
            for start in range(0, len(rows), size):
                if start:
                    found.append([])
                found[-1] += rows[start : start + size].tolist()
        return [np.asarray(rows, dtype=np.int64) for rows in found if rows]


def _reads_pairs(stage: Any, text: str) -> bool:
    """Whether a stage reads two versions of every row: without the second, it refuses even a frame without rows."""
    try:
        stage.transform(pd.DataFrame(columns=['qid', 'docno', 'query', text], dtype='str'))
    except pt.validate.InputValidationError:
        return True
    return False


def quiet(stage: Any) -> Any:
    """Returns the stage without its own progress bars, around the same loaded weights."""
    other = copy.copy(stage)
    if isinstance(stage, Ranker):
        # What it keeps is loaded, since its digest was made.
        other.__dict__['_kept'] = stage.__dict__['_kept']
    else:
        other.model = quiet(stage.model)
    other.verbose = False
    return other


def computed(stage: Any, frame: pd.DataFrame) -> pd.DataFrame:
    """Returns the columns that a stage adds to the rows of a unit, as if it were all that there is.

    Batches are packed from the rows of the unit, and each unit begins with the whole budget of tokens: so the numbers
    are the same to the bit whatever was computed before.
    """
    ranker = ranker_of(stage)
    ranker.budget.tokens = default_budget(ranker.batch_tokens, ranker.map.device).tokens
    with warnings.catch_warnings():
        # What they count is counted over the whole frame, once.
        warnings.simplefilter('ignore')
        res = stage.transform(frame)
    added = [name for name in res.columns if name not in frame.columns and name != 'rank']
    return res.loc[frame.index, added]


class Table:
    """Columns that are filled piece by piece, each in its own type."""

    def __init__(self, n_rows: int) -> None:
        """Starts without columns."""
        self.n_rows = n_rows
        self.there = np.zeros(n_rows, dtype=bool)
        self.columns: dict[str, np.ndarray] = {}

    def put(self, places: np.ndarray, piece: pd.DataFrame, at: np.ndarray) -> None:
        """Puts the rows `at` of a piece at their places."""
        piece.attrs = {}  # or each column would get a copy of them
        for name, values in piece.items():
            # Text is of a type of pandas, which it finds again by itself.
            cells = values.to_numpy() if values.dtype.kind in 'biuf' else values.to_numpy(dtype=object)
            if name not in self.columns:
                self.columns[str(name)] = np.empty(self.n_rows, dtype=cells.dtype)
            self.columns[str(name)][places] = cells[at]
        self.there[places] = True

    def rows(self, place: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the columns of the stage with a row for each of `place`."""
        columns = {name: values for name, values in self.columns.items() if name != ROW}
        if np.array_equal(place, np.arange(self.n_rows)):
            return columns
        return {name: values[place] for name, values in columns.items()}
