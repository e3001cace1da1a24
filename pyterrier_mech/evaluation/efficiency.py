"""What a ranker costs: parameters, memory, arithmetic and measured time, beside those of another in the same run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from pyterrier_mech.frames import strings
from pyterrier_mech.rankers.ranker import Ranker

_MIB = 2**20


def parameters(model: Ranker) -> int:
    """Returns the number of all parameters of a ranker; shared ones count once."""
    return sum(parameter.numel() for parameter in model.map.module.parameters())


def encoder_parameters(model: Ranker) -> int:
    """Returns the number of parameters in the layers of a ranker: no embeddings, no pooler, no classifier."""
    return sum(parameter.numel() for layer in model.map.layers for parameter in layer.module.parameters())


def weight_mb(model: Ranker) -> float:
    """Returns the size of a ranker's parameters and buffers, in MiB (2**20 bytes)."""
    module = model.map.module
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers())) / _MIB


def count_flops(call: Callable[[], Any]) -> int:
    """Returns the floating-point operations that matrix products execute during a call.

    Counted by PyTorch's `FlopCounterMode`: a multiplication and an addition are two operations; sums, norms,
    activations and softmax are not counted.
    """
    # PyTorch has no formula for the fused attention kernel of CPUs, and counts it as nothing.
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={kernel: _attention_flops})
    # Its module tracker fails on views of parameters (DeBERTa), and only the total is wanted.
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with counter:
        call()
    return counter.get_total_flops()


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    rows, heads, tokens, width = query
    return 2 * rows * heads * tokens * key[2] * (width + value[3])


class _NoModules:
    parents = frozenset({'Global'})

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def efficiency(
    model: Any,
    frame: pd.DataFrame,
    *,
    baseline: Ranker | None = None,
    batch_sizes: Iterable[int | None] = (1, 32, None),
    repeats: int = 5,
) -> pd.DataFrame:
    """Measures what a ranker costs on a frame, and its ratios to a baseline that takes turns with it.

    Time is what `score` takes for the whole frame, tokenisation included, after a warm-up. In every round each side
    scores the frame once, in alternating order, so that a slow moment of the machine hits both; `speedup` is the
    median over rounds of the ratio within a round. Absolute times say little about another machine. The rankers are
    not changed; on CUDA the peak statistics of the device are reset.

    **Input columns**: qid, query, docno, text (the `text_field` of each ranker).

    Args:
        model: A ranker; or a fitted stage with a smaller ranker in `model_` and the one it came from in `model`.
        frame: Pairs to score. Lengths decide times: take those that the ranker will meet.
        baseline: The ranker to compare with; by default the `model` of a fitted stage.
        batch_sizes: Pairs of a batch. Pairs are sorted by length, as the rankers do; a number above that of the rows
            is one batch of all. None is the ranker's own token budget.
        repeats: Rounds.

    Returns:
        One row a batch size and ranker. **Output columns**: `ranker` ('baseline' or 'model'), `batch_size` (missing
        for the ranker's own), `parameters`, `encoder_parameters` (in the layers alone), `weight_mb` (parameters and
        buffers in MiB), `flops` (executed for a pair, padding included, see `count_flops`), `ms` (median over rounds
        of milliseconds a pair), `peak_mb` (on CUDA: weights and the most that a pass holds beside them, in MiB; NaN
        on a CPU). For 'model' beside a baseline, else NaN: `speedup` (baseline's time over the model's, median over
        rounds), `speedup_low` and `speedup_high` (least and greatest of the rounds: no confidence interval),
        `flops_ratio`, `parameters_ratio` and `memory_ratio` (of `weight_mb`), all three model over baseline. Times
        are NaN where a batch of that size does not fit in the memory of the device.

    Raises:
        TypeError: If what is given is not a ranker and does not hold one.
        ValueError: If the frame is empty, lacks columns or texts, `repeats` or a batch size is below 1, or the two
            rankers are on different devices.
    """
    sides = _sides(model, baseline)
    sizes = _checked_sizes(batch_sizes, repeats)
    _check_frame(frame, sides)
    rows = []
    for size in sizes:
        passes = {name: _Pass(ranker, frame, size) for name, ranker in sides.items()}
        flops = {name: count_flops(run.score) / len(frame) for name, run in passes.items()}
        peaks = {name: run.peak_mb() for name, run in passes.items()}
        seconds = _take_turns(passes, repeats)
        for name, ranker in sides.items():
            row: dict[str, Any] = {'ranker': name, 'batch_size': size}
            row |= {count.__name__: count(ranker) for count in (parameters, encoder_parameters, weight_mb)}
            row |= {'flops': flops[name], 'ms': float(np.median(seconds[name])) * 1000 / len(frame)}
            rows.append({**row, 'peak_mb': peaks[name], **_ratios(name, sides, flops, seconds)})
    return pd.DataFrame(rows).astype({'batch_size': 'Int64'})


def _ratios(
    name: str, sides: dict[str, Ranker], flops: dict[str, float], seconds: dict[str, np.ndarray]
) -> dict[str, float]:
    names = ('speedup', 'speedup_low', 'speedup_high', 'flops_ratio', 'parameters_ratio', 'memory_ratio')
    if name == 'baseline' or 'baseline' not in sides:
        return dict.fromkeys(names, np.nan)
    rounds = seconds['baseline'] / seconds['model']
    ours, theirs = sides['model'], sides['baseline']
    values = [np.median(rounds), rounds.min(), rounds.max(), flops['model'] / flops['baseline']]
    values += [size(ours) / size(theirs) for size in (parameters, weight_mb)]
    return dict(zip(names, map(float, values), strict=True))


class _Pass:
    """Scores a frame in batches of one size; the ranker's own budget is left alone."""

    def __init__(self, ranker: Ranker, frame: pd.DataFrame, batch_size: int | None):
        # The same module, with a budget of its own.
        self.ranker = ranker.around(ranker.map.module)
        self.ranker.batch_tokens = ranker.budget.tokens if batch_size is None else sys.maxsize
        self.ranker.verbose = False
        self.device = ranker.map.device
        self.batch_size = batch_size
        queries, texts = strings(frame, 'query', ranker), strings(frame, ranker.text_field, ranker)
        values = {'query': queries, 'text': texts}
        parts = [part for tower in ranker.towers for _, part in ranker.parts(values, tower)]
        lengths = np.sum([part.lengths for part in parts], axis=0)
        order = np.argsort(-lengths, kind='stable')
        step = batch_size or len(frame)
        self.batches = [
            ([queries[i] for i in order[start : start + step]], [texts[i] for i in order[start : start + step]])
            for start in range(0, len(frame), step)
        ]

    def score(self) -> None:
        for queries, texts in self.batches:
            self.ranker.score(queries, texts)

    def seconds(self) -> float:
        self._wait()
        start = perf_counter()
        self.score()
        self._wait()
        return perf_counter() - start

    def peak_mb(self) -> float:
        if self.device.type != 'cuda':
            return np.nan
        self._wait()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.score()
        # What lay on the device before may be another ranker's: only this one's weights are counted.
        return weight_mb(self.ranker) + (torch.cuda.max_memory_allocated(self.device) - before) / _MIB

    @property
    def fits(self) -> bool:
        return self.batch_size is None or self.ranker.budget.tokens == sys.maxsize

    def _wait(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)


def _take_turns(passes: dict[str, _Pass], repeats: int) -> dict[str, np.ndarray]:
    """Returns the seconds of every round, by ranker."""
    for run in passes.values():
        run.score()
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(repeats):
        for name in list(passes)[:: 1 if turn % 2 == 0 else -1]:
            seconds[name].append(passes[name].seconds())
    # A batch that was split when memory ran out is not of the size that was asked for.
    return {name: np.where(passes[name].fits, values, np.nan) for name, values in seconds.items()}


def _sides(model: Any, baseline: Ranker | None) -> dict[str, Ranker]:
    if not isinstance(model, Ranker) and isinstance(getattr(model, 'model_', None), Ranker):
        if baseline is None and isinstance(model.model, Ranker):
            baseline = model.model.around(model.model.map.module)
            baseline.text_field = model.model_.text_field
        model = model.model_
    sides = {'model': model} if baseline is None else {'baseline': baseline, 'model': model}
    for name, ranker in sides.items():
        if not isinstance(ranker, Ranker):
            raise TypeError(
                f'{name} must be a CrossEncoder, a BiEncoder, or a PrunedReranker after fit; got {name}={ranker!r}'
            )
    devices = {name: str(ranker.map.device) for name, ranker in sides.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f'the rankers are on different devices, {devices}: times would compare the devices')
    return sides


def _checked_sizes(batch_sizes: Iterable[int | None], repeats: int) -> list[int | None]:
    if repeats < 1:
        raise ValueError(f'repeats must be 1 or more; got repeats={repeats!r}')
    sizes = list(batch_sizes)
    bad = [size for size in sizes if size is not None and not (isinstance(size, Integral) and size >= 1)]
    if bad or not sizes:
        raise ValueError(
            f"batch_sizes={sizes!r}: give numbers of pairs from 1 up, and None for the ranker's own batches"
        )
    return sizes


def _check_frame(frame: pd.DataFrame, sides: dict[str, Ranker]) -> None:
    for ranker in sides.values():
        if missing := [name for name in ('qid', 'query', 'docno', ranker.text_field) if name not in frame.columns]:
            raise ValueError(
                f'the frame to measure on has no {", ".join(map(repr, missing))}: give what the ranker would read, '
                'e.g. (bm25 % 50 >> text)(topics)'
            )
        for column in ('query', ranker.text_field):
            strings(frame, column, ranker)
    if not len(frame):
        raise ValueError('the frame to measure on has no rows')
