"""All versions of all pairs, scored by one call of any ranker: the work behind AxiomProfile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyterrier as pt

from pyterrier_mech.draws import digest, generator
from pyterrier_mech.evaluation.runs import with_ids
from pyterrier_mech.frames import once, row_name
from pyterrier_mech.perturb._documents import plain_terms
from pyterrier_mech.perturb.arguments import as_edit
from pyterrier_mech.perturb.base import TextEdit
from pyterrier_mech.perturb.stage import Perturbation

_CHANGE = (-1, 1)


class Edited(NamedTuple):
    """What an edit makes of all rows.

    Attributes:
        name: How the table calls it.
        expected: The predicted sign, or None.
        agrees: Whether a change is as predicted, None without a prediction.
        weights: What each version counts.
        versions: For each row its versions, None where the edit changes nothing.
        controls: The same for another query; None also where the edit changes nothing for either, or the same.
        digests: For each row a name of its query and versions.
    """

    name: str
    expected: int | None
    agrees: Callable[[float], bool] | None
    weights: Sequence[int]
    versions: list[tuple[str, ...] | None]
    controls: list[tuple[str, ...] | None]
    digests: list[str]


class Scores(NamedTuple):
    """Scores of the original texts [rows], and for each edit its changes and those of its control [rows]."""

    original: np.ndarray
    changes: list[tuple[np.ndarray, np.ndarray]]


def edited_versions(
    frame: pd.DataFrame, axioms: Iterable[Any] | Mapping[str, Any], text_field: str, seed: int
) -> tuple[pd.DataFrame, list[Edited]]:
    """Returns the rows of a frame, sorted, and what every edit makes of them. See `AxiomProfile.of`."""
    rows = _checked(frame, text_field)
    lent = dict(zip(rows['qid'], rows['query']))
    others = [lent.get(other) for other in rows['qid'].map(_lenders(lent, seed))]
    edits = []
    for name, edit in _named(axioms):
        make, control = _makers(edit)
        versions, controls = [], []
        for row, (query, text, other) in enumerate(zip(rows['query'], rows[text_field], others)):
            own = _made(lambda: make(query, text), name, rows, row, text)
            foreign = None if other is None else _made(lambda: control(query, other, text), name, rows, row, text)
            versions.append(own)
            controls.append(None if own is None or foreign == own else foreign)
        expected = getattr(edit, 'expected', None)
        agrees = None if expected is None else edit.agrees
        digests = [digest(*pair).hex()[:16] for pair in zip(rows['query'], rows[text_field], versions)]
        weights = edit.weights if isinstance(edit, TextEdit) else _CHANGE
        edits.append(Edited(name, expected, agrees, weights, versions, controls, digests))
    return rows, edits


def scored(ranker: Any, rows: pd.DataFrame, edits: Sequence[Edited], text_field: str) -> Scores:
    """Returns the scores of the original texts and the changes, from one call of the ranker."""
    if isinstance(ranker, type) or not isinstance(ranker, pt.Transformer):
        raise TypeError(f'ranker={ranker!r}: give a transformer that scores texts, such as CrossEncoder(name).')
    queries = dict(zip(rows['qid'], rows['query']))
    wanted = {(qid, text): None for qid, text in zip(rows['qid'], rows[text_field])}
    for edit in edits:
        for made in (edit.versions, edit.controls):
            wanted |= {(qid, text): None for qid, texts in zip(rows['qid'], made) for text in texts or ()}
    keys = list(wanted)
    given = pd.DataFrame(
        {
            'qid': [qid for qid, _ in keys],
            'query': [queries[qid] for qid, _ in keys],
            'docno': [digest(text).hex()[:16] for _, text in keys],
            text_field: [text for _, text in keys],
        }
    )
    found = _by_key(ranker, given)
    score = {key: found.get((key[0], docno), np.nan) for key, docno in zip(keys, given['docno'])}
    if lost := [key for key, value in score.items() if not np.isfinite(value)]:
        raise ValueError(
            f'{ranker!r} returned no finite score for {len(lost)} of {len(score)} texts, the first of '
            f'qid={lost[0][0]!r}: {lost[0][1][:80]!r}. Give a ranker that scores every row, without a cut-off.'
        )
    qids = rows['qid'].tolist()

    def changes(made: list[tuple[str, ...] | None], weights: Sequence[int]) -> np.ndarray:
        parts = [
            np.nan if texts is None else sum(weight * score[qid, text] for weight, text in zip(weights, texts))
            for qid, texts in zip(qids, made)
        ]
        return np.array(parts, dtype=np.float64)

    original = np.array([score[key] for key in zip(qids, rows[text_field])])
    return Scores(original, [(changes(e.versions, e.weights), changes(e.controls, e.weights)) for e in edits])


def _by_key(ranker: pt.Transformer, given: pd.DataFrame) -> dict[tuple[str, str], float]:
    res = pd.DataFrame(ranker(given))
    if missing := [column for column in ('qid', 'docno', 'score') if column not in res.columns]:
        raise ValueError(f'{ranker!r} returned no column {missing[0]!r}: give a transformer that scores texts.')
    return dict(zip(zip(res['qid'].astype(str), res['docno'].astype(str)), res['score'].astype(float)))


def _checked(frame: pd.DataFrame, text_field: str) -> pd.DataFrame:
    once(frame)
    if missing := [column for column in ('qid', 'docno', 'query', text_field) if column not in frame.columns]:
        raise ValueError(
            f'the frame has no {", ".join(map(repr, missing))}, only {list(frame.columns)}. Give one row per pair, '
            'with topics merged in and texts loaded: dataset.text_loader()(frame).'
        )
    if not len(frame):
        raise ValueError('the frame has no rows: there is no pair to edit.')
    rows = with_ids(frame, 'the frame')[['qid', 'docno', 'query', text_field]]
    rows = rows.sort_values(['qid', 'docno']).reset_index(drop=True)
    for column in ('query', text_field):
        for row in np.flatnonzero([not isinstance(value, str) for value in rows[column]])[:1]:
            raise ValueError(
                f'{row_name(rows, row)} has no string in column {column!r}, but {rows[column][row]!r}. Remove such '
                f'rows with frame.dropna(subset=[{column!r}]).'
            )
    for row in np.flatnonzero(rows.duplicated(['qid', 'docno']))[:1]:
        raise ValueError(f"{row_name(rows, row)} stands there twice: frame.drop_duplicates(['qid', 'docno']).")
    for row in np.flatnonzero(rows.groupby('qid')['query'].transform('nunique') > 1)[:1]:
        raise ValueError(f'qid={rows["qid"][row]!r} has several queries: give each query a qid of its own.')
    return rows


def _lenders(queries: Mapping[str, str], seed: int) -> dict[str, str]:
    """Returns for each query another one that shares no word with it, where there is one."""
    words = {qid: {word for word, _ in plain_terms(query)} for qid, query in queries.items()}
    lenders = {}
    for qid in words:
        free = [other for other in sorted(words) if words[other] and not words[other] & words[qid]]
        if free:
            lenders[qid] = free[int(generator(seed, qid).random() * len(free))]
    return lenders


def _named(axioms: Iterable[Any] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    if isinstance(axioms, Mapping):
        named = [(str(name), edit) for name, edit in axioms.items()]
    else:
        edits = [axioms] if callable(axioms) else list(axioms)
        named = [(str(getattr(e, 'name', getattr(e, '__name__', type(e).__name__))), e) for e in edits]
    names = [name for name, _ in named]
    if not names:
        raise ValueError('there are no axioms: give some, such as all_edits(index).')
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f'two edits are called {twice[0]!r}: name them with a mapping, axioms={{name: edit}}.')
    return named


def _makers(edit: Any) -> tuple[Callable[[str, str], tuple[str, ...]], Callable[[str, str, str], tuple[str, ...]]]:
    """Returns what makes the versions of an edit for (query, text), and of its control for (query, other, text)."""
    if isinstance(edit, TextEdit):
        return edit.versions, edit.control
    if isinstance(edit, type) or not callable(edit):
        raise TypeError(f'{edit!r} is no edit: give an axiom such as TFC1(), or a callable (query, text) -> str.')
    call = as_edit(edit.function if isinstance(edit, Perturbation) else edit)
    return lambda query, text: (text, call(query, text)), lambda query, other, text: (text, call(other, text))


def _made(
    make: Callable[[], tuple[str, ...]], name: str, rows: pd.DataFrame, row: int, text: str
) -> tuple[str, ...] | None:
    try:
        versions = make()
    except Exception as error:
        raise RuntimeError(f'{name} failed at {row_name(rows, row)}: {error!r}') from error
    if not all(isinstance(version, str) for version in versions):
        raise TypeError(f'{name} got {versions[-1]!r} at {row_name(rows, row)}: an edit returns a string.')
    return None if set(versions) == {text} else versions
