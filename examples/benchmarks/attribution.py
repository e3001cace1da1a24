"""Gradient attributions against exact patching, and conductance against captum, in accuracy and speed.

    python examples/benchmarks/attribution.py --model ce-minilm-l6 --pairs 200
    python examples/benchmarks/attribution.py --pairs 5 --speed-pairs 2 --kinds TDC

Prints the equality checks first. Accuracy is that of every method on the same real pairs: over all pairs and heads
(pooled), within a pair (median and quartiles), and of the means over pairs (aggregated), with 95 % bootstrap intervals
that draw whole queries; for all pairs, and by the relevance of the passage. Speed is measured with both in turns.
"""

import statistics
import warnings

import numpy as np
import torch
import typer
from captum.attr import LayerConductance
from common import load_model, load_pairs, load_qrels, print_table, rounds, seconds
from patching import align, naive_hooks
from scipy.stats import rankdata

from pyterrier_mech import PatchHeads
from pyterrier_mech.attribute import AttributeHeads, AttributeNeurons

METHODS = ('attribution_patching', 'trapezoid', 'relp')
TOP = 10
REFERENCE = 401
STEPS = 50


def pearson(a, b):
    """Correlation along the last axis; NaN where one side is constant."""
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    with np.errstate(invalid='ignore', divide='ignore'):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def spearman(a, b):
    return pearson(rankdata(a, axis=-1), rankdata(b, axis=-1))


def recall(a, b):
    """Share of the strongest units of `b` that are among those of `a`, along the last axis."""
    top = [np.argsort(-np.abs(values), axis=-1, kind='stable')[..., :TOP] for values in (a, b)]
    return (top[0][..., :, None] == top[1][..., None, :]).any(-1).mean(-1)


def interval(statistic, qids, a, b, resamples=500):
    """95 % interval of statistic(a, b), whole queries drawn with replacement."""
    groups = [np.flatnonzero(qids == qid) for qid in sorted(set(qids))]
    if len(groups) < 2:
        return 'one query'
    rng = np.random.default_rng(0)
    drawn = [np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))]) for _ in range(resamples)]
    low, high = np.nanquantile([statistic(a[rows], b[rows]) for rows in drawn], [0.025, 0.975])
    return f'[{low:.3f}, {high:.3f}]'


def figures(qids, a, b):
    """One table row a measure: pooled, aggregated with intervals, and the quartiles over pairs."""
    rows = []
    for name, measure in (('Pearson', pearson), ('Spearman', spearman), (f'top-{TOP} recall', recall)):

        def pooled(x, y, measure=measure):
            return measure(x.ravel(), y.ravel())

        def aggregated(x, y, measure=measure):
            return measure(x.mean(0), y.mean(0))

        row = {'measure': name}
        # The strongest of all numbers of all pairs are those of a few pairs: that recall says nothing of a method.
        row['pooled'] = '' if measure is recall else f'{pooled(a, b):.3f} {interval(pooled, qids, a, b, 100)}'
        quartiles = np.nanquantile(measure(a, b), [0.25, 0.5, 0.75])
        row['a pair: median (quartiles)'] = '{1:.3f} ({0:.3f}, {2:.3f})'.format(*quartiles)
        row['aggregated'] = f'{aggregated(a, b):.3f} {interval(aggregated, qids, a, b)}'
        rows.append(row)
    return rows


def print_accuracy(ranker, kind, pairs):
    frame = load_pairs(pairs, kind).merge(load_qrels(), on=['qid', 'docno'], how='left')
    exact = PatchHeads(ranker)(frame)
    good = (exact['patchable'] == 'yes').to_numpy()
    heads = [column for column in exact.columns if column.startswith('L')]
    frame, truth = frame[good], exact.loc[good, heads].to_numpy(dtype=np.float64)
    estimates = {method: AttributeHeads(ranker, method)(frame)[heads].to_numpy(dtype=np.float64) for method in METHODS}
    mixed = estimates['attribution_patching'].copy()
    strongest = np.argsort(-np.abs(mixed).sum(0), kind='stable')[:TOP]
    mixed[:, strongest] = truth[:, strongest]
    estimates[f'attribution_patching, verify={TOP}'] = mixed
    relevant = (frame['label'] > 0).to_numpy()
    qids = frame['qid'].to_numpy()
    parts = {'all pairs': np.full(len(frame), True), 'label > 0': relevant, 'label 0': ~relevant}
    for part, rows in parts.items():
        if rows.sum() < 2:
            continue
        table = []
        for method, values in estimates.items():
            table += [{'method': method, **row} for row in figures(qids[rows], values[rows], truth[rows])]
        print_table(
            f'{kind}, {part}: {rows.sum()} of {len(good)} pairs, {len(set(qids[rows]))} queries, {len(heads)} heads, '
            'against PatchHeads',
            table,
        )


def print_checks(model, ranker, frame, device):
    few = frame.iloc[:2]
    exact = PatchHeads(ranker)(few)
    heads = [column for column in exact.columns if column.startswith('L')]
    scores = np.stack([naive_hooks(ranker, pair, device) for pair in align(ranker, few)])
    ours = exact[heads].to_numpy() + exact['score_original'].to_numpy()[:, None]
    print(f'equality: PatchHeads and hooks, 2 pairs: {np.abs(ours - scores).max():.1e}')
    double = load_model(model, device, dtype='float64')
    one = frame.iloc[:1]
    res = AttributeNeurons(double, rule='left', points=4, tolerance=1e9)(one)
    theirs = captum_conductance(double, one.iloc[0], steps=4)
    print(f'equality: AttributeNeurons(rule=left) and captum, float64: {np.abs(res.neurons[0] - theirs).max():.1e}')


def captum_conductance(ranker, row, steps=STEPS):
    """LayerConductance of the input of every layer's mlp_out, one layer a call: [layers, neurons]."""
    encoder, maker = ranker.map, ranker.maker
    encoded = maker.tokenizer([row['query']], [row['text']], return_tensors='pt', truncation=True)
    owners = np.array([-1 if owner is None else owner for owner in encoded.sequence_ids(0)])
    given = {name: values.to(encoder.device) for name, values in encoded.items()}
    ids = given.pop('input_ids')
    start = torch.where(torch.tensor(owners == 0, device=ids.device), maker.tokenizer.pad_token_id, ids)
    embed = encoder.base.get_input_embeddings()
    ends = embed(start).detach(), embed(ids).detach()

    def forward(point):
        return encoder.module(
            inputs_embeds=point, **{name: values.expand(len(point), -1) for name, values in given.items()}
        ).logits[:, 0]

    layers = [
        LayerConductance(forward, layer.mlp_out).attribute(
            ends[1], baselines=ends[0], n_steps=steps, attribute_to_layer_input=True
        )
        for layer in encoder.layers
    ]
    return torch.stack([layer[0].sum(0) for layer in layers]).detach().cpu().numpy()


def errors(values, reference):
    """Largest error of a neuron, relative to the largest neuron of the pair: median and maximum over pairs."""
    relative = np.abs(values - reference).max((1, 2)) / np.abs(reference).max((1, 2))
    return {'error: median': f'{np.median(relative):.1e}', 'largest': f'{relative.max():.1e}'}


def medians(jobs, repeats):
    return {name: statistics.median(times) for name, times in rounds(jobs, repeats).items()}


def print_heads_speed(ranker, frame, repeats):
    times = medians({'exact': lambda: PatchHeads(ranker)(frame), 'atp': lambda: AttributeHeads(ranker)(frame)}, repeats)
    print_table(
        f'Heads, {len(frame)} pairs, median of {repeats}',
        [
            {'method': name, 'seconds': f'{times[key]:.2f}', 'faster by': f'{times["exact"] / times[key]:.1f}x'}
            for name, key in (('PatchHeads', 'exact'), ('attribution patching', 'atp'))
        ],
    )


def print_neurons_speed(ranker, frame, repeats):
    reference = np.stack(AttributeNeurons(ranker, points=REFERENCE, max_points=REFERENCE)(frame)['neurons'].tolist())
    stages = {f'trapezoid, {n} points': AttributeNeurons(ranker, points=n, max_points=n) for n in (9, 11, 13, 17, 33)}
    stages['trapezoid, tolerance 0.05'] = AttributeNeurons(ranker)
    found, times = {}, {}
    captum = f'captum LayerConductance, {STEPS} steps'

    def run_captum():
        found[captum] = np.stack([captum_conductance(ranker, row) for _, row in frame.iterrows()])

    # One round of captum takes as long as dozens of the others.
    times[captum] = seconds(run_captum)
    jobs = {name: lambda stage=stage: stage(frame) for name, stage in stages.items()}
    times |= medians(jobs, repeats)
    found |= {name: np.stack(stage(frame)['neurons'].tolist()) for name, stage in stages.items()}
    print_table(
        f'All neurons of all layers, {len(frame)} pairs; errors against {REFERENCE} points',
        [
            {
                'method': name,
                'seconds': f'{times[name]:.2f}',
                'faster by': f'{times[captum] / times[name]:.1f}x',
                **errors(values, reference),
            }
            for name, values in found.items()
        ],
    )


def main(
    model: str = 'ce-minilm-l6',
    pairs: int = 200,
    speed_pairs: int = 8,
    kinds: str = 'TDC,TFC1',
    device: str = 'cpu',
    repeats: int = 3,
    threads: int = 0,
):
    if threads:
        torch.set_num_threads(threads)
    warnings.filterwarnings('ignore', message='.*(completeness error|cannot be patched)')
    ranker = load_model(model, device)
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, {device}, model {model}')
    few = load_pairs(speed_pairs)
    print_checks(model, ranker, few, device)
    for kind in filter(None, kinds.split(',')):
        print_accuracy(ranker, kind, pairs)
    if speed_pairs:
        # More pairs than for captum: few pairs of different lengths are mostly padding in a batch.
        print_heads_speed(ranker, load_pairs(3 * speed_pairs), repeats)
        print_neurons_speed(ranker, few, repeats)


if __name__ == '__main__':
    typer.run(main)
