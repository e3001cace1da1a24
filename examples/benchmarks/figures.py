"""The figures of the page on effects: where in the text a cross-encoder reacts to TDC, over pairs and in one pair.

PYTERRIER_MECH_ASSETS=… python examples/benchmarks/figures.py --pairs 100 --out pyterrier_mech/pt_docs
"""

import argparse
from pathlib import Path

from common import load_model, split_pairs

from pyterrier_mech import LayerEffects, PatchLayers, plot


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--pairs', type=int, default=100, help='pairs of the train topics')
    parser.add_argument('--out', type=Path, default=Path(), help='folder of the figures')
    options = parser.parse_args()
    model = load_model('ce-minilm-l6', 'cpu', verbose=True)
    frame = split_pairs('train', options.pairs)
    effects = LayerEffects.from_frame(PatchLayers(model)(frame))
    print(effects)
    print(effects.strongest(12)[['name', 'ratio', 'ratio_low', 'ratio_high', 'n', 'n_absent']].to_string(index=False))
    plot.layers(effects).savefig(options.out / 'layers.png', dpi=130)
    short = frame.loc[frame['text'].str.len().sort_values().index[10]].to_frame().T
    row = PatchLayers(model, by='position')(short).iloc[0]
    plot.layers(row, title=f'query: {row["query"]}').savefig(options.out / 'layers_pair.png', dpi=130)


if __name__ == '__main__':
    main()
