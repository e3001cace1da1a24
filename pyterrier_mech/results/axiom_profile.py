"""Which axioms a ranker keeps: an Artifact made of a ranker, pairs and edits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt

from pyterrier_mech.evaluation.bootstrap import check_interval, ratio_of_sums
from pyterrier_mech.results._rescoring import edited_versions, scored
from pyterrier_mech.saving import SavedResult

_ENDS = ('', '_low', '_high')
_KEPT = [f'kept{end}' for end in _ENDS]
_CHANGE = [f'change{end}' for end in _ENDS]
_CONTROL = [f'control{end}' for end in _ENDS]
_DIFFERENCE = [f'difference{end}' for end in _ENDS]
COLUMNS = (
    *('axiom', 'expected', 'n', 'n_queries', 'n_unchanged'),
    *(*_KEPT, *_CHANGE, 'n_control', 'control_kept', *_CONTROL, *_DIFFERENCE),
)
_PAIRS = ('axiom', 'qid', 'docno', 'edit', 'change', 'kept', 'control', 'control_kept')
_KEYS = ['axiom', 'qid', 'docno', 'edit']


class AxiomProfile(SavedResult):
    """How the score of a ranker moves under axioms and plain edits, over many pairs, with intervals over queries.

    Made by :meth:`of`, or read from a folder with ``AxiomProfile.load(path)``. Two profiles of the same pairs and edits
    are put side by side by :meth:`compare`.

    Attributes:
        confidence: Coverage of the intervals.
        n_resamples: Bootstrap resamples behind the intervals.
        seed: Random seed of the resamples, and of which query lends its terms to a control.
        ranker: The ranker, as it is printed.
        n_pairs: Rows of the frame.
        n_queries: Queries of the frame.
        spread: Standard deviation of the original scores within a query, as root of the mean variance: the unit in
            which score changes of two rankers can be compared. NaN where no query has two texts.
        qids: Queries of the frame, sorted, as strings.
    """

    ARTIFACT_TYPE = 'axiom_profile'
    TABLES = {'axioms': COLUMNS, 'pairs': _PAIRS}
    MADE_BY = 'AxiomProfile.of(ranker, frame, axioms)'

    confidence: float
    n_resamples: int
    seed: int
    ranker: str
    n_pairs: int
    n_queries: int
    spread: float
    qids: list[str]

    @classmethod
    def of(
        cls,
        ranker: pt.Transformer,
        frame: pd.DataFrame,
        axioms: Iterable[Callable[..., str]] | Mapping[str, Callable[..., str]],
        *,
        text_field: str = 'text',
        confidence: float = 0.95,
        n_resamples: int = 1000,
        seed: int = 0,
    ) -> AxiomProfile:
        """Edits the text of every pair by every axiom, and has the ranker score all versions.

        The change is the score of the edited text minus that of the original; for an edit with ``versions``, the sum
        of their scores by its ``weights`` (so for ``TFC2``, how much less the second step adds). A change of less than
        a millionth of the scores is 0.

        The control of a pair is the same edit made with another query of the frame, one that shares no word with its
        own, and scored for its own query: what a foreign term of the same kind does. Edits of query terms that the
        document has (``TFLNC``, ``TFC3``, ``PROX``, ``RemoveQueryTerm``) are made of other words of the document, see
        ``control`` of the edit. Where this gives the same text, as for edits that draw nothing by the query, there is
        no control.

        The ranker is called once, with one row for each different text of a query: ``qid``, ``query``, ``docno`` (a
        name made of the text, so that a score cache cannot confuse versions) and the text, nothing else. It may be any
        transformer that scores such rows, each for itself. ``pt.text.scorer`` does with a ``background_index``;
        without one, it takes all versions together for the collection.

        **Input columns:** ``qid``, ``docno``, ``query``, ``text``.

        Args:
            ranker: Re-scores (query, text) rows.
            frame: One row per pair.
            axioms: The edits: those of ``all_edits``, decorated functions, lambdas; or a mapping that names them.
            text_field: Column of the text.
            confidence: Coverage of the intervals, between 0 and 1.
            n_resamples: Bootstrap resamples.
            seed: Random seed.

        Returns:
            The profile, in memory. A warning tells of edits that change no text, and of a single query (then all
            intervals are NaN).

        Raises:
            TypeError: If the ranker is no transformer, or an edit cannot be called.
            ValueError: If there are no rows or no axioms, a pair stands there twice, two edits have one name, or the
                ranker returns no finite score for a text.
        """
        check_interval(confidence, n_resamples)
        options = {'confidence': float(confidence), 'n_resamples': int(n_resamples), 'seed': int(seed)}
        rows, edits = edited_versions(frame, axioms, text_field, int(seed))
        scores = scored(ranker, rows, edits, text_field)
        size = np.abs(scores.original)
        spread = _spread(scores.original, rows['qid'].to_numpy())
        qids = rows['qid'].to_numpy()
        lines, pairs = [], []
        for edit, (change, control) in zip(edits, scores.changes, strict=True):
            change, control = (_settled(values, size) for values in (change, control))
            kept, control_kept = (_kept(edit.agrees, values) for values in (change, control))
            lines.append(
                {
                    'axiom': edit.name,
                    'expected': np.nan if edit.expected is None else float(edit.expected),
                    **_line(change, kept, control, control_kept, qids, options),
                }
            )
            one = rows[['qid', 'docno']].assign(axiom=edit.name, edit=edit.digests, change=change, kept=kept)
            one = one.assign(control=control, control_kept=control_kept)
            pairs.append(one[np.isfinite(change)][list(_PAIRS)])
        summary: dict[str, Any] = {
            **options,
            'ranker': repr(ranker),
            'n_pairs': len(rows),
            'n_queries': int(rows['qid'].nunique()),
            'spread': spread,
            'qids': sorted(set(rows['qid'])),
        }
        table = pd.DataFrame(lines, columns=list(COLUMNS))
        for remark in _remarks(table, summary['n_queries']):
            warnings.warn(remark, stacklevel=2)
        return cls(
            pt.Artifact.NO_PATH,
            tables={'axioms': table, 'pairs': pd.concat(pairs, ignore_index=True)},
            summary=summary,
        )

    def to_frame(self) -> pd.DataFrame:
        """Returns one row per axiom, in the order in which they were given.

        **Output columns:** ``axiom``, ``expected`` (NaN for no prediction), ``n`` (pairs that the edit changes),
        ``n_queries`` (their queries), ``n_unchanged``, ``kept`` (share of the ``n`` pairs whose score moves as
        predicted) with ``kept_low`` and ``kept_high``, ``change`` (mean score change) with its ends; ``n_control``
        (pairs with a control), ``control_kept``, ``control`` (mean score change of the control) with its ends,
        ``difference`` (mean of change minus control, over the pairs with a control) with its ends.
        """
        return self._tables['axioms'].copy()

    def pairs(self) -> pd.DataFrame:
        """Returns one row for each pair and axiom that changes it.

        **Output columns:** ``axiom``, ``qid``, ``docno``, ``edit`` (a digest of query, original and edited texts),
        ``change``, ``kept`` (1, 0; NaN for no prediction), ``control``, ``control_kept`` (NaN for no control).
        """
        return self._tables['pairs'].copy()

    def compare(self, other: AxiomProfile) -> pd.DataFrame:
        """Returns how this ranker differs from another one on the pairs that both have seen with the same edits.

        **Output columns:** one row per axiom: ``axiom``, ``n`` and ``n_queries`` (pairs in both), ``kept`` and
        ``kept_other``, ``difference`` of the two with ``difference_low`` and ``difference_high`` over queries,
        ``same_sign`` (share of pairs whose score moves the same way).

        Raises:
            ValueError: If they have no pair in common.
        """
        both = self._tables['pairs'].merge(other._tables['pairs'], on=_KEYS, suffixes=('', '_other'))
        if both.empty:
            raise ValueError('The two profiles share no pair with the same edit. Make both of one frame and one list.')
        options = {'confidence': self.confidence, 'n_resamples': self.n_resamples, 'seed': self.seed}
        lines = []
        for axiom in [name for name in self._tables['axioms']['axiom'] if name in set(both['axiom'])]:
            part = both[both['axiom'] == axiom].sort_values(['qid', 'docno'])
            value, low, high, _, _ = ratio_of_sums(part['kept'] - part['kept_other'], 1, part['qid'], **options)
            same = np.sign(part['change']) == np.sign(part['change_other'])
            lines.append(
                {
                    **{'axiom': axiom, 'n': len(part), 'n_queries': part['qid'].nunique()},
                    **{'kept': part['kept'].mean(), 'kept_other': part['kept_other'].mean()},
                    **dict(zip(_DIFFERENCE, map(float, (value, low, high)))),
                    'same_sign': same.mean(),
                }
            )
        return pd.DataFrame(lines)

    def __repr__(self) -> str:
        """Tells of whom, over how much, and which predicted sign is kept least."""
        table = self._tables['axioms'].dropna(subset='kept')
        text = f'{self.ranker}, {len(self._tables["axioms"])} edits, {self.n_pairs} pairs, {self.n_queries} queries'
        for row in table.sort_values('kept', kind='stable').head(1).to_dict('records'):
            text += f', kept least {row["axiom"]} {row["kept"]:.2f} [{row["kept_low"]:.2f}, {row["kept_high"]:.2f}]'
        return f'AxiomProfile({text})'


def _line(
    change: np.ndarray,
    kept: np.ndarray,
    control: np.ndarray,
    control_kept: np.ndarray,
    qids: np.ndarray,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the numbers of one axiom."""
    values = np.stack([kept, change, control, change - control, control_kept], axis=1)
    value, low, high, n, n_queries = ratio_of_sums(values, 1, qids, **options)
    ends = np.stack([value, low, high], axis=1)
    return {
        **{'n': int(n[1]), 'n_queries': int(n_queries[1]), 'n_unchanged': len(change) - int(n[1])},
        **{'n_control': int(n[2]), 'control_kept': value[4]},
        **dict(zip([*_KEPT, *_CHANGE, *_CONTROL, *_DIFFERENCE], ends[:4].ravel())),
    }


def _settled(change: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Returns changes without rounding: a text that reads the same in another batch is no change."""
    return np.where(np.abs(change) <= 1e-6 * np.maximum(size, np.abs(change)), 0.0, change)


def _kept(agrees: Callable[[float], bool] | None, change: np.ndarray) -> np.ndarray:
    if agrees is None:
        return np.full(len(change), np.nan)
    return np.array([float(agrees(value)) if np.isfinite(value) else np.nan for value in change])


def _spread(scores: np.ndarray, qids: np.ndarray) -> float:
    variances = pd.Series(scores).groupby(qids).var().dropna()
    return float(np.sqrt(variances.mean())) if len(variances) else float('nan')


def _remarks(table: pd.DataFrame, n_queries: int) -> list[str]:
    remarks = []
    if len(idle := table['axiom'][table['n'] == 0]):
        remarks.append(f'{", ".join(idle)} changed no text of the frame: there is nothing to tell about it (NaN).')
    if n_queries == 1:
        remarks.append('All rows belong to one query, so there are no intervals and no controls (NaN). Give more.')
    return remarks
