"""What axioms and plain edits have in common: small frozen values that draw by (seed, query, text) alone.

``TextEdit`` is any edit of a document; ``expected`` says which sign it predicts for the change of the score, None for
no prediction. ``MatchingEdit`` knows which words of a document are query terms. ``Axiom`` adds terms to a document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any, ClassVar

from pyterrier_mech.draws import generator, shuffled
from pyterrier_mech.perturb._documents import plain_terms, plain_words
from pyterrier_mech.perturb._words import Span, sentence_ends, with_words, word_spans
from pyterrier_mech.perturb.statistics import collection_statistics

FANG_2004 = 'Fang, Tao and Zhai: A Formal Study of Information Retrieval Heuristics. SIGIR 2004.'
FANG_2011 = 'Fang, Tao and Zhai: Diagnostic Evaluation of Information Retrieval Models. ACM TOIS 29(2), 2011.'
LOCATIONS = ('end', 'start', 'sentence', 'replace')


@dataclass(frozen=True)
class TextEdit:
    """An edit of a document for a query, with or without a prediction.

    Attributes:
        citation: Where the edit, or its prediction, comes from.
        expected: The predicted sign of the score change: 1, -1, or None where nothing is predicted.
        strict: Whether an unchanged score breaks the prediction.
        weights: The prediction is about the sum of the scores of ``versions``, each times its weight.

    Args:
        seed: Random seed.
    """

    seed: int = field(default=0, kw_only=True)

    citation: ClassVar[str] = ''
    expected: ClassVar[int | None] = None
    strict: ClassVar[bool] = True
    weights: ClassVar[tuple[int, ...]] = (-1, 1)

    def __post_init__(self) -> None:
        """Checks the parameters.

        Raises:
            ValueError: If ``seed`` is not a whole number.
        """
        if not isinstance(self.seed, Integral):
            raise ValueError(f'seed={self.seed!r}: must be a whole number.')

    def __call__(self, query: str, text: str) -> str:
        """Returns the edited document, or the same where there is nothing to do."""
        raise NotImplementedError(f'{type(self).__name__} must say what it makes of a text.')

    @property
    def name(self) -> str:
        """The class, with the numbers and words among its settings that are not the default, but for the seed."""
        others = [one for one in fields(self) if one.name != 'seed']
        shown = [(one.name, getattr(self, one.name)) for one in others if one.default != getattr(self, one.name)]
        settings = ', '.join(f'{name}={value!r}' for name, value in shown if isinstance(value, (int, float, str)))
        return f'{type(self).__name__}({settings})' if settings else type(self).__name__

    def agrees(self, change: float) -> bool:
        """Returns whether a score change is what the edit predicts.

        Raises:
            ValueError: If it predicts nothing.
        """
        if self.expected is None:
            raise ValueError(f'{self.name} predicts no sign, so no change agrees or disagrees with it.')
        return change * self.expected > 0 or (not self.strict and change == 0)

    def versions(self, query: str, text: str) -> tuple[str, ...]:
        """Returns the documents that the prediction compares, the original first."""
        return text, self(query, text)

    def control(self, query: str, other: str, text: str) -> tuple[str, ...]:
        """Returns the versions of a document by the same edit made for another query, to compare with."""
        return self.versions(other, text)

    def _draw(self, items: Iterable[Any], k: int, *key: str) -> list[Any]:
        """Returns ``k`` items, each drawn anew and evenly from the distinct ones; none where there are none."""
        distinct, drawn = list(dict.fromkeys(items)), generator(int(self.seed), *key)
        return [distinct[int(drawn.random() * len(distinct))] for _ in range(k if distinct else 0)]


@dataclass(frozen=True)
class MatchingEdit(TextEdit):
    """An edit that asks a collection which words of a document are terms of the query.

    Args:
        statistics: Anything that ``collection_statistics`` takes; ``None`` for the simple tokeniser alone.
        seed: Random seed.
    """

    statistics: Any = None

    # Whether the edit needs query terms in the document: those of another query are mostly not there.
    in_text: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Checks the parameters and wraps the statistics, which are read at the first call.

        Raises:
            TypeError: If no statistics can be had from ``statistics``.
        """
        super().__post_init__()
        if self.statistics is not None:
            object.__setattr__(self, 'statistics', collection_statistics(self.statistics))

    def has(self, text: str, word: str) -> bool:
        """Returns whether a text contains a word, in any form that the collection does not tell apart."""
        terms = {term for _, term in self._pairs(text)}
        return self._term(word) in terms or word.lower() in plain_words(text)

    def control(self, query: str, other: str, text: str) -> tuple[str, ...]:
        """Returns the versions of a document by the same edit made for another query.

        An edit of query terms in the document is made for words of the document instead: as many drawn ones, neither
        stop words nor in the query, as it has different query terms.
        """
        if not self.in_text:
            return super().control(query, other, text)
        others = list(dict.fromkeys(self._not_in_query(query, self._pairs(text))))
        terms = {mark for mark in self._marked(query, text)[1] if mark is not None}
        return self.versions(' '.join(shuffled(others, int(self.seed), query, text, 'control')[: len(terms)]), text)

    def _pairs(self, text: str) -> list[tuple[str, str]]:
        return plain_terms(text) if self.statistics is None else self.statistics.query_terms(text)

    def _term(self, word: str) -> str:
        pairs = self._pairs(word)
        return pairs[0][1] if pairs else word.lower()

    def _not_in_query(self, query: str, pairs: Iterable[tuple[str, str]]) -> list[str]:
        """Returns the words whose terms are not in the query. Stop words of the query are query words too."""
        in_query = {term for _, term in self._pairs(query)} | set(plain_words(query))
        return [word for word, term in pairs if word.lower() not in in_query and term not in in_query]

    def _marked(self, query: str, text: str) -> tuple[list[Span], list[str | None]]:
        """Returns where the words of a text stand, and for each the query term that it is, None for other words."""
        in_query = {term for _, term in self._pairs(query)}
        spans = word_spans(text)
        words = [text[span.start : span.end] for span in spans]
        terms = {word: next((term for _, term in self._pairs(word)), None) for word in dict.fromkeys(words)}
        return spans, [terms[word] if terms[word] in in_query else None for word in words]


@dataclass(frozen=True)
class Axiom(MatchingEdit):
    """Adds the terms that a subclass chooses in ``terms``, one space apart; without any, the text stays as it is.

    Args:
        statistics: Anything that ``collection_statistics`` takes; ``None`` for the simple tokeniser alone.
        seed: Random seed.
        location: Where the terms go: ``'end'`` or ``'start'`` of the document; ``'sentence'``, between two sentences,
            a drawn place (the end where there is one sentence); ``'replace'``, in the places of as many drawn words
            that are not in the query, so that the document keeps its length in words (without enough of them, the
            text stays as it is).
    """

    location: str = field(default='end', kw_only=True)

    citation: ClassVar[str] = FANG_2004
    expected: ClassVar[int | None] = 1

    def __post_init__(self) -> None:
        """Checks the parameters.

        Raises:
            ValueError: If ``location`` is unknown.
        """
        super().__post_init__()
        check_choice('location', self.location, LOCATIONS)

    def terms(self, query: str, text: str) -> list[str]:
        """Returns the words to add, none where the axiom does not apply."""
        raise NotImplementedError(f'{type(self).__name__} must say which terms it adds.')

    def __call__(self, query: str, text: str) -> str:
        """Returns the document with the terms added."""
        terms = self.terms(query, text)
        if not terms:
            return text
        if self.location == 'replace':
            return self._replaced(terms, query, text)
        added = ' '.join(terms)
        ends = sentence_ends(text) if self.location == 'sentence' else []
        for end in self._draw(ends, 1, query, text, 'location'):
            return f'{text[: end.end]}{added} {text[end.end :]}'
        return f'{added} {text}' if self.location == 'start' else f'{text} {added}'

    def _replaced(self, terms: Sequence[str], query: str, text: str) -> str:
        spans, marks = self._marked(query, text)
        others = set(self._not_in_query(query, ((w, w) for w in plain_words(text)))) - {t.lower() for t in terms}
        free = [s for s, mark in zip(spans, marks) if mark is None and text[s.start : s.end].lower() in others]
        if len(free) < len(terms):
            return text
        drawn = generator(int(self.seed), query, text, 'location')
        chosen = sorted(sorted((drawn.random(), span) for span in free)[: len(terms)], key=lambda one: one[1])
        return with_words(text, [span for _, span in chosen], terms)


@dataclass(frozen=True)
class CountedAxiom(Axiom):
    """An axiom that adds ``k`` terms."""

    k: int = 1

    def __post_init__(self) -> None:
        """Checks the parameters, as ``Axiom`` does, and that ``k`` is at least 1."""
        super().__post_init__()
        check_count('k', self.k)


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises a ValueError if a setting is not a whole number of at least ``least``."""
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f'{name}={value!r}: must be a whole number of at least {least}.')


def check_choice(name: str, value: Any, options: Sequence[str]) -> None:
    """Raises a ValueError if a setting is not among its options."""
    if value not in options:
        shown = ', '.join(map(repr, options[:-1]))
        raise ValueError(f'{name}={value!r}: must be {shown} or {options[-1]!r}.')


def checked_words(words: Any, instead: str) -> tuple[str, ...]:
    """Returns a setting that lists words as a tuple.

    Raises:
        ValueError: If it is not a list of words. A set is refused too: its order, and so the draw, changes from
            process to process.
    """
    if isinstance(words, str) or not isinstance(words, Sequence):
        raise ValueError(f'words={words!r}: give a list of words, or None for {instead}.')
    if not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise ValueError(f'words={words!r}: give at least one word and no empty ones, or None.')
    return tuple(words)
