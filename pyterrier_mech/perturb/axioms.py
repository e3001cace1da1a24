"""Axioms of term matching and document length: each predicts the sign of the score change.

The formulations are those of Fang, Tao and Zhai; the added term is the word as the query writes it, lower-cased.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from pyterrier_mech.perturb.base import (
    FANG_2004,
    Axiom,
    CountedAxiom,
    TextEdit,
    check_choice,
    check_count,
    checked_words,
)
from pyterrier_mech.perturb.statistics import CollectionStatistics, idf


@dataclass(frozen=True)
class _DrawnQueryTerm(CountedAxiom):
    """An axiom that adds drawn terms of the query."""

    per: str = field(default='pair', kw_only=True)

    def __post_init__(self) -> None:
        """Checks the parameters, as ``Axiom`` does, and ``per``."""
        super().__post_init__()
        check_choice('per', self.per, ('pair', 'query'))

    def _drawn(self, k: int, query: str, text: str) -> list[str]:
        key = (query,) if self.per == 'query' else (query, text)
        return self._draw((word for word, _ in self._pairs(query)), k, *key)


@dataclass(frozen=True)
class TFC1(_DrawnQueryTerm):
    """TFC1: one more occurrence of a query term raises the score.

    The term is drawn evenly from the distinct query words that are not stop words, whether or not the collection
    has them. The axiom speaks of documents of equal length: ``location='replace'`` keeps the number of words.

    Args:
        statistics: The collection, for its tokeniser and stop words; ``None`` for the simple tokeniser.
        k: Number of occurrences to add, each drawn anew; the first ``k - 1`` are those of ``k - 1``.
        per: ``'pair'``: drawn for each query and text; ``'query'``: the same for all texts of a query, as in Chen,
            Merullo and Eickhoff (SIGIR 2024).
        seed: Random seed.
        location: ``'end'``, ``'start'``, ``'sentence'`` or ``'replace'``, see ``Axiom``.
    """

    def terms(self, query: str, text: str) -> list[str]:
        """Returns ``k`` drawn query words."""
        return self._drawn(self.k, query, text)


@dataclass(frozen=True)
class TFC2(_DrawnQueryTerm):
    """TFC2: each further occurrence of a query term raises the score by less.

    The same term is added ``k`` times; it is the one that ``TFC1`` with the same seed adds first, for every ``k``, so
    that ``TFC2(k=1)`` … ``TFC2(k=5)`` trace one curve per document. ``expected`` is the sign of the whole change; that
    its steps shrink is read from the curve. ``versions`` are the document, the one with ``k`` and the one with ``2 k``
    occurrences more, and the sum by ``weights`` is how much less the second step adds.

    Args:
        statistics: The collection, for its tokeniser and stop words; ``None`` for the simple tokeniser.
        k: Number of occurrences to add.
        per: ``'pair'`` or ``'query'``, see ``TFC1``.
        seed: Random seed.
        location: ``'end'``, ``'start'``, ``'sentence'`` or ``'replace'``, see ``Axiom``.
    """

    weights: ClassVar[tuple[int, ...]] = (-1, 2, -1)

    def terms(self, query: str, text: str) -> list[str]:
        """Returns one drawn query word, ``k`` times."""
        return self._drawn(1, query, text) * self.k

    def versions(self, query: str, text: str) -> tuple[str, ...]:
        """Returns the document, and with ``k`` and ``2 k`` occurrences more."""
        once, twice = self(query, text), replace(self, k=2 * self.k)(query, text)
        return (text, once, twice) if twice != text else (text, text, text)


@dataclass(frozen=True)
class TFLNC(CountedAxiom):
    """TF-LNC: more occurrences of a query term raise the score, though the document grows by them.

    As ``TFC1`` at the end of the text, but for terms that the document has already: one of them is drawn, and added
    ``k`` times. Where the document has no query term, it stays as it is.

    Args:
        statistics: The collection, for its tokeniser and stop words; ``None`` for the simple tokeniser.
        k: Number of occurrences to add, all of one term.
        seed: Random seed.
        location: ``'end'``, ``'start'`` or ``'sentence'``; with ``'replace'`` the document does not grow.
    """

    in_text: ClassVar[bool] = True

    def terms(self, query: str, text: str) -> list[str]:
        """Returns one drawn query word that the document has, ``k`` times."""
        there = {term for _, term in self._pairs(text)}
        return self._draw((word for word, term in self._pairs(query) if term in there), 1, query, text) * self.k


@dataclass(frozen=True)
class TDC(Axiom):
    """TDC: an occurrence of the most discriminative query term raises the score.

    The term is the query word with the highest IDF, the first in the query among equals. Words that no document
    contains are skipped; without any other, the text stays as it is.

    About half of the pairs published with MechIR add another term: there words are looked up unstemmed in a stemmed
    lexicon, and a word that is missing from it counts as the rarest of all.

    Args:
        statistics: The collection that gives document frequencies; required.
        seed: Unused for the term; of the place, where ``location`` draws one.
        location: ``'end'``, ``'start'``, ``'sentence'`` or ``'replace'``, see ``Axiom``.
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
class LNC1(CountedAxiom):
    """LNC1: terms that are not in the query do not raise the score.

    ``expected`` is -1 for "not up": an unchanged score keeps the axiom too.

    Args:
        statistics: The collection, for its tokeniser, stemmer and stop words; ``None`` for the simple tokeniser. With
            a stemmer, other forms of query words are not added either.
        k: Number of terms to add, each drawn anew.
        words: Words to draw from; ``None`` for the document's own words that are neither stop words nor in the query.
        seed: Random seed.
        location: ``'end'``, ``'start'``, ``'sentence'`` or ``'replace'``, see ``Axiom``.
    """

    words: Sequence[str] | None = None

    expected: ClassVar[int | None] = -1
    strict: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Checks the parameters, as ``Axiom`` does, and stores ``words`` as a tuple."""
        super().__post_init__()
        if self.words is not None:
            object.__setattr__(self, 'words', checked_words(self.words, 'the words of the document'))

    def terms(self, query: str, text: str) -> list[str]:
        """Returns ``k`` drawn words that are not in the query."""
        pairs = self._pairs(text) if self.words is None else [(word, self._term(word)) for word in self.words]
        return self._draw(self._not_in_query(query, pairs), self.k, query, text)


@dataclass(frozen=True)
class LNC2(TextEdit):
    """LNC2: a document repeated ``k`` times, where it has a query term, does not score lower than once.

    ``expected`` is 1 for "not down": an unchanged score keeps the axiom too. The copies stand one space apart.

    Args:
        k: How often the text stands in the result, at least 2.
        seed: Unused, nothing is drawn.
    """

    k: int = 2

    citation: ClassVar[str] = FANG_2004
    expected: ClassVar[int | None] = 1
    strict: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Checks the parameters, and that ``k`` is at least 2."""
        super().__post_init__()
        check_count('k', self.k, least=2)

    def __call__(self, query: str, text: str) -> str:
        """Returns the document ``k`` times."""
        return ' '.join([text] * self.k) if text.strip() else text
