"""The analysis of Chen, Merullo and Eickhoff (SIGIR 2024, arXiv 2405.02503) by public stages, on two other rankers.

    python examples/reproductions/chen_2024.py --topics 20 --pairs 1 --out chen

TFC1 adds one drawn query term, the same for all passages of a topic, to relevant and to non-relevant passages. Printed,
with 95 % intervals over queries: score changes, blocks by type of token (patched together, and the mean of single
positions), heads, the strongest heads by type of token, paths between them, and where they look. Figures and tables go
to --out. Needs the folder PYTERRIER_MECH_ASSETS, see examples/real_data.py.
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from pyterrier_mech import (
    TFC1,
    AttentionPatterns,
    AttentionShares,
    AttributePaths,
    BiEncoder,
    HeadEffects,
    LayerEffects,
    PatchHeads,
    PatchLayers,
    PatchPaths,
    PathEffects,
    Perturb,
    head_roles,
    head_shares,
    plot,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from real_data import assets, cells, load, of_each, quotient, rankers, shown

GRADES = {'relevant': (2, 3), 'non-relevant': (0,)}
TERMS = {'new': 'no', 'there': 'yes'}
LITERATURE = {'by': 'token_type', 'types': 'literature'}


def pairs(folder: Path, options) -> pd.DataFrame:
    """Passages with a drawn query term added, and their `grade`: relevant or not."""
    docs, topics, qrels = load(folder)
    graded = {label: grade for grade, labels in GRADES.items() for label in labels}
    frame = qrels.assign(grade=qrels['label'].map(graded)).dropna(subset='grade')
    frame = of_each(frame.merge(topics).merge(docs), 'grade', options.topics, options.pairs, options.seed)
    return Perturb(TFC1(per='query', seed=options.seed, location=options.location))(frame)


class Study:
    """One ranker: every step prints its numbers and leaves its figures and tables in the folder."""

    def __init__(self, name, model, frame, options):
        self.name, self.model, self.frame, self.options = name, model, frame, options
        self.bi = isinstance(model, BiEncoder)
        # Scores of the bi-encoder are cosines: two digits would show nothing of them.
        self.digits = 4 if self.bi else 2

    def keep(self, figure, what):
        if self.options.out:
            figure.savefig(self.options.out / f'{self.name}-{what}.png', dpi=self.options.dpi)
        plt.close('all')

    def table(self, table, what):
        if self.options.out:
            table.to_csv(self.options.out / f'{self.name}-{what}.csv', index=False)

    def run(self):
        print(f'\n=== {self.name}', flush=True)
        patched = PatchLayers(self.model, types='literature')(self.frame)
        self.scores(patched)
        self.blocks(patched)
        self.single_positions(patched)
        strongest = self.heads(PatchHeads(self.model)(self.frame))
        self.by_type(strongest)
        self.attention(strongest)
        self.paths(strongest)

    def scores(self, patched):
        for (grade, there), rows in patched.groupby(['grade', 'term_before']):
            change = rows['score_perturbed'] - rows['score_original']
            mean = shown(*quotient(rows['qid'], (change, 1)), self.digits)
            before = shown(*quotient(rows['qid'], (rows['score_original'], 1)), self.digits)
            print(f'{grade}, term there: {there}: {len(rows)} pairs, score {before}, its change {mean}')

    def groups(self, patched):
        """Rows of each grade, and by whether the passage had the term before; groups without rows are left out."""
        found = [(grade, patched[patched['grade'] == grade]) for grade in GRADES]
        found += [(f'term {name}', patched[patched['term_before'] == word]) for name, word in TERMS.items()]
        yield from ((group, rows) for group, rows in found if len(rows))

    def blocks(self, patched):
        for group, rows in self.groups(patched):
            change = (rows['score_perturbed'] - rows['score_original']).to_numpy()
            mean = quotient(rows['qid'], (change, 1))
            print(f'\n{group}: {len(rows)} pairs, score change {shown(*mean, self.digits)}; {(change < 0).sum()} fall')
            # Shares of a change that may be none are noise.
            column = 'ratio' if mean[1] > 0 or mean[2] < 0 else 'mean'
            effects, what = LayerEffects.from_frame(rows), f'layers-{group.replace(" ", "-")}'
            self.table(effects.to_frame(), what)
            self.keep(plot.layers(effects, column=column, title=f'{self.name}, {group}'), what)
            self.print_blocks(effects.to_frame(), column)

    def print_blocks(self, table, column='ratio'):
        """The residual stream by layer and type; of the other blocks the strongest."""
        print('share of the change' if column == 'ratio' else 'score')
        stream = table[table['site'] == 'resid_pre']
        wide = stream.assign(shown=cells(stream, column)).pivot(index='layer', columns='type', values='shown')
        print(wide[list(dict.fromkeys(stream['type']))].to_string())
        for site in ('attn_out', 'mlp_out'):
            best = table[table['site'] == site].sort_values(column, key=abs, ascending=False).head(4)
            listed = zip(best['layer'], best['type'], cells(best, column), strict=True)
            print(f'{site}: ' + ', '.join(f'L{layer} {kind} {value}' for layer, kind, value in listed))

    def single_positions(self, patched):
        new = patched[patched['term_before'] == TERMS['new']]
        some = new.groupby('grade').head(self.options.single)
        joint = LayerEffects.from_frame(some).to_frame().set_index('name')['ratio']
        alone = PatchLayers(self.model, by='position', types='literature')(self.frame.loc[some.index])
        effects = LayerEffects.from_frame(alone)
        table = effects.to_frame()
        self.table(table, 'single')
        self.keep(plot.layers(effects, title=f'{self.name}, one position at a time'), 'single')
        print(f'\n{len(some)} pairs, term new: {effects.positions}')
        self.print_blocks(table)
        both = table.set_index('name')['ratio'].corr(joint)
        print(f'correlation with the joint patch of the same pairs: {both:.2f}')

    def heads(self, patched):
        effects = {group: HeadEffects.from_frame(rows) for group, rows in (('all', patched), *self.groups(patched))}
        figure, axes = plt.subplots(1, 2, figsize=(9.4, 2.9), layout='constrained')
        for ax, grade in zip(axes, GRADES, strict=True):
            plot.heads(effects[grade], column='mean', ax=ax, title=f'{self.name}, {grade}')
        self.keep(figure, 'heads')
        table = effects['all'].to_frame()
        strongest = effects['all'].strongest(self.options.strongest)['name'].tolist()
        columns = {'head': strongest, 'share, all': cells(table.set_index('name').loc[strongest], 'ratio')}
        for group, found in effects.items():
            of_group = found.to_frame()
            self.table(of_group, f'heads-{group.replace(" ", "-")}')
            columns[f'score, {group}'] = cells(of_group.set_index('name').loc[strongest], 'mean', self.digits + 1)
        print('\n' + pd.DataFrame(columns).to_string(index=False))
        matrices = [effects[grade].matrix('mean').ravel() for grade in GRADES]
        print(f'correlation of the two head maps: {np.corrcoef(*matrices)[0, 1]:.2f}')
        for grade in GRADES:
            best = effects[grade].to_frame().nlargest(4, 'mean')
            print(
                f'{grade}: ' + ', '.join(f'{n} {v}' for n, v in zip(best['name'], cells(best, 'mean', self.digits + 1)))
            )
        return strongest

    def by_type(self, strongest):
        for site in ('z', 'pattern'):
            patched = PatchHeads(self.model, heads=strongest[:4], site=site, **LITERATURE)(self.frame)
            effects = LayerEffects.from_frame(patched)
            table = effects.to_frame()
            self.table(table, f'head-types-{site}')
            self.keep(plot.layers(effects, title=self.name), f'head-types-{site}')
            best = table.loc[table.groupby(['layer', 'head'])['ratio'].nlargest(2).index.get_level_values(-1)]
            print(
                f'\n{site} by type of token, the two largest of each head: '
                + ', '.join(f'{n} {v}' for n, v in zip(best['name'], cells(best, 'ratio'), strict=True))
            )

    def attention(self, strongest):
        tower = 'text' if self.bi else None
        shares = AttentionShares(self.model)(self.frame)
        roles = head_roles(shares, tower=tower).set_index('name')
        same = roles.index[roles['role'] == 'same-token'].tolist()
        print(f'\nsame-token heads: {", ".join(same) or "none"}')
        heads = list(dict.fromkeys([*same, *strongest]))
        flows = ['injected_to_doc_same', 'doc_same_to_injected'] + (
            [] if self.bi else ['injected_to_query_same', 'query_same_to_injected']
        )
        for flow in flows:
            table = head_shares(shares, flow, tower=tower)
            best = table.set_index('name').loc[heads]
            print(
                f'{flow} (even {table["expected"][0]:.3f}, {table["n"].max()} pairs): '
                + ', '.join(f'{n} {v}' for n, v in zip(best.index, cells(best, 'share'), strict=True))
            )
        lengths = self.frame['text'].str.split().str.len()
        there = self.frame['term_before'] == 'yes'
        row = lengths[there].idxmin() if there.any() else lengths.idxmin()
        head = (same or strongest)[0]
        found = AttentionPatterns(self.model, [head], tower=tower)(self.frame.loc[[row]]).iloc[0]
        self.keep(plot.attention(found, f'{tower}.{head}' if tower else head, n_tokens=24), 'attention')

    def paths(self, strongest):
        direct = PatchPaths(self.model, receivers='score', senders=strongest)(self.frame)
        effects = PathEffects.from_frame(direct).to_frame()
        print(
            '\nstraight to the score: '
            + ', '.join(f'{n} {v}' for n, v in zip(effects['name'], cells(effects, 'ratio')))
        )
        some = self.frame.groupby('grade').head(self.options.single)
        estimated = PathEffects.from_frame(AttributePaths(self.model, receivers='all')(some))
        self.keep(plot.paths(estimated, title=f'{self.name}: paths, estimated'), 'paths')
        early = [name for name in strongest if int(name[1 : name.index('H')]) < self.model.n_layers - 1]
        table = estimated.to_frame()
        table = table[table['sender'].isin(early) & (table['receiver'] != 'score')]
        best = table.loc[table['ratio'].abs().nlargest(4).index]
        if len(best):
            exact = PatchPaths(self.model, receivers=sorted(set(best['receiver'])), senders=sorted(set(best['sender'])))
            exact = PathEffects.from_frame(exact(self.frame)).to_frame().set_index('name').loc[best['name']]
            print(
                'from the strongest heads into others, exact: '
                + ', '.join(f'{n} {v}' for n, v in zip(exact.index, cells(exact, 'ratio'), strict=True))
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--topics', type=int, default=20, help='how many topics')
    parser.add_argument('--pairs', type=int, default=1, help='passages of each grade and topic, at most')
    parser.add_argument(
        '--single', type=int, default=5, help='pairs of each grade that are patched position by position'
    )
    parser.add_argument('--strongest', type=int, default=6, help='how many heads are followed')
    parser.add_argument('--location', choices=['end', 'start'], default='end', help='where the term goes')
    parser.add_argument('--models', nargs='+', help='some of the two rankers, by name')
    parser.add_argument('--out', type=Path, help='folder for figures and tables')
    parser.add_argument('--dpi', type=int, default=120, help='resolution of figures')
    parser.add_argument('--seed', type=int, default=0, help='random seed of passages and terms')
    parser.add_argument('--device', default=None)
    options = parser.parse_args()
    folder = assets()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    frame = pairs(folder / 'dl', options)
    print(f'{len(frame)} pairs of {frame["qid"].nunique()} topics')
    print(frame.groupby(['grade', 'term_before']).size().to_string())
    for name, model in rankers(folder, options.device).items():
        if name in (options.models or [name]):
            Study(name, model, frame, options).run()


if __name__ == '__main__':
    main()
