"""Plain edits: what changes about a document that no axiom of matching speaks of. Most predict no sign.

They ask how much a ranker minds: the case of letters, punctuation, order, typing errors, stop words, synonyms. Edits of
this kind are the probes of MacAvaney et al.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pyterrier_mech.draws import generator
from pyterrier_mech.perturb._documents import _in_word
from pyterrier_mech.perturb._words import Span, sentences, with_words, word_spans
from pyterrier_mech.perturb.base import FANG_2004, MatchingEdit, TextEdit, check_choice, check_count

ABNIRML = (
    'MacAvaney, Feldman, Goharian, Downey and Cohan: ABNIRML: Analyzing the Behavior of Neural IR Models. TACL 2022.'
)


@dataclass(frozen=True)
class ChangeCase(TextEdit):
    """All letters in upper or lower case. A ranker that lower-cases its input does not see it.

    Args:
        to: ``'upper'`` or ``'lower'``.
        seed: Unused, nothing is drawn.
    """

    to: str = 'upper'

    citation: ClassVar[str] = ABNIRML

    def __post_init__(self) -> None:
        """Checks the parameters."""
        super().__post_init__()
        check_choice('to', self.to, ('upper', 'lower'))

    def __call__(self, query: str, text: str) -> str:
        """Returns the document in the other case."""
        return text.upper() if self.to == 'upper' else text.lower()


@dataclass(frozen=True)
class RemovePunctuation(TextEdit):
    """Every run of characters that are neither letters, digits nor white space becomes a space, or nothing at an end.

    Args:
        seed: Unused, nothing is drawn.
    """

    citation: ClassVar[str] = ABNIRML

    def __call__(self, query: str, text: str) -> str:
        """Returns the document without punctuation; where there is none, as it is."""
        if all(_in_word(character) or character.isspace() for character in text):
            return text
        kept = (character if _in_word(character) or character.isspace() else ' ' for character in text)
        return ' '.join(''.join(kept).split())


@dataclass(frozen=True)
class ShuffleSentences(TextEdit):
    """The sentences in another order, never the original one.

    A sentence ends at a full stop, exclamation or question mark before white space. One sentence stays as it is.

    Args:
        seed: Random seed.
    """

    citation: ClassVar[str] = ABNIRML

    def __call__(self, query: str, text: str) -> str:
        """Returns the document with its sentences shuffled."""
        return _other_order(sentences(text), text, int(self.seed), query)


@dataclass(frozen=True)
class ShuffleWords(TextEdit):
    """The words, cut at white space, in another order, never the original one.

    Args:
        seed: Random seed.
    """

    citation: ClassVar[str] = ABNIRML

    def __call__(self, query: str, text: str) -> str:
        """Returns the document with its words shuffled."""
        return _other_order(text.split(), text, int(self.seed), query)


def _other_order(parts: list[str], text: str, seed: int, query: str) -> str:
    if len(set(parts)) < 2:
        return text
    # Of two parts, every second draw is the original order: it is drawn again, at most till the rotation helps.
    for attempt in range(20):
        drawn = generator(seed, query, text, attempt)
        order = [part for _, part in sorted((drawn.random(), place) for place in range(len(parts)))]
        if (new := [parts[place] for place in order]) != parts:
            return ' '.join(new)
    return ' '.join([*parts[1:], parts[0]])


@dataclass(frozen=True)
class Typos(TextEdit):
    """Two neighbouring letters are exchanged in ``k`` drawn words of at least four letters; the first letter stays.

    Args:
        k: Number of words; where fewer can be changed, all of them.
        seed: Random seed.
    """

    k: int = 1

    citation: ClassVar[str] = ABNIRML

    def __post_init__(self) -> None:
        """Checks the parameters."""
        super().__post_init__()
        check_count('k', self.k)

    def __call__(self, query: str, text: str) -> str:
        """Returns the document with typing errors."""
        drawn = generator(int(self.seed), query, text)
        wrong = [(drawn.random(), span, _typed(text[span.start : span.end], drawn.random())) for span in _long(text)]
        chosen = sorted((span, word) for _, span, word in sorted(wrong)[: self.k])
        return with_words(text, [span for span, _ in chosen], [word for _, word in chosen])


def _long(text: str) -> list[Span]:
    """Returns the words that have two different neighbours behind their first letter, and four letters."""
    spans = (span for span in word_spans(text) if span.end - span.start >= 4)
    return [span for span in spans if len(set(text[span.start + 1 : span.end])) > 1]


def _typed(word: str, share: float) -> str:
    places = [place for place in range(1, len(word) - 1) if word[place] != word[place + 1]]
    place = places[int(share * len(places))]
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


@dataclass(frozen=True)
class RemoveStopWords(MatchingEdit):
    """Words that the collection does not index are taken out, and one space is left between the others.

    Args:
        statistics: The collection, whose stop words go; ``None`` for a short list of English function words.
        seed: Unused, nothing is drawn.
    """

    citation: ClassVar[str] = ABNIRML

    def __call__(self, query: str, text: str) -> str:
        """Returns the document without stop words."""
        return _without(text, [span for span in word_spans(text) if not self._pairs(text[span.start : span.end])])


@dataclass(frozen=True)
class RemoveQueryTerm(MatchingEdit):
    """All occurrences of one drawn query term are taken out.

    TF-LNC read backwards: the document with more occurrences, and longer by just these, scores higher. So the score
    should fall.

    Args:
        statistics: The collection, for its tokeniser and stop words; ``None`` for the simple tokeniser.
        seed: Random seed.
    """

    citation: ClassVar[str] = FANG_2004
    expected: ClassVar[int | None] = -1
    in_text: ClassVar[bool] = True

    def __call__(self, query: str, text: str) -> str:
        """Returns the document without the term."""
        spans, marks = self._marked(query, text)
        drawn = self._draw((mark for mark in marks if mark is not None), 1, query, text)
        return _without(text, [span for span, mark in zip(spans, marks) if drawn == [mark]])


@dataclass(frozen=True)
class ReplaceQueryTerm(MatchingEdit):
    """All occurrences of one drawn query term are replaced by a synonym, drawn from a list of your own.

    Args:
        statistics: The collection, for its tokeniser and stemmer; ``None`` for the simple tokeniser. With a stemmer, a
            word of the list stands for all its forms.
        synonyms: For words, lists of what may stand for them: ``{'bread': ['loaf', 'baguette']}``.
        seed: Random seed.
    """

    synonyms: Any = field(kw_only=True)

    citation: ClassVar[str] = ABNIRML

    def __post_init__(self) -> None:
        """Checks the parameters, and stores ``synonyms`` as a tuple of pairs.

        Raises:
            ValueError: If ``synonyms`` does not give a list of words for each word.
        """
        super().__post_init__()
        given = self.synonyms
        pairs = tuple(given.items()) if isinstance(given, Mapping) else given
        if not _is_list(pairs) or not all(_is_list(pair) and len(pair) == 2 and _is_list(pair[1]) for pair in pairs):
            raise ValueError(f"synonyms={given!r}: give for each word a list of words, such as {{'bread': ['loaf']}}.")
        object.__setattr__(self, 'synonyms', tuple((word, tuple(words)) for word, words in pairs))

    def __call__(self, query: str, text: str) -> str:
        """Returns the document with a synonym for the term."""
        synonyms = {self._term(word): words for word, words in self.synonyms}
        spans, marks = self._marked(query, text)
        for old in self._draw((mark for mark in marks if mark in synonyms), 1, query, text):
            (new,) = self._draw(synonyms[old], 1, query, text, 'synonym')
            places = [span for span, mark in zip(spans, marks) if mark == old]
            return with_words(text, places, [new] * len(places))
        return text


def _is_list(words: Any) -> bool:
    return isinstance(words, Sequence) and not isinstance(words, str) and len(words) > 0


def _without(text: str, spans: Sequence[Span]) -> str:
    """Returns a text without some words and one of the gaps beside each; as it is where there are none."""
    if not spans:
        return text
    return with_words(text, [_with_gap(text, span) for span in spans], [''] * len(spans)).strip()


def _with_gap(text: str, span: Span) -> Span:
    """Returns a word with the white space behind it; before it, where there is none behind."""
    start, end = span
    while end < len(text) and text[end].isspace():
        end += 1
    while end == span.end and start > 0 and text[start - 1].isspace():
        start -= 1
    return Span(start, end)
