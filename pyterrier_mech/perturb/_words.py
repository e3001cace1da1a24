"""The words of a text and where they stand, so that edits leave punctuation and white space in their places."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from pyterrier_mech.perturb._documents import _WORD, _in_word, plain_words

_BOUNDARY = re.compile(r'(?<=[.!?])\s+')


class Span(NamedTuple):
    """Where a word stands in a text."""

    start: int
    end: int


def word_spans(text: str) -> list[Span]:
    """Returns where the words of a text stand; they are the words of ``plain_words``."""
    if text.isascii():
        return [Span(*match.span()) for match in _WORD.finditer(text)]
    return list(_runs(text))


def _runs(text: str) -> Iterator[Span]:
    start = 0
    for inside, run in groupby(text, _in_word):
        end = start + sum(1 for _ in run)
        if inside and plain_words(text[start:end]):
            yield Span(start, end)
        start = end


def with_words(text: str, spans: Iterable[Span], words: Iterable[str]) -> str:
    """Returns a text with other words in the places of some; between them it stays as it is."""
    parts, position = [], 0
    for span, word in zip(spans, words, strict=True):
        parts += [text[position : span.start], word]
        position = span.end
    return ''.join(parts) + text[position:]


def sentences(text: str) -> list[str]:
    """Returns the sentences of a text: it is cut at white space after a full stop, exclamation or question mark."""
    return [part for part in _BOUNDARY.split(text) if part]


def sentence_ends(text: str) -> list[Span]:
    """Returns the white space between the sentences of a text."""
    return [Span(*match.span()) for match in _BOUNDARY.finditer(text) if 0 < match.start() and match.end() < len(text)]
