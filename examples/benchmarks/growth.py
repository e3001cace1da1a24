"""Cost of a head sweep against the number of pairs, their length, and the model's layers and heads.

python examples/benchmarks/growth.py --model ce-minilm-l6 --pairs 2000
"""

import resource

import torch
import typer
from common import assets, load_model, load_pairs, print_table, seconds
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from pyterrier_mech import CrossEncoder, PatchHeads


def peak_mib() -> float:
    """Peak resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def flops(layers: int, heads: int, d: int, ff: int, n: int) -> float:
    """What the wavefront executes for one pair, by the formula of the documentation (prefix re-use, one row last)."""
    full = 8 * n * d * d + 4 * n * n * d + 4 * n * d * ff
    start = 4 * n * d * ff / 2 + 2 * n * d * d / heads + 2 * n * (d / heads) * ff
    last = 4 * heads * n * d
    variants = sum(heads * layer for layer in range(layers - 1))
    return 2 * layers * full + variants * full + heads * (layers - 1) * start + heads * layers * last


def synthetic(layers: int, heads: int, d: int) -> CrossEncoder:
    tokenizer = AutoTokenizer.from_pretrained(assets() / 'models' / 'ce-minilm-l6')
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=d,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * d,
        num_labels=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CrossEncoder(BertForSequenceClassification(config).eval(), tokenizer=tokenizer)


def cut_to(frame, words: int):
    """Texts of about `words` words, so that lengths differ by design."""
    long = (frame['text_0'] + ' ') * 8
    text = long.str.split().str[:words].str.join(' ')
    return frame.assign(text_0=text, text=text + ' ' + frame['added'])


def main(model: str = 'ce-minilm-l6', pairs: int = 2000, device: str = 'cpu'):
    """Prints three tables."""
    ranker = load_model(model, device)
    stage = PatchHeads(ranker)
    stage(load_pairs(5))
    base = None
    rows = []
    for count in sorted({max(1, pairs // 20), max(1, pairs // 4), pairs}):
        frame = load_pairs(count)
        tokens = sum(ranker.maker.tokenize(list(frame['text'])).lengths)
        time = seconds(lambda frame=frame: stage(frame))
        base = base or time / tokens
        rows.append(
            {
                'pairs': count,
                'ms a pair': f'{1e3 * time / count:.0f}',
                'tokens a pair': f'{tokens / count:.0f}',
                'cost a token, first = 1': f'{time / tokens / base:.2f}',
                'peak MiB': f'{peak_mib():.0f}',
            }
        )
    print_table('Number of pairs', rows)

    config = ranker.map.base.config
    size = (config.num_hidden_layers, config.num_attention_heads, config.hidden_size, config.intermediate_size)
    rows = []
    for words in (25, 50, 100, 200):
        frame = cut_to(load_pairs(8), words)
        n = ranker.maker.tokenize(list(frame['text'])).lengths.mean() + 12
        time = seconds(lambda frame=frame: stage(frame)) / 8
        rows.append(
            {
                'tokens': f'{n:.0f}',
                'ms a pair': f'{1e3 * time:.0f}',
                'GFLOP by the formula': f'{flops(*size, n) / 1e9:.1f}',
                'GFLOP/s': f'{flops(*size, n) / time / 1e9:.0f}',
            }
        )
    print_table('Length', rows)

    rows = []
    frame = load_pairs(4)
    for layers, heads, d in ((2, 4, 256), (4, 4, 256), (8, 4, 256), (4, 8, 256), (4, 16, 256), (4, 8, 512)):
        toy = PatchHeads(synthetic(layers, heads, d))
        toy(frame.iloc[:1])
        time = seconds(lambda toy=toy: toy(frame)) / 4
        n = toy.model.maker.tokenize(list(frame['text'])).lengths.mean() + 12
        needed = flops(layers, heads, d, 4 * d, n)
        rows.append(
            {
                'layers': layers,
                'heads': heads,
                'd': d,
                'ms a pair': f'{1e3 * time:.0f}',
                'GFLOP by the formula': f'{needed / 1e9:.1f}',
                'GFLOP/s': f'{needed / time / 1e9:.0f}',
            }
        )
    print_table('Layers and heads (random weights)', rows)


if __name__ == '__main__':
    typer.run(main)
