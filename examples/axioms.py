"""Which axioms does a ranker keep? One table over all axioms and plain edits, for neural rankers and for BM25.

python examples/axioms.py --data FOLDER --model cross-encoder/ms-marco-MiniLM-L6-v2 --bi all-MiniLM-L6-v2 --bm25

FOLDER has topics.tsv (qid, query), qrels.tsv (qid, docno, label) and docs.jsonl.gz (docno, text); or give a PyTerrier
dataset with --dataset. BM25 is Terrier's and needs Java.
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd
import pyterrier as pt

from pyterrier_mech import AxiomProfile, BiEncoder, CrossEncoder, all_edits
from pyterrier_mech.perturb import collection_statistics


def arguments(parser):
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('--data', type=Path, help='folder with topics.tsv, qrels.tsv and docs.jsonl.gz')
    source.add_argument('--dataset', help='PyTerrier dataset with topics, judgements and texts, e.g. mech:lab')
    parser.add_argument('--model', action='append', default=[], help='cross-encoder: hub name or folder, any number')
    parser.add_argument('--bi', action='append', default=[], help='bi-encoder: the same')
    parser.add_argument('--bm25', action='store_true', help="Terrier's BM25, with the whole collection behind it")
    parser.add_argument('--encoder', help='bi-encoder that chooses close words for STMC1; without it, no STMC1')
    parser.add_argument('--split', help='topics of this value in a column split only, where topics.tsv has one')
    parser.add_argument('--topics', type=int, default=20, help='number of topics')
    parser.add_argument('--pairs', type=int, default=10, help='judged passages a topic')
    parser.add_argument('--seed', type=int, default=0, help='seed of passages, edits and intervals')
    parser.add_argument('--out', type=Path, help='folder to save the profiles in')
    options = parser.parse_args()
    if not (options.model or options.bi or options.bm25):
        parser.error('there is no ranker: give --model, --bi or --bm25')
    for name in ('topics', 'pairs'):
        if getattr(options, name) < 1:
            parser.error(f'--{name} must be 1 or more, not {getattr(options, name)}')
    return options


def load(options):
    """Returns documents, topics and judgements."""
    if options.dataset:
        dataset = pt.get_dataset(options.dataset)
        return pd.DataFrame(dataset.get_corpus_iter(verbose=False)), dataset.get_topics(), dataset.get_qrels()
    read = {'sep': '\t', 'dtype': str, 'keep_default_na': False}
    docs = pd.read_json(options.data / 'docs.jsonl.gz', lines=True, dtype=str)
    topics = pd.read_csv(options.data / 'topics.tsv', **read)
    return docs, topics, pd.read_csv(options.data / 'qrels.tsv', **read)


def judged_pairs(docs, topics, qrels, options):
    """Returns a sample of the judged passages of a sample of the topics."""
    if options.split:
        topics = topics[topics['split'] == options.split]
    topics = topics[topics['qid'].isin(qrels['qid'])].sort_values('qid')
    topics = topics.sample(min(options.topics, len(topics)), random_state=options.seed)
    rows = qrels.merge(topics[['qid', 'query']], on='qid').merge(docs[['docno', 'text']], on='docno')
    rows = rows.drop_duplicates(['qid', 'docno']).sort_values(['qid', 'docno'])
    rows = rows.sample(frac=1, random_state=options.seed).groupby('qid').head(options.pairs)
    return rows.sort_values(['qid', 'docno'])[['qid', 'docno', 'query', 'text']]


def statistics_of(docs, folder):
    """Returns the statistics of an index, where there is one that stems without Java, else those of the words."""
    try:
        from pyterrier_pisa import PisaIndex
    except ImportError:
        return collection_statistics(docs)
    index = PisaIndex(f'{folder}/pisa', text_field='text')
    index.index(docs[['docno', 'text']].to_dict('records'))
    return collection_statistics(index)


def bm25(docs, folder):
    """Returns BM25 over texts, with the document frequencies and lengths of the whole collection."""
    index = pt.terrier.TerrierIndex(f'{folder}/terrier')
    index.index(docs[['docno', 'text']].to_dict('records'))
    return pt.text.scorer(wmodel='BM25', body_attr='text', background_index=index.index_obj())


def shown(value, low, high):
    return '–' if pd.isna(value) else f'{value:.2f} [{low:.2f}, {high:.2f}]'


def table(profile):
    """Returns the profile as text: score changes in units of its spread."""
    rows = []
    for row in profile.to_frame().to_dict('records'):
        scaled = {name: row[name] / profile.spread for name in row if name.startswith(('change', 'diff'))}
        expected = '' if pd.isna(row['expected']) else f'{row["expected"]:+.0f}'
        rows.append(
            {
                **{'edit': row['axiom'], 'expected': expected, 'n': row['n'], 'unchanged': row['n_unchanged']},
                'kept': shown(row['kept'], row['kept_low'], row['kept_high']),
                'change': shown(scaled['change'], scaled['change_low'], scaled['change_high']),
                'minus control': shown(scaled['difference'], scaled['difference_low'], scaled['difference_high']),
                **{'n control': row['n_control']},
            }
        )
    return pd.DataFrame(rows).to_string(index=False)


def report(name, ranker, pairs, edits, options):
    profile = AxiomProfile.of(ranker, pairs, edits, seed=options.seed)
    spread = f'score changes in standard deviations within a topic ({profile.spread:.3f})'
    print(f'\n{name}: {spread}\n{table(profile)}', flush=True)
    if options.out:
        profile.save(options.out / name, overwrite=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options = arguments(parser)
    docs, topics, qrels = load(options)
    pairs = judged_pairs(docs, topics, qrels, options)
    encoder = BiEncoder(options.encoder) if options.encoder else None
    rankers = {Path(name).name: CrossEncoder(name) for name in options.model}
    rankers |= {Path(name).name: BiEncoder(name) for name in options.bi}
    with tempfile.TemporaryDirectory() as folder:
        edits = all_edits(statistics_of(docs, folder), encoder=encoder, seed=options.seed)
        print(f'{len(pairs)} pairs of {pairs["qid"].nunique()} topics; statistics of {len(docs)} documents', flush=True)
        for name, ranker in rankers.items():
            report(name, ranker, pairs, edits, options)
        if options.bm25:  # last: Java starts here
            report('BM25', bm25(docs, folder), pairs, edits, options)


if __name__ == '__main__':
    main()
