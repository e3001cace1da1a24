"""Which criterion prunes a cross-encoder best: chosen on train topics, judged on dev topics and a second collection.

    python examples/benchmarks/pruning.py --out pruning-runs
    python examples/benchmarks/pruning.py --out pruning-runs --no-runs --no-speed

Of the train topics, four in five are fitted on, the fifth is for early stopping; the dev topics and `mech:lab` are seen
by nothing but the judge. All judged passages of a topic are its candidates. The second collection and the ablations of
SMA are run at half alone. Every finished run is kept in `--out`, so that a killed benchmark goes on where it was; the
second command only prints what there is. Measure speed on a quiet machine: `--no-speed` leaves it for later.
"""

import json
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import typer
from common import assets, load_model, load_qrels
from pruning_tables import MAIN, print_tables

from pyterrier_mech import TDC, Perturb, PrunedReranker
from pyterrier_mech.lab import LabDataset
from pyterrier_mech.prune import (
    L0,
    SMA,
    Conductance,
    Distillation,
    Fisher,
    Magnitude,
    Movement,
    Patching,
    Plan,
    Random,
    Rescaling,
    Taylor,
    UnitScores,
    prune_units,
)
from pyterrier_mech.prune.plans.plan import fingerprint
from pyterrier_mech.stats import efficiency

RECOVERIES = ('none', 'rescaled', 'distilled')
SPARSITIES = (0.3, 0.5, 0.68)


def criteria(perturbation, pairs: int, seed: int) -> dict:
    """Name -> criterion. The ablations of SMA come last."""
    sma = {'perturbation': perturbation, 'max_pairs': min(pairs, 200), 'seed': seed}
    few = {'max_pairs': min(pairs, 200), 'seed': seed}
    return {
        'Random': Random(seed),
        'Magnitude': Magnitude(),
        'Taylor': Taylor(max_pairs=pairs, seed=seed),
        'Fisher': Fisher(max_pairs=pairs, seed=seed),
        'Fisher (labels)': Fisher('labels', max_pairs=pairs, seed=seed),
        'Movement': Movement(seed=seed),
        'L0': L0(seed=seed),
        'Patching': Patching(perturbation, **few),
        'Conductance': Conductance(**few),
        'SMA': SMA(**sma),
        'SMA without circuit protection': SMA(**sma, protection=1.0),
        'SMA without importance weighting': SMA(**sma, role_weighting=False),
        'SMA without layer protection': SMA(**sma),
    }


def allocation_of(name: str) -> str:
    """Layers are protected by the adaptive allocation; what ablates that spreads the budget evenly."""
    return 'uniform' if name.endswith('layer protection') else 'adaptive'


@dataclass(eq=False)
class Data:
    """What is fitted on, stopped by, and judged on: frames of judged passages, and all judgements."""

    fit: pd.DataFrame
    stop: pd.DataFrame
    judged: dict[str, pd.DataFrame]
    qrels: dict[str, pd.DataFrame]
    documents: pd.DataFrame


def load_data() -> Data:
    folder, qrels = assets() / 'dl', load_qrels()
    topics = pd.read_csv(folder / 'topics.tsv', sep='\t', dtype=str)
    docs = pd.read_json(folder / 'docs.jsonl.gz', lines=True, dtype={'docno': str})
    frame = qrels.drop(columns='label').merge(topics, on='qid').merge(docs, on='docno').sort_values(['qid', 'docno'])
    train = frame[frame['split'] == 'train'].drop(columns='split')
    stop = sorted(train['qid'].unique())[::5]
    lab = LabDataset()
    lab_frame = lab.get_qrels()[['qid', 'docno']].merge(lab.get_topics(), on='qid').sort_values(['qid', 'docno'])
    return Data(
        train[~train['qid'].isin(stop)].reset_index(drop=True),
        train[train['qid'].isin(stop)].reset_index(drop=True),
        {
            'dev': frame[frame['split'] == 'dev'].drop(columns='split').reset_index(drop=True),
            'lab': lab.text_loader()(lab_frame).reset_index(drop=True),
        },
        {'dev': qrels, 'lab': lab.get_qrels()},
        docs,
    )


@dataclass(frozen=True)
class Scored:
    """The scores of a criterion that ran already, as a criterion."""

    scores_: UnitScores

    @property
    def needs(self):
        return frozenset({'text'})

    def scores(self, model, data):
        return self.scores_


def main(
    out: Path = Path('pruning-runs'),
    model: str = 'ce-minilm-l6',
    criterion: list[str] = [],  # noqa: B006 - typer reads it
    sparsity: list[float] = list(SPARSITIES),  # noqa: B006
    recovery: list[str] = ['none', 'rescaled'],  # noqa: B006
    seed: list[int] = [0],  # noqa: B006
    pairs: int = 496,
    epochs: int = 1,
    budget: str = 'flops',
    allocation: str = '',
    speed_rows: int = 200,
    device: str = 'cpu',
    verbose: bool = False,
    runs: bool = True,
    speed: bool = True,
):
    """Runs what is not yet in OUT, then prints the tables.

    By default all criteria run without recovery and with least squares; add `--recovery distilled` for
    self-distillation of `--epochs` epochs, and more `--seed`s.
    """
    out.mkdir(parents=True, exist_ok=True)
    ranker, data = load_model(model, device, verbose=verbose), load_data()
    same_settings(out, model=fingerprint(ranker), pairs=pairs, epochs=epochs, budget=budget, allocation=allocation)
    if runs:
        unpruned(out, ranker, data)
        edit = Perturb(TDC(data.documents))
        for number in seed:
            for name, rule in criteria(edit, pairs, number).items():
                if criterion and name not in criterion:
                    continue
                shares = [MAIN] if name.startswith('SMA without') else sparsity
                every = [(share, how) for share in shares for how in recovery]
                left = [run for run in every if not (folder(out, name, *run, number) / 'run.json').exists()]
                if left:
                    prune(out, ranker, data, name, rule, left, number, epochs, budget, allocation)
    if speed:
        speeds(out, ranker, data, speed_rows)
    print_tables(out, ranker, data)


def same_settings(out: Path, **settings) -> None:
    """Runs of one folder are compared: they must be of one model and the same settings."""
    path = out / 'settings.json'
    if not path.exists():
        path.write_text(json.dumps(settings))
    kept = json.loads(path.read_text())
    if kept != settings:
        raise SystemExit(f'{out} holds runs with {kept}, not {settings}: give another --out.')


def folder(out: Path, name: str, sparsity: float, recovery: str, seed: int) -> Path:
    return out / f'{name}-{sparsity:g}-{recovery}-{seed}'.replace(' ', '_')


def unpruned(out: Path, ranker, data: Data) -> None:
    target = out / 'unpruned'
    if not (target / 'run.json').exists():
        target.mkdir(exist_ok=True)
        for part, frame in data.judged.items():
            ranker.transform(frame).drop(columns='text').to_parquet(target / f'{part}.parquet')
        (target / 'run.json').write_text('{}')


@cache
def scored(rule, ranker, data: Data) -> tuple[UnitScores, float]:
    """The scores of a criterion, and the minutes that they took."""
    start = time.perf_counter()
    first = PrunedReranker(ranker, rule, recovery=())
    first.fit(data.fit, data.qrels['dev'])
    return first.scores_, (time.perf_counter() - start) / 60


def prune(out, ranker, data, name, rule, runs, seed, epochs, budget, allocation) -> None:
    """Scores the units once, then prunes, repairs and judges for every sparsity and recovery."""
    scores, minutes = scored(rule, ranker, data)
    print(f'{name}, seed {seed}: {minutes:.2f} minutes, {scores.passes:.1f} passes {scores.notes}', flush=True)
    for sparsity, how in runs:
        target = folder(out, name, sparsity, how, seed)
        target.mkdir(exist_ok=True)
        fit = Rescaling(seed=seed)
        training = Distillation(epochs, seed=seed, checkpoint=str(target / 'checkpoint.pt'))
        repairs = {'none': (), 'rescaled': (fit,), 'distilled': (fit, training)}
        pruned = PrunedReranker(
            ranker,
            Scored(scores),
            sparsity,
            budget=budget,
            allocation=allocation or allocation_of(name),
            recovery=repairs[how],
        )
        start = time.perf_counter()
        pruned.fit(data.fit, data.qrels['dev'], data.stop, data.qrels['dev'])
        taken = (time.perf_counter() - start) / 60
        for part, frame in data.judged.items():
            if part == 'dev' or sparsity == MAIN:
                pruned(frame).drop(columns='text').to_parquet(target / f'{part}.parquet')
        pruned.plan_.save(target / 'plan.json')
        pruned.history_.to_csv(target / 'history.csv', index=False)
        about = {
            'criterion': name,
            'sparsity': sparsity,
            'recovery': how,
            'seed': seed,
            'criterion_minutes': minutes,
            'passes': scores.passes,
            'circuit': list(scores.notes.get('circuit', [])),
            'fit_minutes': taken,
            'qids': pruned.qids_,
        }
        (target / 'run.json').write_text(json.dumps(about))
        print(f'  {sparsity:g} {how}: {taken:.1f} minutes, {pruned.plan_!r}', flush=True)


def speeds(out: Path, ranker, data: Data, count: int) -> None:
    """Measures every plan once, beside the unpruned ranker: what it does with the weights does not matter here."""
    rows = data.judged['dev'].sample(count, random_state=0)
    columns = ['speedup', 'speedup_low', 'speedup_high', 'flops_ratio', 'parameters_ratio', 'memory_ratio']
    seen: dict[Plan, dict] = {}
    for path in sorted(out.glob('*/plan.json')):
        if not (path.parent / 'speed.json').exists():
            plan = Plan.load(path)
            if plan not in seen:
                small = prune_units(ranker, plan.heads, plan.neurons)
                measured = efficiency(small, rows, baseline=ranker, batch_sizes=[None], repeats=5).iloc[1]
                seen[plan] = {name: float(measured[name]) for name in columns}
            (path.parent / 'speed.json').write_text(json.dumps(seen[plan]))


if __name__ == '__main__':
    typer.run(main)
