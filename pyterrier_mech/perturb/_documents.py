"""Document frequencies counted from the documents themselves: a frame, an iterable or a PyTerrier dataset."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property
from itertools import dropwhile, groupby
from typing import Any

import pandas as pd

_WORD = re.compile(r'[^\W_]+')

# Function words that questions are made of. 'who' and 'can' stay, as they do in Terrier's list.
STOP_WORDS = frozenset(
    'a an and are as at be been but by could did do does for from had has have how if in into is it its many may much '
    'my of often on or our own s should so some t than that the their them then there these they this those to was '
    'were what when where which why will with would you your'.split()
)


def plain_words(text: str) -> list[str]:
    """Returns the lower-cased runs of letters and digits in a text, with the combining marks that follow them."""
    text = text.lower()
    if text.isascii():
        return _WORD.findall(text)
    runs = (''.join(dropwhile(_is_mark, run)) for inside, run in groupby(text, _in_word) if inside)
    return [word for word in runs if word]


@cache
def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith('M')


@cache
def _in_word(character: str) -> bool:
    return character.isalnum() or _is_mark(character)


def plain_terms(text: str) -> list[tuple[str, str]]:
    """Returns the words of a text that are not in ``STOP_WORDS``, without stemming.

    Returns:
        A pair (word, word) for every word in text order: without stemming the word is its own index term.
    """
    return [(word, word) for word in plain_words(text) if word not in STOP_WORDS]


class Keyed:
    """What is equal, and hashes, by `_key`, which subclasses give."""

    def _key(self) -> tuple[object, ...]:
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, type(self)) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())


class DocumentStatistics(Keyed):
    """Statistics of documents that are in no index.

    The documents are read once, when the first number is asked for, and each counts once per term. Two objects are
    equal if they hold the same source object and read the same field.

    Args:
        source: A frame with a text column, an iterable of dicts or strings, or a PyTerrier dataset. An iterator is
            used up by the count.
        text_field: Column or key that holds the text of a document.
    """

    def __init__(self, source: pd.DataFrame | Iterable[Any] | Any, text_field: str = 'text') -> None:
        self.source = source
        self.text_field = text_field

    @property
    def n_docs(self) -> int:
        """Number of documents."""
        return self._counts[0]

    def df(self, term: str) -> int:
        """Returns the number of documents that contain ``term``, 0 for a term that none contains."""
        return self._counts[1].get(term, 0)

    def query_terms(self, text: str) -> list[tuple[str, str]]:
        """Returns the words of ``text`` by the simple tokeniser, see ``plain_terms``."""
        return plain_terms(text)

    @cached_property
    def _counts(self) -> tuple[int, dict[str, int]]:
        n_docs, counts = 0, Counter[str]()
        for text in self._texts():
            n_docs += 1
            counts.update(set(plain_words(text)))
        return n_docs, dict(counts)

    def _texts(self) -> Iterator[str]:
        for position, document in enumerate(self._documents()):
            if isinstance(document, Mapping):
                if self.text_field not in document:
                    raise ValueError(
                        f'document {position} has no field {self.text_field!r}, only {list(document)}. '
                        'Name the field with collection_statistics(source, text_field=...).'
                    )
                document = document[self.text_field]
            if not isinstance(document, str):
                raise TypeError(
                    f'document {position} is {document!r}: give strings, or dicts with a string in {self.text_field!r}.'
                )
            yield document

    def _documents(self) -> Iterable[Any]:
        if isinstance(self.source, pd.DataFrame):
            if self.text_field not in self.source.columns:
                raise ValueError(
                    f'the frame has no column {self.text_field!r}, only {list(self.source.columns)}. '
                    'Name the column with collection_statistics(frame, text_field=...).'
                )
            return self.source[self.text_field]
        corpus_iter = getattr(self.source, 'get_corpus_iter', None)
        return self.source if corpus_iter is None else corpus_iter(verbose=False)

    def _key(self) -> tuple[object, ...]:
        return DocumentStatistics, id(self.source), self.text_field

    def __repr__(self) -> str:
        if isinstance(self.source, (pd.DataFrame, list, tuple)):
            kind = 'frame' if isinstance(self.source, pd.DataFrame) else type(self.source).__name__
            source = f'<{kind} of {len(self.source)} documents>'
        else:
            source = repr(self.source)
        return f'DocumentStatistics({source}, text_field={self.text_field!r})'
