"""Prompts: texts around query and document, tokenised with them, of which truncation takes nothing.

A tokenizer may join the end of a query with what stands behind it. So a piece of a prompt with a query in it is
tokenised whole, and offsets say which tokens are whose: a token belongs to the query if it has a character of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from pyterrier_mech.frames import Fields
from pyterrier_mech.inputs.tokens import InputMaker, Ragged, Template
from pyterrier_mech.inputs.words import Words, grouped_words

_Part = tuple[str, list[int], Words | None]
_PLACES = {'{query}': 'query', '{text}': 'text'}
# A text without letters, behind which the rest of a prompt stands as behind most texts.
_NEUTRAL = '0'
# The share of the room that a query may take.
_QUERY_SHARE = (3, 4)


@dataclass(frozen=True)
class Prompt:
    """A prompt as pieces that are tokenised apart, and joined by ids.

    Attributes:
        pieces: Texts in which `{query}` and `{text}` stand once each, over all pieces.
    """

    pieces: tuple[str, ...]

    @classmethod
    def of(cls, template: str | Sequence[str]) -> Prompt:
        """Makes a prompt of a template, or of the pieces of one.

        Raises:
            TypeError: If it is something else.
            ValueError: If `{query}` or `{text}` does not stand in it once.
        """
        pieces = (template,) if isinstance(template, str) else tuple(template)
        if not all(isinstance(piece, str) for piece in pieces):
            raise TypeError(f'template must be a string, or strings that are tokenised apart; got {template!r}')
        for place in _PLACES:
            if (count := sum(piece.count(place) for piece in pieces)) != 1:
                raise ValueError(f'template must have {place} once; got it {count} times in {template!r}')
        return cls(pieces)

    @property
    def fields(self) -> tuple[str, ...]:
        """Query and text in their order, and '' for what stands around them: five in all."""
        order = [_PLACES[place] for place in re.findall('|'.join(map(re.escape, _PLACES)), ''.join(self.pieces))]
        return ('', order[0], '', order[1], '')

    def filled(self, piece: str, texts: dict[str, str]) -> tuple[str, list[tuple[str, int, int]]]:
        """Returns a piece with texts in their places, and where these stand, (field, start, end)."""
        whole, spans = '', []
        for part in re.split(f'({"|".join(map(re.escape, _PLACES))})', piece):
            if part in _PLACES:
                spans.append((_PLACES[part], len(whole), len(whole) + len(texts[_PLACES[part]])))
            whole += texts[_PLACES[part]] if part in _PLACES else part
        return whole, spans


class _Row(NamedTuple):
    """Token ids of the five parts of a row, and for its fields the tokens' words."""

    ids: list[list[int]]
    words: dict[str, Words]


class PromptMaker(InputMaker):
    """Tokenises query and document within a prompt; see `InputMaker`."""

    def __init__(self, tokenizer: Any, max_length: int, prompt: Prompt):
        """Keeps tokenizer and prompt; nothing is read from them yet."""
        super().__init__(tokenizer, max_length)
        self.prompt = prompt

    def template(self, n_parts: int) -> Template:
        """Returns a frame of nothing: what stands around the texts is parts of its own."""
        return Template(((),) * (n_parts + 1), ((),) * (n_parts + 1), (0,) * n_parts)

    def parts(self, values: Fields) -> list[tuple[str, Ragged]]:
        """Returns field and ids of each of the five parts of all rows, in their order; see `InputMaker`.

        Where the text will be cut, what stands behind it is as behind another text.
        """
        encoded = self._encoded(values, words=False)
        rows = [row.ids for row in encoded]
        if rows and self.prompt.fields[3] == 'text':
            plain = self._encoded({field: [_NEUTRAL] for field in _PLACES.values()}, words=False)[0].ids[4]
            rows = [[*ids[:4], plain] if sum(map(len, ids)) > self.max_length else ids for ids in rows]
        columns = zip(*rows, strict=True) if rows else [()] * 5
        return [(field, Ragged.from_lists(ids)) for field, ids in zip(self.prompt.fields, columns, strict=True)]

    def words(self, values: Fields, prompts: Mapping[str, str]) -> dict[str, list[Words]]:
        """See `InputMaker`; prompts before the fields are a part of the template here."""
        encoded = self._encoded(values, words=True)
        return {field: [row.words[field] for row in encoded] for field in _PLACES.values()}

    def kept(self, lengths: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns how many tokens of each part survive truncation: all of the prompt, then the query, then the text.

        Raises:
            ValueError: If the prompt leaves no room.
        """
        fields = self.prompt.fields
        room = self.max_length - np.sum([n for n, field in zip(lengths, fields, strict=True) if not field], axis=0)
        if (room < 1).any():
            raise ValueError(
                f'max_length={self.max_length} has no room for query and text beside the prompt of '
                f'{self.max_length - int(room.min())} tokens; use a larger one'
            )
        more, of = _QUERY_SHARE
        query = np.minimum(lengths[fields.index('query')], room * more // of)
        # A short text leaves its room to the query.
        query = np.maximum(query, np.minimum(lengths[fields.index('query')], room - lengths[fields.index('text')]))
        text = np.minimum(lengths[fields.index('text')], room - query)
        whole = {'query': query, 'text': text}
        return [whole.get(field, n) for field, n in zip(fields, lengths, strict=True)]

    def _encoded(self, values: Fields, words: bool) -> list[_Row]:
        """Returns every row; equal rows are tokenised once."""
        pairs = pd.MultiIndex.from_arrays([np.asarray(values[field], dtype=object) for field in _PLACES.values()])
        rows, distinct = pd.factorize(pairs)
        texts = [dict(zip(_PLACES.values(), pair, strict=True)) for pair in distinct]
        pieces = [list(self._piece(piece, texts, words)) for piece in self.prompt.pieces]
        made = [self._joined(list(of_row)) for of_row in zip(*pieces, strict=True)]
        return [made[row] for row in rows]

    def _piece(self, piece: str, texts: Sequence[dict[str, str]], words: bool) -> Iterator[list[_Part]]:
        """Yields for every row the parts of a piece: field, ids, and words."""
        filled = [self.prompt.filled(piece, of) for of in texts]
        if not filled[0][1]:
            alone: list[_Part] = [('', self._ids([piece])['input_ids'][0], None)]
            yield from [alone] * len(texts)
            return
        encoded = self._ids([whole for whole, _ in filled])
        for i, (whole, spans) in enumerate(filled):
            ids, offsets = encoded['input_ids'][i], encoded['offset_mapping'][i]
            owners = _owners(offsets, spans)
            parts: list[_Part] = []
            done = 0
            for field, first, end in owners:
                parts.append(('', ids[done:first], None))
                of = grouped_words(whole, offsets[first:end], encoded.word_ids(i)[first:end], 0) if words else None
                parts.append((field, ids[first:end], of))
                done = end
            yield [*parts, ('', ids[done:], None)]

    def _ids(self, texts: list[str]) -> Any:
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=True,
            verbose=False,
        )

    @staticmethod
    def _joined(pieces: Sequence[list[_Part]]) -> _Row:
        ids: list[list[int]] = [[]]
        words = {}
        for field, tokens, of in chain.from_iterable(pieces):
            if field:
                ids += [tokens, []]
                if of is not None:
                    words[field] = of
            else:
                ids[-1] = [*ids[-1], *tokens]
        return _Row(ids, words)


def _owners(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Returns which tokens belong to each field, (field, first, end), from where the fields stand in the text."""
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    found, done = [], 0
    for field, start, end in spans:
        inside = np.flatnonzero((starts < end) & (ends > start) & (np.arange(len(starts)) >= done))
        first = int(inside[0]) if len(inside) else max(done, int(np.searchsorted(starts, end)))
        done = int(inside[-1]) + 1 if len(inside) else first
        found.append((field, first, done))
    return found
