"""The tables of pruning.py, from the runs that it kept."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from common import print_table
from scipy.stats import mannwhitneyu

from pyterrier_mech import AttentionShares, PrunedReranker, Units, head_roles
from pyterrier_mech.prune import FitData, Plan
from pyterrier_mech.prune.criteria.gates import unit_gradients
from pyterrier_mech.stats import compare, holm
from pyterrier_mech.units import head

MEASURE = 'ndcg_cut_10'
MAIN = 0.5


def print_tables(out: Path, ranker, data) -> None:
    runs = load_runs(out)
    if not len(runs):
        print('There are no runs yet.')
        return
    for part in data.judged:
        judged = judge(out, runs, part, data.qrels[part])
        if not len(judged):
            continue
        if part == 'dev':
            print_table(
                f'nDCG@10 retained on {data.judged[part]["qid"].nunique()} dev topics: mean over seeds [95 % interval '
                'over queries of the first seed], paired t-test against the unpruned ranker, Holm over a seed',
                quality(judged).to_dict('records'),
            )
            if len(measured := speed(runs)):
                print_table('Units kept, operations and speed (median of rounds)', measured.to_dict('records'))
            print_table('What a criterion costs', costs(runs).to_dict('records'))
            if len(tests := duels(out, runs, data)):
                print_table(
                    f'SMA and Patching against others at {MAIN:.0%}: paired, first seed, Holm over the table',
                    tests.to_dict('records'),
                )
        else:
            print_table(
                f'Second collection, {data.judged[part]["qid"].nunique()} topics of mech:lab, nothing fitted there',
                quality(judged).to_dict('records'),
            )
    best = strongest(judge(out, runs, 'dev', data.qrels['dev']))
    for name in dict.fromkeys([best, 'SMA']):
        if (out / f'{name}-{MAIN:g}-none-0'.replace(' ', '_')).exists():
            print_table(
                f'{name}, {MAIN:.0%}: only one group of layers pruned (p not corrected)',
                groups(out, ranker, data, name).to_dict('records'),
            )
            print_table(
                f'{name}, {MAIN:.0%}, no recovery: what the removed heads carried, by role, for the queries that lost '
                'most and for the others (p not corrected)',
                failures(out, ranker, data, name).to_dict('records'),
            )


def load_runs(out: Path) -> pd.DataFrame:
    """One row a run, with its folder."""
    rows = []
    for path in sorted(out.glob('*/run.json')):
        about = json.loads(path.read_text())
        if about:
            rows.append({**about, 'folder': path.parent})
    return pd.DataFrame(rows)


def judge(out: Path, runs: pd.DataFrame, part: str, qrels: pd.DataFrame) -> pd.DataFrame:
    """The runs with what `compare` says of each, tests corrected over all of the same seed."""
    base = pd.read_parquet(out / 'unpruned' / f'{part}.parquet')
    runs = runs[[(folder / f'{part}.parquet').exists() for folder in runs['folder']]]
    if not len(runs):
        return runs
    fitted = set().union(*runs['qids'])
    tables = []
    for _, of_seed in runs.groupby('seed'):
        frames = {str(f): pd.read_parquet(f / f'{part}.parquet') for f in of_seed['folder']}
        # Query ids of the second collection are those of another set of topics.
        result = compare(base, frames, qrels, [MEASURE], fitted_on=fitted if part == 'dev' else ())
        tables.append(result.table.merge(result.scores, on='run'))
    judged = pd.concat(tables)
    return runs.assign(run=runs['folder'].astype(str)).merge(judged, on='run')


def quality(judged: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (sparsity, recovery, criterion), runs in judged.groupby(['sparsity', 'recovery', 'criterion']):
        first, kept = runs.sort_values('seed').iloc[0], runs['retention']
        rows.append(
            {
                'sparsity': sparsity,
                'recovery': recovery,
                'criterion': criterion,
                'seeds': len(runs),
                'nDCG@10': round(runs['value'].mean(), 4),
                'retention': f'{kept.mean():.3f} [{first["retention_low"]:.3f}, {first["retention_high"]:.3f}]',
                'seeds from-to': f'{runs["retention"].min():.3f}-{runs["retention"].max():.3f}'
                if len(runs) > 1
                else '',
                'd_z': round(first['d_z'], 2),
                'p': round(first['p'], 4),
                'p Holm': round(first['p_corrected'], 4),
                'score r': round(runs['pearson_pooled'].mean(), 3),
                'MSE': round(runs['mse'].mean(), 2),
                'order': -kept.mean(),
            }
        )
    return pd.DataFrame(rows).sort_values(['sparsity', 'recovery', 'order']).drop(columns='order')


def strongest(judged: pd.DataFrame) -> str:
    """The criterion that keeps most without recovery at the main sparsity."""
    plain = judged[(judged['sparsity'] == MAIN) & (judged['recovery'] == 'none')]
    return plain.groupby('criterion')['retention'].mean().idxmax() if len(plain) else 'Fisher'


def speed(runs: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (sparsity, criterion), of in runs[runs['seed'] == runs['seed'].min()].groupby(['sparsity', 'criterion']):
        path = of.iloc[0]['folder']
        if not (path / 'speed.json').exists():
            continue
        measured, plan = json.loads((path / 'speed.json').read_text()), Plan.load(path / 'plan.json').to_frame()
        rows.append(
            {
                'sparsity': sparsity,
                'criterion': criterion,
                'heads': ' '.join(map(str, plan['heads'])),
                'neurons': ' '.join(map(str, plan['neurons'])),
                'FLOPs': round(measured['flops_ratio'], 3),
                'parameters': round(measured['parameters_ratio'], 3),
                'speedup': round(measured['speedup'], 2),
                'rounds': f'{measured["speedup_low"]:.2f}-{measured["speedup_high"]:.2f}',
            }
        )
    return pd.DataFrame(rows)


def costs(runs: pd.DataFrame) -> pd.DataFrame:
    table = runs.groupby('criterion')[['criterion_minutes', 'passes']].mean().sort_values('passes').round(2)
    return table.rename(columns={'criterion_minutes': 'minutes', 'passes': 'passes over the fit rows'}).reset_index()


def duels(out: Path, runs: pd.DataFrame, data) -> pd.DataFrame:
    """Paired tests of the interpretable criteria against the others, for each recovery, Holm over the table."""
    rows = []
    at = runs[(runs['sparsity'] == MAIN) & (runs['seed'] == runs['seed'].min())]
    for recovery, of in at.groupby('recovery'):
        frames = {row['criterion']: pd.read_parquet(row['folder'] / 'dev.parquet') for _, row in of.iterrows()}
        for other in ('Random', 'Magnitude', 'Fisher'):
            ours = {name: frames[name] for name in ('SMA', 'Patching') if name in frames}
            if other in frames and ours:
                table = compare(frames[other], ours, data.qrels['dev'], [MEASURE]).table
                rows += [{'recovery': recovery, 'against': other, **row} for row in table.to_dict('records')]
    table = pd.DataFrame(rows)
    if not len(table):
        return table
    table['p Holm'] = holm(table['p'].to_numpy())
    kept = [
        'recovery',
        'run',
        'against',
        'value',
        'baseline',
        'difference',
        'difference_low',
        'difference_high',
        'd_z',
        'p',
    ]
    return table[[*kept, 'p Holm']].round(4)


def groups(out: Path, ranker, data, name: str) -> pd.DataFrame:
    """What a plan costs when it is carried out in one third of the layers alone; the circuit is that of SMA."""
    path = out / f'{name}-{MAIN:g}-none-0'.replace(' ', '_')
    plan = Plan.load(path / 'plan.json')
    found = [json.loads(other.read_text())['circuit'] for other in sorted(out.glob('SMA-*-0/run.json'))]
    circuit = Units.of(found[0] if found else [])
    every, base = Units.all(ranker), pd.read_parquet(out / 'unpruned' / 'dev.parquet')
    thirds = np.array_split(np.arange(ranker.n_layers), 3)
    rows = []
    for group, layers in zip(('early', 'middle', 'late'), thirds, strict=True):
        gone, there, members = (within(units, layers) for units in (plan.removed, every, circuit))
        part = PrunedReranker(ranker, plan=Plan.removing(ranker, gone), recovery=())
        part.fit(data.fit)
        row = compare(base, part(data.judged['dev']), data.qrels['dev'], [MEASURE], fitted_on=part.qids_).table.iloc[0]
        rows.append(
            {
                'group': f'{group} ({layers[0]}-{layers[-1]})',
                'heads removed': f'{len(gone.heads)} of {len(there.heads)}',
                'neurons removed': f'{len(gone.neurons)} of {len(there.neurons)}',
                'circuit members kept': f'{len(members - gone)} of {len(members)}',
                'nDCG@10 lost': round(-row['difference'], 4),
                '95 %': f'[{-row["difference_high"]:.4f}, {-row["difference_low"]:.4f}]',
                'p': round(row['p'], 4),
            }
        )
    return pd.DataFrame(rows)


def within(units: Units, layers) -> Units:
    return Units(unit for unit in units if unit.site.layer in layers)


def failures(out: Path, ranker, data, name: str) -> pd.DataFrame:
    """The share of |g| that the removed heads of each role had, for the third of queries that lost most and the rest.

    g is the first-order effect of taking a head away on the score of a pair; shares are over all heads, and means over
    the pairs of a query.
    """
    path = out / f'{name}-{MAIN:g}-none-0'.replace(' ', '_')
    removed = Plan.load(path / 'plan.json').removed
    frame = data.judged['dev']
    runs = [pd.read_parquet(folder / 'dev.parquet') for folder in (out / 'unpruned', path)]
    lost = compare(*runs, data.qrels['dev'], [MEASURE]).per_query.set_index('qid')['difference'].sort_values()
    worst = set(lost.index[: len(lost) // 3])
    sample = frame.sample(frac=1, random_state=0).groupby('qid').head(20).reset_index(drop=True)
    roles = head_roles(AttentionShares(ranker)(sample)).set_index(['layer', 'head'])['role']
    effects = np.zeros((len(sample), ranker.n_layers, max(ranker.counts('heads').values())))
    for batch in unit_gradients(ranker, FitData(sample)):
        for layer, g in enumerate(batch.heads):
            effects[batch.rows, layer, : g.shape[1]] = np.abs(g)
    effects /= effects.sum((1, 2), keepdims=True)
    rows = []
    for role in sorted(roles.unique()):
        of_role = [unit for unit in roles.index[roles == role] if head(*unit) in removed]
        carried = sum((effects[:, layer, number] for layer, number in of_role), np.zeros(len(sample)))
        by_query = pd.Series(carried).groupby(sample['qid']).mean()
        ours, others = by_query[by_query.index.isin(worst)], by_query[~by_query.index.isin(worst)]
        p = mannwhitneyu(ours, others).pvalue if len(of_role) else np.nan
        rows.append(
            {
                'role': role,
                'heads removed': f'{len(of_role)} of {(roles == role).sum()}',
                f'lost most ({len(ours)} queries)': f'{ours.mean():.1%}',
                f'others ({len(others)})': f'{others.mean():.1%}',
                'p (Mann-Whitney)': round(p, 3),
            }
        )
    return pd.DataFrame(rows)
