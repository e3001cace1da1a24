"""A small test collection on everyday topics, as a PyTerrier dataset: `pt.get_dataset('mech:lab')`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from importlib.resources import files
from typing import Any

import pandas as pd
import pyterrier as pt


class LabDataset(pt.datasets.Dataset):
    """Short passages, topics and graded judgements (0–3), written for teaching.

    For most topics one passage answers in other words than the query's, and others use the query's words for
    something else. Every passage among the first 20 of BM25 or of all-MiniLM-L6-v2 is judged. One author wrote and
    judged it, with these two rankers in view: use it to learn and to test, not as evidence about rankers.
    """

    def get_corpus_iter(self, *, verbose: bool = True) -> Iterable[dict[str, Any]]:
        """Returns the passages as dicts of docno and text."""
        return pt.utils.GeneratorLen(
            iter(pt.tqdm(self._docs, desc='mech:lab documents', disable=not verbose)), len(self._docs)
        )

    def get_corpus_lang(self) -> str:
        """Returns 'en'."""
        return 'en'

    def get_topics(self, variant: str | None = None) -> pd.DataFrame:
        """Returns qid and query."""
        self._no_variant(variant)
        return _table('topics.tsv')

    def get_topics_lang(self) -> str:
        """Returns 'en'."""
        return 'en'

    def get_qrels(self, variant: str | None = None) -> pd.DataFrame:
        """Returns qid, docno and label: 3 answers the query, 2 in part, 1 touches it, 0 does not."""
        self._no_variant(variant)
        return _table('qrels.tsv').astype({'label': int})

    def text_loader(self, fields: str | list[str] = '*', *, verbose: bool = False) -> pt.Transformer:
        """Returns a stage that adds the text of each docno.

        Args:
            fields: 'text', ['text'] or '*'; there is no other field.
            verbose: Has no effect: the passages are in memory.
        """
        if fields not in ('*', 'text', ['text']):
            raise ValueError(f"fields={fields!r}: mech:lab has the field 'text' alone")
        return LabTextLoader(self)

    @cached_property
    def texts(self) -> dict[str, str]:
        """The passages by docno."""
        return {doc['docno']: doc['text'] for doc in self._docs}

    @cached_property
    def _docs(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in _data('docs.jsonl').splitlines()]

    def _no_variant(self, variant: str | None) -> None:
        if variant is not None:
            raise ValueError(f'variant={variant!r}: mech:lab has no variants')

    def __repr__(self) -> str:
        """Says how to get it."""
        return "pt.get_dataset('mech:lab')"


class LabTextLoader(pt.Transformer):
    """Adds the passage of each docno.

    **Input columns**: docno. **Output columns**: the same and text.
    """

    schematic = {'label': 'Lab texts', 'help_url': None}

    def __init__(self, dataset: LabDataset):
        """Stores the dataset."""
        super().__init__()
        self.dataset = dataset

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Looks the texts up."""
        pt.validate.columns(inp, includes=['docno'], context=self)
        if unknown := sorted(set(inp['docno']) - set(self.dataset.texts)):
            raise KeyError(f'mech:lab has no document {unknown[0]!r} ({len(unknown)} such docnos in the frame)')
        return inp.assign(text=inp['docno'].map(self.dataset.texts).astype(str))

    def fuse_rank_cutoff(self, k: int) -> pt.Transformer:
        """Cuts before loading: the ranking is the same."""
        return pt.RankCutoff(k) >> self

    def __repr__(self) -> str:
        """Says how to get it."""
        return f'{self.dataset!r}.text_loader()'

    def __eq__(self, other: object) -> bool:
        """There is one such collection."""
        return isinstance(other, LabTextLoader)

    def __hash__(self) -> int:
        """Fits `__eq__`."""
        return hash(LabTextLoader)


class LabProvider(pt.datasets.DatasetProvider):
    """Makes `mech:lab` known to `pt.get_dataset`."""

    def get_dataset(self, name: str) -> LabDataset:
        """Returns the dataset.

        Raises:
            KeyError: If the name is not 'lab'.
        """
        if name != 'lab':
            raise KeyError(f"no dataset 'mech:{name}'; there is 'mech:lab'")
        return LabDataset()

    def list_dataset_names(self) -> Iterable[str]:
        """Returns the one name."""
        return ['lab']


def _data(name: str) -> str:
    return (files('pyterrier_mech.lab') / 'data' / name).read_text(encoding='utf-8')


def _table(name: str) -> pd.DataFrame:
    header, *rows = (line.split('\t') for line in _data(name).splitlines())
    return pd.DataFrame(rows, columns=header)
