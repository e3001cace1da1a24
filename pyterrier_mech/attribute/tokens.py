"""Integrated gradients of the input, word by word, as a pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyterrier_mech.anatomy.model import EMBEDDINGS
from pyterrier_mech.attribute.lines import Baseline, Line, moving_tower
from pyterrier_mech.attribute.path import Integrating, integrate, warn_of
from pyterrier_mech.frames import Fields, texts_of, with_columns
from pyterrier_mech.rankers.ranker import as_numpy

ERROR = 'completeness_error.tokens'


@dataclass(eq=False, repr=False)
class AttributeTokens(Integrating):
    """How much of the score comes from every word of the input: integrated gradients of its word embeddings.

    The effect of a token is the integral of the gradient with respect to its word embedding along the straight line
    from a baseline, times the way that the embedding goes; a word has the sum over its tokens. The effects of a row
    sum to s(x) − s(baseline). A token that the baseline leaves as it is has none.

    **Input columns**: qid, query, docno, text.

    **Output columns**: the same and `tokens`, the words as they stand in query and text, in the order of the input and
    with the special tokens; `token_effects`, an array [words] (float32, or float64 for a float64 model, in units of the
    score); and `completeness_error.tokens`: the difference between their sum and s(x) − s(baseline), relative to the
    latter or to a tenth of the score's whole way along the line if that is more. The ranking is kept.

    Args:
        model: A ranker.
        baseline: 'all': all but the special tokens become padding tokens. 'query': query tokens do, the text stays.
            Else token ids, special tokens included, of the input's length, or a function from the input's ids to them.
            Of a bi-encoder's towers, only the query's moves with 'query' and only the text's with every other baseline;
            the words are those of the tower that moves.
        rule: 'trapezoid' on a uniform grid with both ends, or 'left' (see `AttributeNeurons`).
        points: Points of the first grid.
        tolerance: Intervals are halved, row by row, until the completeness error is not above this.
        max_points: No row gets more points. A warning counts the rows that would need them.
        batch_tokens: Tokens of one batch, over all points, each counted four times for the memory of its graph; by
            default as the model has it.
        text_field: Column of the text; by default as the model has it.
        verbose: Shows a progress bar; by default as the model has it.

    Raises:
        ValueError: If a setting is not known, a baseline does not fit its row, or a gradient is not finite.

    Source: Sundararajan, Taly, Yan, ICML 2017, arXiv 1703.01365.
    """

    _: KW_ONLY
    baseline: Baseline = 'all'

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Attributes the score of every row."""
        self.check()
        fields = texts_of(inp, self, self.text)
        if not len(inp):
            none = np.zeros(0, dtype=object)
            return with_columns(inp, {'tokens': none, 'token_effects': none, ERROR: np.zeros(0, dtype=np.float32)})
        return with_columns(inp, self._attribute(inp, fields))

    def _attribute(self, inp: pd.DataFrame, values: Fields) -> dict[str, Any]:
        model = self.model
        lines = self.lines(inp)
        fields = model.towers[moving_tower(model, self.baseline)]
        errors = np.zeros(len(inp), dtype=model.float_type)
        words: list[list[str]] = [[] for _ in lines]
        effects: list[Any] = [None] * len(lines)

        def reduce(line: Line, layers: list[torch.Tensor]) -> np.ndarray:
            return as_numpy(layers[0].sum(-1)).astype(model.float_type)

        for result in integrate(model, lines, site=EMBEDDINGS.kind, reduce=reduce, **self.walking()):
            row = result.row
            errors[row] = result.error
            words[row], starts = merged(model, {field: values[field][row] for field in fields}, len(lines[row]))
            effects[row] = np.add.reduceat(result.value, starts)
        warn_of(errors, self.grid)
        return {'tokens': words, 'token_effects': effects, ERROR: errors}


def merged(model: Any, texts: dict[str, str], length: int) -> tuple[list[str], list[int]]:
    """Returns the words of one tower's input and the position where each begins, special tokens included.

    Words are what the tokenizer splits before it splits words, cut out of the text; a truncated word ends where the
    text was cut.

    Args:
        model: A ranker.
        texts: Query and text, or the one that the tower reads.
        length: Tokens of the input.
    """
    if model.prompted:
        return _merged_in_prompt(model, texts)
    maker = model.maker_of(tuple(texts))
    whole = [model.prepared(field, text) for field, text in texts.items()]
    parts = [_pieces(maker.tokenizer, text) for text in whole]
    kept = [int(k[0]) for k in maker.kept([np.asarray([len(part)]) for part in parts])]
    words: list[str] = []
    starts: list[int] = []
    tokens, position = maker.tokenizer.convert_ids_to_tokens, 0
    for i, specials in enumerate(maker.template(len(parts)).specials):
        for token in specials:
            words.append(tokens(token))
            starts.append(position)
            position += 1
        if i < len(parts):
            for offset, word in _words(parts[i][: kept[i]], whole[i]):
                words.append(word)
                starts.append(position + offset)
            position += kept[i]
    if maker.fill is not None:
        starts += range(position, maker.fill.length)
        words += [tokens(maker.fill.token)] * (maker.fill.length - position)
        position = max(position, maker.fill.length)
    if position != length:
        raise ValueError(f'{model!r}: its tokenizer gives {position} tokens for an input of {length}')
    return words, starts


def _merged_in_prompt(model: Any, texts: dict[str, str]) -> tuple[list[str], list[int]]:
    """As `merged`: the tokens of a prompt are words of their own."""
    values = {field: [text] for field, text in texts.items()}
    parts, words_of = model.parts(values, tuple(values)), model.words_of(values)
    words: list[str] = []
    starts: list[int] = []
    position = 0
    for field, ids in zip([field for field, _ in parts], model.maker.cut([ids for _, ids in parts]), strict=True):
        tokens = ids.row(0).tolist()
        owners = list(words_of[field][0].owners) if field else list(range(len(tokens)))
        for _, of_word in groupby(range(len(tokens)), owners.__getitem__):
            some = list(of_word)
            starts.append(position + some[0])
            word = [tokens[token] for token in some]
            joined = model.maker.tokenizer.decode(word).strip()
            words.append(joined or model.maker.tokenizer.convert_ids_to_tokens(word[0]))
        position += len(tokens)
    return words, starts


def _pieces(tokenizer: Any, text: str) -> list[tuple[int | None, str, int, int]]:
    """Returns (word number, token, where it begins and ends in the text) of every token; no special tokens."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        (word, token, *offsets)
        for word, token, offsets in zip(encoded.word_ids(0), encoded.tokens(0), encoded['offset_mapping'], strict=True)
    ]


def _words(pieces: Sequence[tuple[int | None, str, int, int]], text: str) -> list[tuple[int, str]]:
    """Returns where each word begins, in tokens, and its text."""
    starts = [i for i, piece in enumerate(pieces) if i == 0 or piece[0] is None or piece[0] != pieces[i - 1][0]]
    words = []
    for start, end in zip(starts, [*starts[1:], len(pieces)], strict=False):
        # Byte-level and sentencepiece tokenizers count the space before a word as its own.
        word = text[pieces[start][2] : pieces[end - 1][3]].strip()
        words.append((start, word or pieces[start][1]))
    return words
