"""Axioms that keep the length of a document: one query term for another, and query terms moved together or apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from pyterrier_mech.perturb._words import Span, with_words
from pyterrier_mech.perturb.base import FANG_2011, MatchingEdit, check_choice


@dataclass(frozen=True)
class TFC3(MatchingEdit):
    """TFC3: of two documents with equally many query terms, the one with more different ones scores higher.

    One drawn occurrence of a query term that the document has at least twice is replaced by a query term that it
    lacks. The axiom is about terms that discriminate equally: with a collection, the new term must be in it and must
    not be more frequent than the old one; without one, nothing is known of frequencies.

    Args:
        statistics: The collection, for its tokeniser and its document frequencies; ``None`` for the simple tokeniser.
        seed: Random seed.
    """

    citation: ClassVar[str] = FANG_2011
    expected: ClassVar[int | None] = 1

    def terms(self, query: str, text: str) -> list[str]:
        """Returns the word that is added, none where the axiom does not apply."""
        return [word for _, word in self._exchanged(query, text)]

    def __call__(self, query: str, text: str) -> str:
        """Returns the document with one query term exchanged for another."""
        for span, word in self._exchanged(query, text):
            return with_words(text, [span], [word])
        return text

    def control(self, query: str, other: str, text: str) -> tuple[str, ...]:
        """Returns the document with a repeated word that is not in the query exchanged for a word of another query."""
        return self.versions(' '.join([*self._not_in_query(query, self._pairs(text)), other]), text)

    def _exchanged(self, query: str, text: str) -> list[tuple[Span, str]]:
        """Returns what is drawn: a place, and the word that comes there; none where there is nothing to draw."""
        spans, marks = self._marked(query, text)
        counts = Counter(mark for mark in marks if mark is not None)
        pairs = {term: word for word, term in reversed(self._pairs(query))}
        missing = [term for term in pairs if term not in counts]
        choices = [(old, new) for old in counts if counts[old] > 1 for new in missing if self._no_commoner(new, old)]
        drawn = self._draw(choices, 1, query, text)
        places = [span for span, mark in zip(spans, marks) if drawn and mark == drawn[0][0]]
        return [(span, pairs[drawn[0][1]]) for span in self._draw(places, 1, query, text, 'place')]

    def _no_commoner(self, new: str, old: str) -> bool:
        return self.statistics is None or 0 < self.statistics.df(new) <= self.statistics.df(old)


@dataclass(frozen=True)
class PROX(MatchingEdit):
    """PROX: query terms that stand closer together raise the score, those that stand apart lower it.

    The same words in another order. ``'together'`` moves all occurrences of query terms to the place of the first;
    ``'apart'`` spreads them evenly over the document. Closeness is the smallest number of words from one query term to
    another one, which Tao and Zhai found to work best; where it does not change in the right direction, or the
    document has fewer than two different query terms, the text stays as it is. Punctuation stays in its place.

    Args:
        statistics: The collection, for its tokeniser and stop words; ``None`` for the simple tokeniser.
        direction: ``'together'``, which predicts 1, or ``'apart'``, which predicts -1.
        seed: Unused, nothing is drawn.
    """

    direction: str = field(default='together', kw_only=True)

    in_text: ClassVar[bool] = True
    citation: ClassVar[str] = (
        'Tao and Zhai: An Exploration of Proximity Measures in Information Retrieval. SIGIR 2007. As an axiom: Hagen, '
        'Völske, Göring and Stein: Axiomatic Result Re-Ranking. CIKM 2016.'
    )

    def __post_init__(self) -> None:
        """Checks the parameters, as ``MatchingEdit`` does, and the direction."""
        super().__post_init__()
        check_choice('direction', self.direction, ('together', 'apart'))

    @property
    def expected(self) -> int:  # type: ignore[override]
        """1 for 'together', -1 for 'apart'."""
        return 1 if self.direction == 'together' else -1

    def __call__(self, query: str, text: str) -> str:
        """Returns the document with its query terms moved."""
        spans, marks = self._marked(query, text)
        before = _distance(marks)
        if before is None:
            return text
        order = _gathered(marks) if self.direction == 'together' else _spread(marks)
        after = _distance([marks[place] for place in order])
        if after is None or (after - before) * self.expected >= 0:
            return text
        words = [text[span.start : span.end] for span in spans]
        return with_words(text, spans, [words[place] for place in order])


def _distance(marks: Sequence[str | None]) -> int | None:
    """Returns the smallest distance in words between two different query terms, None where there are not two."""
    places = [(place, mark) for place, mark in enumerate(marks) if mark is not None]
    # Of the closest two, none is between: so they are neighbours among the occurrences.
    return min((b[0] - a[0] for a, b in zip(places, places[1:]) if a[1] != b[1]), default=None)


def _gathered(marks: Sequence[str | None]) -> list[int]:
    """Returns the order of the words with all query terms at the place of the first."""
    first = next(place for place, mark in enumerate(marks) if mark is not None)
    found = [place for place, mark in enumerate(marks) if mark is not None]
    others = [place for place, mark in enumerate(marks) if mark is None]
    return [*others[:first], *found, *others[first:]]


def _spread(marks: Sequence[str | None]) -> list[int]:
    """Returns the order of the words with the query terms at equal distances, the first and last at the ends."""
    found = [place for place, mark in enumerate(marks) if mark is not None]
    others = iter([place for place, mark in enumerate(marks) if mark is None])
    at = {round(i * (len(marks) - 1) / (len(found) - 1)): place for i, place in enumerate(found)}
    return [at[place] if place in at else next(others) for place in range(len(marks))]
