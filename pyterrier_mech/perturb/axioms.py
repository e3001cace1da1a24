"""Axioms of term matching as perturbations: each adds terms to a document and predicts the sign of the score change.

An axiom is a small frozen value. What it draws depends on (seed, query, text) only, never on the order of calls. The
formulations are those of Fang, Tao and Zhai; the appended term is the word as the query writes it, lower-cased.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, ClassVar

from pyterrier_mech.draws import generator
from pyterrier_mech.perturb._documents import plain_terms, plain_words
from pyterrier_mech.perturb.statistics import CollectionStatistics, collection_statistics, idf


@dataclass(frozen=True)
class Axiom:
    """Adds the terms that a subclass chooses in ``terms``, one space apart; without any, the text stays as it is.

    Args:
        statistics: Anything that ``collection_statistics`` takes; ``None`` for the simple tokeniser alone.
        seed: Random seed.
        location: Where the terms go, ``'end'`` or ``'start'`` of the document.
    """

    statistics: Any = None
    seed: int = field(default=0, kw_only=True)
    location: str = field(default='end', kw_only=True)

    citation: ClassVar[str] = 'Fang, Tao and Zhai: A Formal Study of Information Retrieval Heuristics. SIGIR 2004.'
    expected: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Checks the parameters and wraps the statistics, which are read at the first call.

        Raises:
            TypeError: If no statistics can be had from ``statistics``.
            ValueError: If ``seed`` is not a whole number, or ``location`` is unknown.
        """
        if not isinstance(self.seed, Integral):
            raise ValueError(f'seed={self.seed!r}: must be a whole number.')
        if self.location not in ('end', 'start'):
            raise ValueError(f"location={self.location!r}: must be 'end' or 'start'.")
        if self.statistics is not None:
            object.__setattr__(self, 'statistics', collection_statistics(self.statistics))

    def terms(self, query: str, text: str) -> list[str]:
        """Returns the words to add, none where the axiom does not apply."""
        raise NotImplementedError(f'{type(self).__name__} must say which terms it adds.')

    def __call__(self, query: str, text: str) -> str:
        """Returns the document with the terms added."""
        terms = ' '.join(self.terms(query, text))
        if not terms:
            return text
        return f'{text} {terms}' if self.location == 'end' else f'{terms} {text}'

    def agrees(self, change: float) -> bool:
        """Returns whether a score change is what the axiom predicts."""
        return change * self.expected > 0

    def _pairs(self, text: str) -> list[tuple[str, str]]:
        return plain_terms(text) if self.statistics is None else self.statistics.query_terms(text)

    def _draw(self, words: Iterable[str], k: int, query: str, text: str) -> list[str]:
        distinct, drawn = list(dict.fromkeys(words)), generator(int(self.seed), query, text)
        return [distinct[int(drawn.random() * len(distinct))] for _ in range(k if distinct else 0)]


@dataclass(frozen=True)
class _Counted(Axiom):
    """An axiom that adds ``k`` terms."""

    k: int = 1

    def __post_init__(self) -> None:
        """Checks the parameters, as ``Axiom`` does, and that ``k`` is at least 1."""
        super().__post_init__()
        if not isinstance(self.k, Integral) or self.k < 1:
            raise ValueError(f'k={self.k!r}: must be a whole number of at least 1.')


@dataclass(frozen=True)
class TFC1(_Counted):
    """TFC1: one more occurrence of a query term raises the score.

    The term is drawn evenly from the distinct query words that are not stop words, whether or not the collection
    has them.

    Args:
        statistics: The collection, for its tokeniser and stop words; ``None`` for the simple tokeniser.
        k: Number of occurrences to add, each drawn anew; the first ``k - 1`` are those of ``k - 1``.
        seed: Random seed.
        location: ``'end'`` or ``'start'``.
    """

    def terms(self, query: str, text: str) -> list[str]:
        """Returns ``k`` drawn query words."""
        return self._draw((word for word, _ in self._pairs(query)), self.k, query, text)


@dataclass(frozen=True)
class TFC2(_Counted):
    """TFC2: each further occurrence of a query term raises the score by less.

    The same term is added ``k`` times; it is the one that ``TFC1`` with the same seed adds first, for every ``k``, so
    that ``TFC2(k=1)`` … ``TFC2(k=5)`` trace one curve per document. ``expected`` is the sign of the whole change;
    that its steps shrink is read from the curve.

    Args:
        statistics: The collection, for its tokeniser and stop words; ``None`` for the simple tokeniser.
        k: Number of occurrences to add.
        seed: Random seed.
        location: ``'end'`` or ``'start'``.
    """

    def terms(self, query: str, text: str) -> list[str]:
        """Returns one drawn query word, ``k`` times."""
        return self._draw((word for word, _ in self._pairs(query)), 1, query, text) * self.k


@dataclass(frozen=True)
class TDC(Axiom):
    """TDC: an occurrence of the most discriminative query term raises the score.

    The term is the query word with the highest IDF, the first in the query among equals. Words that no document
    contains are skipped; without any other, the text stays as it is.

    About half of the pairs published with MechIR add another term: there words are looked up unstemmed in a stemmed
    lexicon, and a word that is missing from it counts as the rarest of all.

    Args:
        statistics: The collection that gives document frequencies; required.
        seed: Unused, nothing is drawn.
        location: ``'end'`` or ``'start'``.
    """

    def __post_init__(self) -> None:
        """Checks the parameters, as ``Axiom`` does, and that there are statistics."""
        if self.statistics is None:
            raise ValueError('statistics=None: TDC needs document frequencies; give an index or documents, TDC(index).')
        super().__post_init__()

    def terms(self, query: str, text: str) -> list[str]:
        """Returns the query word with the highest IDF."""
        statistics: CollectionStatistics = self.statistics
        known = [(word, term) for word, term in statistics.query_terms(query) if statistics.df(term) > 0]
        return [max(known, key=lambda pair: idf(statistics, pair[1]))[0]] if known else []


@dataclass(frozen=True)
class LNC1(_Counted):
    """LNC1: terms that are not in the query do not raise the score.

    ``expected`` is -1 for "not up": an unchanged score keeps the axiom too.

    Args:
        statistics: The collection, for its tokeniser, stemmer and stop words; ``None`` for the simple tokeniser. With
            a stemmer, other forms of query words are not added either.
        k: Number of terms to add, each drawn anew.
        words: Words to draw from; ``None`` for the document's own words that are neither stop words nor in the query.
        seed: Random seed.
        location: ``'end'`` or ``'start'``.
    """

    words: Sequence[str] | None = None

    expected: ClassVar[int] = -1

    def __post_init__(self) -> None:
        """Checks the parameters, as ``Axiom`` does, and stores ``words`` as a tuple."""
        super().__post_init__()
        if self.words is None:
            return
        # A set is refused with the rest: its order, and so the draw, changes from process to process.
        if isinstance(self.words, str) or not isinstance(self.words, Sequence):
            raise ValueError(f'words={self.words!r}: give a list of words, or None for the words of the document.')
        if not self.words or not all(isinstance(word, str) and word.strip() for word in self.words):
            raise ValueError(f'words={self.words!r}: give at least one word and no empty ones, or None.')
        object.__setattr__(self, 'words', tuple(self.words))

    def agrees(self, change: float) -> bool:
        """Returns whether the score did not rise."""
        return change <= 0

    def terms(self, query: str, text: str) -> list[str]:
        """Returns ``k`` drawn words that are not in the query."""
        candidates = self._pairs(text) if self.words is None else [(word, self._term(word)) for word in self.words]
        # Stop words of the query are query words too, though no pair holds them.
        in_query = {term for _, term in self._pairs(query)} | set(plain_words(query))
        others = [word for word, term in candidates if word.lower() not in in_query and term not in in_query]
        return self._draw(others, self.k, query, text)

    def _term(self, word: str) -> str:
        pairs = self._pairs(word)
        return pairs[0][1] if pairs else word.lower()
