"""The role of a head, from where it looks.

`head_roles` adds up the shares of `AttentionShares` over the rows of a frame and names a role for each head, with the
numbers that it follows from, and how stable it is. `compare_roles` puts the roles on several collections side by side.
`head_shares` averages any flow, with intervals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from pyterrier_mech.circuits.shares import EXPECTED, FLOWS, MODEL, REPEATED, SHARE, WORD_FLOWS, named
from pyterrier_mech.evaluation.bootstrap import check_interval, ratio_of_sums
from pyterrier_mech.units import head

SAME_TOKEN = 'same-token'
ROLES = (SAME_TOKEN, 'query-focused', 'document-focused', 'matching', 'special-token', 'mixed')
ODDS = 'odds.'

# Which words look above expectation where: any other set of flows has no name.
_ROLE_OF = {
    frozenset({'query_to_query'}): 'query-focused',
    frozenset({'query_to_query', 'document_to_query'}): 'query-focused',
    frozenset({'document_to_document'}): 'document-focused',
    frozenset({'document_to_document', 'query_to_document'}): 'document-focused',
    frozenset({'query_to_document'}): 'matching',
    frozenset({'document_to_query'}): 'matching',
    frozenset({'query_to_document', 'document_to_query'}): 'matching',
}
_TOWERS = ('query', 'text')


def head_roles(
    frame: pd.DataFrame,
    *,
    same: float = 0.25,
    odds: float = 2.0,
    special: float = 0.5,
    tower: str | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Names the role of every head from where it looks, over all rows of a frame.

    Shares are means over rows. First, what a word gives to itself at another place: of the mass of all tokens whose
    word stands elsewhere too, a 'same-token' head (a duplicate-token head) gives the share `same` or more to these
    places, and that share has `odds` times the odds of even attention. Of any other, a head that gives the share
    `special` or more of its mass to CLS and separators is 'special-token'. Of the rest, what query words give to words
    is divided into query and document, and so is what document words give; a flow is above expectation where its odds
    are `odds` times those of attention spread evenly.

    - 'query-focused': query to query is above, and document to query may be;
    - 'document-focused': document to document is above, and query to document may be;
    - 'matching': query to document, document to query, or both;
    - 'mixed': none of these, or both stay on their own side.

    In one sequence of a bi-encoder there are no two sides: its heads are 'same-token', 'special-token' or 'mixed'.

    **Input columns**: qid and what `AttentionShares` writes.

    **Output columns**: one row a head: `layer`, `head`, `name`, `role`, `stability` (the share of bootstrap samples of
    the queries in which the head has the same role; NaN with one query), `above` (the flows above expectation),
    `same_token` and `same_token_expected` (of the mass of tokens whose word stands elsewhere too, the share that goes
    there, and that of even attention; NaN without such tokens), `attention.{flow}` and `expected.{flow}` (mean shares),
    `odds.{flow}` for the flows between words (ratio of the odds to those expected, from sums over rows; NaN without
    such mass), `n` (rows), `n_queries`, `n_repeated` (rows with such tokens), and the thresholds `same_threshold`,
    `odds_threshold` and `special_threshold`.

    Args:
        frame: The frame of an `AttentionShares` stage.
        same: The share to the same word elsewhere that makes the role.
        odds: How many times the expected odds are above expectation.
        special: The share of mass on special tokens that makes the role.
        tower: 'query' or 'text': which sequence of a bi-encoder.
        n_resamples: How often queries are drawn for the stability.
        seed: Random seed.

    Raises:
        ValueError: If a threshold is out of range, a column is missing, or there are no rows or rows of other heads.
    """
    limits = _Limits(same, odds, special)
    flows = _flows(frame, tower)
    sums = _sums(frame, flows, tower)
    totals = {name: values.sum(0) for name, values in sums.items()}
    measures, stability = _measures(totals), _stability(sums, limits, n_resamples, seed)
    roles, n_repeated = _roles(measures, limits), int((frame[named(REPEATED, tower)] > 0).sum())
    counts = {'n': len(frame), 'n_queries': len(sums['n']), 'n_repeated': n_repeated, **limits.columns()}
    rows = []
    for layer, number in np.argwhere(~np.isnan(totals['to_cls'])).tolist():
        at = (layer, number)
        above = [flow for flow, values in measures.odds.items() if values[at] >= odds]
        row: dict[str, Any] = {'layer': layer, 'head': number, 'name': head(layer, number).name}
        row |= {'role': ROLES[roles[at]], 'stability': stability[at], 'above': ' '.join(above)}
        row |= {'same_token': measures.same[at], 'same_token_expected': float(measures.same_even)}
        row |= {SHARE + flow: totals[flow][at] / len(frame) for flow in flows}
        row |= {EXPECTED + flow: float(totals[EXPECTED + flow]) / len(frame) for flow in flows}
        rows.append(row | {ODDS + flow: values[at] for flow, values in measures.odds.items()} | counts)
    return pd.DataFrame(rows)


def compare_roles(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Returns the roles of the same heads on several collections, side by side.

    Args:
        tables: For the name of each collection what `head_roles` returned.

    Returns:
        One row a head: `layer`, `head`, `name`, `role.{collection}` and `stability.{collection}` for each, `n_roles`
        (how many different roles it has), and `agrees` (whether it has one).

    Raises:
        ValueError: If there are fewer than two tables, or they have different heads or thresholds.
    """
    if len(tables) < 2:
        raise ValueError(f'tables must have two collections or more; got {list(tables)}')
    first = next(iter(tables.values()))
    keys, limits = ['layer', 'head', 'name'], ['same_threshold', 'odds_threshold', 'special_threshold']
    for name, table in list(tables.items())[1:]:
        for columns, what in ((keys, 'heads'), (limits, 'thresholds')):
            if not table[columns].reset_index(drop=True).equals(first[columns].reset_index(drop=True)):
                raise ValueError(f'{name!r} has other {what} than {next(iter(tables))!r}: make both tables alike')
    res = first[keys].reset_index(drop=True)
    for what in ('role', 'stability'):
        res = res.assign(**{f'{what}.{name}': table[what].to_numpy() for name, table in tables.items()})
    n_roles = res[[f'role.{name}' for name in tables]].nunique(axis=1)
    return res.assign(n_roles=n_roles, agrees=n_roles == 1)


def head_shares(
    frame: pd.DataFrame,
    flow: str,
    *,
    tower: str | None = None,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Returns the mean share of one flow for every head, with bootstrap intervals over queries.

    Args:
        frame: The frame of an `AttentionShares` stage.
        flow: A flow or a part of one: 'document_to_query', 'document_to_query.same_word', 'injected_to_query_same', ….
        tower: 'query' or 'text': which sequence of a bi-encoder.
        confidence: Coverage of the interval.
        n_resamples: How often queries are drawn.
        seed: Random seed.

    Returns:
        One row a head: `layer`, `head`, `name`, `share`, `share_low`, `share_high`, `expected` (of even attention), `n`
        and `n_queries` (rows, and their queries, that have the flow; the rest is left out).

    Raises:
        ValueError: If the column is missing, or there are no rows.
    """
    share, expected = (named(kind + flow, tower) for kind in (SHARE, EXPECTED))
    _need(frame, [share, expected])
    check_interval(confidence, n_resamples)
    values = _stacked(frame, share)
    options = {'confidence': confidence, 'n_resamples': n_resamples, 'seed': seed}
    means = ratio_of_sums(values, np.ones(len(values)), frame['qid'], **options)
    even = float(frame[expected].mean())
    rows = []
    for layer, number in np.argwhere(_there(frame, tower)).tolist():
        at = (layer, number)
        row = {'layer': layer, 'head': number, 'name': head(layer, number).name, 'share': means.value[at]}
        row |= {'share_low': means.low[at], 'share_high': means.high[at], 'expected': even}
        rows.append(row | {'n': int(means.n[at]), 'n_queries': int(means.n_queries[at])})
    return pd.DataFrame(rows)


def _there(frame: pd.DataFrame, tower: str | None) -> np.ndarray:
    """Returns which heads there are [layers, heads]."""
    return ~np.isnan(np.asarray(frame[named(SHARE + 'to_cls', tower)].iloc[0]))


# -- what roles follow from


@dataclass(frozen=True)
class _Limits:
    """The thresholds."""

    same: float
    odds: float
    special: float

    def __post_init__(self) -> None:
        """Checks them."""
        for name in ('same', 'special'):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f'{name} must be a share above 0 and up to 1, e.g. 0.5; got {getattr(self, name)!r}')
        if not self.odds >= 1:
            raise ValueError(
                f'odds must be 1 or more, or flows below expectation would count as above it; got {self.odds!r}'
            )

    def columns(self) -> dict[str, float]:
        return {f'{name}_threshold': float(getattr(self, name)) for name in ('same', 'odds', 'special')}


class _Measures(NamedTuple):
    """What roles follow from [..., layers, heads], for one sum over rows or for many."""

    same: np.ndarray
    same_even: np.ndarray
    special: np.ndarray
    odds: dict[str, np.ndarray]


def _flows(frame: pd.DataFrame, tower: str | None) -> list[str]:
    """Returns the flows that a frame has of a tower."""
    if tower is None and (apart := [side for side in _TOWERS if named(SHARE + 'to_cls', side) in frame.columns]):
        if SHARE + 'to_cls' not in frame.columns:
            raise ValueError(
                f'these are the shares of a bi-encoder, which reads two sequences: give tower={apart[-1]!r}'
            )
    here = {flow for flow in WORD_FLOWS if tower is None or named(SHARE + flow, tower) in frame.columns}
    flows = [flow for flow in FLOWS if flow not in WORD_FLOWS or flow in here]
    parts = [f'{flow}.same_word' for flow in flows if flow in WORD_FLOWS]
    needed = [named(kind + flow, tower) for flow in [*flows, *parts] for kind in (SHARE, EXPECTED)]
    _need(frame, [*needed, named(REPEATED, tower)])
    return flows


def _need(frame: pd.DataFrame, columns: list[str]) -> None:
    missing = [column for column in columns if column not in frame.columns]
    if missing or not len(frame):
        what = f'The frame has no {missing[0]!r}' if missing else 'The frame has no rows'
        raise ValueError(f'{what}: pass what AttentionShares(model) returned for at least one pair.')
    if MODEL in frame.columns and frame[MODEL].nunique(dropna=False) > 1:
        several = frame[MODEL].unique().tolist()
        raise ValueError(
            f'the rows are of {len(several)} rankers ({several[0]} and {several[1]}), which must not be mixed: keep '
            f'those of one, frame[frame[{MODEL!r}] == …]'
        )


def _sums(frame: pd.DataFrame, flows: list[str], tower: str | None) -> dict[str, np.ndarray]:
    """Returns the sums over the rows of every query [queries, ...]: of shares, of what is expected, of same words."""
    _, query = np.unique(np.asarray(frame['qid'], dtype=str), return_inverse=True)

    def of(column: str) -> np.ndarray:
        values = _stacked(frame, named(column, tower))
        if (np.isnan(values) != np.isnan(values[0])).any():
            raise ValueError(f'the rows have {named(column, tower)!r} of different heads: keep those of one ranker')
        sums = np.zeros((query.max() + 1, *values.shape[1:]))
        np.add.at(sums, query, values)
        return sums

    sums = {flow: of(SHARE + flow) for flow in flows} | {EXPECTED + flow: of(EXPECTED + flow) for flow in flows}
    words = [flow for flow in flows if flow in WORD_FLOWS]
    for kind, name in ((SHARE, 'same'), (EXPECTED, 'same_even')):
        sums[name] = np.sum([of(f'{kind}{flow}.same_word') for flow in words], axis=0)
    return sums | {REPEATED: of(REPEATED), 'n': np.bincount(query).astype(float)}


def _stacked(frame: pd.DataFrame, column: str) -> np.ndarray:
    """Returns the numbers or arrays of a column, one a row."""
    try:
        return np.stack([np.asarray(value, dtype=np.float64) for value in frame[column]])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f'the rows of column {column!r} must have arrays of one shape ({error}): keep those of one ranker; arrays '
            'do not survive CSV, write_frame(frame, path) keeps them'
        ) from error


def _measures(sums: dict[str, np.ndarray]) -> _Measures:
    """From sums [..., layers, heads], and [...] of what is the same for all heads."""

    def wide(values: np.ndarray) -> np.ndarray:
        return np.asarray(values)[..., None, None]

    odds: dict[str, np.ndarray] = {}
    with np.errstate(divide='ignore', invalid='ignore'):
        for source in ('query', 'document'):
            to_query, to_document = f'{source}_to_query', f'{source}_to_document'
            if to_query in sums and to_document in sums:
                found = sums[to_query] / sums[to_document]
                even = wide(sums[EXPECTED + to_query] / sums[EXPECTED + to_document])
                odds |= {to_query: found / even, to_document: even / found}
        return _Measures(
            same=sums['same'] / wide(sums[REPEATED]),
            same_even=sums['same_even'] / sums[REPEATED],
            special=(sums['to_cls'] + sums['to_sep']) / wide(sums['n']),
            odds={flow: odds[flow] for flow in WORD_FLOWS if flow in odds},
        )


def _roles(measures: _Measures, limits: _Limits) -> np.ndarray:
    """Returns roles as places in `ROLES`, of the shape of the measures."""
    above = np.zeros(measures.special.shape, dtype=np.int64)
    for bit, values in enumerate(measures.odds.values()):
        above += (values >= limits.odds) << bit
    of_above = []
    for mask in range(1 << len(measures.odds)):
        flows = frozenset(flow for bit, flow in enumerate(measures.odds) if mask >> bit & 1)
        of_above.append(ROLES.index(_ROLE_OF.get(flows, 'mixed')))
    roles = np.where(measures.special >= limits.special, ROLES.index('special-token'), np.asarray(of_above)[above])
    # Where a text repeats one word, even attention goes to the same word.
    same, even = measures.same, np.asarray(measures.same_even)[..., None, None]
    beyond = same * (1 - even) >= limits.odds * even * (1 - same)
    return np.where((same >= limits.same) & beyond, ROLES.index(SAME_TOKEN), roles)


def _stability(sums: dict[str, np.ndarray], limits: _Limits, n_resamples: int, seed: int) -> np.ndarray:
    """Returns how often bootstrap samples of the queries give each head the role that all give it [layers, heads]."""
    check_interval(0.5, n_resamples)
    role = _roles(_measures({name: values.sum(0) for name, values in sums.items()}), limits)
    n_queries = len(sums['n'])
    if n_queries == 1:
        return np.full(role.shape, np.nan)
    rng = np.random.default_rng(seed)
    counts = [np.bincount(rng.integers(n_queries, size=n_queries), minlength=n_queries) for _ in range(n_resamples)]
    drawn = {name: np.tensordot(np.asarray(counts, dtype=float), values, axes=1) for name, values in sums.items()}
    return (_roles(_measures(drawn), limits) == role).mean(0)
