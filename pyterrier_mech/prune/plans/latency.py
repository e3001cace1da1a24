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
    rows, tokens = _rows(model, frame, text)
    path = _path(model, tokens, len(rows), repeats)
    costs = _from_file(model, path) if cache else None
    if costs is None:
        shares = _measure(model, rows['query'].tolist(), rows[text].tolist(), repeats)
        costs = _costs(model, shares)
        if cache:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps({'measured': date.today().isoformat(), **shares}))
    return costs


def _from_file(model: Ranker, path: Path) -> Costs | None:
    """Returns the costs of a table that was kept; None where there is none that is whole and of these days."""
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
    rows, _ = _rows(model, frame, text)
    model = _quiet(model)
    queries, texts = rows['query'].tolist(), rows[text].tolist()
    target, nearest = asked, np.inf
    plan = best = make(asked)
    for _ in range(_CORRECTIONS):
        small = prune_units(model, plan.heads, plan.neurons)
        jobs: dict[str, Callable[[], object]] = {
            'whole': lambda: model.score(queries, texts),
            'small': lambda s=small: s.score(queries, texts),  # type: ignore[misc]
        }
        times = _in_turns(jobs, _TURNS)
        measured = float(np.median(times['whole'] / times['small']))
        distance = abs(np.log(measured / asked))
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


def _rows(model: Ranker, frame: pd.DataFrame, text: str) -> tuple[pd.DataFrame, float]:
    """Returns rows for two batches, and the mean number of tokens of all rows."""
    rows = frame[['query', text]].astype(str).sort_values(['query', text])
    tokens = float(Inputs.plain(model, rows['query'].tolist(), rows[text].tolist()).lengths.mean())
    count = max(1, int(2 * model.budget.tokens / tokens))
    return rows.sample(min(count, len(rows)), random_state=0), tokens


def _measure(model: Ranker, queries: list[str], texts: list[str], repeats: int) -> Shares:
    """Returns shares of the whole time: of each kind at some widths and in the last layer alone, and what is fixed."""
    model = _quiet(model)
    variants = {'whole': model, 'nothing': _variant(model, HEADS, 0.0, [])}
    widths = {kind: _measured_widths(model, kind) for kind in KINDS}
    for kind in KINDS:
        for step, share in enumerate(widths[kind].values()):
            variants[f'{kind} {step}'] = _variant(model, kind, share, layers_of_all_tokens(model))
        variants[f'{kind} last'] = _variant(model, kind, 1.0, [model.n_layers - 1])
    times = _in_turns({name: lambda v=v: v.score(queries, texts) for name, v in variants.items()}, repeats)  # type: ignore[misc]
    relative = {name: float(np.median(np.asarray(t) / times['whole'])) for name, t in times.items()}
    fixed = min(relative['nothing'], 1.0)
    shares: Shares = {'fixed': [fixed]}
    for kind in KINDS:
        above = [0.0] + [relative[f'{kind} {step}'] - fixed for step in range(len(widths[kind]))]
        # A wider block is never quicker: what looks so is noise.
        shares[kind] = np.maximum.accumulate(np.maximum(above, 0.0)).tolist()
        shares[f'{kind} at'] = [0.0, *widths[kind]]
        shares[f'{kind} last'] = [max(relative[f'{kind} last'] - fixed, 0.0)]
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
    tables: dict[str, list[np.ndarray]] = {}
    for kind in KINDS:
        widths = _counts(model, kind)
        total = sum(widths[layer] for layer in inner) or 1
        tables[kind] = []
        for layer, width in enumerate(widths):
            at = np.arange(width + 1) / max(1, width)
            if layer in inner:
                tables[kind].append(np.interp(at, shares[f'{kind} at'], shares[kind]) * width / total)
            else:
                tables[kind].append(at * shares[f'{kind} last'][0])
    parts = sum(float(table[-1]) for layers in tables.values() for table in layers)
    fixed = shares['fixed'][0] if parts else 1.0
    # Times of parts do not add up to the whole exactly.
    scale = (1 - fixed) / parts if parts else 0.0
    heads, neurons = ([scale * table for table in tables[kind]] for kind in KINDS)
    return Costs(heads, neurons, fixed, 'time of scoring')


def _counts(model: Ranker, kind: str) -> list[int]:
    return list(model.counts(kind).values())


def _variant(model: Ranker, kind: str, share: float, layers: Sequence[int]) -> Ranker:
    """Returns a copy with a share of the heads, or of the neurons, in some layers and nothing elsewhere."""
    kept = (
        [
            list(range(round(share * count) if name == kind and layer in layers else 0))
            for layer, count in enumerate(_counts(model, name))
        ]
        for name in KINDS
    )
    variant = prune_units(model, *kept)
    # Embeddings can be most of a model, and are the same in all variants.
    variant.map.base.set_input_embeddings(model.map.base.get_input_embeddings())
    return variant


def _quiet(model: Ranker) -> Ranker:
    """Returns the ranker, around the same module, without progress bars, which take time."""
    quiet = model.around(model.map.module)
    quiet.verbose, quiet.batch_tokens = False, model.budget.tokens
    return quiet


def _in_turns(jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, np.ndarray]:
    """Returns the seconds of each job, turn by turn."""
    for job in jobs.values():
        job()
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - start)
    return {name: np.asarray(values) for name, values in times.items()}


def _path(model: Ranker, tokens: float, rows: int, repeats: int) -> Path:
    """Returns the file of the table for these shapes on this device."""
    device = model.map.device
    key = (
        torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor(),
        platform.node(),
        torch.get_num_threads(),
        torch.get_num_interop_threads(),
        torch.backends.cpu.get_cpu_capability(),
        torch.__version__,
        str(model.map.dtype),
        type(model).__name__,
        model.map.base.config.model_type,
        _counts(model, HEADS),
        _counts(model, NEURONS),
        [(layer.head_dim, layer.mlp_out.out_features) for layer in model.map.layers],
        type(model.readout).__name__,
        model.dtype == 'tf32',
        model.budget.tokens,
        round(tokens / 8),
        rows,
        repeats,
        _GRID,
    )
    return Path(pt.io.pyterrier_home()) / 'pyterrier_mech' / 'latency' / f'{digest(*key).hex()[:16]}.json'
