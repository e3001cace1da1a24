"""What heads and neurons cost in time, measured on the user's device with the ranker's own scoring."""

from __future__ import annotations

import json
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyterrier as pt
import torch

from pyterrier_mech.draws import digest
from pyterrier_mech.inputs.inputs import Inputs
from pyterrier_mech.prune.plans.costs import Costs, layers_of_all_tokens
from pyterrier_mech.prune.plans.plan import Plan
from pyterrier_mech.prune.surgery import check_prunable, prune_units
from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.saving import write_atomic
from pyterrier_mech.units import HEADS, KINDS, NEURONS

Shares = dict[str, list[float]]
Pairs = tuple[list[str], list[str]]

# Shares of all heads or neurons at which time is measured; between them it is interpolated.
_GRID = (0.25, 0.5, 0.75, 1.0)
# A plan is corrected until its measured speed-up is so near to what was asked, or so often.
# Beyond a tenth it warns.
_NEAR, _FAR, _CORRECTIONS, _TURNS = 0.03, 0.1, 4, 7
# Drivers, libraries and what else runs on a machine change: older tables are measured again.
_VALID = timedelta(days=30)


def latency_costs(
    model: Ranker, frame: pd.DataFrame, *, repeats: int = 5, cache: bool = True, text_field: str | None = None
) -> Costs:
    """Measures the time of attention and feed-forward blocks of several widths, as shares of the whole ranker's time.

    Copies of the ranker with some share of the heads in every layer and no neurons, and the other way round, score
    the same rows in turns, so that a slow moment of the machine hits all; times are medians over the turns relative
    to the whole ranker in the same turn. What is left without any heads and neurons (tokenisation, embeddings, norms)
    is fixed.

    Args:
        model: The ranker.
        frame: Rows with query and text, as long as those that will be scored; two batches of them are used.
        repeats: Turns.
        cache: Whether to keep the table in PyTerrier's folder, and for 30 days take it from there when the same shapes
            are asked for on the same device, with the same versions and threads.
        text_field: Column of the text; by default as the model has it.

    Raises:
        ValueError: If the frame is empty or lacks columns, units of the model cannot be removed, or `repeats` is below
            1.
    """
    text = text_field or model.text_field
    missing = [name for name in ('query', text) if name not in frame.columns]
    if missing or not len(frame):
        lacks = ', '.join(map(repr, missing)) or 'rows'
        raise ValueError(f'latency_costs needs rows to time, with query and text: the frame has no {lacks}')
    if repeats < 1:
        raise ValueError(f'repeats must be 1 or more; got repeats={repeats!r}')
    check_prunable(model)
    pairs, tokens = _pairs(model, frame, text)
    path = _path(model, tokens, len(pairs[0]), repeats)
    costs = _from_file(model, path) if cache else None
    if costs is None:
        shares = _measure(model, pairs, repeats)
        costs = _costs(model, shares)
        if cache:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps({'measured': date.today().isoformat(), **shares}))
    return costs


def _from_file(model: Ranker, path: Path) -> Costs | None:
    """Returns the costs of a table that was kept; None where it is missing, torn or too old."""
    try:
        shares = json.loads(path.read_text(encoding='utf-8'))
        age = date.today() - date.fromisoformat(shares['measured'])
        return _costs(model, shares) if timedelta(0) <= age <= _VALID else None
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


def corrected(make: Callable[[float], Plan], asked: float, model: Ranker, frame: pd.DataFrame, text: str) -> Plan:
    """Makes plans until one is as fast as asked on the clock: times of parts do not add up exactly.

    Args:
        make: From a speed-up by the table to a plan.
        asked: The speed-up that is wanted.
        model: The ranker.
        frame: Rows to time; see `latency_costs`.
        text: Column of the text.

    Returns:
        The plan whose measured speed-up came nearest; its settings tell it as `measured_speedup`.
    """
    pairs, _ = _pairs(model, frame, text)
    model = _quiet(model)
    target, nearest = asked, np.inf
    plan = best = make(asked)
    for _ in range(_CORRECTIONS):
        small = prune_units(model, plan.heads, plan.neurons)
        measured = 1 / _times(model, {'small': small}, pairs, _TURNS)['small']
        distance = float(abs(np.log(measured / asked)))
        if distance < nearest:
            nearest, best = distance, replace(plan, settings={**plan.settings, 'measured_speedup': measured})
        if distance <= _NEAR:
            break
        target = max(1 + _NEAR, target * asked / measured)
        try:
            plan = make(target)
        except ValueError:
            # No plan is so fast by the table: the nearest so far is the answer.
            break
    if nearest > _FAR:
        warnings.warn(
            f'asked for {asked:.2f} times the speed, the nearest plan measures '
            f'{best.settings["measured_speedup"]:.2f}: measure on a quiet machine, or ask for what the plan can give',
            stacklevel=2,
        )
    return best


def _pairs(model: Ranker, frame: pd.DataFrame, text: str) -> tuple[Pairs, float]:
    """Returns queries and texts for two batches, and the mean number of tokens of all rows."""
    rows = frame[['query', text]].astype(str).sort_values(['query', text])
    tokens = float(Inputs.plain(model, rows['query'].tolist(), rows[text].tolist()).lengths.mean())
    count = max(1, int(2 * model.budget.tokens / tokens))
    some = rows.sample(min(count, len(rows)), random_state=0)
    return (some['query'].tolist(), some[text].tolist()), tokens


def _measure(model: Ranker, pairs: Pairs, repeats: int) -> Shares:
    """Returns shares of the whole time: of each kind at some widths and in the last layer alone, and what is fixed."""
    model, inner = _quiet(model), layers_of_all_tokens(model)
    widths = {kind: _measured_widths(model, kind) for kind in KINDS}
    variants = {'nothing': _variant(model, HEADS, 0.0, [])}
    for kind in KINDS:
        variants |= {f'{kind} {at}': _variant(model, kind, share, inner) for at, share in widths[kind].items()}
        variants[f'{kind} last'] = _variant(model, kind, 1.0, [model.n_layers - 1])
    times = _times(model, variants, pairs, repeats)
    fixed = min(times['nothing'], 1.0)
    shares: Shares = {'fixed': [fixed]}
    for kind in KINDS:
        above = [0.0, *(times[f'{kind} {at}'] - fixed for at in widths[kind])]
        # A wider block is never quicker: what looks so is noise.
        shares[kind] = np.maximum.accumulate(np.maximum(above, 0.0)).tolist()
        shares[f'{kind} at'] = [0.0, *widths[kind]]
        shares[f'{kind} last'] = [max(times[f'{kind} last'] - fixed, 0.0)]
    return shares


def _measured_widths(model: Ranker, kind: str) -> dict[float, float]:
    """Returns the widths of variants that differ, as shares of all units of a kind, and what share was asked for.

    A layer of twelve heads has no eighth of them: times are put where they were measured.
    """
    counts = [_counts(model, kind)[layer] for layer in layers_of_all_tokens(model)]
    kept = {share: sum(round(share * count) for count in counts) / max(1, sum(counts)) for share in _GRID}
    return {there: share for share, there in kept.items() if there > 0}


def _costs(model: Ranker, shares: Shares) -> Costs:
    inner = layers_of_all_tokens(model)
    heads: list[np.ndarray] = []
    neurons: list[np.ndarray] = []
    for kind, table in ((HEADS, heads), (NEURONS, neurons)):
        widths = _counts(model, kind)
        total = sum(widths[layer] for layer in inner) or 1
        for layer, width in enumerate(widths):
            at = np.arange(width + 1) / max(1, width)
            there = np.interp(at, shares[f'{kind} at'], shares[kind]) * width / total
            table.append(there if layer in inner else at * shares[f'{kind} last'][0])
    parts = sum(float(part[-1]) for part in [*heads, *neurons])
    fixed = shares['fixed'][0] if parts else 1.0
    # Times of parts do not add up to the whole exactly.
    scale = (1 - fixed) / parts if parts else 0.0
    return Costs([scale * part for part in heads], [scale * part for part in neurons], fixed, 'time of scoring')


def _counts(model: Ranker, kind: str) -> list[int]:
    return list(model.counts(kind).values())


def _variant(model: Ranker, kind: str, share: float, layers: Sequence[int]) -> Ranker:
    """Returns a copy with a share of the heads, or of the neurons, in some layers and nothing elsewhere."""
    kept: dict[str, list[range]] = {name: [range(0)] * model.n_layers for name in KINDS}
    for layer in layers:
        kept[kind][layer] = range(round(share * _counts(model, kind)[layer]))
    variant = prune_units(model, kept[HEADS], kept[NEURONS])
    # Embeddings can be most of a model, and are the same in all variants.
    variant.map.base.set_input_embeddings(model.map.base.get_input_embeddings())
    return variant


def _quiet(model: Ranker) -> Ranker:
    """Returns the ranker, around the same module, without progress bars, which take time."""
    quiet = model.around(model.map.module)
    quiet.verbose, quiet.batch_tokens = False, model.budget.tokens
    return quiet


def _times(whole: Ranker, variants: dict[str, Ranker], pairs: Pairs, repeats: int) -> dict[str, float]:
    """Returns the time of each variant relative to the whole ranker's in the same turn: medians over the turns."""
    jobs = {'': whole, **variants}
    for ranker in jobs.values():
        ranker.score(*pairs)
    seconds = np.empty((len(jobs), repeats))
    for turn in range(repeats):
        for job, ranker in enumerate(jobs.values()):
            start = time.perf_counter()
            ranker.score(*pairs)
            seconds[job, turn] = time.perf_counter() - start
    return dict(zip(jobs, np.median(seconds / seconds[0], axis=1).tolist(), strict=True))


def _path(model: Ranker, tokens: float, rows: int, repeats: int) -> Path:
    """Returns the file of the table for these shapes on this device."""
    device = model.map.device
    key = (
        torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor(),
        platform.node(),
        torch.__version__,
        torch.__config__.parallel_info(),
        (str(model.map.dtype), model.dtype == 'tf32', type(model).__name__, type(model.readout).__name__),
        model.map.base.config.model_type,
        [(layer.n_heads, layer.n_neurons, layer.head_dim, layer.mlp_out.out_features) for layer in model.map.layers],
        (model.budget.tokens, round(tokens / 8), rows, repeats),
        _GRID,
    )
    return Path(pt.io.pyterrier_home()) / 'pyterrier_mech' / 'latency' / f'{digest(*key).hex()[:16]}.json'
