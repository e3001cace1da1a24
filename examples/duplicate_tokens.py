"""Do the heads that look at the same word elsewhere carry what a ranker makes of one more query word?

    python examples/duplicate_tokens.py --topics 40 --passages 1

TDC appends a query word to a passage that has it already, or to one that has not. For every head: how much of the
attention of the appended word goes to the same word in the query and in the passage, its role by `head_roles`, and its
effect by exact patching, on the same pairs, with 95 % intervals over queries. Needs the folder PYTERRIER_MECH_ASSETS,
see examples/real_data.py, with dl/pairs_TDC.tsv.
"""

import argparse
import re
from pathlib import Path

import pandas as pd
from real_data import assets, rankers

from pyterrier_mech import (
    AttentionShares,
    HeadEffects,
    PatchHeads,
    head_roles,
    head_shares,
)

# Of pairs whose passage has not, or has, the word already. There the score hardly changes, so there is no ratio.
EFFECTS = {'new: share of change': ('ratio', False), 'there: score': ('mean', True)}


def pairs(folder: Path, topics: int, passages: int, seed: int) -> pd.DataFrame:
    """Passages with a query word appended: of each topic, some that have it already and as many that have not."""
    queries = pd.read_csv(folder / 'topics.tsv', sep='\t', dtype=str)
    docs = pd.read_json(folder / 'docs.jsonl.gz', lines=True, dtype={'docno': str})
    drawn = pd.read_csv(folder / 'pairs_TDC.tsv', sep='\t', dtype=str).sample(frac=1, random_state=seed)
    frame = drawn.merge(queries, on='qid').merge(docs, on='docno')
    words = zip(frame['added'], frame['text'], strict=True)
    frame['there'] = [word in re.findall(r'\w+', text.lower()) for word, text in words]
    both = frame.groupby('qid', sort=False)['there'].nunique() == 2
    frame = frame[frame['qid'].isin(both.index[both][:topics])].groupby(['qid', 'there']).head(passages)
    frame = frame.sort_values(['qid', 'docno'], ignore_index=True)
    return frame.assign(text_0=frame['text'], text=frame['text'] + ' ' + frame['added'])


def with_interval(table: pd.DataFrame, column: str) -> pd.Series:
    form = '{:.3f} [{:.3f}, {:.3f}]' if 'score' in column else '{:.2f} [{:.2f}, {:.2f}]'
    ends = zip(table[column], table[f'{column}_low'], table[f'{column}_high'], strict=True)
    return pd.Series([form.format(*row) for row in ends], index=table.index)


def measured(model, frame: pd.DataFrame, flows: dict[str, str], tower: str | None) -> pd.DataFrame:
    """One row a head: its role, its effects, and the flows."""
    shares, patched = AttentionShares(model)(frame), PatchHeads(model)(frame)
    roles = head_roles(shares, tower=tower)
    limits = ', '.join(f'{name} {roles[f"{name}_threshold"][0]:g}' for name in ('same', 'odds', 'special'))
    print(f'roles: {roles["n"][0]} pairs of {roles["n_queries"][0]} queries; thresholds: {limits}')
    most = roles.nlargest(4, 'same_token')
    listed = ', '.join(f'{name} {share:.2f}' for name, share in zip(most['name'], most['same_token'], strict=True))
    print(f'of the mass of repeated words, to the same word elsewhere: {listed}')
    table = roles[['name', 'role', 'stability']]
    for name, (column, there) in EFFECTS.items():
        rows = patched[(patched['there'] == there) & (patched['patchable'] == 'yes')]
        change = (rows['score_perturbed'] - rows['score_original']).mean()
        print(f'{name}: {len(rows)} pairs; the score changes by {change:.3f} in the mean')
        found = HeadEffects.from_frame(rows).to_frame()
        found = found.rename(columns={f'{column}{end}': f'{name}{end}' for end in ('', '_low', '_high')})
        table = table.merge(found[['name', name, f'{name}_low', f'{name}_high']], on='name')
    for name, flow in flows.items():
        found = head_shares(shares, flow, tower=tower).rename(columns=lambda column: column.replace('share', name))
        print(f'{name}: {flow}, of {found["n"].max()} pairs; even attention would give {found["expected"][0]:.3f}')
        table = table.merge(found[['name', name, f'{name}_low', f'{name}_high']], on='name')
    return table


def shown(table: pd.DataFrame, flows: dict[str, str], strongest: int) -> None:
    """Prints the strongest heads, and where roles and effects disagree."""
    ranks = table[list(EFFECTS)].abs().rank(ascending=False)
    first = ranks.min(axis=1).where(table['role'] != 'same-token', 0)
    best = table.loc[first.sort_values(kind='stable').index].head(strongest)
    columns = {'head': best['name'], 'role': best['role'], 'stability': best['stability'].round(2)}
    columns |= {name: with_interval(best, name) for name in [*EFFECTS, *flows]}
    print('\n' + pd.DataFrame(columns).to_string(index=False) + '\n')
    same = table['role'] == 'same-token'
    for name in EFFECTS:
        certain = (table[f'{name}_low'] > 0) | (table[f'{name}_high'] < 0)
        for what, rows in {
            'same-token, the interval excludes 0': same & certain,
            'same-token, it does not': same & ~certain,
            'another role, it excludes 0, among the five largest': ~same & certain & (ranks[name] <= 5),
        }.items():
            print(f'{name}: {what}: {", ".join(table.loc[rows, "name"]) or "none"}')
        for flow in flows:
            rank = table[flow].rank().corr(table[name].abs().rank())
            print(f'{name}: rank correlation of its size with "{flow}", {len(table)} heads: {rank:.2f}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--topics', type=int, default=20, help='how many topics')
    parser.add_argument('--passages', type=int, default=1, help='passages of each kind and topic, at most')
    parser.add_argument('--strongest', type=int, default=10, help='how many heads are printed')
    parser.add_argument('--seed', type=int, default=0, help='random seed of the draw')
    parser.add_argument('--device', default=None)
    args = parser.parse_args()
    folder = assets()
    frame = pairs(folder / 'dl', args.topics, args.passages, args.seed)
    cross, dense = rankers(folder, args.device).values()
    query = {'to query': 'injected_to_query_same', 'from query': 'query_same_to_injected'}
    text = {'to passage': 'injected_to_doc_same', 'from passage': 'doc_same_to_injected'}
    for title, model, flows, tower in (
        ('ce-minilm-l6', cross, {**query, 'to passage': text['to passage']}, None),
        ('all-MiniLM-L6-v2, inside the passage', dense, text, 'text'),
    ):
        print(f'\n{title}\n')
        shown(measured(model, frame, flows, tower), flows, args.strongest)


if __name__ == '__main__':
    main()
