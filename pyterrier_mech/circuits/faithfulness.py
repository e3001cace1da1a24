"""How much of an effect a circuit carries: curves over its size, against random circuits."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from pyterrier_mech.circuits.ablation import ablated_scores
from pyterrier_mech.evaluation.bootstrap import ratio_of_sums
from pyterrier_mech.frames import Fields, two_versions
from pyterrier_mech.inputs.inputs import Inputs
from pyterrier_mech.patch.heads import PatchHeads
from pyterrier_mech.patch.pairs import reasons
from pyterrier_mech.patch.replacement import Replacement, check_value
from pyterrier_mech.provenance import as_qids
from pyterrier_mech.results.circuit import Circuit
from pyterrier_mech.units import HEADS, Units

CIRCUIT, RANDOM = 'circuit', 'random'


def faithfulness(
    model: Any,
    circuit: Circuit,
    frame: pd.DataFrame,
    *,
    sizes: Sequence[int] | None = None,
    value: str = 'mean',
    reference: pd.DataFrame | None = None,
    n_random: int = 5,
    seed: int = 0,
    filler: str | None = 'a',
    confidence: float = 0.95,
    n_resamples: int = 1000,
    text_field: str | None = None,
) -> pd.DataFrame:
    """Measures what is left of a score change in a circuit alone, and what goes without the circuit.

    With s′ the score when units are ablated, in both inputs of a pair alike, and sums over rows:

    - `faithfulness` = Σ (s′(perturbed) − s′(original)) / Σ (s(perturbed) − s(original)), everything but the circuit
      ablated: 1 if the circuit does it all;
    - `completeness` = 1 − the same, with the circuit ablated: 1 if nothing does it without the circuit.

    Both for parts of the circuit by size, strongest units first, and for random sets with as many heads and neurons in
    every layer. Everything means all heads; it means all neurons too if the circuit has neurons, and neurons only if it
    has no heads. The score changes are those of aligned pairs, as in `PatchHeads`.

    **Input columns**: qid, query, docno, text and the other version that `Perturb` wrote: text_0, query_0, or both.

    **Output columns**: `size` (heads, or neurons of a circuit without heads), `kind` ('circuit' or 'random'), `draw`
    (number of the random set), `faithfulness`, `faithfulness_low`, `faithfulness_high`, `completeness`,
    `completeness_low`, `completeness_high` (bootstrap intervals over queries), `n_heads`, `n_neurons`, `n` (rows),
    `n_queries`, `n_left_out` (rows that cannot be patched).

    Args:
        model: The ranker.
        circuit: The circuit, found on other queries.
        frame: Pairs to judge it on.
        sizes: Sizes of the parts; by default 0, 1, 2, 4, … and the whole.
        value: What stands in the place of ablated units: 'mean', 'resample' or 'zero'. See `AblatedReranker`.
        reference: Frame with query and text columns, for 'mean' and 'resample'; usually rows of other queries.
        n_random: Random sets of each size. Draw i follows one random order of seed + i, so that its sets are nested.
        seed: Of the random sets and of the rows drawn by 'resample'.
        filler: Token that stands where one side has none; see `PatchHeads`.
        confidence: Coverage of the intervals.
        n_resamples: Bootstrap resamples.
        text_field: Column of the text, here and in the reference; by default as the model has it.

    Raises:
        TypeError: If the circuit is none, or the reference is no frame.
        ValueError: If the frame has queries that the circuit was found on, no row can be patched, a setting is not
            known or out of range, or the ranker has not all units.

    Source: Wang et al. 2022, arXiv 2211.00593.
    """
    text = text_field if text_field is not None else model.text_field
    _check(circuit, frame, n_random)
    check_value(value, reference, text)
    circuit.units.check(model)
    original, pairs = _pairs(model, frame, text, filler)
    sizes = _default_sizes(circuit) if sizes is None else list(sizes)
    every = Units.all(model, sorted({unit.site.kind for unit in circuit.units}) or [HEADS])
    rows, inside = _sets(model, circuit, sizes, n_random, seed)

    # Each set once: all random sets of size 0 are the same one.
    sets = list(dict.fromkeys([Units(), *inside, *(every - units for units in inside)]))

    def made(units: Units) -> Replacement:
        return Replacement(model, units, value, reference, seed, text)

    scores = ablated_scores(model, pairs, original, sets, made)
    changes = dict(zip(sets, np.asarray(scores[:, 1] - scores[:, 0], dtype=np.float64), strict=True))
    remaining = np.stack([changes[every - units] for units in inside] + [changes[units] for units in inside])
    qids = frame['qid'].astype(str).to_numpy()[pairs.good]
    options = {'confidence': confidence, 'n_resamples': n_resamples, 'seed': seed}
    shares, low, high, *_ = ratio_of_sums(remaining.T, changes[Units()], qids, **options)
    n = len(inside)
    return pd.DataFrame(rows).assign(
        faithfulness=shares[:n],
        faithfulness_low=low[:n],
        faithfulness_high=high[:n],
        completeness=1 - shares[n:],
        completeness_low=1 - high[n:],
        completeness_high=1 - low[n:],
        n_heads=[len(units.heads) for units in inside],
        n_neurons=[len(units.neurons) for units in inside],
        n=len(pairs.good),
        n_queries=len(set(qids)),
        n_left_out=len(pairs.rest),
    )


def _check(circuit: Any, frame: pd.DataFrame, n_random: int) -> None:
    if not isinstance(circuit, Circuit):
        raise TypeError(
            f'circuit must be a Circuit; got {circuit!r}: use discover_circuit(effects) or Circuit.from_units(units)'
        )
    if n_random < 0:
        raise ValueError(f'n_random must be 0 or more; got {n_random!r}')
    if shared := sorted(as_qids(frame.get('qid', ())) & as_qids(circuit.qids)):
        raise ValueError(
            f'The circuit was found on {len(shared)} of the queries that it is judged on (first: {shared[0]!r}), which '
            "flatters it. Judge it on others: frame[~frame['qid'].isin(circuit.qids)]."
        )


def _pairs(model: Any, frame: pd.DataFrame, text: str, filler: str | None) -> tuple[Fields, Inputs]:
    # Pairs are read, and refused, as by PatchHeads.
    original, perturbed = two_versions(frame, PatchHeads(model, heads=[]), text)
    if not len(frame):
        raise ValueError('The frame has no rows: give pairs of queries that the circuit was not found on')
    inputs = Inputs.pairs(model, original, perturbed, filler)
    if not len(inputs.good):
        raise ValueError(
            f'None of the {len(frame)} rows can be patched ({reasons(inputs)}): see the patchable column of PatchHeads'
        )
    if len(inputs.rest):
        warnings.warn(
            f'{len(inputs.rest)} of {len(frame)} rows cannot be patched ({reasons(inputs)}); left out', stacklevel=3
        )
    return original, inputs


def _default_sizes(circuit: Circuit) -> list[int]:
    whole = len(circuit.heads) or len(circuit.neurons)
    return [0, *(2**i for i in range(whole.bit_length()) if 2**i < whole), *([whole] if whole else [])]


def _sets(
    model: Any, circuit: Circuit, sizes: Sequence[int], n_random: int, seed: int
) -> tuple[list[dict[str, Any]], list[Units]]:
    """Returns size, kind and draw of every set, and the sets."""
    rows: list[dict[str, Any]] = []
    sets: list[Units] = []
    for size in sizes:
        part = circuit.top(size).units
        rows.append({'size': size, 'kind': CIRCUIT, 'draw': 0})
        rows += [{'size': size, 'kind': RANDOM, 'draw': draw} for draw in range(n_random)]
        sets += [part, *(Units.random(part, model, seed + draw) for draw in range(n_random))]
    return rows, sets
