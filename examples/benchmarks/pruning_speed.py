"""Whether a pruned ranker is as fast as asked: plans made by the clock on train topics, measured on dev topics.

    python examples/benchmarks/pruning_speed.py --speedup 1.5 --speedup 2

Both rankers run on the same engine and take turns; the speed-up is the median over rounds of the ratio in a round. Run
it on a quiet machine.
"""

import typer
from common import load_model, load_qrels, of_split, print_table

from pyterrier_mech import PrunedReranker
from pyterrier_mech.prune import Fisher
from pyterrier_mech.stats import efficiency


def main(
    model: str = 'ce-minilm-l6',
    speedup: list[float] = [1.5, 2.0],  # noqa: B006 - typer reads it
    sparsity: list[float] = [0.4, 0.5],  # noqa: B006
    allocation: list[str] = ['adaptive', 'global'],  # noqa: B006
    pairs: int = 248,
    rows: int = 200,
    repeats: int = 7,
    device: str = 'cpu',
):
    """Prints what was asked, and what efficiency measures for plans by time and by operations."""
    ranker = load_model(model, device)
    train, dev = (of_split(load_qrels(), split, count) for split, count in (('train', 1000), ('dev', rows)))
    asked = [{'budget': 'latency', 'speedup': value} for value in speedup]
    asked += [{'budget': 'flops', 'sparsity': value} for value in sparsity]
    table = []
    for settings in asked:
        for spread in allocation:
            pruned = PrunedReranker(ranker, Fisher(max_pairs=pairs), allocation=spread, recovery=(), **settings)
            pruned.fit(train)
            measured = efficiency(pruned, dev, batch_sizes=[None], repeats=repeats).iloc[1]
            plan = pruned.plan_.to_frame()
            table.append(
                {
                    'asked': ' '.join(f'{name}={value}' for name, value in settings.items()),
                    'allocation': spread,
                    'heads': ' '.join(map(str, plan['heads'])),
                    'neurons': ' '.join(map(str, plan['neurons'])),
                    'FLOPs': round(measured['flops_ratio'], 3),
                    'speedup': round(measured['speedup'], 2),
                    'rounds': f'{measured["speedup_low"]:.2f}-{measured["speedup_high"]:.2f}',
                }
            )
    print_table(f'{model} on {device}, {rows} dev pairs', table)


if __name__ == '__main__':
    typer.run(main)
