"""What conductance says about each neuron, over many pairs: an Artifact made from the frame of AttributeNeurons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyterrier as pt

from pyterrier_mech.provenance import as_qids
from pyterrier_mech.results._schemes import DATASET, GROUPS, KEYS, SCHEME, aggregate, labels_of, sorted_rows
from pyterrier_mech.saving import SavedResult
from pyterrier_mech.units import Units

SCHEMES = ('relevance', *GROUPS)
ORDERS = ('value', 'magnitude')
FUSIONS = ('average', 'intersection')

Names = Sequence[str] | None


class NeuronEffects(SavedResult):
    """Mean conductance of every neuron over the pairs of a dataset, for relevant and for other pairs apart.

    Such a mean is an attribution scheme; there are two for each dataset. Their difference says what sets relevant pairs
    apart: a neuron's relevance is its relevant less its non-relevant mean. Made by `from_frame`, or read from a folder
    with `NeuronEffects.load(path)`; `join` puts datasets together.

    Attributes:
        schemes: One row a scheme: `scheme` (``'{dataset}.relevant'``, ``'{dataset}.non_relevant'``), `dataset`,
            `label`, `n` (pairs that entered), `n_queries`, `median_error` and `worst_error` (completeness errors of
            these pairs).
        datasets: One row a dataset: `dataset`, `n_rows`, `n_unjudged` (left out since they are not judged), `n_inexact`
            (left out since their completeness error is above `max_error`), `n_nan` (left out since a neuron or the
            error is not finite), `n_duplicates` (they enter), `min_rel`, `max_error` (NaN for none).
        qids: Queries of the frames, sorted, as strings: what was chosen by these effects is judged on others.

    Source: Vast, Van Cooten, Soulier, Piwowarski, ICTIR 2024, arXiv 2406.19309.
    """

    ARTIFACT_TYPE = 'neuron_effects'
    TABLES = {'neurons': KEYS, 'schemes': (SCHEME, DATASET, 'n', 'worst_error'), 'datasets': (DATASET,)}
    MADE_BY = 'NeuronEffects.from_frame(frame, qrels)'

    qids: list[str]

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame,
        qrels: pd.DataFrame,
        *,
        dataset: str = 'all',
        min_rel: int = 1,
        unjudged: int | None = None,
        max_error: float | None = None,
        column: str = 'neurons',
    ) -> NeuronEffects:
        """Averages the frame of an `AttributeNeurons` stage.

        **Input columns**: qid, docno, `neurons` (arrays [layers, neurons]), `completeness_error`.

        Args:
            frame: One row per pair.
            qrels: Judgements: qid, docno, label.
            dataset: What the schemes of this frame are called.
            min_rel: The lowest label of a relevant pair.
            unjudged: Label of the pairs that have none; by default they are left out and counted.
            max_error: Pairs with a larger `completeness_error.neurons` are left out and counted; by default none is.
            column: The column of arrays, e.g. 'neurons.cls' of ``AttributeNeurons(by='token_type')``. Pairs without
                such a token are counted with `n_nan`.

        Returns:
            The effects, in memory. A warning tells of duplicate pairs and of a label without any pair, whose scheme is
            NaN.

        Raises:
            ValueError: If columns are missing, arrays differ in shape, a pair has two labels, or no pair is left.
        """
        rows = sorted_rows(frame, column, max_error)
        tables = aggregate(rows, labels_of(rows, qrels, unjudged), dataset, column, min_rel, max_error)
        return cls(pt.Artifact.NO_PATH, tables=tables, summary={'qids': sorted(as_qids(frame['qid']))})

    @classmethod
    def join(cls, *effects: NeuronEffects) -> NeuronEffects:
        """Puts the schemes of several datasets into one object.

        Raises:
            ValueError: If two have a dataset of the same name, or they are not of the same neurons.
        """
        names = [name for one in effects for name in one.datasets[DATASET]]
        twice = sorted({name for name in names if names.count(name) > 1})
        if not effects or twice:
            what = f'dataset={twice[0]!r} comes twice' if twice else 'There is nothing to join'
            raise ValueError(f"{what}: give effects made with from_frame(..., dataset='…') under different names.")
        keys = effects[0].to_frame()[list(KEYS)]
        tables = {name: [one._tables[name] for one in effects] for name in cls.TABLES}
        other = next((one for one in effects if not one.to_frame()[list(KEYS)].equals(keys)), None)
        if other is not None:
            raise ValueError(f'{other!r} and {effects[0]!r} have other neurons: join effects of one model.')
        values = [table.drop(columns=list(KEYS)) for table in tables['neurons']]
        joined = {name: pd.concat(tables[name], ignore_index=True) for name in ('schemes', 'datasets')}
        joined['neurons'] = pd.concat([keys, *values], axis=1)
        qids = sorted({qid for one in effects for qid in one.qids})
        return cls(pt.Artifact.NO_PATH, tables=joined, summary={'qids': qids})

    @property
    def schemes(self) -> pd.DataFrame:
        """One row a scheme."""
        return self._tables['schemes'].copy()

    @property
    def datasets(self) -> pd.DataFrame:
        """One row a dataset."""
        return self._tables['datasets'].copy()

    def to_frame(self) -> pd.DataFrame:
        """Returns one row per neuron, sorted by layer and neuron.

        **Output columns**: `layer`, `neuron`, `name`, and one column a scheme.
        """
        return self._tables['neurons'].copy()

    def mean(self, scheme: str = 'relevance', datasets: Names = None) -> np.ndarray:
        """Returns the mean over datasets of a scheme, or of relevance, as an array [layers, neurons].

        It is NaN where a layer has fewer neurons than the widest.

        Args:
            scheme: 'relevance' (relevant less non-relevant), 'relevant' or 'non_relevant'.
            datasets: Names of datasets; by default all.

        Raises:
            ValueError: If a name is not known, or a scheme that is needed has no pairs.
        """
        table = self._tables['neurons']
        matrix = np.full((table['layer'].max() + 1, table['neuron'].max() + 1), np.nan)
        matrix[table['layer'], table['neuron']] = self._values(scheme, datasets).mean(axis=0)
        return matrix

    def top(
        self, p: float, scheme: str = 'relevance', *, datasets: Names = None, fuse: str = 'average', by: str = 'value'
    ) -> Units:
        """Returns the `p` percent of all neurons with the largest mean attribution.

        Args:
            p: In percent of all neurons; at least one neuron is taken. The literature uses 0.1 to 1.
            scheme: 'relevance' (relevant less non-relevant), 'relevant' or 'non_relevant'.
            datasets: Names of datasets; by default all.
            fuse: How datasets are put together: 'average' (their means are averaged, then the first are taken) or
                'intersection' (the neurons that are among the first of every dataset, which may be few or none).
            by: 'value', with its sign, or 'magnitude', without.

        Raises:
            ValueError: If a setting is not known or out of range, or a scheme that is needed has no pairs.
        """
        return self._extreme(-1, p, scheme, datasets, fuse, by)

    def bottom(
        self, p: float, scheme: str = 'relevance', *, datasets: Names = None, fuse: str = 'average', by: str = 'value'
    ) -> Units:
        """Returns the `p` percent of all neurons with the smallest mean attribution. See `top`.

        With ``by='value'`` these speak most against; with ``by='magnitude'`` they matter least.
        """
        return self._extreme(1, p, scheme, datasets, fuse, by)

    def overlaps(self, p: float, *, by: str = 'value') -> pd.DataFrame:
        """Returns, for every two schemes, how many of their top neurons they share, as a part of `p` percent."""
        table = self._tables['neurons']
        full = [name for name in self._tables['schemes'][SCHEME] if table[name].notna().all()]
        sets = [set(_first(table[name].to_numpy(), -1, self._count(p, by), by)) for name in full]
        return pd.DataFrame([[len(a & b) / len(a) for b in sets] for a in sets], index=full, columns=full)

    def _extreme(self, sign: int, p: float, scheme: str, datasets: Names, fuse: str, by: str) -> Units:
        if fuse not in FUSIONS:
            raise ValueError(f'fuse must be one of {FUSIONS}; got fuse={fuse!r}')
        count, values = self._count(p, by), self._values(scheme, datasets)
        if fuse == 'average':
            values = values.mean(axis=0, keepdims=True)
        chosen = set.intersection(*(set(_first(row, sign, count, by)) for row in values))
        table = self._tables['neurons']
        return Units.of(table['name'].iloc[sorted(chosen)])

    def _count(self, p: float, by: str) -> int:
        if by not in ORDERS:
            raise ValueError(f'by must be one of {ORDERS}; got by={by!r}')
        if not 0 < p <= 100:
            raise ValueError(f'p must be a percentage above 0 and up to 100 (1 is one in a hundred); got p={p!r}')
        return max(1, round(len(self._tables['neurons']) * p / 100))

    def _values(self, scheme: str, datasets: Names) -> np.ndarray:
        """Returns [datasets, neurons]."""
        if scheme not in SCHEMES:
            raise ValueError(f'scheme must be one of {SCHEMES}; got scheme={scheme!r}')
        known = self._tables['datasets'][DATASET].tolist()
        names = known if datasets is None else [datasets] if isinstance(datasets, str) else list(datasets)
        if not names or set(names) - set(known):
            raise ValueError(f'datasets must be among {known}; got datasets={datasets!r}')
        return np.stack([self._of_dataset(scheme, name) for name in names])

    def _of_dataset(self, scheme: str, dataset: str) -> np.ndarray:
        if scheme == 'relevance':
            return self._of_dataset('relevant', dataset) - self._of_dataset('non_relevant', dataset)
        values = self._tables['neurons'][f'{dataset}.{scheme}'].to_numpy(dtype=np.float64)
        if np.isnan(values).any():
            raise ValueError(
                f'{dataset}.{scheme} has no pairs: attribute pairs of both labels, or choose another scheme or min_rel.'
            )
        return values

    def __repr__(self) -> str:
        """Tells how much data there is and how exact it is."""
        table = self._tables['schemes']
        parts = [f'{row[SCHEME]} {row["n"]} pairs' for row in table.to_dict('records')]
        worst = table['worst_error'].max()
        return f'NeuronEffects({len(self._tables["neurons"])} neurons, {", ".join(parts)}, worst error {worst:.2g})'


def _first(values: np.ndarray, sign: int, count: int, by: str) -> list[int]:
    """Returns the places of the smallest (sign 1) or largest (-1) values; of equal ones the first."""
    size = np.abs(values) if by == 'magnitude' else values
    return np.argsort(sign * size, kind='stable')[:count].tolist()
