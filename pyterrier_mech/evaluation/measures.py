"""Measures of what an edit does to scores and ranking, for `pt.Experiment`.

They read `score_original` and `score_perturbed`, which `PatchHeads` writes; without heads it only scores the two
versions, and with ``filler='mask'`` it reads both texts as they are::

    rescore = PatchHeads(model, heads=[], filler='mask')
    pt.Experiment(
        [bm25 % 10 >> text >> Perturb(axiom) >> rescore],
        topics,
        qrels,
        [ScoreChange, AxiomAgreement(axiom.expected), RankChange, KendallTau],
    )

Qrels say only which queries there are; no label is read. Rows without a number in one of the two columns do not
enter. A query for which nothing is left, or that has no results, has no value: NaN. PyTerrier's mean over queries is
then NaN too, never a mean over fewer queries than it says. To leave such queries out, and see how many they are::

    values = pt.Experiment(..., perquery=True)
    values.groupby(['name', 'measure'])['value'].agg(['mean', 'count'])

``@k`` keeps the first k documents of a query by `score`, as for any measure.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import ir_measures
import numpy as np
import pandas as pd
from scipy import stats

from pyterrier_mech.inputs.alignment import TRUNCATED, UNCHANGED

_SCORES = ['score_original', 'score_perturbed']


def _measure(value: Callable[[pd.DataFrame], float], name: str, description: str) -> ir_measures.Measure:
    """Makes a measure from a function of the rows of a query that have both scores."""

    def of_query(qrels: pd.DataFrame, run: pd.DataFrame) -> float:
        if missing := [column for column in _SCORES if column not in run.columns]:
            raise ValueError(
                f'{name} reads {_SCORES}, and the results lack {missing}: put PatchHeads(model, heads=[]) behind '
                "Perturb. A run saved with save_format='trec' has lost them."
            )
        rows = run.loc[np.isfinite(run[_SCORES].to_numpy(dtype=float)).all(axis=1)]
        return value(rows) if len(rows) else math.nan

    measure = ir_measures.define_byquery(
        of_query,
        name,
        run_inputs=['query_id', 'doc_id', 'score', *_SCORES],
        qrel_inputs=['query_id'],
        short_desc=description,
    )
    # The class is this measure's own. ir_measures gives a query without results the value 0: no change.
    type(measure).DEFAULT = math.nan
    return measure


def _score_change(rows: pd.DataFrame) -> float:
    return float((rows['score_perturbed'] - rows['score_original']).mean())


def _rank_change(rows: pd.DataFrame) -> float:
    before, after = (rows[column].rank(ascending=False) for column in _SCORES)
    return float((after - before).abs().mean())


def _kendall_tau(rows: pd.DataFrame) -> float:
    return float(stats.kendalltau(*[rows[column] for column in _SCORES]).statistic) if len(rows) > 1 else math.nan


ScoreChange = _measure(
    _score_change, 'ScoreChange', 'Mean of score_perturbed - score_original over the documents of a query, in logits.'
)

RankChange = _measure(
    _rank_change,
    'RankChange',
    'Mean distance between the ranks of a document by score_original and by score_perturbed; equal scores share the '
    'mean of their ranks.',
)

KendallTau = _measure(
    _kendall_tau,
    'KendallTau',
    'Kendall tau-b between score_original and score_perturbed; NaN for a single document, or where all scores of one '
    'version are equal.',
)


def AxiomAgreement(expected: int = 1) -> ir_measures.Measure:  # noqa: N802 - it is used like a measure
    """Makes the measure of how often a score moves as an axiom says.

    The share of the documents of a query with `score_perturbed` above (`expected=1`) or below (`expected=-1`)
    `score_original`; a score that stays counts against. Documents that the edit did not reach ('nothing changed' or
    'edit truncated away' in `patchable`, where there is such a column) do not enter.

    Args:
        expected: The sign that the axiom predicts, as in `axiom.expected`.

    Raises:
        ValueError: If it is neither 1 nor -1.
    """
    if expected not in (1, -1):
        raise ValueError(
            f'expected must be 1 (the score should rise) or -1 (it should fall); got expected={expected!r}'
        )

    def share(rows: pd.DataFrame) -> float:
        if 'patchable' in rows.columns:
            rows = rows[~rows['patchable'].isin([UNCHANGED, TRUNCATED])]
        moved = np.sign(rows['score_perturbed'] - rows['score_original'])
        return float((moved == expected).mean()) if len(rows) else math.nan

    return _measure(
        share, f'AxiomAgreement({expected:+d})', 'Share of documents whose score moves in the sign that the axiom says.'
    )
