"""Speed of exact head patching against hooks and against MechIR, on the same real pairs.

    python examples/benchmarks/patching.py --model ce-minilm-l6 --pairs 20
    python examples/benchmarks/patching.py --model electra-base --pairs 5 --no-mechir

Prints the equality check first. All times are medians over rounds in which the contestants take turns. MechIR 0.2.0
needs transformers<5, so it runs in a virtual environment of its own, made here (or given by --mechir-venv).
"""

from pathlib import Path

import numpy as np
import torch
import typer
from common import (
    MechIR,
    align,
    comparison,
    gemm_peak,
    inputs_of,
    load_model,
    load_pairs,
    mechir_python,
    print_table,
    rounds,
    seconds,
)
from torch.utils.flop_counter import FlopCounterMode

from pyterrier_mech import PatchHeads


@torch.no_grad()
def naive_hooks(model, pair, device):
    """One unpadded full forward a head, with hooks on the module: [heads] patched scores."""
    base, source = inputs_of(pair, 'original', device), inputs_of(pair, 'perturbed', device)
    module, layers = model.map.module, model.map.layers
    z, scores = {}, []
    handles = [
        layer.attention_out.register_forward_pre_hook(lambda _, args, i=i: z.__setitem__(i, args[0]))
        for i, layer in enumerate(layers)
    ]
    module(**source)
    for handle in handles:
        handle.remove()
    module(**base)
    for i, layer in enumerate(layers):
        for head in range(layer.n_heads):
            columns = layer.columns(head)

            def swap(_, args, i=i, columns=columns):
                patched = args[0].clone()
                patched[..., columns] = z[i][..., columns]
                return (patched,)

            handle = layer.attention_out.register_forward_pre_hook(swap)
            scores.append(module(**base).logits[0, 0])
            handle.remove()
    return torch.stack(scores).cpu().numpy()


def compare_with_mechir(model, frame, pairs, device, venv, repeats):
    """Ours and MechIR on a few pairs, as shipped (padded to 330 tokens) and padded to the longest pair only."""
    worker = MechIR(mechir_python(venv), model.model, device)
    stage = PatchHeads(model)
    # MechIR returns the mean over a batch of normalised effects, so one pair a batch keeps values comparable.
    res = stage(frame)
    heads = [column for column in res.columns if column.startswith('L')]
    expected = res[heads].to_numpy() / (res.score_perturbed - res.score_original).to_numpy()[:, None]
    worst = max(
        np.abs(np.ravel(worker.patch([pair], len(pair))['effects']) - row).max()
        for pair, row in zip(pairs, expected, strict=True)
    )
    print(f'MechIR, one pair a batch, no padding: largest difference of normalised effects {worst:.1e}')
    widths = {'MechIR 0.2.0 as shipped (330 tokens)': 330, 'MechIR 0.2.0, tight padding': max(map(len, pairs))}
    times = {'ours': [], **{name: [] for name in widths}}
    for _ in range(repeats):
        times['ours'].append(seconds(lambda: stage(frame)))
        for name, width in widths.items():
            times[name].append(worker.patch(pairs, width)['seconds'])
    print_table(f'Head sweep against MechIR, {len(pairs)} pairs, {repeats} rounds', comparison(times, len(pairs)))


def main(
    model: str = 'ce-minilm-l6',
    pairs: int = 20,
    mechir_pairs: int = 4,
    device: str = 'cpu',
    repeats: int = 5,
    mechir: bool = True,
    mechir_venv: Path | None = None,
    batch_tokens: int | None = None,
    dtype: str | None = None,
):
    """Prints the equality check, the comparison and the ladder."""
    ranker = load_model(model, device, batch_tokens=batch_tokens, **({'dtype': dtype} if dtype else {}))
    frame = load_pairs(pairs)
    aligned = align(ranker, frame)
    stage = PatchHeads(ranker)
    res = stage(frame)
    heads = [column for column in res.columns if column.startswith('L')]
    check = min(pairs, 5)
    scores = np.stack([naive_hooks(ranker, pair, device) for pair in aligned[:check]])
    ours = res[heads].to_numpy()[:check] + res.score_original.to_numpy()[:check, None]
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, {device}, {dtype or "float32"}')
    print(f'equality: largest difference of a patched score to hooks, {check} pairs: {np.abs(ours - scores).max():.1e}')
    lengths = [len(pair) for pair in aligned]
    print(f'{pairs} pairs, {np.mean(lengths):.0f} tokens on average, {len(heads)} heads, model {model}')

    jobs = {
        'ours': lambda: stage(frame),
        'naive hooks, unpadded': lambda: [naive_hooks(ranker, pair, device) for pair in aligned],
    }
    print_table(f'Head sweep, {repeats} rounds', comparison(rounds(jobs, repeats), pairs))
    print_ladder(ranker, stage, frame, aligned, device, repeats)
    if mechir:
        # MechIR takes its time: a few pairs, spread evenly over the lengths.
        few = np.argsort(lengths)[np.linspace(0, pairs - 1, mechir_pairs + 2).round().astype(int)[1:-1]]
        compare_with_mechir(ranker, frame.iloc[few], [aligned[i] for i in few], device, mechir_venv, repeats)


def print_ladder(ranker, stage, frame, aligned, device, repeats):
    """From the FLOPs that naive hooks need down to what the hardware makes of those that are executed."""
    needed = sum(one_forward_flops(ranker, len(pair)) for pair in aligned)
    n_heads = sum(ranker.head_counts)
    with FlopCounterMode(display=False) as counter:
        stage(frame)
    executed = counter.get_total_flops()
    rates, peaks = [], []
    for _ in range(repeats):
        # The best rate is measured right beside, since what the machine gives may change from minute to minute.
        peaks.append(gemm_peak(ranker, device, next(ranker.map.module.parameters()).dtype))
        rates.append(executed / seconds(lambda: stage(frame)))
    hardware = float(np.median(np.divide(rates, peaks)))
    print_table(
        'Ladder',
        [
            {'step': 'naive: full forwards a pair', 'value': f'{2 + n_heads}'},
            {'step': 'executed: full forwards a pair', 'value': f'{executed / needed:.1f}'},
            {'step': 'FLOP gain (naive / executed)', 'value': f'{(2 + n_heads) * needed / executed:.2f}x'},
            {'step': 'padding (real / processed tokens)', 'value': '1.00' if device == 'cpu' else 'see batch_tokens'},
            {'step': 'executed rate', 'value': f'{np.median(rates) / 1e9:.0f} GFLOP/s'},
            {'step': "best GEMM rate of the model's shapes", 'value': f'{np.median(peaks) / 1e9:.0f} GFLOP/s'},
            {'step': 'hardware (executed / best), median', 'value': f'{hardware:.2f}'},
        ],
    )


def one_forward_flops(ranker, n):
    """8nd² + 4n²d + 4n·d·d_ff a layer."""
    total = 0
    for layer in ranker.map.layers:
        d = layer.attention_out.out_features
        width = layer.n_heads * layer.head_dim
        total += 8 * n * d * width + 4 * n * n * width + 4 * n * d * layer.n_neurons
    return total


if __name__ == '__main__':
    typer.run(main)
