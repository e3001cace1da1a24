"""Token ids of texts, and the special tokens around them: every text is tokenised once, pairs are joined by ids.

The result is what the tokenizer's own pair encoding gives, special tokens, segment ids and truncation included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd

from pyterrier_mech.frames import Fields
from pyterrier_mech.inputs.words import Words, words_of

_T = TypeVar('_T')

TOKEN, FILLED = 1, 2
"""What a mask says of a position: it has a token, or one that fills the row up. 0 is padding, or hidden."""


class Fill(NamedTuple):
    """What fills short sequences up, as ColBERT fills its queries up with masks.

    Attributes:
        token: Its id.
        length: Sequences with fewer tokens get this many.
        attended: Whether other tokens attend to it.
    """

    token: int
    length: int
    attended: bool


@dataclass(frozen=True)
class Ragged:
    """Token ids of many texts in one array: text i is `flat[starts[i]:starts[i] + lengths[i]]`."""

    flat: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[int]]) -> Ragged:
        """Joins lists of ids."""
        lengths = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
        flat = np.fromiter(chain.from_iterable(lists), dtype=np.int64, count=int(lengths.sum()))
        return cls(flat, np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64), lengths)

    def take(self, rows: np.ndarray) -> Ragged:
        """Returns the texts `rows`, which may repeat; the ids are shared."""
        return Ragged(self.flat, self.starts[rows], self.lengths[rows])

    def row(self, i: int) -> np.ndarray:
        """Returns the ids of text i."""
        return self.flat[self.starts[i] : self.starts[i] + self.lengths[i]]


@dataclass(frozen=True)
class Template:
    """How a tokenizer frames one text or a pair: `specials[0] text specials[1] (text specials[2])`."""

    specials: tuple[tuple[int, ...], ...]
    special_segments: tuple[tuple[int, ...], ...]
    part_segments: tuple[int, ...]

    @property
    def n_special(self) -> int:
        """Number of special tokens."""
        return sum(map(len, self.specials))

    def framed(self, parts: Sequence[Sequence[_T]], specials: Sequence[Sequence[_T]]) -> list[_T]:
        """Returns one value a position, from values for the tokens of each part and for the special tokens."""
        return [*chain.from_iterable(chain(*pair) for pair in zip(specials, parts, strict=False)), *specials[-1]]

    def special_types(self) -> list[list[str]]:
        """Returns the types of the special tokens: those before the text are 'cls', the others are 'sep'."""
        return [['sep' if place else 'cls'] * len(tokens) for place, tokens in enumerate(self.specials)]


class InputMaker:
    """Tokenises texts and builds padded batches for a tokenizer and a maximum length."""

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        uses_segments: bool = False,
        marker: int | None = None,
        fill: Fill | None = None,
    ):
        """Keeps the tokenizer; nothing is read from it yet.

        Args:
            tokenizer: A fast tokenizer.
            max_length: Tokens of a sequence, special tokens included.
            uses_segments: Whether the model is given segment ids.
            marker: Token that says what a text is, put between the first special tokens and the text.
            fill: What fills short sequences up.
        """
        self.tokenizer = tokenizer
        self.marker = marker
        self.fill = fill
        self.max_length = max_length
        self.uses_segments = uses_segments
        self._templates: dict[int, Template] = {}

    def template(self, n_parts: int) -> Template:
        """Returns the frame around one text or a pair, read off the tokenizer's own output."""
        if n_parts not in self._templates:
            encoded = self.tokenizer(*['a'] * n_parts, return_token_type_ids=True)
            ids, segments = encoded['input_ids'], encoded['token_type_ids']
            owners = encoded.sequence_ids(0)
            specials: list[list[int]] = [[] for _ in range(n_parts + 1)]
            special_segments: list[list[int]] = [[] for _ in range(n_parts + 1)]
            part_segments = [0] * n_parts
            seen = 0
            for token, segment, owner in zip(ids, segments, owners, strict=True):
                if owner is None:
                    specials[seen].append(token)
                    special_segments[seen].append(segment)
                else:
                    part_segments[owner] = segment
                    seen = owner + 1
            if self.marker is not None:
                specials[0].append(self.marker)
                special_segments[0].append(0)
            self._templates[n_parts] = Template(
                tuple(map(tuple, specials)), tuple(map(tuple, special_segments)), tuple(part_segments)
            )
        return self._templates[n_parts]

    @property
    def pad_id(self) -> int:
        """Token that fills a row up."""
        return self.tokenizer.pad_token_id or 0

    def totals(self, lengths: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the tokens of every row, special ones and fill included, from those of each part."""
        totals = self.template(len(lengths)).n_special + np.sum(lengths, axis=0)
        return totals if self.fill is None else np.maximum(totals, self.fill.length)

    def filled(self, values: list[_T], fill: _T) -> list[_T]:
        """Returns one value a position, from those of the tokens that are no fill."""
        return values if self.fill is None else values + [fill] * (self.fill.length - len(values))

    def attended(self, mask: np.ndarray) -> np.ndarray:
        """Returns 1 where a position may be attended to, from a mask of `TOKEN` and `FILLED`."""
        fill = self.fill is not None and self.fill.attended
        return (mask > 0 if fill else mask == TOKEN).astype(np.int64)

    def tokenize(self, texts: Sequence[str]) -> Ragged:
        """Returns the ids of every text without special tokens; equal texts are tokenised once."""
        if not texts:
            return Ragged.from_lists([])
        rows, distinct = pd.factorize(np.asarray(texts, dtype=object))
        encoded = self.tokenizer(
            list(distinct),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return Ragged.from_lists(encoded['input_ids']).take(rows)

    def parts(self, values: Fields) -> list[tuple[str, Ragged]]:
        """Returns field and ids of each part of all rows, from the texts of the fields of a tower."""
        return [(field, self.tokenize(texts)) for field, texts in values.items()]

    def words(self, values: Fields, prompts: Mapping[str, str]) -> dict[str, list[Words]]:
        """Returns the words of the texts of all fields, token by token.

        Args:
            values: The texts of every field, with what is put before them.
            prompts: What is put before them.
        """
        return {field: words_of(self.tokenizer, texts, len(prompts[field])) for field, texts in values.items()}

    def cut(self, parts: Sequence[Ragged]) -> list[Ragged]:
        """Truncates the parts of every row as the tokenizer would."""
        kept = self.kept([part.lengths for part in parts])
        return [Ragged(part.flat, part.starts, lengths) for part, lengths in zip(parts, kept, strict=True)]

    def kept(self, lengths: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns how many tokens of each part survive truncation (the tokenizers' `longest_first`).

        Args:
            lengths: For each part, the number of tokens of every row.

        Raises:
            ValueError: If the special tokens alone exceed the maximum length.
        """
        room = self.max_length - self.template(len(lengths)).n_special
        if room < 0:
            raise ValueError(f'max_length={self.max_length} has no room for the special tokens; use a larger one')
        if len(lengths) == 1:
            return [np.minimum(lengths[0], room)]
        first, second = lengths
        short, long = np.minimum(first, second), np.maximum(first, second)
        fits = first + second <= room
        # The longer part gives way until both are equal; from there on both do, the first part by one more if odd.
        cut = np.maximum(short, room - short)
        both = short + cut > room
        short_kept = np.where(fits, short, np.where(both, room // 2, short))
        long_kept = np.where(fits, long, np.where(both, room // 2 + room % 2, cut))
        swapped = first > second
        return [np.where(swapped, long_kept, short_kept), np.where(swapped, short_kept, long_kept)]

    def joined(self, parts: Sequence[Ragged]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Joins and pads rows.

        Args:
            parts: One text, or query and text, already cut to their kept lengths.

        Returns:
            Token ids, a mask of `TOKEN`, `FILLED` and 0, and segment ids, [rows, tokens] each.
        """
        template = self.template(len(parts))
        n_rows = len(parts[0].lengths)
        totals = template.n_special + np.sum([part.lengths for part in parts], axis=0)
        width = int(self.totals([part.lengths for part in parts]).max())
        ids = np.full((n_rows, width), self.pad_id, dtype=np.int64)
        segments = np.zeros((n_rows, width), dtype=np.int64)
        rows = np.arange(n_rows)
        cursor = np.zeros(n_rows, dtype=np.int64)
        for i, (tokens, token_segments) in enumerate(zip(template.specials, template.special_segments, strict=True)):
            for token, segment in zip(tokens, token_segments, strict=True):
                ids[rows, cursor] = token
                segments[rows, cursor] = segment
                cursor = cursor + 1
            if i < len(parts):
                row, column = np.nonzero(np.arange(int(parts[i].lengths.max(initial=0))) < parts[i].lengths[:, None])
                ids[row, cursor[row] + column] = parts[i].flat[parts[i].starts[row] + column]
                segments[row, cursor[row] + column] = template.part_segments[i]
                cursor = cursor + parts[i].lengths
        mask = TOKEN * (np.arange(width) < totals[:, None]).astype(np.int64)
        if self.fill is not None:
            filled = (mask == 0) & (np.arange(width) < self.fill.length)
            ids[filled], mask[filled] = self.fill.token, FILLED
        return ids, mask, segments
