"""A heat map of attention heads from your own PISA or Terrier index and a cross-encoder or bi-encoder.

python examples/heat_map.py --index my-index.pisa --dataset irds:msmarco-passage/trec-dl-2019/judged --out heads.png
"""

import argparse
from pathlib import Path

import pyterrier as pt

from pyterrier_mech import LNC1, TDC, TFC1, TFC2, BiEncoder, CrossEncoder, HeadEffects, PatchHeads, Perturb, plot

AXIOMS = {axiom.__name__: axiom for axiom in (TDC, TFC1, TFC2, LNC1)}


def arguments(parser):
    parser.add_argument('--index', required=True, help='folder of a PISA or Terrier index')
    parser.add_argument('--dataset', required=True, help='PyTerrier dataset with the topics, e.g. irds:…, mech:lab')
    parser.add_argument('--variant', help="variant of the topics, where the dataset has several, e.g. 'title'")
    parser.add_argument('--model', default='cross-encoder/ms-marco-MiniLM-L6-v2', help='hub name or folder')
    parser.add_argument('--bi', action='store_true', help='the model is a bi-encoder')
    parser.add_argument('--text', choices=['dataset', 'index'], default='dataset', help='where the texts come from')
    parser.add_argument('--axiom', choices=AXIOMS, default='TDC', help='what is added to each text')
    parser.add_argument('--topics', type=int, default=20, help='number of topics')
    parser.add_argument('--cutoff', type=int, default=10, help='documents a topic')
    parser.add_argument('--filler', default='a', help="token in the place of added ones, or 'mask'")
    parser.add_argument('--out', default='heads.png', help='figure: .png, .pdf or .svg')
    options = parser.parse_args()
    for name in ('topics', 'cutoff'):
        if getattr(options, name) < 1:
            parser.error(f'--{name} must be 1 or more, not {getattr(options, name)}')
    return options


def open_index(folder):
    if (folder / 'data.properties').exists():
        return pt.terrier.TerrierIndex(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f'there is no folder {str(folder)!r}: give a PISA or Terrier index to --index')
    return pt.Artifact.load(str(folder))


def load_topics(dataset, variant):
    topics = dataset.get_topics(variant) if variant else dataset.get_topics()
    if 'query' not in topics.columns:
        raise ValueError(f'the topics have no query, only {list(topics.columns)}: choose one of them with --variant')
    return topics


def load_texts(source):
    if not hasattr(source, 'text_loader'):
        raise ValueError(f'{type(source).__name__} holds no texts: choose the other with --text')
    return source.text_loader()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options = arguments(parser)
    try:
        index = open_index(Path(options.index))
        dataset = pt.get_dataset(options.dataset)
        topics = load_topics(dataset, options.variant).head(options.topics)
        text = load_texts(index if options.text == 'index' else dataset)
        model = (BiEncoder if options.bi else CrossEncoder)(options.model, verbose=True)
        model.maker  # loads weights, settings and tokenizer now, so that what is wrong is found before any work
    except (OSError, ValueError, KeyError) as error:
        parser.exit(2, f'{parser.prog}: error: {error.args[-1]}\n')
    edit = Perturb(AXIOMS[options.axiom](index))
    res = (index.bm25() % options.cutoff >> text >> edit >> PatchHeads(model, filler=options.filler))(topics)

    effects = HeadEffects.from_frame(res)
    print(effects)
    print(effects.strongest(10)[['name', 'ratio', 'ratio_low', 'ratio_high', 'mean', 'n']].to_string(index=False))
    plot.heads(effects, title=f'{options.axiom}, {Path(options.model).name}').savefig(options.out, dpi=200)
    print(f'Wrote {options.out}')


if __name__ == '__main__':
    main()
