"""Speed of patching blocks and paths against hooks, and against MechIR's `block_all`.

    python examples/benchmarks/blocks.py --no-mechir
    python examples/benchmarks/blocks.py --mechir-venv ENVIRONMENT

Prints, for each sweep, the largest difference of a patched score first. All times are medians over rounds in which the
contestants take turns. MechIR 0.2.0 runs in a virtual environment of its own, as in `patching.py`. As it is shipped,
its collator pads to 330 tokens and `block_all` patches every one of them: that takes minutes a pair (`--shipped`).

Another sweep is one function that returns a `Sweep`, named in `SWEEPS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import naive_paths
import numpy as np
import pandas as pd
import torch
import typer
from common import (
    MechIR,
    align,
    comparison,
    inputs_of,
    load_model,
    load_pairs,
    mechir_python,
    print_table,
    rounds,
    seconds,
)

from pyterrier_mech import PatchLayers, PatchPaths

BLOCKS = ('resid_pre', 'attn_out', 'mlp_out')
TYPES = ('cls', 'query', 'sep', 'doc_match', 'doc_other', 'inserted')


@dataclass
class Sweep:
    """One kind of patching, by a stage and by hand.

    Attributes:
        stage: Ours.
        naive: From an aligned pair to its patched scores, one forward of the module for each.
        effects: From a row of the stage's frame to its effects, in the same order and shape.
    """

    stage: Any
    naive: Callable[[Any], np.ndarray]
    effects: Callable[[pd.Series], np.ndarray]


def token_types(ranker, device) -> Sweep:
    """Every block, all positions of a type together."""

    def wheres(types):
        return [[i for i, one in enumerate(types) if one == kind] for kind in TYPES if kind in types]

    def effects(row):
        there = [kind for kind in TYPES if np.isfinite(row[f'mlp_out.L0.{kind}'])]
        layers = range(ranker.n_layers)
        return np.array([[[row[f'{b}.L{i}.{kind}'] for kind in there] for i in layers] for b in BLOCKS])

    return Sweep(PatchLayers(ranker), lambda pair: naive_blocks(ranker, pair, wheres(pair.types), device), effects)


def positions(ranker, device) -> Sweep:
    """Every block, one position at a time."""

    def effects(row):
        return np.array([[row[f'{block}.L{i}'] for i in range(ranker.n_layers)] for block in BLOCKS])

    stage = PatchLayers(ranker, by='position')
    return Sweep(stage, lambda pair: naive_blocks(ranker, pair, [[i] for i in range(len(pair))], device), effects)


def paths_to_score(ranker, device) -> Sweep:
    """Every head, through no other head."""
    names = [f'L{i}H{h}>score' for i in range(ranker.n_layers) for h in range(ranker.n_heads(i))]
    naive = lambda pair: naive_paths.to_score(ranker, pair, device)  # noqa: E731
    return Sweep(PatchPaths(ranker), naive, lambda row: row[names].to_numpy(dtype=float))


def all_paths(ranker, device) -> Sweep:
    """Every head into the queries, keys and values of every later head."""
    heads = [(i, h) for i in range(ranker.n_layers) for h in range(ranker.n_heads(i))]

    def effects(row):
        cells = [row[f'paths.L{i}H{h}.{kind}'] for kind in 'qkv' for i, h in heads if i]
        flat = np.concatenate(cells)
        return flat[np.isfinite(flat)]

    return Sweep(PatchPaths(ranker, 'all'), lambda pair: naive_paths.to_all(ranker, pair, device), effects)


SWEEPS = {
    'token types': token_types,
    'positions': positions,
    'paths to the score': paths_to_score,
    'all paths': all_paths,
}


@torch.no_grad()
def naive_blocks(ranker, pair, wheres, device):
    """One unpadded full forward for each block, layer and list of positions: patched scores [blocks, layers, lists]."""
    base, source = inputs_of(pair, 'original', device), inputs_of(pair, 'perturbed', device)
    module, layers = ranker.map.module, ranker.map.layers
    parts = {
        **{('resid_pre', i): layer.module for i, layer in enumerate(layers)},
        **{('attn_out', i): layer.attention_out for i, layer in enumerate(layers)},
        **{('mlp_out', i): layer.mlp_out for i, layer in enumerate(layers)},
    }

    def hook(site, act):
        if site[0] == 'resid_pre':
            return parts[site].register_forward_pre_hook(lambda _, args: (act(args[0]), *args[1:]))
        return parts[site].register_forward_hook(lambda _, args, output: act(output))

    seen: dict[Any, torch.Tensor] = {}
    handles = [hook(site, lambda x, site=site: seen.setdefault(site, x)) for site in parts]
    module(**source)
    for handle in handles:
        handle.remove()
    module(**base)
    scores = []
    for site in parts:
        for where in wheres:

            def swap(x, site=site, where=where):
                patched = x.clone()
                patched[:, where] = seen[site][:, where]
                return patched

            handle = hook(site, swap)
            scores.append(module(**base).logits[0, 0])
            handle.remove()
    return torch.stack(scores).cpu().numpy().reshape(len(BLOCKS), len(layers), len(wheres))


def run_sweep(name, sweep, frame, pairs, repeats):
    """The largest difference, then the comparison."""
    res = sweep.stage(frame)
    ours = [sweep.effects(row) + row['score_original'] for _, row in res.iterrows()]
    worst = max(np.abs(mine - sweep.naive(pair)).max() for mine, pair in zip(ours, pairs, strict=True))
    print(f'\n{name}: largest difference of a patched score to hooks, {len(pairs)} pairs: {worst:.1e}')
    jobs = {'ours': lambda: sweep.stage(frame), 'naive hooks, unpadded': lambda: [sweep.naive(pair) for pair in pairs]}
    tokens = np.mean([len(pair) for pair in pairs])
    title = f'{name.capitalize()}: {len(pairs)} pairs, {tokens:.0f} tokens on average, {repeats} rounds'
    print_table(title, comparison(rounds(jobs, repeats), len(pairs)))


def run_mechir(ranker, sweep, frame, pairs, worker, shipped, repeats):
    """`block_all` beside positions: its effects are divided by the change of the score, a batch's are averaged."""
    res = sweep.stage(frame)
    differences = []
    for pair, (_, row) in zip(pairs, res.iterrows(), strict=True):
        change = row['score_perturbed'] - row['score_original']
        theirs = np.array(worker.patch([pair], len(pair), patch_type='block_all')['effects'])
        error = np.abs(theirs - sweep.effects(row) / change).max()
        differences.append({'change of the score': change, 'normalised': error, 'raw': error * abs(change)})
    print_table('MechIR 0.2.0 block_all, one pair a batch, no padding: largest differences', differences)
    widths = {'MechIR 0.2.0, tight padding': max(map(len, pairs))}
    if shipped:
        widths = {'MechIR 0.2.0 as shipped (330 tokens)': 330, **widths}
    times: dict[str, list[float]] = {'ours': [], **{name: [] for name in widths}}
    for _ in range(repeats):
        times['ours'].append(seconds(lambda: sweep.stage(frame)))
        for name, width in widths.items():
            times[name].append(worker.patch(pairs, width, patch_type='block_all')['seconds'])
    title = f'Positions against block_all, {len(pairs)} pairs, {repeats} rounds'
    print_table(title, comparison(times, len(pairs)))


def main(
    model: str = 'ce-minilm-l6',
    pairs: int = 10,
    position_pairs: int = 2,
    path_pairs: int = 1,
    mechir_pairs: int = 1,
    device: str = 'cpu',
    repeats: int = 5,
    mechir_repeats: int = 1,
    mechir: bool = True,
    mechir_venv: Path | None = None,
    shipped: bool = True,
    sweeps: list[str] | None = None,
):
    """Prints every sweep against hooks, then positions against MechIR."""
    ranker = load_model(model, device)
    frame = load_pairs(pairs)
    aligned = align(ranker, frame)
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, {device}, model {model}')
    # Of the slow ones a few pairs, of about the mean length.
    lengths = np.array([len(pair) for pair in aligned])
    typical = np.argsort(np.abs(lengths - lengths.mean()), kind='stable')

    def some(count):
        return frame.iloc[typical[:count]], [aligned[i] for i in typical[:count]]

    counts = {'positions': position_pairs, 'all paths': path_pairs}
    for name in sweeps or SWEEPS:
        rounds_of = 1 if name == 'all paths' else repeats  # minutes a pair by hand
        run_sweep(name, SWEEPS[name](ranker, device), *some(counts.get(name, pairs)), rounds_of)
    if mechir:
        worker = MechIR(mechir_python(mechir_venv), ranker.model, device)
        run_mechir(ranker, positions(ranker, device), *some(mechir_pairs), worker, shipped, mechir_repeats)


if __name__ == '__main__':
    typer.run(main)
