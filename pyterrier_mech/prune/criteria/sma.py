"""Sparse mechanistic analysis: what a unit does for the score, weighed by its role, its circuit protected."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from pyterrier_mech.circuits.discovery import discover_circuit
from pyterrier_mech.circuits.roles import ODDS, head_roles
from pyterrier_mech.circuits.shares import FLOWS, SHARE, AttentionShares
from pyterrier_mech.patch.ablate import AblateHeads
from pyterrier_mech.prune.criteria import causal
from pyterrier_mech.prune.criteria.gates import unit_gradients
from pyterrier_mech.prune.data import FitData, sample
from pyterrier_mech.prune.protocol import at_least, check_step
from pyterrier_mech.prune.scores import UnitScores
from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.results import HeadEffects
from pyterrier_mech.units import HEADS, NEURONS, Site, Unit, Units

Layers = list[np.ndarray]

# The circuit is a fifth of the heads at most, and one neuron in a hundred.
_HEAD_SHARE, _NEURON_SHARE = 0.2, 0.01
# A unit without any role keeps this share of its effect, so that such units are still ordered by effect.
_LEAST = 0.1


@dataclass(frozen=True)
class SMA:
    """Sparse mechanistic analysis: performance effect × role strength, the odds of circuit members to stay tripled.

    *Performance effect.* Of a head, the mean over pairs of how far the score moves when the head's output is zero
    (exact, as `AblateHeads`); of a neuron, the first-order estimate of the same, mean `|g|` (as `Taylor`).

    *Role strength*, between 0.1 and 1. Of a head, how far it looks from where even attention would: x / (1 + x) with x
    the largest `|log odds ratio|` of its flows between words (as `head_roles`), times the share of its mass that is not
    on CLS and separators. Of a neuron, how differently it serves relevant and other pairs:
    `|mean g on relevant − mean g on others| / (mean |g| on relevant + mean |g| on others)`. What is below 0.1 counts as
    0.1. Where a ranker reads query and text apart, or its attention is not described, heads have strength 1; where
    there are no judged pairs of both kinds, neurons have; `notes` says so.

    *Importance* is the product. Ranked within its kind over all layers, a unit gets r = (rank − ½) / n, 1 the best, and
    the odds r / (1 − r); those of circuit members are multiplied by `protection`, and the score is the probability
    that comes out. So heads and neurons are not joint.

    *Circuit.* What is given as `circuit`. Else, where the data has two versions of each text or a perturbation makes
    them, it is discovered: the heads with the largest share of the score change, as `discover_circuit` takes them (a
    fifth of all at most), and the neurons of the highest importance (one in a hundred). Where no head's
    interval excludes 0, as on few queries, the circuit is those neurons alone. Without two versions nothing is
    protected. `notes` names the members.

    Args:
        circuit: A `Circuit`, `Units`, or names of heads and neurons.
        perturbation: What makes second versions, as in `Patching`.
        protection: How many times the odds of circuit members are multiplied; 1 is no protection.
        role_weighting: Whether role strength counts; otherwise the effect alone is the importance.
        max_pairs: How many pairs are looked at, drawn evenly from the queries; None for all.
        min_rel: The lowest label that is relevant.
        seed: Random seed of the draw of pairs, and of the intervals in discovery.

    Attributes:
        qids: Queries that the given circuit was found on; nothing that it protects may be judged on them.

    Source: parts of it: Michel, Levy, Neubig, NeurIPS 2019, arXiv 1905.10650 (ablation, first-order estimate); Chen,
    Merullo, Eickhoff, SIGIR 2024, arXiv 2405.02503 (patched heads of rankers).
    """

    needs: ClassVar[frozenset[str]] = frozenset({'text'})

    circuit: Any = None
    perturbation: causal.Perturbing | None = None
    protection: float = 3.0
    role_weighting: bool = True
    max_pairs: int | None = 200
    min_rel: int = 1
    seed: int = 0
    qids: tuple[str, ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Reads the circuit as units, so that equal circuits make equal criteria."""
        if self.circuit is not None:
            object.__setattr__(self, 'qids', tuple(getattr(self.circuit, 'qids', self.qids)))
            object.__setattr__(self, 'circuit', Units.of(self.circuit))

    def check(self) -> None:
        """Checks the settings.

        Raises:
            TypeError: If the perturbation is neither a function nor a stage.
            ValueError: If one is out of range.
        """
        causal.check_perturbation(self.perturbation)
        at_least(1, self, 'max_pairs')
        if not 1 <= self.protection < np.inf:
            raise ValueError(
                f'protection must be 1 (no protection) or more; got protection={self.protection!r}. For members three '
                'times as likely to stay give 3.'
            )

    def scores(self, model: Ranker, data: FitData) -> UnitScores:
        """Scores every unit of a ranker by the probability that it should stay.

        Raises:
            ValueError: If a setting is out of range, the ranker lacks a unit of the circuit, the data has no texts, or
                none of its pairs can be patched.
        """
        check_step(self, data)
        if self.circuit is not None:
            self.circuit.check(model)
        some = sample(_labelled(data), self.max_pairs, self.seed)
        heads = causal.mean_effects(model, AblateHeads(model, text_field='text').transform(some.plain.frame))
        neurons, selectivity = _neurons(model, some.plain, self.min_rel)
        passes = 1 + causal.variants(model) + 3
        notes: dict[str, Any] = {'pairs': len(some.frame)}
        if self.role_weighting:
            strengths = _head_strengths(model, some.plain)
            notes['roles'] = {'heads': strengths is not None, 'neurons': selectivity is not None}
            passes += strengths is not None
            heads, neurons = _weighted(heads, strengths), _weighted(neurons, selectivity)
        members, found, patched = self._members(model, some, neurons)
        passes = (passes + patched) * len(some.frame) / len(data.frame)
        notes |= {'circuit': members.names, **found}
        kept_heads, kept_neurons = (
            _probabilities(layers, members.of_kind(kind), self.protection)
            for kind, layers in ((HEADS, heads), (NEURONS, neurons))
        )
        return UnitScores(kept_heads, kept_neurons, passes=passes, notes=notes).check(model)

    def _members(self, model: Ranker, data: FitData, neurons: Layers) -> tuple[Units, dict[str, Any], float]:
        """Returns the circuit, notes on where it comes from, and the passes that it took."""
        if self.circuit is not None:
            return self.circuit, {'protection': 'given'}, 0.0
        if self.protection == 1:
            return Units(), {'protection': 'none: protection=1'}, 0.0
        if self.perturbation is None and not data.paired:
            return Units(), {'protection': 'none: no circuit, and no second version of the texts to find one'}, 0.0
        frame, unpatchable = causal.patchable(model, causal.two_versions_of(data, self.perturbation))
        heads = _circuit_heads(model, frame, self.seed)
        found = 'discovered' if heads else 'discovered, without heads: no interval of an effect excludes 0'
        notes = {'protection': found, 'unpatchable': unpatchable}
        return heads | _top(neurons, _NEURON_SHARE), notes, (2 + causal.variants(model)) * len(frame) / len(data.frame)


def _neurons(model: Ranker, data: FitData, min_rel: int) -> tuple[Layers, Layers | None]:
    """Returns mean |g| of every neuron, and its selectivity where there are judged pairs of both kinds."""
    labels = data.frame['label'].to_numpy() if 'label' in data.frame.columns else np.full(len(data.frame), np.nan)
    relevant, others = labels >= min_rel, labels < min_rel
    sums = [np.zeros((5, count)) for count in model.counts(NEURONS).values()]
    for batch in unit_gradients(model, data):
        picks = np.stack([np.ones(len(batch.rows), dtype=bool), relevant[batch.rows], others[batch.rows]])
        for total, g in zip(sums, batch.neurons, strict=True):
            wide = g.astype(np.float64)
            total[:3] += picks @ np.abs(wide)
            total[3:] += picks[1:] @ wide
    effects = [total[0] / len(data.frame) for total in sums]
    n_relevant, n_others = int(relevant.sum()), int(others.sum())
    if not n_relevant or not n_others:
        return effects, None
    return effects, [
        _ratio(np.abs(total[3] / n_relevant - total[4] / n_others), total[1] / n_relevant + total[2] / n_others)
        for total in sums
    ]


def _labelled(data: FitData) -> FitData:
    """Returns the data with the judgements in a column, where there are any."""
    return data if data.qrels is None else FitData(data.frame.assign(label=data.labels()), data.qrels)


def _head_strengths(model: Ranker, data: FitData) -> Layers | None:
    """Returns the role strength of every head, or None where attention cannot be seen from query to text."""
    counts = list(model.counts(HEADS).values())
    if len(model.towers) > 1 or model.map.why_not_plain() or not any(counts):
        return None
    plain = data.frame[['qid', 'query', 'docno', 'text']]
    roles = head_roles(AttentionShares(model, text_field='text').transform(plain), n_resamples=1)
    strengths = [np.zeros(count) for count in counts]
    for row in roles.to_dict('records'):
        strengths[row['layer']][row['head']] = _strength(row)
    return strengths


def _strength(row: dict[Any, Any]) -> float:
    with np.errstate(divide='ignore'):
        sizes = np.abs(np.log([row[ODDS + flow] for flow in FLOWS if ODDS + flow in row]))
    # NaN where a kind of word gives no word any mass: no flow, no role.
    largest = float(np.max(sizes, initial=0.0, where=~np.isnan(sizes)))
    return (1 - 1 / (1 + largest)) * (1 - row[SHARE + 'to_cls'] - row[SHARE + 'to_sep'])


def _weighted(effects: Layers, strengths: Layers | None) -> Layers:
    if strengths is None:
        return effects
    return [effect * np.clip(strength, _LEAST, 1) for effect, strength in zip(effects, strengths, strict=True)]


def _circuit_heads(model: Ranker, frame: pd.DataFrame, seed: int) -> Units:
    """Returns the heads that carry the score change; none where no interval of an effect excludes 0."""
    # With one query there are no intervals.
    if frame['qid'].nunique() < 2 or not any(model.counts(HEADS).values()):
        return Units()
    effects = HeadEffects.from_frame(causal.patch_stage(model).transform(frame), seed=seed)
    table = effects.to_frame()
    certain = int(((table['ratio_low'] > 0) | (table['ratio_high'] < 0)).sum())
    most = max(1, round(_HEAD_SHARE * len(table)))
    return Units.of(discover_circuit(effects, k=min(certain, most))) if certain else Units()


def _top(layers: Layers, share: float) -> Units:
    """Returns the neurons of the highest importance over all layers."""
    units = [Unit(Site(NEURONS, layer), i) for layer, values in enumerate(layers) for i in range(len(values))]
    order = np.argsort(-np.concatenate(layers), kind='stable')[: max(1, round(share * len(units)))]
    return Units(units[place] for place in order)


def _probabilities(layers: Layers, members: Units, protection: float) -> Layers:
    """Returns the probability of staying of every unit of one kind."""
    values = np.concatenate(layers)
    ranks = (rankdata(values) - 0.5) / max(1, len(values))
    kept = [part.copy() for part in np.split(ranks, np.cumsum([len(layer) for layer in layers])[:-1])]
    for site, number in members:
        chance = protection * kept[site.layer][number] / (1 - kept[site.layer][number])
        kept[site.layer][number] = chance / (1 + chance)
    return kept


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)
