"""Rows of query and text as a ranker reads them: one version, or an original and a perturbed one side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pyterrier_mech.anatomy.model import Batch, first_position
from pyterrier_mech.anatomy.readouts import FirstToken, LastToken
from pyterrier_mech.frames import Fields
from pyterrier_mech.inputs.alignment import (
    HIDDEN,
    HIDDEN_LAST,
    MASK_FILLER,
    PROMPT,
    SCHEMES,
    UNALIGNED,
    UNCHANGED,
    Aligner,
    Alignment,
)
from pyterrier_mech.inputs.tokens import InputMaker, Ragged
from pyterrier_mech.inputs.words import Placed, RowWords

ORIGINAL, PERTURBED = 'original', 'perturbed'
# Which token a read-out reads, and what is said where one version hides it.
_READ = {FirstToken: (0, HIDDEN), LastToken: (-1, HIDDEN_LAST)}


class PlainTower:
    """Sequences of one version."""

    words: RowWords | None = None

    def __init__(self, maker: InputMaker, parts: Sequence[Ragged], fields: Sequence[str], query: Ragged | None):
        """Cuts the parts.

        Args:
            maker: Tokenizer and maximum length.
            parts: Ids of each part.
            fields: What the parts are, 'query' or 'text'.
            query: Ids whose tokens count as query terms, where types are wanted.
        """
        self.maker, self.fields, self.query = maker, fields, query
        self.parts = maker.cut(parts)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row, special tokens included."""
        return self.maker.totals([part.lengths for part in self.parts])

    def ids(self, row: int) -> np.ndarray:
        """Returns the token ids of a row [tokens]."""
        return self.arrays(np.asarray([row]), ORIGINAL)[0][0]

    def types(self, row: int, inserted: bool = True, scheme: str = 'basic') -> Sequence[str]:
        """Returns the type of every position of a row, one of a scheme of `SCHEMES`."""
        if self.query is None:
            raise ValueError('these inputs were made without types')
        if scheme != 'basic':
            return _fine_types(self, row, inserted, scheme)
        query = set(self.query.row(row).tolist())
        template = self.maker.template(len(self.parts))
        parts = [
            [field or PROMPT] * int(part.lengths[row])
            if field != 'text'
            else ['doc_match' if token in query else 'doc_other' for token in part.row(row).tolist()]
            for field, part in zip(self.fields, self.parts, strict=True)
        ]
        return self.maker.filled(template.framed(parts, template.special_types()), 'sep')

    def placed(self, row: int) -> list[Placed]:
        """Returns field and token of every position of a row, twice the same."""
        template = self.maker.template(len(self.parts))
        parts: list[list[Placed]] = [
            [(field, token, token) if field else ('', None, None) for token in range(int(part.lengths[row]))]
            for field, part in zip(self.fields, self.parts, strict=True)
        ]
        special: Placed = ('', None, None)
        return self.maker.filled(template.framed(parts, [[special] * len(ones) for ones in template.specials]), special)

    def changed(self, row: int) -> list[bool]:
        """There is one version."""
        return [False] * int(self.lengths[row])

    def unchanged(self, row: int) -> bool:
        """There is one version."""
        return True

    def arrays(self, rows: np.ndarray, side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns ids, mask (`TOKEN`, `FILLED` or 0) and segment ids of some rows."""
        return self.maker.joined([part.take(rows) for part in self.parts])


class AlignedTower:
    """Sequences of two versions, equally long."""

    words: RowWords | None = None

    def __init__(self, alignments: Sequence[Alignment], fields: Sequence[str], pad: int):
        """Keeps the alignment of every row."""
        self.alignments, self.fields, self.pad = alignments, fields, pad

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row, special tokens included."""
        return np.asarray([len(alignment) for alignment in self.alignments], dtype=np.int64)

    def ids(self, row: int) -> np.ndarray:
        """Returns the token ids of the original of a row [tokens]."""
        return self.alignments[row].original

    def types(self, row: int, inserted: bool = True, scheme: str = 'basic') -> Sequence[str]:
        """Returns the type of every position of a row, what was inserted as 'inserted' or as what it is."""
        if scheme != 'basic':
            return _fine_types(self, row, inserted, scheme)
        return self.alignments[row].types if inserted else self.alignments[row].plain_types

    def placed(self, row: int) -> Sequence[Placed]:
        """Returns field and token, in both versions, of every position of a row."""
        return self.alignments[row].placed

    def changed(self, row: int) -> list[bool]:
        """Returns for every position of a row whether the perturbed version has a token of its own there."""
        return [change in ('inserted', 'replaced') for change in self.alignments[row].changes]

    def unchanged(self, row: int) -> bool:
        """Whether both versions of a row are one."""
        return bool(self.alignments[row].problem)

    def arrays(self, rows: np.ndarray, side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns ids, mask (`TOKEN`, `FILLED` or 0) and segment ids of one side of some rows."""
        picked = [self.alignments[row] for row in rows]
        names = ((side, self.pad), (f'{side}_mask', 0), ('segments', 0))
        ids, mask, segments = (_padded([getattr(one, name) for one in picked], fill) for name, fill in names)
        return ids, mask, segments


Tower = PlainTower | AlignedTower
"""The sequences of one tower of a ranker: of query and text together, or of one of them."""


class Inputs:
    """Rows as a ranker reads them.

    Attributes:
        model: The ranker.
        towers: The sequences of each of its towers.
        problems: For every row why its two versions cannot be compared, or ''.
        good: Rows without a problem.
        rest: Rows with one.
    """

    def __init__(self, model: Any, towers: Sequence[Tower], problems: Sequence[str], versions: Sequence[Fields] = ()):
        """Holds what `plain` and `pairs` make; the texts only where types may be asked for."""
        self.model, self.towers, self.problems = model, towers, problems
        if versions:
            words = RowWords(model, towers, versions, problems)
            for tower in towers:
                tower.words = words
        self.good = np.asarray([row for row, problem in enumerate(problems) if not problem], dtype=np.int64)
        self.rest = np.asarray([row for row, problem in enumerate(problems) if problem], dtype=np.int64)

    @classmethod
    def plain(cls, model: Any, queries: Sequence[str], texts: Sequence[str], *, types: bool = False) -> Inputs:
        """Makes the inputs of one version, as the ranker scores it.

        Args:
            model: A ranker.
            queries: Query of every row.
            texts: Text of every row.
            types: Whether position types are wanted.

        Raises:
            TypeError: If queries or texts are not lists of strings.
            ValueError: If they differ in number.
        """
        values = checked_rows(queries, texts)
        parts = [model.parts(values, tower) for tower in model.towers]
        query = _query(parts) if types else None
        towers = [
            PlainTower(model.maker_of(fields), *_split(tower), query)
            for fields, tower in zip(model.towers, parts, strict=True)
        ]
        return cls(model, towers, [''] * len(values['query']), [values] if types else [])

    @classmethod
    def of_field(cls, model: Any, field: str, texts: Sequence[str]) -> Inputs:
        """Makes the inputs of the tower of a bi-encoder that reads one field alone."""
        parts = model.parts({field: texts}, (field,))
        return cls(model, [PlainTower(model.maker_of((field,)), *_split(parts), None)], [''] * len(texts))

    @classmethod
    def pairs(cls, model: Any, original: Fields, perturbed: Fields, filler: str | None) -> Inputs:
        """Makes the inputs of two versions, aligned so that they are equally long; see `Aligner`."""
        aligners = [Aligner(model.maker_of(tower), filler) for tower in model.towers]
        sides = [[model.parts(texts, tower) for tower in model.towers] for texts in (original, perturbed)]
        query = _query(sides[1])

        def align(tower: int, row: int) -> Alignment:
            before, after = ([ids.row(row) for _, ids in side[tower]] for side in sides)
            fields = [field for field, _ in sides[0][tower]]
            return aligners[tower].align(before, after, fields, query=query.row(row))

        aligned = [[align(tower, row) for row in range(len(original['text']))] for tower in range(len(model.towers))]
        problems = [_problem([one.problem for one in rows]) for rows in zip(*aligned, strict=True)]
        place, hidden = _READ.get(type(model.readout), (0, ''))
        if filler == MASK_FILLER and hidden:
            for row, ones in enumerate(zip(*aligned, strict=True)):
                if not problems[row] and not all(
                    one.original_mask[place] and one.perturbed_mask[place] for one in ones
                ):
                    problems[row] = hidden
        pad = model.maker.pad_id
        towers = [AlignedTower(rows, fields, pad) for rows, fields in zip(aligned, model.towers, strict=True)]
        return cls(model, towers, problems, [original, perturbed])

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.problems)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row, over all towers."""
        return np.sum([tower.lengths for tower in self.towers], axis=0)

    def batch(self, tower: int, rows: Sequence[int] | np.ndarray, side: str = ORIGINAL) -> Batch:
        """Returns the model inputs of one tower and side for some rows, padded to the longest of them.

        Where positions are hidden by a mask filler, the others are numbered without a gap, so that a model with
        absolute positions reads the plain text. Relative positions and sliding windows still count the hidden ones.
        """
        model = self.model
        lengths = self.towers[tower].lengths[np.asarray(rows)]
        ids, mask, segments = self.towers[tower].arrays(np.asarray(rows), side)
        fields = self.towers[tower].fields
        maker, device = model.maker_of(fields), model.map.device
        attended, shown = (torch.from_numpy(part).to(device) for part in (maker.attended(mask), (mask > 0).astype(int)))
        inputs = {'input_ids': torch.from_numpy(ids).to(device), 'attention_mask': attended}
        if maker.uses_segments:
            inputs['token_type_ids'] = torch.from_numpy(segments).to(device)
        if int(shown.sum()) != int(lengths.sum()):
            first, counted = first_position(model.map.base.config), shown
            if first:  # such models do not count padding tokens, wherever they stand
                counted = counted * (inputs['input_ids'] != first - 1)
            inputs['position_ids'] = (counted.cumsum(1) * counted - 1 + first).clamp(min=0)
        return Batch(inputs, model.scored(fields, inputs['input_ids'], shown))

    def types(
        self, tower: int, rows: Sequence[int] | np.ndarray, inserted: bool = True, scheme: str = 'basic'
    ) -> np.ndarray:
        """Returns the position types of one tower of some rows as places in a scheme, -1 for padding, [rows, tokens].

        Args:
            tower: Which tower.
            rows: Which rows.
            inserted: Whether what was inserted has a type of its own, or is what it is.
            scheme: One of `SCHEMES`; the place behind its types is that of a prompt.

        Raises:
            ValueError: If there is no such scheme, or the inputs were made without types.
        """
        places = {name: place for place, name in enumerate((*SCHEMES.get(scheme, ()), PROMPT))}
        names = [self.towers[tower].types(row, inserted, scheme) for row in rows]
        return _padded([[places[name] for name in row] for row in names], -1)


def _fine_types(tower: Tower, row: int, inserted: bool, scheme: str) -> Sequence[str]:
    if scheme != 'literature':
        raise ValueError(f'scheme must be one of {tuple(SCHEMES)}; got {scheme!r}')
    assert tower.words is not None  # given with the texts, like what basic types need
    return tower.words.types(tower, row, inserted)


def checked_rows(queries: Any, texts: Any) -> Fields:
    """Returns queries and texts as lists of strings, one a row.

    Raises:
        TypeError: If one of them is not a list of strings; the message names the first other value.
        ValueError: If they differ in number.
    """
    values = {'query': checked_texts('queries', queries), 'text': checked_texts('texts', texts)}
    if len(values['query']) != len(values['text']):
        raise ValueError(
            f'there must be one text for each query; got {len(values["query"])} queries and {len(values["text"])} '
            'texts: repeat the query for each of its texts'
        )
    return values


def checked_texts(name: str, values: Any) -> list[str]:
    """Returns a list, a Series or an array of strings as a list.

    Raises:
        TypeError: If it is something else; the message names the first value that is not a string.
    """
    if isinstance(values, str) or not hasattr(values, '__iter__'):
        raise TypeError(f'{name} must be a list of strings; got {values!r}: write [{values!r}]')
    found = values.tolist() if hasattr(values, 'tolist') else list(values)
    for row, value in enumerate(found):
        if not isinstance(value, str):
            raise TypeError(f'{name} must be strings; got {value!r} at position {row}: remove it, or give a text')
    return found


def _split(parts: Sequence[tuple[str, Ragged]]) -> tuple[list[Ragged], list[str]]:
    return [ids for _, ids in parts], [field for field, _ in parts]


def _query(towers: Sequence[Sequence[tuple[str, Ragged]]]) -> Ragged:
    return next(ids for parts in towers for field, ids in parts if field == 'query')


def _padded(arrays: Sequence[Any], fill: int) -> np.ndarray:
    values = np.full((len(arrays), max(map(len, arrays), default=0)), fill, dtype=np.int64)
    for row, array in zip(values, arrays, strict=True):
        row[: len(array)] = array
    return values


def _problem(problems: Sequence[str]) -> str:
    """Returns why a row cannot be patched, from what each tower says; '' if one of them can and none fails."""
    if UNALIGNED in problems:
        return UNALIGNED
    if '' in problems:
        return ''
    return next((problem for problem in problems if problem != UNCHANGED), UNCHANGED)
