"""Alignment of an original and a perturbed input: equal length, position by position.

Patching moves activations between two runs, so both need a token at every position. Pairs are aligned on token ids:
common tokens keep their place, and where one side has more, the other gets filler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import pandas as pd

from pyterrier_mech.inputs.tokens import FILLED, TOKEN, InputMaker
from pyterrier_mech.inputs.words import Placed

MASK_FILLER = 'mask'
UNCHANGED = 'nothing changed'
TRUNCATED = 'edit truncated away'
UNALIGNED = 'no alignment'
FILLER = 'edit equals the filler'
HIDDEN = 'the first token, which is read, is hidden'
HIDDEN_LAST = 'the last token, which is read, is hidden'

TYPES = ('cls', 'query', 'sep', 'doc_match', 'doc_other', 'inserted')
"""Types of positions."""

PROMPT = 'prompt'
"""The type of a prompt's tokens, of rankers that have one."""

LITERATURE = (
    'cls',
    'query_same',
    'query_other',
    'sep_first',
    'sep_last',
    'doc_same',
    'doc_query',
    'doc_other',
    'inserted',
)
"""Finer types, by whole words: `*_same` is a word that the edit has put in, where it stands elsewhere in the query or
in the document; `doc_query` a document word that is another query word. All separators but the last are `sep_first`.

Source: Chen, Merullo, Eickhoff, SIGIR 2024, arXiv 2405.02503; Lu, Chen, Eickhoff, EMNLP 2025, arXiv 2502.04645.
"""

SCHEMES = {'basic': TYPES, 'literature': LITERATURE}
"""Ways to divide positions into types."""


def types_of(model: Any, scheme: str) -> tuple[str, ...]:
    """Returns the types of a scheme that positions of a ranker may have."""
    return (*SCHEMES[scheme], PROMPT) if model.prompted else SCHEMES[scheme]


_Cell = tuple[str, int | None, int | None]
_SAME, _REPLACED, _INSERTED, _DELETED = 'same', 'replaced', 'inserted', 'deleted'


@dataclass(frozen=True, eq=False)
class Alignment:
    """Two inputs of equal length and what became of every position.

    Attributes:
        original: Token ids of the original input [tokens].
        perturbed: Token ids of the perturbed input [tokens].
        segments: Segment ids of both [tokens].
        original_mask: `TOKEN` or `FILLED` where the original input has one, else 0 [tokens].
        perturbed_mask: The same for the perturbed input.
        changes: For every position 'same', 'replaced', 'inserted' (the perturbed input has more) or 'deleted'.
        plain_types: For every position 'cls', 'sep', 'prompt', 'query', 'doc_match' (a document token that occurs in
            the query) or 'doc_other', whether it was inserted or not.
        problem: Why the pair cannot be patched, or ''.
    """

    original: np.ndarray
    perturbed: np.ndarray
    segments: np.ndarray
    original_mask: np.ndarray
    perturbed_mask: np.ndarray
    changes: tuple[str, ...]
    plain_types: tuple[str, ...]
    problem: str = ''

    def __len__(self) -> int:
        """Number of positions."""
        return len(self.original)

    @property
    def types(self) -> tuple[str, ...]:
        """The types of the positions, those of inserted ones as 'inserted'."""
        both = zip(self.changes, self.plain_types, strict=True)
        return tuple(_INSERTED if change == _INSERTED else kind for change, kind in both)

    @property
    def placed(self) -> tuple[Placed, ...]:
        """For every position its field, '' for special tokens, and the places of its tokens in both versions."""
        seen = {'query': [0, 0], 'text': [0, 0]}
        places: list[Placed] = []
        for change, kind in zip(self.changes, self.plain_types, strict=True):
            if kind in ('cls', 'sep', PROMPT):
                places.append(('', None, None))
                continue
            field = 'query' if kind == 'query' else 'text'
            both: list[int | None] = [None, None]
            for side, gap in enumerate((_INSERTED, _DELETED)):
                # An input aligned with itself has nothing of the other version.
                if change != gap and not (side and self.problem == UNALIGNED):
                    both[side] = seen[field][side]
                    seen[field][side] += 1
            places.append((field, both[0], both[1]))
        return tuple(places)

    def positions(self, change: str) -> np.ndarray:
        """Returns the positions with a given change."""
        return np.flatnonzero(np.asarray(self.changes) == change)

    def to_frame(self, tokenizer: Any) -> pd.DataFrame:
        """Returns one row a position: original, perturbed (as tokens), change, type."""
        return pd.DataFrame(
            {
                'original': tokenizer.convert_ids_to_tokens(self.original.tolist()),
                'perturbed': tokenizer.convert_ids_to_tokens(self.perturbed.tolist()),
                'change': self.changes,
                'type': self.types,
            }
        )


class Aligner:
    """Aligns pairs for one tokenizer, maximum length and filler.

    Args:
        maker: The ranker's tokenizer and maximum length.
        filler: What stands where one side has no token: a token (default 'a', as in the literature), 'mask' to hide
            the positions from attention instead, or None to refuse pairs of unequal length.

    Raises:
        ValueError: If the filler is not a single token.
    """

    def __init__(self, maker: InputMaker, filler: str | None = 'a'):
        """Looks the filler up."""
        self.maker = maker
        self.filler = filler
        self._filler_id = self._lookup(filler) if filler not in (None, MASK_FILLER) else maker.tokenizer.pad_token_id

    def _lookup(self, filler: str | None) -> int:
        tokenizer = self.maker.tokenizer
        if filler in tokenizer.get_vocab() and filler in tokenizer.all_special_tokens:
            return tokenizer.convert_tokens_to_ids(filler)
        ids = tokenizer(f' {filler}', add_special_tokens=False)['input_ids']
        if len(ids) != 1:
            raise ValueError(f"filler={filler!r} is {len(ids)} tokens of this model; use a single token, or 'mask'")
        return ids[0]

    def align(
        self,
        original: Sequence[np.ndarray],
        perturbed: Sequence[np.ndarray],
        fields: Sequence[str] = ('query', 'text'),
        query: Sequence[int] | np.ndarray = (),
    ) -> Alignment:
        """Aligns one pair.

        Args:
            original: Token ids of each part (query and text, or one of them) of the original, no special tokens.
            perturbed: The same for the perturbed input.
            fields: What the parts are, 'query' or 'text', or '' for a part of a prompt.
            query: Token ids that count as query terms where the query is not one of the parts.
        """
        room = self.maker.max_length
        columns = [list(_columns(a.tolist(), b.tolist(), room)) for a, b in zip(original, perturbed, strict=True)]
        problem = self._problem(original, perturbed, columns)
        if problem == UNALIGNED:
            return self.unpatched(original, fields, problem)
        kept = self.maker.kept([np.asarray([len(column)]) for column in columns])
        columns = [column[: int(k[0])] for column, k in zip(columns, kept, strict=True)]
        if not problem and all(change == _SAME for column in columns for change, _, _ in column):
            problem = TRUNCATED
        in_query = set(np.asarray(query).tolist())
        for field, column in zip(fields, columns, strict=True):
            if field == 'query':
                in_query |= {token for _, a, b in column for token in (a, b) if token is not None}
        aligned = self._build(columns, fields, in_query, problem)
        same_ids = np.array_equal(aligned.original, aligned.perturbed)
        if not problem and same_ids and np.array_equal(aligned.original_mask, aligned.perturbed_mask):
            return replace(aligned, problem=FILLER)
        return aligned

    def unpatched(self, parts: Sequence[np.ndarray], fields: Sequence[str], problem: str) -> Alignment:
        """Returns one input aligned with itself, for a pair that has a problem."""
        kept = self.maker.kept([np.asarray([len(part)]) for part in parts])
        columns = [
            [(_SAME, token, token) for token in part[: int(k[0])].tolist()] for part, k in zip(parts, kept, strict=True)
        ]
        return self._build(columns, fields, set(), problem)

    def _problem(
        self, original: Sequence[np.ndarray], perturbed: Sequence[np.ndarray], columns: Sequence[list[Any]]
    ) -> str:
        if all(np.array_equal(a, b) for a, b in zip(original, perturbed, strict=True)):
            return UNCHANGED
        for a, b, column in zip(original, perturbed, columns, strict=True):
            uneven = len(a) != len(b)
            if uneven and self.filler is None:
                return UNALIGNED
            if uneven and len(a) and len(b) and all(change != _SAME for change, _, _ in column):
                return UNALIGNED
        return ''

    def _build(
        self, columns: Sequence[list[Any]], fields: Sequence[str], in_query: set[int], problem: str
    ) -> Alignment:
        template = self.maker.template(len(columns))
        changes = template.framed(
            [[change for change, _, _ in c] for c in columns], [[_SAME] * len(t) for t in template.specials]
        )
        types = template.framed(
            [[_type(cell, field, in_query) for cell in c] for field, c in zip(fields, columns, strict=True)],
            template.special_types(),
        )
        segments = template.framed(
            [[segment] * len(c) for segment, c in zip(template.part_segments, columns, strict=True)],
            template.special_segments,
        )
        ones = [[TOKEN] * len(tokens) for tokens in template.specials]
        sides = []
        for side in (1, 2):
            tokens = [[self._filler_id if cell[side] is None else cell[side] for cell in c] for c in columns]
            hidden = [[self.filler == MASK_FILLER and cell[side] is None for cell in c] for c in columns]
            shown = [[0 if one else TOKEN for one in c] for c in hidden]
            sides.append((template.framed(tokens, template.specials), template.framed(shown, ones)))
        (original, mask_0), (perturbed, mask_1) = sides
        if self.maker.fill is not None:
            added = [max(0, self.maker.fill.length - sum(mask)) for mask in (mask_0, mask_1)]
            for (ids, mask), count in zip(sides, added, strict=True):
                missing = max(added) - count
                ids += [self.maker.fill.token] * count + [self.maker.pad_id] * missing
                mask += [FILLED] * count + [0] * missing
            changes += [_SAME] * min(added) + [_INSERTED if added[0] < added[1] else _DELETED] * abs(
                added[0] - added[1]
            )
            types += ['sep'] * max(added)
            segments += [0] * max(added)
        arrays = [np.asarray(values, dtype=np.int64) for values in (original, perturbed, segments, mask_0, mask_1)]
        return Alignment(*arrays, tuple(changes), tuple(types), problem)  # type: ignore[call-arg, arg-type]


def _type(cell: _Cell, field: str, in_query: set[int]) -> str:
    if field != 'text':
        return field or PROMPT
    _, a, b = cell
    return 'doc_match' if (a if b is None else b) in in_query else 'doc_other'


def _columns(a: list[int], b: list[int], room: int) -> Iterator[_Cell]:
    """Yields one (change, original token, perturbed token) a position, those after `room` positions roughly or not."""
    # Common ends first: an appended, prepended or inserted edit is then found where it was made, and the quadratic
    # search in the middle stays small.
    start = _common(a, b)
    end = _common(a[start:][::-1], b[start:][::-1])
    middle_a, middle_b = a[start : len(a) - end], b[start : len(b) - end]
    if start >= room or max(len(middle_a), len(middle_b)) > room:
        # What is cut off later need not be searched.
        middle_a, middle_b, end = middle_a[:room], middle_b[:room], 0
    for token in a[:start]:
        yield _SAME, token, token
    matcher = SequenceMatcher(None, middle_a, middle_b, autojunk=False)
    for _, i, i_end, j, j_end in matcher.get_opcodes():
        left, right = middle_a[i:i_end], middle_b[j:j_end]
        for k in range(max(len(left), len(right))):
            x = left[k] if k < len(left) else None
            y = right[k] if k < len(right) else None
            change = _INSERTED if x is None else _DELETED if y is None else _SAME if x == y else _REPLACED
            yield change, x, y
    for token in a[len(a) - end :]:
        yield _SAME, token, token


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
