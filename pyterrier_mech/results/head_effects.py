"""What patching says about each head, over many pairs: an Artifact made from the frame of PatchHeads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt

from pyterrier_mech.results._aggregate import COLUMNS, KEYS, aggregate
from pyterrier_mech.saving import SavedResult
from pyterrier_mech.units import parse


class HeadEffects(SavedResult):
    """Effect of each head over all rows of a patching run, with an interval over queries.

    Made by :meth:`from_frame`, or read from a folder with ``HeadEffects.load(path)``.

    Attributes:
        confidence: Coverage of the intervals.
        n_resamples: Bootstrap resamples behind the intervals.
        seed: Random seed of the resamples.
        analysis: Which analysis made the effects: the class of the stage as 'by', and its settings.
        n_rows: Rows of the frame.
        n_used: Rows that entered for at least one head.
        n_queries: Queries of these rows.
        n_unpatchable: Rows that could not be patched, counted by reason.
        n_nan: Patchable rows where a score or a head was NaN or infinite; such values do not enter.
        n_duplicates: Rows that repeat a (qid, docno) pair; they enter.
        mean_delta: Mean score change ``score_perturbed - score_original`` of the used rows, in logits.
        low_delta_share: Share of the used rows whose score changes by less than 0.05 logits.
        wrong_direction_share: Share of the used rows whose score moves against the sum of all score changes; NaN where
            that sum is 0.
        qids: Queries of the frame, sorted, as strings: what was chosen by these effects is judged on others.
    """

    ARTIFACT_TYPE = 'head_effects'
    TABLES = {'heads': COLUMNS}
    MADE_BY = 'HeadEffects.from_frame(frame)'

    confidence: float
    n_resamples: int
    seed: int
    analysis: dict[str, Any]
    n_rows: int
    n_used: int
    n_queries: int
    n_unpatchable: dict[str, int]
    n_nan: int
    n_duplicates: int
    mean_delta: float
    low_delta_share: float
    wrong_direction_share: float
    qids: list[str]

    @classmethod
    def from_frame(
        cls, frame: pd.DataFrame, *, confidence: float = 0.95, n_resamples: int = 1000, seed: int = 0
    ) -> HeadEffects:
        """Aggregates the frame of ``PatchHeads``, or of ``AttributeHeads`` with a method that reads two texts.

        With d the value of a head column and delta = score_perturbed - score_original, a head's ``ratio`` is the sum of
        d over all rows divided by the sum of delta over the same rows: the share of the score change that the head
        carries. Ratios of single rows are never averaged, since they are undefined at delta = 0 and wild near it.
        ``mean`` is the mean of d, in logits. Intervals are percentile bootstrap intervals over queries.

        How the effects were made is read from the column ``analysis``, which the stage has written. Where a head of
        the original was put into the perturbed text, delta counts in that direction, so that a head that carries the
        change has a positive ratio either way.

        **Input columns:** ``qid``, ``docno``, ``score_original``, ``score_perturbed``, ``analysis``, one or more
        ``L{layer}H{head}``; ``patchable`` where there is one: rows with anything but ``'yes'`` are counted by reason
        and left out.

        Args:
            frame: One row per pair. Layers may have different numbers of heads, and heads may be missing.
            confidence: Coverage of the intervals, between 0 and 1.
            n_resamples: Bootstrap resamples.
            seed: Random seed of the resamples. The order of the rows does not matter.

        Returns:
            The effects, in memory. A warning tells of duplicate pairs, of NaN in patchable rows, of ratios that are NaN
            because the score changes sum to 0 (also in resamples: then the interval is NaN), and of a single query
            (then all intervals are NaN).

        Raises:
            ValueError: If columns are missing, no row can be aggregated, or there is no ratio: the frame does not say
                how its effects were made, holds those of several analyses or directions, of ``AblateHeads``,
                normalised ones, or parts of a single score.
        """
        table, summary = aggregate(frame, confidence=float(confidence), n_resamples=int(n_resamples), seed=int(seed))
        return cls(pt.Artifact.NO_PATH, tables={'heads': table}, summary=summary)

    def to_frame(self) -> pd.DataFrame:
        """Returns one row per head, sorted by layer and head.

        **Output columns:** ``layer``, ``head``, ``name``, ``ratio``, ``ratio_low``, ``ratio_high``, ``mean``,
        ``mean_low``, ``mean_high``, ``n`` (rows that entered), ``n_queries`` (their queries).
        """
        return self._tables['heads'].copy()

    def strongest(self, k: int = 10) -> pd.DataFrame:
        """Returns the rows of :meth:`to_frame` with the ``k`` largest absolute ratios.

        Heads whose ratio is NaN come after those with one, by absolute mean. Heads without any row are left out.
        """
        table = self._tables['heads'].dropna(subset='mean')
        size = table[['ratio', 'mean']].abs()
        order = size.sort_values(['ratio', 'mean'], ascending=False, na_position='last').index
        return table.loc[order].head(k).reset_index(drop=True)

    def matrix(self, column: str = 'ratio', stack: str = '') -> np.ndarray:
        """Returns a column of :meth:`to_frame` as an array ``[layers, max heads]``, NaN where there is no head.

        Args:
            column: A column of numbers.
            stack: Which stack of layers, where the names of heads begin with one: 'cross' for ``cross.L3H7``.

        Raises:
            ValueError: If the column holds no numbers of heads, or there is no such stack.
        """
        columns = [name for name in COLUMNS if name not in KEYS]
        if column not in columns:
            raise ValueError(f'column must be one of {columns}; got column={column!r}')
        table = self._tables['heads']
        stacks = table['name'].map(lambda name: parse(name).site.stack)
        table = table[stacks == stack]
        if not len(table):
            raise ValueError(f'stack must be one of {sorted(set(stacks))}; got stack={stack!r}')
        matrix = np.full((table['layer'].max() + 1, table['head'].max() + 1), np.nan)
        matrix[table['layer'], table['head']] = table[column]
        return matrix

    def __repr__(self) -> str:
        """Tells how much data there is and which head matters most."""
        text = f'{len(self._tables["heads"])} heads, {self.n_used} of {self.n_rows} rows, {self.n_queries} queries'
        top = self.strongest(1)
        kind = 'mean' if top['ratio'].isna().all() else 'ratio'
        for row in top.to_dict('records'):
            low, high = row[f'{kind}_low'], row[f'{kind}_high']
            text += f', strongest {row["name"]} {kind} {row[kind]:.3g} [{low:.3g}, {high:.3g}]'
        return f'HeadEffects({text})'
