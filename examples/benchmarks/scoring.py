"""Speed of scoring against sentence-transformers' CrossEncoder.predict at its best batch size, on the same pairs.

python examples/benchmarks/scoring.py --model ce-minilm-l6 --pairs 1000
"""

import numpy as np
import pandas as pd
import torch
import typer
from common import assets, comparison, load_model, print_table, rounds
from sentence_transformers import CrossEncoder as TheirCrossEncoder


def candidates(count: int, seed: int = 0) -> pd.DataFrame:
    """Judged (query, passage) pairs of assets/dl, whole topics in a row, as a re-ranker gets them."""
    folder = assets() / 'dl'
    topics = pd.read_csv(folder / 'topics.tsv', sep='\t', dtype=str)
    docs = pd.read_json(folder / 'docs.jsonl.gz', lines=True, dtype={'docno': str})
    qrels = pd.read_csv(folder / 'qrels.tsv', sep='\t', dtype=str)
    return qrels.merge(topics, on='qid').merge(docs, on='docno').iloc[:count]


def main(model: str = 'ce-minilm-l6', pairs: int = 1000, device: str = 'cpu', repeats: int = 5):
    """Prints the equality check and the comparison."""
    ours = load_model(model, device)
    frame = candidates(pairs)
    queries, texts = list(frame['query']), list(frame['text'])
    path = ours.model
    theirs = TheirCrossEncoder(path, device=device, activation_fn=torch.nn.Identity(), max_length=ours.maker.max_length)
    both = list(zip(queries, texts, strict=True))

    def predict(size):
        return theirs.predict(both, batch_size=size, show_progress_bar=False)

    difference = np.abs(ours.score(queries, texts) - predict(32)).max()
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, {device}')
    print(f'equality: largest difference of a score over {pairs} pairs: {difference:.1e}')
    jobs = {'ours': lambda: ours.score(queries, texts)}
    jobs |= {f'CrossEncoder.predict, batch_size={size}': lambda size=size: predict(size) for size in (16, 32, 64, 128)}
    times = rounds(jobs, repeats)
    print_table(f'Scoring, {repeats} rounds', comparison(times, pairs))
    theirs_best = [min(values) for values in zip(*(v for n, v in times.items() if n != 'ours'), strict=True)]
    ratios = [theirs / ours for theirs, ours in zip(theirs_best, times['ours'], strict=True)]
    print(f'\nagainst the best of their settings in each round, median: {np.median(ratios):.2f}x')
    if device != 'cpu':
        precisions(model, device, queries, texts)


def precisions(model, device, queries, texts):
    """What lower precision costs: error against float32, and speed, in the same run."""
    exact = load_model(model, device).score(queries, texts)
    rows = []
    names = ['float32', 'tf32', 'bfloat16', 'float16']
    rankers = {name: load_model(model, device, dtype=name) for name in names}
    times = rounds({name: lambda r=ranker: r.score(queries, texts) for name, ranker in rankers.items()}, 5)
    for name in names:
        error = np.abs(rankers[name].score(queries, texts) - exact)
        rows.append(
            {
                'dtype': name,
                'largest error': f'{error.max():.1e}',
                'median error': f'{np.median(error):.1e}',
                'pairs/s': f'{len(queries) / np.median(times[name]):.4g}',
            }
        )
    print_table('Precision, against float32', rows)


if __name__ == '__main__':
    typer.run(main)
