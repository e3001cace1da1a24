"""Collection statistics behind one small protocol, from whatever the user already has.

``collection_statistics`` turns an index, a frame, an iterable or a dataset into an object with ``n_docs``,
``query_terms`` and ``df``. Each adapter tokenises and stems as its source does, so that a query word finds the
document frequency under which it was indexed, and reads its source only when the first number is asked for.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import pyterrier as pt

from pyterrier_mech.perturb._documents import DocumentStatistics
from pyterrier_mech.perturb._pisa import PisaStatistics
from pyterrier_mech.perturb._terrier import TerrierStatistics, terrier_index


class CollectionStatistics(Protocol):
    """What an axiom asks of a collection."""

    @property
    def n_docs(self) -> int:
        """Number of documents."""
        ...

    def query_terms(self, text: str) -> list[tuple[str, str]]:
        """Returns (word, index term) for the words of ``text`` in text order, without stop words.

        The word is as written, lower-cased by the tokeniser of the collection; the index term is what it becomes.
        """
        ...

    def df(self, term: str) -> int:
        """Returns the number of documents that contain the index term ``term``, 0 for one that is not there."""
        ...


def idf(statistics: CollectionStatistics, term: str) -> float:
    """Returns the inverse document frequency ln(N / df) of an index term (Spärck Jones 1972).

    Raises:
        ValueError: If no document contains the term: a term that is not in the index has no IDF, least of all the
            highest.
    """
    df = statistics.df(term)
    if df == 0:
        raise ValueError(f'no document of {statistics!r} contains {term!r}: skip terms whose df is 0.')
    return math.log(statistics.n_docs / df)


def collection_statistics(source: Any, *, text_field: str = 'text') -> CollectionStatistics:  # noqa: ANN401
    """Returns the statistics of a collection in whatever form it comes.

    Args:
        source: One of: an object that already has ``n_docs``, ``query_terms`` and ``df`` (returned as it is); a
            ``PisaIndex`` or its retriever; a ``pt.terrier.TerrierIndex``, a Terrier retriever, ``IndexRef`` or
            ``Index``; the folder of such an index; a frame with a text column; an iterable of dicts or strings; a
            PyTerrier dataset.
        text_field: Column or key of the text, for frames, dicts and datasets.

    Raises:
        TypeError: If the source is none of these.
        FileNotFoundError: If the source is a path without an index.
    """
    if all(inspect.getattr_static(source, name, None) is not None for name in ('n_docs', 'query_terms', 'df')):
        return source
    if (pisa := sys.modules.get('pyterrier_pisa')) is not None:
        if isinstance(source, pisa.PisaIndex):
            return PisaStatistics(source)
        if isinstance(source, pisa.PisaRetrieve):
            return PisaStatistics(source.index, source.stops)
    if isinstance(source, pt.terrier.TerrierIndex):
        return TerrierStatistics(source)
    if isinstance(source, pt.terrier.Retriever):
        return TerrierStatistics(terrier_index(source.indexref), source.tokeniser.getClass().getName())
    if pt.java.started() and isinstance(source, (pt.terrier.J.IndexRef, pt.terrier.J.Index)):
        return TerrierStatistics(terrier_index(source))
    if isinstance(source, (str, Path)):
        return collection_statistics(_open_index(Path(source)))
    if _holds_documents(source):
        return DocumentStatistics(source, text_field)
    raise TypeError(
        f'no collection statistics from {type(source).__name__} ({source!r}): give a PisaIndex, a TerrierIndex or '
        'IndexRef, the folder of an index, a frame with a text column, an iterable of dicts or strings, a PyTerrier '
        'dataset, or an object with n_docs, query_terms and df.'
    )


def _open_index(path: Path) -> Any:  # noqa: ANN401 - any kind of index
    folder = path.parent if path.name == 'data.properties' else path
    if (folder / 'data.properties').exists():
        return pt.terrier.TerrierIndex(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f'no index at {str(path)!r}: give the folder of a Terrier or PISA index.')
    return pt.Artifact.load(str(folder))


def _holds_documents(source: Any) -> bool:  # noqa: ANN401
    if isinstance(source, pd.DataFrame) or hasattr(source, 'get_corpus_iter'):
        return True
    # A dict iterates over its keys and a pipeline over its stages: neither holds documents.
    return isinstance(source, Iterable) and not isinstance(source, (Mapping, bytes, pt.Transformer))
