"""How well gradients estimate patching, of blocks by token type and of paths between heads.

    python examples/benchmarks/estimates.py --pairs 60 --path-pairs 8

Correlations are over columns: of single pairs (all together), and of the ratios over all pairs that `LayerEffects` and
`PathEffects` give. Exact paths take a quarter of a minute a pair and more.
"""

import warnings

import numpy as np
import typer
from common import load_model, load_pairs, print_table, seconds
from scipy.stats import pearsonr, spearmanr

from pyterrier_mech import AttributeLayers, AttributePaths, LayerEffects, PatchLayers, PatchPaths, PathEffects


def cells(frame, names):
    """All effects of some columns, arrays put one behind the other."""
    return np.concatenate([np.ravel(np.stack(frame[name].to_numpy())) for name in names]).astype(float)


def row(what, estimate, exact, effects, names):
    a, b = cells(estimate, names), cells(exact, names)
    there = np.isfinite(a) & np.isfinite(b)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        tables = [effects.from_frame(frame).to_frame()[['name', 'ratio']].dropna() for frame in (estimate, exact)]
    both = tables[0].merge(tables[1], on='name')
    top = both['ratio_y'].abs().nlargest(20).index
    return {
        'what': what,
        'pairs': len(exact),
        'columns': len(both),
        'Pearson, single pairs': pearsonr(a[there], b[there]).statistic,
        'Pearson, ratios': pearsonr(both['ratio_x'], both['ratio_y']).statistic,
        'Spearman, ratios': spearmanr(both['ratio_x'], both['ratio_y']).statistic,
        'of the 20 strongest': f'{len(set(top) & set(both["ratio_x"].abs().nlargest(20).index))} found',
    }


def main(model: str = 'ce-minilm-l6', pairs: int = 60, path_pairs: int = 8, device: str = 'cpu'):
    """Prints correlations, and how much faster the estimates are."""
    ranker = load_model(model, device)
    frame, few = load_pairs(pairs), load_pairs(path_pairs)
    frames = {}
    ranker.score(frame['query'], frame['text'])  # loads the weights

    def timed(name, stage, inp):
        return seconds(lambda: frames.setdefault(name, stage(inp)))

    times = {
        'blocks': [
            timed('AttributeLayers', AttributeLayers(ranker), frame),
            timed('PatchLayers', PatchLayers(ranker), frame),
        ],
        'paths': [
            timed('AttributePaths', AttributePaths(ranker, 'all'), few),
            timed('PatchPaths', PatchPaths(ranker, 'all'), few),
        ],
    }
    blocks = [name for name in frames['PatchLayers'] if name.startswith(('resid_pre.', 'attn_out.', 'mlp_out.'))]
    arrays = [name for name in frames['PatchPaths'] if name.startswith('paths.') and name != 'paths.score']
    direct = [frame.drop(columns='paths.score') for frame in (frames['AttributePaths'], frames['PatchPaths'])]
    print_table(
        f'Estimates against exact patching, TDC, {model}',
        [
            row('blocks by type', frames['AttributeLayers'], frames['PatchLayers'], LayerEffects, blocks),
            row('paths into heads', *direct, PathEffects, arrays),
        ],
    )
    print_table('How much faster', [{'what': name, 'times': exact / fast} for name, (fast, exact) in times.items()])


if __name__ == '__main__':
    typer.run(main)
