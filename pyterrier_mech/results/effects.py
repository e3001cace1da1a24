"""What patching says over many pairs: the base of the effects of heads, of blocks and of paths."""

from __future__ import annotations

from typing import Any, TypeVar

import pandas as pd
import pyterrier as pt

from pyterrier_mech.results._aggregate import Kind, Reading, aggregate
from pyterrier_mech.saving import SavedResult

_Self = TypeVar('_Self', bound='Effects')


class Effects(SavedResult):
    """Effects over all rows of a frame, with intervals over queries. Made by `from_frame`, or read by `load(path)`.

    Attributes:
        confidence: Coverage of the intervals.
        n_resamples: Bootstrap resamples behind the intervals.
        seed: Random seed of the resamples.
        analysis: Which analysis made the effects: the class of the stage as 'by', and its settings.
        n_rows: Rows of the frame.
        n_used: Rows that entered for at least one head, block or path.
        n_queries: Queries of these rows.
        n_unpatchable: Rows that could not be patched, counted by reason.
        n_nan: Patchable rows where a score or an effect was NaN or infinite; such values do not enter.
        n_duplicates: Rows that repeat a (qid, docno) pair; they enter.
        mean_delta: Mean score change ``score_perturbed - score_original`` of the used rows, in logits.
        low_delta_share: Share of the used rows whose score changes by less than 0.05 logits.
        wrong_direction_share: Share of the used rows whose score moves against the sum of all score changes; NaN where
            that sum is 0.
        qids: Queries of the frame, sorted, as strings: what was chosen by these effects is judged on others.
    """

    # Not annotated, since annotations are what the summary has. A subclass says what it is of.
    KIND = Kind('', (), '', '')

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
        cls: type[_Self], frame: pd.DataFrame, *, confidence: float = 0.95, n_resamples: int = 1000, seed: int = 0
    ) -> _Self:
        """Aggregates the frame of a stage; the class says which.

        With d an effect and delta = score_perturbed - score_original, ``ratio`` is the sum of d over all rows divided
        by the sum of delta over the same rows: the share of the score change that is carried. Ratios of single rows are
        never averaged, since they are undefined at delta = 0 and wild near it. ``mean`` is the mean of d, in logits.
        Intervals are percentile bootstrap intervals over queries.

        How the effects were made is read from the column ``analysis``, which the stage has written. Where something of
        the original was put into the perturbed text, delta counts in that direction, so that what carries the change
        has a positive ratio either way.

        **Input columns:** ``qid``, ``docno``, ``score_original``, ``score_perturbed``, ``analysis``, and columns of
        effects; ``patchable`` where there is one: rows with anything but ``'yes'`` are counted by reason and left out.

        Args:
            frame: One row per pair. Heads or blocks may be missing.
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
        options = {'confidence': float(confidence), 'n_resamples': int(n_resamples), 'seed': int(seed)}
        table, summary = aggregate(frame, cls.KIND, cls._reading, **options)
        return cls(pt.Artifact.NO_PATH, tables={next(iter(cls.TABLES)): table}, summary=summary)

    @classmethod
    def _reading(cls, frame: pd.DataFrame) -> Reading:
        """Returns what is read from a frame."""
        raise NotImplementedError

    @property
    def _table(self) -> pd.DataFrame:
        return next(iter(self._tables.values()))

    def to_frame(self) -> pd.DataFrame:
        """Returns the table, whose columns the class names; ``.to_csv(path)`` writes it for other programs."""
        return self._table.copy()

    def strongest(self, k: int = 10) -> pd.DataFrame:
        """Returns the rows of :meth:`to_frame` with the ``k`` largest absolute ratios.

        Rows whose ratio is NaN come after those with one, by absolute mean. Those that no pair entered are left out.
        """
        table = self._table.dropna(subset='mean')
        size = table[['ratio', 'mean']].abs()
        order = size.sort_values(['ratio', 'mean'], ascending=False, na_position='last').index
        return table.loc[order].head(k).reset_index(drop=True)

    def __repr__(self) -> str:
        """Tells how much data there is and what matters most."""
        text = f'{len(self._table)} {self.KIND.noun}, {self.n_used} of {self.n_rows} rows, {self.n_queries} queries'
        top = self.strongest(1)
        kind = 'mean' if top['ratio'].isna().all() else 'ratio'
        for row in top.to_dict('records'):
            low, high = row[f'{kind}_low'], row[f'{kind}_high']
            text += f', strongest {row["name"]} {kind} {row[kind]:.3g} [{low:.3g}, {high:.3g}]'
        return f'{type(self).__name__}({text})'
