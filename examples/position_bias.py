"""Does it matter where a query word stands? TDC at the start, inside and at the end of passages, by type of token.

    python examples/position_bias.py --topics 40 --out position

The same word is added to the same passages at three places. Compared pair by pair, with 95 % intervals over queries:
the change of the score, against the plain passage and against a filler at the same place; where in the text the change
is carried, layer by layer; and by which heads. The control is a rare word of another topic at the same places.
Passages that have the word already and those that have not are kept apart. Needs the folder PYTERRIER_MECH_ASSETS,
see examples/real_data.py.
"""

import argparse
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from real_data import assets, cells, load, of_each, quotient, rankers, shown

from pyterrier_mech import (
    LNC1,
    TDC,
    TFC1,
    AttentionShares,
    BiEncoder,
    HeadEffects,
    LayerEffects,
    PatchHeads,
    PatchLayers,
    Perturb,
    head_roles,
)
from pyterrier_mech.stats import bootstrap_by_query

LOCATIONS = {'start': 'start', 'inside': 'sentence', 'end': 'end'}
AXIOMS = {'TDC': TDC, 'TFC1': TFC1}
SITES = {'resid_pre': 'residual stream', 'attn_out': 'attention', 'mlp_out': 'feed-forward'}
# Colours that the colour-blind tell apart, too.
LOOKS = (('#0072b2', 'o'), ('#d55e00', 's'), ('#009e73', '^'))
GROUPS = {'new': 'no', 'there': 'yes'}


def edited_frames(folder: Path, options) -> dict[str, dict[str, pd.DataFrame]]:
    """For the word and for the control, the same pairs with it at each place."""
    docs, topics, qrels = load(folder)
    frame = qrels.merge(topics).merge(docs)
    axiom, settings = AXIOMS[options.axiom], {'seed': options.seed}
    if axiom is TFC1:
        settings['per'] = 'query'
    versions = places(frame, axiom, docs.to_dict('records'), **settings)
    # A passage of one sentence has no place inside, and the stage then takes the end.
    inside = versions['inside']['text']
    whole = (inside != versions['end']['text']) & (inside != versions['start']['text'])
    chosen = of_each(versions['end'][whole], 'term_before', options.topics, options.passages, options.seed)
    keys = chosen[['qid', 'docno']]
    versions = {place: keys.merge(version) for place, version in versions.items()}
    plain = chosen.assign(text=chosen['text_0'])[['qid', 'docno', 'query', 'text', 'label']]
    words = sorted(set(chosen['term_added']))
    controls = places(plain, LNC1, docs.to_dict('records'), words=words, seed=options.seed)
    # Which pairs have the query word already is told by the edit, not by its control.
    controls = {place: control.assign(term_before=chosen['term_before']) for place, control in controls.items()}
    return {options.axiom: versions, 'control': controls}


def places(frame, axiom, statistics, **settings):
    return {
        place: Perturb(axiom(statistics, location=location, **settings))(frame) for place, location in LOCATIONS.items()
    }


class Study:
    """One ranker."""

    def __init__(self, name, model, frames, options):
        self.name, self.model, self.options = name, model, options
        self.bi = isinstance(model, BiEncoder)
        self.digits = 4 if self.bi else 2
        some = frames[options.axiom]['end']
        shares = AttentionShares(model)(some)
        roles = head_roles(shares, tower='text' if self.bi else None)
        self.same = roles.loc[roles['role'] == 'same-token', 'name'].tolist()
        plain = some['query'].tolist(), some['text_0'].tolist()
        self.plain = np.asarray(model.score(*plain), dtype=float)
        self.heads = {what: {place: self.patched(frame) for place, frame in of.items()} for what, of in frames.items()}
        yes = [frame['patchable'] == 'yes' for of in self.heads.values() for frame in of.values()]
        self.kept = np.logical_and.reduce(yes)
        self.group = some['term_before'].to_numpy()
        self.qids = some['qid'].to_numpy()
        self.frames = frames

    def patched(self, frame):
        found = PatchHeads(self.model, heads=self.same)(frame)
        return found.assign(score_edited=self.model.score(frame['query'].tolist(), frame['text'].tolist()))

    def rows(self, group):
        return self.kept & (self.group == GROUPS[group])

    def run(self):
        print(f'\n=== {self.name}; same-token heads: {", ".join(self.same) or "none"}', flush=True)
        self.scores()
        blocks = self.blocks()
        self.head_maps()
        return blocks

    def scores(self):
        for group in GROUPS:
            rows = self.rows(group)
            if not rows.any():
                continue
            qids, table, changes = self.qids[rows], [], {}
            for what, of in self.heads.items():
                for place, found in of.items():
                    found = found[rows]
                    plain = found['score_edited'].to_numpy(float) - self.plain[rows]
                    filler = (found['score_perturbed'] - found['score_original']).to_numpy(float)
                    changes[what, place] = plain, filler
                    means = [shown(*quotient(qids, (change, 1)), self.digits) for change in (plain, filler)]
                    table.append({'word': what, 'place': place, 'against plain': means[0], 'against filler': means[1]})
            print(f'\n{group}: {rows.sum()} pairs of {len(set(qids))} topics; change of the score')
            print(pd.DataFrame(table).to_string(index=False))
            table = []
            for one, other in combinations(LOCATIONS, 2):
                for what in self.heads:
                    sides = zip(changes[what, one], changes[what, other], strict=True)
                    means = [shown(*quotient(qids, (a - b, 1)), self.digits) for a, b in sides]
                    table.append({'word': what, 'places': f'{one} - {other}', 'plain': means[0], 'filler': means[1]})
                word, control = ([changes[what, place] for place in (one, other)] for what in self.heads)
                means = [
                    shown(*quotient(qids, (word[0][i] - word[1][i] - control[0][i] + control[1][i], 1)), self.digits)
                    for i in range(2)
                ]
                table.append(
                    {'word': 'difference', 'places': f'{one} - {other}', 'plain': means[0], 'filler': means[1]}
                )
            print(pd.DataFrame(table).to_string(index=False))

    def blocks(self):
        """The share of the change that the residual stream carries, by layer and type, where the word is new."""
        rows, tables, patched = self.rows('new'), {}, {}
        for place, frame in self.frames[self.options.axiom].items():
            patched[place] = PatchLayers(self.model, types='literature')(frame[rows])
            table = tables[place] = LayerEffects.from_frame(patched[place]).to_frame()
            if self.options.out:
                table.to_csv(self.options.out / f'{self.name}-{place}.csv', index=False)
            stream = table[table['site'] == 'resid_pre']
            wide = stream.assign(shown=cells(stream, 'ratio')).pivot(index='layer', columns='type', values='shown')
            kinds = stream.groupby('type')['ratio'].agg(lambda ratio: ratio.abs().max() >= 0.05)
            print(f'\n{place}: share of the change in the residual stream; not shown: {", ".join(kinds.index[~kinds])}')
            print(wide[kinds.index[kinds]].to_string())
            for site in ('attn_out', 'mlp_out'):
                best = table[table['site'] == site].sort_values('ratio', key=abs, ascending=False).head(4)
                listed = zip(best['layer'], best['type'], cells(best, 'ratio'), strict=True)
                print(f'{site}: ' + ', '.join(f'L{layer} {kind} {value}' for layer, kind, value in listed))
        self.block_differences(patched)
        return tables

    def block_differences(self, patched):
        """Which shares differ most between the places."""
        columns = [name for name in patched['end'] if name.startswith(('resid_pre.', 'attn_out.', 'mlp_out.'))]
        for one, other in combinations(LOCATIONS, 2):
            found = {name: self.difference(patched[one], patched[other], name) for name in columns}
            found = {name: value for name, value in found.items() if np.isfinite(value).all()}
            certain = {name: value for name, value in found.items() if value[1] > 0 or value[2] < 0}
            best = sorted(found, key=lambda name: -abs(found[name][0]))[:5]
            listed = ', '.join(f'{name} {shown(*found[name])}' for name in best)
            print(f'{one} - {other}: {len(certain)} of {len(found)} shares differ; the largest: {listed}')

    def difference(self, one, other, column):
        """The share of a column in one frame less that in another one, of the same pairs."""
        sides = [(side[column], side['score_perturbed'] - side['score_original']) for side in (one, other)]
        there = np.logical_and.reduce([side.notna() for side, _ in sides])
        if not there.any():
            return (np.nan,) * 3
        return quotient(one['qid'][there], *((effect[there], change[there]) for effect, change in sides))

    def head_maps(self):
        rows = self.rows('new')
        found = {p: PatchHeads(self.model)(frame[rows]) for p, frame in self.frames[self.options.axiom].items()}
        effects = {place: HeadEffects.from_frame(frame) for place, frame in found.items()}
        names = effects['end'].to_frame()['name'].tolist()
        print()
        for place, of_place in effects.items():
            best = of_place.strongest(6)
            print(f'{place}: ' + ', '.join(f'{n} {v}' for n, v in zip(best['name'], cells(best, 'ratio'), strict=True)))
        for one, other in combinations(LOCATIONS, 2):
            maps = [found[place][['qid', *names]].groupby('qid').sum().to_numpy() for place in (one, other)]
            low, high = bootstrap_by_query(correlation, *maps)
            value = correlation(*(side.sum(axis=0)[None] for side in maps))[0]
            print(f'{one}, {other}: correlation of the head maps {shown(value, float(low), float(high))}')
            for head in dict.fromkeys([*self.same, *effects['end'].strongest(3)['name']]):
                print(f'   {head}: share {shown(*self.difference(found[one], found[other], head))}')
        control = {place: frame[rows] for place, frame in self.heads['control'].items()}
        for head in self.same:
            for what, of in ((self.options.axiom, found), ('control', control)):
                means = {p: shown(*quotient(f['qid'], (f[head], 1)), self.digits + 1) for p, f in of.items()}
                print(f'{head}, {what}, score: ' + ', '.join(f'{place} {mean}' for place, mean in means.items()))


def correlation(one, other):
    """Of two arrays [resamples, heads], row by row."""
    one, other = (side - side.mean(axis=1, keepdims=True) for side in (one, other))
    return (one * other).sum(axis=1) / np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))


def draw(tables, options):
    """For each ranker the three blocks and types of token that carry most, layer by layer, a line a place."""
    figure, axes = plt.subplots(len(tables), 3, figsize=(7.4, 2.2 * len(tables)), layout='constrained', squeeze=False)
    for row, (name, of_places) in zip(axes, tables.items(), strict=True):
        most = pd.concat(of_places.values()).groupby(['site', 'type'])['ratio'].max().nlargest(3).index
        for ax, (site, kind) in zip(row, most, strict=False):
            for (place, table), (colour, marker) in zip(of_places.items(), LOOKS, strict=True):
                part = table[(table['site'] == site) & (table['type'] == kind)]
                ax.plot(part['layer'], part['ratio'], color=colour, marker=marker, markersize=4, label=place)
                ax.fill_between(part['layer'], part['ratio_low'], part['ratio_high'], color=colour, alpha=0.15)
            ax.axhline(0, color='#808080', linewidth=0.6)
            ax.set_title(f'{kind}, {SITES[site]}', fontsize=9)
            ax.set_xlabel('layer', fontsize=8)
            ax.set_ylim(-0.15, 1.25)
            ax.tick_params(labelsize=8)
            ax.spines[['top', 'right']].set_visible(False)
        row[0].set_ylabel(f'{name}\nshare of the change', fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=3, fontsize=8, frameon=False)
    figure.savefig(options.out / 'position.png', dpi=options.dpi)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--axiom', choices=AXIOMS, default='TDC', help='which query word is added')
    parser.add_argument('--topics', type=int, default=20, help='how many topics')
    parser.add_argument('--passages', type=int, default=1, help='passages a topic with the word, and without, at most')
    parser.add_argument('--models', nargs='+', help='some of the two rankers, by name')
    parser.add_argument('--out', type=Path, help='folder for the figure and tables')
    parser.add_argument('--dpi', type=int, default=110, help='resolution of the figure')
    parser.add_argument('--seed', type=int, default=0, help='random seed of passages and places')
    parser.add_argument('--device', default=None)
    options = parser.parse_args()
    folder = assets()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    frames = edited_frames(folder / 'dl', options)
    words = frames[options.axiom]['end']['text_0'].str.split().str.len()
    print(f'{len(words)} passages of {words.min()} to {words.max()} words')
    tables = {}
    for name, model in rankers(folder, options.device).items():
        if name in (options.models or [name]):
            tables[name] = Study(name, model, frames, options).run()
    if options.out:
        draw(tables, options)


if __name__ == '__main__':
    main()
