"""What the benchmarks share: real pairs, a model of a given size, MechIR, interleaved runs, the GEMM peak."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoTokenizer, ElectraConfig, ElectraForSequenceClassification

from pyterrier_mech import CrossEncoder
from pyterrier_mech.inputs.alignment import Aligner

WORKER = Path(__file__).with_name('mechir_worker.py')


def assets() -> Path:
    folder = Path(os.environ.get('PYTERRIER_MECH_ASSETS', ''))
    if not (folder / 'dl').is_dir():
        raise SystemExit(
            'Set PYTERRIER_MECH_ASSETS to the folder that holds dl/ (passages, topics, pairs) and models/.'
        )
    return folder


def load_model(name: str, device: str, **settings) -> CrossEncoder:
    """A cross-encoder by path or hub name; 'electra-base' is one of that size with random weights."""
    if name != 'electra-base':
        path = assets() / 'models' / name
        return CrossEncoder(str(path) if path.is_dir() else name, device=device, **settings)
    tokenizer = AutoTokenizer.from_pretrained(assets() / 'models' / 'ce-minilm-l6')
    config = ElectraConfig(
        vocab_size=len(tokenizer),
        embedding_size=768,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        num_labels=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = ElectraForSequenceClassification(config).eval().to(device)
    return CrossEncoder(module, tokenizer=tokenizer, **settings)


def load_pairs(count: int, kind: str = 'TDC', seed: int = 0) -> pd.DataFrame:
    """Real pairs: qid, query, docno, text (edited), text_0."""
    folder = assets() / 'dl'
    topics = pd.read_csv(folder / 'topics.tsv', sep='\t', dtype=str)
    docs = pd.read_json(folder / 'docs.jsonl.gz', lines=True, dtype={'docno': str})
    drawn = pd.read_csv(folder / f'pairs_{kind}.tsv', sep='\t', dtype=str)
    drawn = drawn.sample(count, random_state=seed, replace=count > len(drawn))
    frame = drawn.merge(topics, on='qid').merge(docs, on='docno')
    return frame.assign(text_0=frame['text'], text=frame['text'] + ' ' + frame['added'])


def of_split(frame: pd.DataFrame, split: str, count: int, seed: int = 0) -> pd.DataFrame:
    """`count` rows of the topics of a split ('train' or 'dev'), drawn so that all topics have equally many or all."""
    folder = assets() / 'dl'
    topics = pd.read_csv(folder / 'topics.tsv', sep='\t', dtype=str)
    docs = pd.read_json(folder / 'docs.jsonl.gz', lines=True, dtype={'docno': str})
    frame = frame.merge(topics[topics['split'] == split], on='qid').sample(frac=1, random_state=seed)
    turns = frame.groupby('qid').cumcount()
    drawn = frame.loc[turns.sort_values(kind='stable').index[:count]].sort_values(['qid', 'docno'])
    return drawn.merge(docs, on='docno').reset_index(drop=True)


def split_pairs(split: str, count: int, kind: str = 'TDC', seed: int = 0) -> pd.DataFrame:
    """Real pairs of the topics of a split: qid, query, docno, text (edited), text_0."""
    pairs = pd.read_csv(assets() / 'dl' / f'pairs_{kind}.tsv', sep='\t', dtype=str)
    frame = of_split(pairs, split, count, seed)
    return frame.assign(text_0=frame['text'], text=frame['text'] + ' ' + frame['added'])


def load_qrels() -> pd.DataFrame:
    """All judgements: qid, docno, label."""
    return pd.read_csv(assets() / 'dl' / 'qrels.tsv', sep='\t', dtype={'qid': str, 'docno': str, 'label': int})


def align(model, frame):
    """The pairs as token ids of equal length: what every contestant is given."""
    aligner = Aligner(model.maker)
    ids = {name: model.maker.tokenize(list(frame[name])) for name in ('query', 'text_0', 'text')}
    rows = range(len(frame))
    return [
        aligner.align([ids['query'].row(i), ids['text_0'].row(i)], [ids['query'].row(i), ids['text'].row(i)])
        for i in rows
    ]


def inputs_of(pair, side, device, width=None):
    width = width or len(pair)
    fields = {'input_ids': getattr(pair, side), 'token_type_ids': pair.segments, 'attention_mask': pair.original_mask}
    return {
        name: torch.from_numpy(np.pad(values, (0, width - len(values))))[None].to(device)
        for name, values in fields.items()
    }


class MechIR:
    """A worker process with MechIR, one request a line."""

    def __init__(self, python, model_path, device):
        command = [python, str(WORKER), model_path, device]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def patch(self, pairs, width, **options):
        """Seconds and batch-mean effects of pairs padded to `width`; `options` as `patch` of MechIR takes them."""
        fields = {
            name: [getattr(pair, name).tolist() for pair in pairs] for name in ('original', 'perturbed', 'segments')
        }
        self.process.stdin.write(
            json.dumps({'width': width, 'options': {'patch_type': 'head_all', **options}, **fields}) + '\n'
        )
        self.process.stdin.flush()
        line = next(line for line in self.process.stdout if line.startswith('{'))
        return json.loads(line)


def mechir_python(venv: Path | None) -> str:
    folder = venv or Path(tempfile.mkdtemp(prefix='mechir-'))
    python = folder / 'bin' / 'python'
    if not python.exists():
        print(f'making a virtual environment for MechIR 0.2.0 in {folder}', file=sys.stderr)
        subprocess.run([sys.executable, '-m', 'venv', folder], check=True)
        packages = ['mechir==0.2.0', 'transformers<5', f'torch=={torch.__version__.split("+")[0]}']
        subprocess.run([python, '-m', 'pip', 'install', '-q', *packages], check=True)
    return str(python)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def rounds(jobs: dict, repeats: int) -> dict[str, list[float]]:
    """Seconds of each job, round by round. The jobs take turns, so that a slow moment of the machine hits all."""
    for work in jobs.values():
        work()
    times = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, work in jobs.items():
            times[name].append(seconds(work))
    return times


def comparison(times: dict[str, list[float]], items: int) -> list[dict]:
    """One row a contestant, the first is ours: items per second, and the median over rounds of the time ratio."""
    ours = next(iter(times.values()))
    return [
        {
            'contestant': name,
            'pairs/s': f'{items / statistics.median(values):.3g}',
            'ours is faster by': f'{statistics.median(t / o for t, o in zip(values, ours, strict=True)):.2f}x',
        }
        for name, values in times.items()
    ]


def gemm_peak(model: CrossEncoder, device: str, dtype=torch.float32) -> float:
    """The best rate, in FLOP/s, over plain matrix products of the model's own shapes and several batch heights, now.

    The rate of a shape is a median: what can be kept up, not the luckiest moment.
    """
    layer = model.map.layers[0]
    shapes = {tuple(linear.weight.shape) for linear in (layer.attention_out, layer.mlp_in, layer.mlp_out)}
    best = 0.0
    for rows in (512, 1024, 2048, 4096):
        for columns, inner in shapes:
            a = torch.randn(rows, inner, device=device, dtype=dtype)
            b = torch.randn(inner, columns, device=device, dtype=dtype)
            out = torch.empty(rows, columns, device=device, dtype=dtype)
            torch.mm(a, b, out=out)
            times = [seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)) for _ in range(7)]
            best = max(best, 2 * rows * inner * columns / statistics.median(times))
    return best


def print_table(title: str, rows: list[dict]) -> None:
    print(f'\n{title}\n')
    print(pd.DataFrame(rows).to_string(index=False))
