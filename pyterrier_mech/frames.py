"""What every stage reads from its input frame, checked before it does any work, and how it adds columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import pyterrier as pt

from pyterrier_mech.provenance import ANALYSIS, Analysis

EDITED = 'edited'
"""Column in which `Perturb` names the columns that it has edited; their originals stand under the same name with _0."""

Fields = dict[str, list[str]]
"""The values of 'query' and 'text' for every row."""

_WAY_OUT = {
    'text': "Put a text loader before this stage: dataset.text_loader() or pt.text.get_text(index, 'text').",
    'text_0': 'Put an edit before this stage: Perturb(...) writes text and text_0 (or query and query_0).',
    'query': 'Give topics with a query column, e.g. dataset.get_topics() or pt.new.queries([...]).',
}


def require(inp: pd.DataFrame, stage: pt.Transformer, *modes: Sequence[str]) -> Sequence[str]:
    """Checks that `inp` is a result frame with all the columns of one of `modes`, and returns that mode.

    Args:
        inp: The frame that the stage was given.
        stage: The stage, named in the message.
        modes: Alternative lists of columns beside qid and docno, the preferred one first.

    Raises:
        pt.validate.InputValidationError: If no mode fits; the message says which stage to put before this one.
        ValueError: If two columns have one name.
    """
    try:
        with pt.validate.any(inp, context=stage) as v:
            fits = [columns for columns in modes if v.result_frame(extra_columns=list(columns))]
    except pt.validate.InputValidationError as error:
        missing = error.modes[0].missing_columns
        ways = ' '.join(_WAY_OUT[column] for column in missing if column in _WAY_OUT)
        raise pt.validate.InputValidationError(f'{error.args[0]} {ways}'.strip(), error.modes) from None
    once(inp)
    return fits[0]


def once(inp: pd.DataFrame) -> None:
    """Checks that every column has a name of its own.

    Raises:
        ValueError: If not.
    """
    if not inp.columns.is_unique:
        twice = inp.columns[inp.columns.duplicated()][0]
        raise ValueError(
            f'the frame has {list(inp.columns).count(twice)} columns called {twice!r}: rename or remove all but one, '
            'e.g. frame.loc[:, ~frame.columns.duplicated()]'
        )


def strings(inp: pd.DataFrame, column: str, stage: Any) -> list[str]:
    """Returns a text column as a list of strings.

    Raises:
        ValueError: If a value is null or not a string; the message names the first such rows and the way out.
    """
    values = inp[column].tolist()
    bad = [i for i, value in enumerate(values) if not isinstance(value, str)]
    if bad:
        where = ', '.join(f'{row_name(inp, i)}: {values[i]!r}' for i in bad[:3])
        raise ValueError(
            f'{type(stage).__name__}: {len(bad)} of {len(values)} rows have no string in column {column!r} ({where}). '
            f"Remove them with res.dropna(subset=[{column!r}]) or fill them with res.fillna({{{column!r}: ''}})."
        )
    return values


def row_name(inp: pd.DataFrame, row: int) -> str:
    """Returns what an error calls a row."""
    return f'qid={inp["qid"].iloc[row]!r} docno={inp["docno"].iloc[row]!r}'


def row_names(inp: pd.DataFrame) -> list[str]:
    """Returns what an error calls each row."""
    return [row_name(inp, row) for row in range(len(inp))]


def texts_of(inp: pd.DataFrame, stage: pt.Transformer, text: str) -> Fields:
    """Returns the queries and texts of a frame.

    Raises:
        pt.validate.InputValidationError: If a column is missing.
        ValueError: If a value is null.
    """
    require(inp, stage, ['query', text])
    return {'query': strings(inp, 'query', stage), 'text': strings(inp, text, stage)}


def two_versions(inp: pd.DataFrame, stage: pt.Transformer, text: str) -> tuple[Fields, Fields]:
    """Returns query and text of the original and of the perturbed pair of every row.

    An edit is what `Perturb` made, as the column `EDITED` says. A `query_0` alone is not one: query rewriters leave
    that column too. A frame made by hand, without `EDITED`, may have a second version of its text, and no `query_0`.

    Args:
        inp: A result frame with text_0, query_0 or both.
        stage: The stage, named in errors.
        text: Column of the text.

    Raises:
        pt.validate.InputValidationError: If a column is missing.
        ValueError: If a text is null, or it is unclear what was edited.
    """
    require(inp, stage, ['query', text, f'{text}_0'], ['query', text, 'query_0'])
    perturbed = texts_of(inp, stage, text)
    edited = edited_columns(inp, text)
    original = {}
    for field, column in (('query', 'query'), ('text', text)):
        rows = [row for row, columns in enumerate(edited) if column in columns]
        original[field] = list(perturbed[field])
        if rows:
            for row, value in zip(rows, strings(inp.iloc[rows], f'{column}_0', stage), strict=True):
                original[field][row] = value
    return original, perturbed


def edited_columns(inp: pd.DataFrame, text: str) -> list[set[str]]:
    """Returns the columns of every row that an edit has changed.

    Raises:
        ValueError: If a frame that does not say it has a `query_0`, or if it says something else.
    """
    if not len(inp):
        return []
    if EDITED not in inp.columns:
        if 'query_0' in inp.columns:
            raise ValueError(
                f"the frame has a column 'query_0' and no column {EDITED!r}, so it is unknown whether an edit or a "
                'query rewriter changed the query: put Perturb(...) before this stage, or say it with '
                f"frame.assign({EDITED}='query'), {EDITED}={text!r} or {EDITED}='query {text}'"
            )
        return [{text}] * len(inp)
    said = inp[EDITED].tolist()
    for row, value in enumerate(said):
        columns = set(value.split()) if isinstance(value, str) else set()
        if not columns or columns - {'query', text}:
            raise ValueError(
                f"{row_name(inp, row)}: column {EDITED!r} must name 'query', {text!r} or both, as Perturb writes it; "
                f'got {value!r}'
            )
        if missing := [column for column in sorted(columns) if f'{column}_0' not in inp.columns]:
            raise ValueError(
                f'{row_name(inp, row)}: column {EDITED!r} names {missing[0]!r}, but the frame has no '
                f"'{missing[0]}_0' with the original"
            )
    edited = [set(value.split()) for value in said]
    check_not_rewritten(inp, edited)
    return edited


def check_not_rewritten(inp: pd.DataFrame, edited: Sequence[set[str]]) -> None:
    """Checks that no rewriter came after an edit of the query: it would have moved the original to `query_1`.

    Raises:
        ValueError: If one did.
    """
    rows = [row for row, columns in enumerate(edited) if 'query' in columns and 'query_1' in inp.columns]
    if rows and inp['query_1'].iloc[rows].notna().any():
        raise ValueError(
            "the frame has a column 'query_1', so a query rewriter came after the edit of the query, and 'query_0' is "
            "not the original: put rewriters before Perturb(..., field='query'), or remove 'query_1' if 'query_0' is it"
        )


def with_columns(inp: pd.DataFrame, columns: Mapping[str, Any], analysis: Analysis | None = None) -> pd.DataFrame:
    """Returns a new frame with columns added at the end, replacing those of the same name.

    As `inp.assign(**columns)`, but at once: a column at a time is slow, and warned of, for models of many heads.

    Args:
        inp: The frame, left as it is.
        columns: What is added.
        analysis: Which analysis the columns of units among them are of; it is noted in the column `ANALYSIS`. What an
            earlier analysis has verified of the same units is dropped.
    """
    added, stale = dict(columns), set(columns)
    if analysis is not None:
        added[ANALYSIS] = analysis.noted(inp.drop(columns=[name for name in stale if name in inp.columns]))
        stale |= {ANALYSIS, *(f'{name}.exact' for name in analysis.columns)}
    kept = inp.drop(columns=[name for name in inp.columns if name in stale])
    res = pd.concat([kept, pd.DataFrame(added, index=inp.index)], axis=1)
    res.attrs = dict(inp.attrs)
    return res
