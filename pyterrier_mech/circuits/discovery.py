"""From effects of heads, neurons and paths to a circuit."""

from __future__ import annotations

import warnings
from typing import Any

import pandas as pd

from pyterrier_mech.columns import Z, path_of
from pyterrier_mech.results import Circuit, HeadEffects, NeuronEffects, PathEffects
from pyterrier_mech.results.head_effects import KEYS


def discover_circuit(
    effects: HeadEffects,
    *,
    k: int | None = None,
    share: float | None = None,
    roles: pd.DataFrame | None = None,
    neurons: NeuronEffects | None = None,
    p: float = 1.0,
    scheme: str = 'relevance',
    fuse: str = 'average',
    edges: PathEffects | None = None,
) -> Circuit:
    """Puts the heads with the strongest effects, and neurons if there are effects of such, into a circuit.

    Heads come in the order of their absolute ratio, the share of the score change that they carry; only heads whose
    interval excludes 0 are taken. Heads chosen like this are strong partly by luck: judge the circuit by `faithfulness`
    on other queries than these, which it remembers.

    Args:
        effects: Effects of heads.
        k: How many heads at most; by default all whose interval excludes 0.
        share: The same as a share of all heads, instead of `k`.
        roles: What `head_roles` returned.
        neurons: Effects of neurons.
        p: How many of the neurons, in percent: those with the largest mean attribution. See `NeuronEffects.top`.
        scheme: 'relevance', 'relevant' or 'non_relevant'; it becomes the neurons' role. See `NeuronEffects.top`.
        fuse: How datasets are put together: 'average' or 'intersection'.
        edges: Effects of paths: those between the chosen heads, and from them to the score, whose interval excludes 0
            become the edges of the circuit.

    Raises:
        TypeError: If effects are of another kind.
        ValueError: If a setting is out of range, no head has an interval that excludes 0, or the edges are of another
            ranker.
    """
    _check(effects, k, share, roles, neurons, edges)
    table = effects.to_frame()
    if share is not None:
        k = max(1, round(share * len(table)))
    certain = _certain(table)
    if not len(certain):
        raise ValueError(
            f'None of the {len(table)} heads has an interval of its ratio that excludes 0 ({effects.n_queries} '
            'queries): patch more topics, or lower the confidence of HeadEffects.from_frame.'
        )
    if k is not None and len(certain) < k:
        warnings.warn(
            f'{len(certain)} heads have an interval that excludes 0: the circuit has these and not {k}', stacklevel=2
        )
    heads = _strongest(certain).iloc[:k]
    if roles is not None:
        keys = [name for name in KEYS if name in roles.columns]
        heads = heads.merge(roles[[*keys, 'role']], on=keys, how='left')
    settings: dict[str, Any] = {'k': k, 'share': share, 'confidence': effects.confidence, 'analysis': effects.analysis}
    settings |= {'n_heads': len(table), 'n_certain': len(certain), 'head_counts': _head_counts(table)}
    if effects.site != Z:
        settings['site'] = effects.site
    qids, chosen = list(effects.qids), None
    if neurons is not None:
        settings |= {'p': float(p), 'scheme': scheme, 'fuse': fuse}
        chosen = _neurons(neurons, p, scheme, fuse)
        qids += neurons.qids
    between = None
    if edges is not None:
        settings['edges'] = edges.analysis
        between = _edges(edges, set(heads['name']))
        qids += edges.qids
    return Circuit.of_tables(heads, chosen, edges=between, settings=settings, qids=qids)


def _certain(table: pd.DataFrame) -> pd.DataFrame:
    return table[(table['ratio_low'] > 0) | (table['ratio_high'] < 0)]


def _strongest(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows by their absolute ratio, which is called effect in a circuit."""
    found = table.assign(size=table['ratio'].abs()).sort_values('size', ascending=False, kind='stable')
    return found.rename(columns={'ratio': 'effect', 'ratio_low': 'effect_low', 'ratio_high': 'effect_high'})


def _edges(effects: PathEffects, heads: set[str]) -> pd.DataFrame:
    table = _certain(effects.to_frame())
    return _strongest(table[[path_of(name).heads <= heads for name in table['name']]])


def _head_counts(table: pd.DataFrame) -> list[int]:
    """Returns the heads of every layer, as far as there are effects of them."""
    counts = table.groupby('layer')['head'].max() + 1
    return [int(counts.get(layer, 0)) for layer in range(int(table['layer'].max()) + 1)]


def _check(effects: Any, k: Any, share: Any, roles: Any, neurons: Any, edges: Any) -> None:
    if not isinstance(effects, HeadEffects):
        raise TypeError(f'effects must be HeadEffects, HeadEffects.from_frame(frame); got {type(effects).__name__}')
    if neurons is not None and not isinstance(neurons, NeuronEffects):
        raise TypeError(f'neurons must be NeuronEffects, NeuronEffects.from_frame(…); got {type(neurons).__name__}')
    if edges is not None and not isinstance(edges, PathEffects):
        raise TypeError(f'edges must be PathEffects, PathEffects.from_frame(frame); got {type(edges).__name__}')
    models = [of.analysis['model'] for of in (effects, edges) if of is not None and 'model' in of.analysis]
    if len(set(models)) > 1:
        raise ValueError(f'the effects of heads are of {models[0]}, but those of edges of {models[1]}: take one ranker')
    if k is not None and share is not None:
        raise ValueError(f'k={k!r} and share={share!r} both say how many heads: give one of them')
    if k is not None and k < 1:
        raise ValueError(f'k must be 1 or more; got k={k!r}')
    if share is not None and not 0 < share <= 1:
        raise ValueError(f'share must be above 0 and up to 1, such as 0.1; got share={share!r}')
    if missing := [name for name in ('layer', 'head', 'role') if roles is not None and name not in roles.columns]:
        raise ValueError(f'roles= has no {", ".join(map(repr, missing))}: give what head_roles(frame) returned')


def _neurons(effects: NeuronEffects, p: float, scheme: str, fuse: str) -> pd.DataFrame:
    means, units = effects.mean(scheme), sorted(effects.top(p, scheme, fuse=fuse))
    rows = [(unit.name, means[unit.site.layer, unit.index], scheme) for unit in units]
    table = pd.DataFrame(rows, columns=['name', 'effect', 'role'])
    return table.sort_values('effect', ascending=False, kind='stable')
