"""Whole words of token positions, and the position types of the literature that follow from them.

A word in several pieces matches as a whole: the piece "the" of *theracort* is not a match of *theraderm*. Words are
compared in lower case, as they stand in the text; punctuation belongs to no word.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import pandas as pd

from pyterrier_mech.frames import Fields

Placed = tuple[str, int | None, int | None]
"""Of one position: its field ('' for a special token), and its token's place there in the first and last version."""


@dataclass(frozen=True)
class Words:
    """The words of one text: which word each token belongs to, and how each is written.

    Attributes:
        owners: The number of its word for every token.
        names: Every word in lower case; '' for punctuation and for a prompt.
    """

    owners: Sequence[int]
    names: Sequence[str]

    def name(self, token: int | None) -> str:
        """Returns the word of a token; '' where there is no token."""
        return '' if token is None else self.names[self.owners[token]]


class Tower(Protocol):
    """What has positions: see `inputs.Tower`."""

    def placed(self, row: int) -> Sequence[Placed]:
        """Returns field and token of every position of a row."""

    def changed(self, row: int) -> Sequence[bool]:
        """Returns for every position of a row whether the last version has a token of its own there."""

    def types(self, row: int, inserted: bool = True) -> Sequence[str]:
        """Returns the basic types."""


class RowWords:
    """The words of all rows of some inputs, found when they are first asked for."""

    def __init__(self, model: Any, towers: Sequence[Tower], versions: Sequence[Fields], problems: Sequence[str]):
        """Keeps the texts.

        Args:
            model: The ranker.
            towers: Its inputs.
            versions: Query and text of every row: the original and the perturbed one, or one version.
            problems: For every row why it cannot be patched, or ''.
        """
        self.model, self.towers, self.versions, self.problems = model, towers, versions, problems

    @cached_property
    def _words(self) -> list[dict[str, list[Words]]]:
        return [self.model.words_of(one) for one in self.versions]

    def of(self, tower: Tower, row: int) -> list[str]:
        """Returns the word of every position of a row in the last version; '' where there is none."""
        return ['' if word is None else self._name(row, *word) for word in self.instances(tower, row)]

    def instances(self, tower: Tower, row: int) -> list[tuple[str, int] | None]:
        """Returns which word of which field stands at every position of a row in the last version, None for none."""
        words = self._words[-1]
        return [
            (field, words[field][row].owners[after]) if after is not None else None
            for field, _, after in tower.placed(row)
        ]

    def query(self, row: int) -> set[str]:
        """Returns the words of the query, of both versions."""
        return {name for words in self._words for name in words['query'][row].names} - {''}

    def added(self, row: int) -> set[str]:
        """Returns the words that an edit has put into a row: the perturbed version has more of them, in its input."""
        if self.problems[row] or len(self._words) < 2:
            return set()
        more = set()
        for field, before in self._words[0].items():
            more |= set(Counter(self._words[1][field][row].names) - Counter(before[row].names))
        seen = set()
        for tower in self.towers:
            names = self.of(tower, row)
            seen |= {name for name, changed in zip(names, tower.changed(row), strict=True) if changed}
        return (more & seen) - {''}

    def types(self, tower: Tower, row: int, inserted: bool = True) -> list[str]:
        """Returns the type of every position of a row, one of `LITERATURE`."""
        added, query = self.added(row), self.query(row)
        words = self.instances(tower, row)
        own = {word for word, changed in zip(words, tower.changed(row), strict=True) if changed}
        basic = tower.types(row, inserted)
        last_separator = max((place for place, kind in enumerate(basic) if kind == 'sep'), default=-1)
        types = []
        for place, (kind, (field, before, _), word) in enumerate(zip(basic, tower.placed(row), words, strict=True)):
            if kind == 'sep':
                types.append('sep_last' if place == last_separator else 'sep_first')
            elif kind in ('cls', 'inserted', 'prompt'):
                types.append(kind)
            else:
                # What only the original has is one of its words.
                name = self._words[0][field][row].name(before) if word is None else self._name(row, *word)
                types.append(_type(field, name, name in added and word not in own, query))
        return types

    def _name(self, row: int, field: str, number: int) -> str:
        return self._words[-1][field][row].names[number]


def _type(field: str, name: str, same: bool, query: set[str]) -> str:
    if field == 'query':
        return 'query_same' if same else 'query_other'
    return 'doc_same' if same else 'doc_query' if name in query else 'doc_other'


def words_of(tokenizer: Any, texts: Sequence[str], prompt: int = 0) -> list[Words]:
    """Returns the words of every text; equal texts are read once.

    Args:
        tokenizer: A fast tokenizer.
        texts: What it is given.
        prompt: How many characters at the beginning of every text are no words of it.
    """
    if not texts:
        return []
    rows, distinct = pd.factorize(pd.Series(texts, dtype=object))
    encoded = tokenizer(
        list(distinct),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    found = [
        grouped_words(text, encoded['offset_mapping'][i], encoded.word_ids(i), prompt)
        for i, text in enumerate(distinct)
    ]
    return [found[row] for row in rows]


def grouped_words(text: str, offsets: Sequence[tuple[int, int]], ids: Sequence[int | None], prompt: int) -> Words:
    """Returns the words of some tokens of a text, from where they stand in it and the tokenizer's own words."""
    owners: list[int] = []
    names: list[str] = []
    for word in _grouped(text, offsets, ids):
        surface = text[min(offsets[token][0] for token in word) : max(offsets[token][1] for token in word)].strip()
        of_prompt = prompt and offsets[word[-1]][1] <= prompt
        owners += [len(names)] * len(word)
        names.append('' if of_prompt else _bare(surface).lower())
    return Words(owners, names)


def _grouped(text: str, offsets: Sequence[tuple[int, int]], ids: Sequence[int | None]) -> Iterator[list[int]]:
    """Yields the tokens of each word.

    The tokenizer's own words are split further: some tokenizers keep punctuation with a word, or know no words at all.
    """
    word: list[int] = []
    for token, (start, end) in enumerate(offsets):
        if word:
            before, until = offsets[word[-1]]
            left, right = text[before:until], text[start:end]
            blank = not left.strip()  # a token for a space belongs to the word behind it
            apart = text[until:end][:1].isspace() or left[-1:].isspace()
            marks = _is_punctuation(left.strip()) or _is_punctuation(right.strip())
            if ids[token] != ids[word[-1]] or (not blank and (apart or marks)):
                yield word
                word = []
        word.append(token)
    if word:
        yield word


def _is_punctuation(text: str) -> bool:
    """Whether there is something, and all of it is punctuation or symbols."""
    return bool(text) and not _bare(text)


def _bare(text: str) -> str:
    """Returns a text without the punctuation and symbols around it."""
    there = [place for place, char in enumerate(text) if unicodedata.category(char)[0] not in 'PS']
    return text[there[0] : there[-1] + 1] if there else ''
