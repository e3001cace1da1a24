"""What is lost when a run is killed, and what keeping its work costs.

python examples/benchmarks/durability.py --kills 100 --rows 1000000
"""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import typer
from common import assets, load_model, load_pairs, print_table, seconds
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from pyterrier_mech import AttributeNeurons, CrossEncoder, PatchHeads, PatchLayers, Resumable
from pyterrier_mech.durable import resumable
from pyterrier_mech.durable.rows import Rows, computed

STAGES = {'PatchHeads': PatchHeads, 'AttributeNeurons': AttributeNeurons, 'PatchLayers': PatchLayers}


def toy() -> CrossEncoder:
    """Two layers of random weights: units take milliseconds, so that kills hit the writing."""
    tokenizer = AutoTokenizer.from_pretrained(assets() / 'models' / 'ce-minilm-l6')
    sizes = {'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 4, 'intermediate_size': 48}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_labels=1, **sizes)).eval()
    return CrossEncoder(module, tokenizer=tokenizer)


def model_of(name: str) -> CrossEncoder:
    return toy() if name == 'toy' else load_model(name, 'cpu')


@contextmanager
def computing(function):
    """Puts another function in the place of the one that computes a unit."""
    resumable.computed = function
    try:
        yield
    finally:
        resumable.computed = computed


def work(model: str, stage: str, folder: str, pairs: pd.DataFrame, size: int, threads: int, ready, log: str) -> None:
    """What is killed: a process of its own, which says when its model is loaded, and what it begins."""
    torch.set_num_threads(threads)
    run = Resumable(STAGES[stage](model_of(model)), folder, rows=size)
    run.status(pairs)
    begun = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noted(of, unit):
        os.write(begun, f'{len(unit)}\n'.encode())
        return computed(of, unit)

    ready.set()
    with computing(noted):
        run(pairs)


def killed(model: str, stage: str, pairs: pd.DataFrame, size: int, kills: int, seed: int) -> dict:
    """A row of the table: runs that are killed at a random moment, each resumed here and compared."""
    context, draw = multiprocessing.get_context('spawn'), random.Random(f'{model} {stage} {seed}')
    equal, again, interrupted = 0, [], 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Resumable(STAGES[stage](model_of(model)), f'{folder}/whole', rows=size)
        whole.status(pairs)
        start = time.perf_counter()
        expected = whole(pairs)
        length = time.perf_counter() - start
        for kill in range(kills):
            run, log = Resumable(whole.stage, f'{folder}/{kill}', rows=size), Path(folder) / 'log'
            ready = context.Event()
            there = model, stage, str(run.folder), pairs, size, torch.get_num_threads(), ready, str(log)
            process = context.Process(target=work, args=there)
            process.start()
            ready.wait()
            time.sleep(draw.random() * length)
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            interrupted += process.exitcode == -signal.SIGKILL
            begun = sum(map(int, log.read_text().split())) if log.exists() else 0
            again.append(begun - run.status(pairs).done)
            equal += same(run(pairs), expected)
            shutil.rmtree(run.folder)
            log.unlink(missing_ok=True)
    return {
        'model': model,
        'stage': stage,
        'rows': len(pairs),
        'a unit': size,
        'kills': kills,
        'in the middle': interrupted,
        'equal to the bit': equal,
        'rows computed again': f'{statistics.mean(again):.1f}, at most {max(again)}',
    }


def same(res: pd.DataFrame, expected: pd.DataFrame) -> bool:
    try:
        pd.testing.assert_frame_equal(res, expected, check_exact=True)
    except AssertionError as error:
        print(error, file=sys.stderr)
        return False
    return True


def overhead(pairs: pd.DataFrame, size: int, repeats: int) -> list[dict]:
    """Computing without a folder, unit by unit, against what a folder adds; and reading a finished one."""
    stage = PatchHeads(load_model('ce-minilm-l6', 'cpu'))
    plain, kept, again = [], [], []
    stage(pairs.iloc[:2])
    # Runs that take turns would show the noise of the machine: the parts of one run are taken apart.
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            run, inside = Resumable(stage, folder, rows=size), []

            def timed(of, unit, inside=inside):
                start = time.perf_counter()
                res = computed(of, unit)
                inside.append(time.perf_counter() - start)
                return res

            with computing(timed):
                whole = seconds(lambda run=run: run(pairs))
            plain.append(sum(inside))
            kept.append(whole)
            again.append(seconds(lambda run=run: run(pairs)))
    ratio = statistics.median(k / p - 1 for k, p in zip(kept, plain, strict=True))
    return [
        {
            'rows': len(pairs),
            'a unit': size,
            'computing, s': f'{statistics.median(plain):.2f}',
            'with a folder, s': f'{statistics.median(kept):.2f}',
            'overhead': f'{100 * ratio:.2f} %',
            'second run, s': f'{statistics.median(again):.3f}',
            'second run is faster by': f'{statistics.median(k / a for k, a in zip(kept, again, strict=True)):.0f}x',
        }
    ]


def filled(run: Resumable, frame: pd.DataFrame) -> None:
    """Stores invented effects, 72 a row, in the place of computed ones."""
    draw, heads = np.random.default_rng(0), [unit.name for unit in run.stage.chosen('heads')]
    first = computed(run.stage, Rows.of(run.stage, frame.iloc[:1]).frame)

    def invented(_, unit):
        effects = draw.normal(size=(len(unit), len(heads))).astype(np.float32)
        res = pd.DataFrame(effects, columns=heads).assign(**first.drop(columns=heads).iloc[0])
        return res[first.columns].astype(first.dtypes)

    with computing(invented):
        run.work(frame)


def read(folder: str, name: str, compact: bool, queue) -> None:
    """Lists and reads in a process of its own, whose peak of memory is that of this alone."""
    frame = pd.read_parquet(name)
    run = Resumable(PatchHeads(load_model('ce-minilm-l6', 'cpu')), folder)
    if compact:
        run.compact()
    run.status(frame.iloc[:1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    status = seconds(lambda: run.status(frame))
    start = time.perf_counter()
    res = run(frame)
    took = time.perf_counter() - start
    queue.put(
        {
            'rows': len(res),
            'files': len(list(Path(folder).glob('*.parquet'))),
            'listed, s': f'{status:.1f}',
            'read, s': f'{took:.1f}',
            'frame, MiB': f'{res.memory_usage(index=True, deep=False).sum() / 2**20:.0f}',
            'peak above start, MiB': f'{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before:.0f}',
        }
    )


def listed(count: int) -> list[dict]:
    """A folder of many rows: listed and read as it is, and after `compact`."""
    context, table = multiprocessing.get_context('spawn'), []
    with tempfile.TemporaryDirectory() as folder:
        pair = load_pairs(1)
        frame = pd.concat([pair] * count, ignore_index=True)
        frame = frame.assign(qid=[str(i // 10) for i in range(count)], docno=[str(i) for i in range(count)])
        frame['text'] = [f'bread {i} rust' for i in range(count)]
        frame['text_0'] = [f'bread {i}' for i in range(count)]
        name = f'{folder}/frame.parquet'
        frame.to_parquet(name)
        filled(Resumable(PatchHeads(load_model('ce-minilm-l6', 'cpu')), f'{folder}/units'), frame)
        for compact in (False, True):
            queue = context.Queue()
            process = context.Process(target=read, args=(f'{folder}/units', name, compact, queue))
            process.start()
            table.append(queue.get())
            process.join()
    return table


def main(
    kills: int = 100, pairs: int = 64, size: int = 8, repeats: int = 3, rows: int = 1_000_000, measured: int = 512
):
    """Prints three tables: kills, overhead, many rows."""
    contestants = [(model, stage) for model in ('ce-minilm-l6', 'toy') for stage in STAGES]
    frame, table = load_pairs(pairs), []
    for number, (model, stage) in enumerate(contestants):
        n = kills // len(contestants) + (number < kills % len(contestants))
        table.append(killed(model, stage, frame, size, n, seed=number))
    print_table('Killed at random moments and run again', table)
    print_table('What a folder costs PatchHeads', overhead(load_pairs(measured), 256, repeats))
    print_table('Many rows', listed(rows))


if __name__ == '__main__':
    typer.run(main)
