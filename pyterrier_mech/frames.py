"""Checks that every stage makes on its input frame before it does any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import pyterrier as pt

_WAY_OUT = {
    'text': "Put a text loader before this stage: dataset.text_loader() or pt.text.get_text(index, 'text').",
    'text_0': 'Put an edit before this stage: Perturb(...) writes text and text_0 (or query and query_0).',
    'query': 'Give topics with a query column, e.g. dataset.get_topics() or pt.new.queries([...]).',
}


def require(inp: pd.DataFrame, stage: pt.Transformer, *modes: Sequence[str]) -> Sequence[str]:
    """Checks that ``inp`` is a result frame with all the columns of one of ``modes``, and returns that mode.

    Args:
        inp: The frame that the stage was given.
        stage: The stage, named in the message.
        modes: Alternative lists of columns beside qid and docno, the preferred one first.

    Raises:
        pt.validate.InputValidationError: If no mode fits; the message says which stage to put before this one.
    """
    try:
        with pt.validate.any(inp, context=stage) as v:
            fits = [columns for columns in modes if v.result_frame(extra_columns=list(columns))]
    except pt.validate.InputValidationError as error:
        missing = error.modes[0].missing_columns
        ways = ' '.join(_WAY_OUT[column] for column in missing if column in _WAY_OUT)
        raise pt.validate.InputValidationError(f'{error.args[0]} {ways}'.strip(), error.modes) from None
    return fits[0]


def strings(inp: pd.DataFrame, column: str, stage: pt.Transformer) -> list[str]:
    """Returns a text column as a list of strings.

    Raises:
        ValueError: If a value is null or not a string; the message names the first such rows and the way out.
    """
    values = inp[column].tolist()
    bad = [i for i, value in enumerate(values) if not isinstance(value, str)]
    if bad:
        where = ', '.join(f'qid={inp["qid"].iloc[i]!r} docno={inp["docno"].iloc[i]!r}: {values[i]!r}' for i in bad[:3])
        raise ValueError(
            f'{type(stage).__name__}: {len(bad)} of {len(values)} rows have no string in column {column!r} ({where}). '
            f"Remove them with res.dropna(subset=[{column!r}]) or fill them with res.fillna({{{column!r}: ''}})."
        )
    return values


def with_columns(inp: pd.DataFrame, columns: Mapping[str, Any]) -> pd.DataFrame:
    """Returns a new frame with columns added at the end, replacing those of the same name.

    As `inp.assign(**columns)`, but at once: a column at a time is slow, and warned of, for models of many heads.
    """
    kept = inp.drop(columns=[name for name in columns if name in inp.columns])
    res = pd.concat([kept, pd.DataFrame(dict(columns), index=inp.index)], axis=1)
    res.attrs = dict(inp.attrs)
    return res
