"""Document frequencies read from the files of a PISA index."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pyterrier_mech.perturb._documents import Keyed


class PisaStatistics(Keyed):
    """Statistics of a PISA index, with its own tokeniser and stemmer.

    PISA keeps stop words in the index and drops them when it retrieves, so they are dropped from queries here.

    Args:
        index: A ``pyterrier_pisa.PisaIndex``.
        stops: The stop words to drop, as ``PisaIndex`` takes them; ``None`` for those of the index.
    """

    def __init__(self, index: Any, stops: Any = None) -> None:  # noqa: ANN401 - pyterrier_pisa may be absent
        self.index = index
        self.stops = stops

    @property
    def n_docs(self) -> int:
        """Number of documents in the index."""
        return int(np.fromfile(self._file('inv.docs'), dtype=np.uint32, count=2)[1])

    def df(self, term: str) -> int:
        """Returns the number of documents that contain the index term ``term``, 0 for one that is not in the index."""
        return self._frequencies.get(term, 0)

    def query_terms(self, text: str) -> list[tuple[str, str]]:
        """Returns (word, index term) for every word of ``text`` that is not a stop word.

        Raises:
            ValueError: If stemming changes the number of words, so that words and terms cannot be paired.
        """
        import pyterrier_pisa

        words, terms = pyterrier_pisa.tokenize(text), self.index.tokenize(text)
        if len(words) != len(terms):
            raise ValueError(
                f'{self.index!r} makes {len(terms)} terms of the {len(words)} words in {text!r}: {terms} of {words}. '
                'Use an index whose stemmer keeps one term per word.'
            )
        return [(word, term) for word, term in zip(words, terms) if word not in self._stop_words]

    @cached_property
    def _stop_words(self) -> frozenset[str]:
        from pyterrier_pisa.stopwords import _STOPWORDS

        stops = self.index.stops if self.stops is None else self.stops
        if isinstance(stops, Enum):
            stops = stops.value
        return frozenset(_STOPWORDS.get(stops, ()) if isinstance(stops, str) else stops)

    @cached_property
    def _frequencies(self) -> dict[str, int]:
        # inv.docs is a row of sequences, each led by its length: the number of documents (one value), then the
        # documents of every term in the order of fwd.terms. Only the lengths are wanted, so each hop skips a list.
        # A memoryview, because it gives plain integers several times faster than a memmap does.
        numbers = np.memmap(self._file('inv.docs'), dtype=np.uint32, mode='r').data
        lengths, position = [], 2
        while position < len(numbers):
            lengths.append(numbers[position])
            position += 1 + numbers[position]
        terms = self._file('fwd.terms').read_text(encoding='utf-8').rstrip('\n').split('\n')
        if position != len(numbers) or len(lengths) != len(terms):
            raise ValueError(
                f'{self.index!r}: inv.docs does not hold one list for every term of fwd.terms. Index again.'
            )
        return dict(zip(terms, lengths))

    def _file(self, name: str) -> Path:
        path = Path(self.index.path) / name
        if not path.exists():
            raise FileNotFoundError(f'{self.index!r} has no {name}: index the documents before asking for statistics.')
        return path

    def _key(self) -> tuple[object, ...]:
        stops = self.index.stops if self.stops is None else self.stops
        if not isinstance(stops, str) and isinstance(stops, Iterable):
            stops = frozenset(stops)
        return PisaStatistics, Path(self.index.path).resolve(), self.index.stemmer, stops

    def __getstate__(self) -> dict[str, Any]:
        return {'index': self.index, 'stops': self.stops}

    def __repr__(self) -> str:
        return f'PisaStatistics({self.index!r}' + ('' if self.stops is None else f', stops={self.stops!r}') + ')'
