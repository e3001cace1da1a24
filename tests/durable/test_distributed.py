"""Many workers on one folder: their result, and what happens when units fail or workers die."""

import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import inside
import pandas as pd
import pytest
from toys import frame_of, pairs, toy_cross_encoder
from typer.testing import CliRunner

from pyterrier_mech import Distributed, PatchHeads, Resumable
from pyterrier_mech.cli import app
from pyterrier_mech.durable import FailedUnitsError
from pyterrier_mech.tables import read_frame

pytestmark = pytest.mark.filterwarnings('ignore:.*cannot be patched')


def equal(res, expected):
    pd.testing.assert_frame_equal(res, expected, check_exact=True)


class Troubled(PatchHeads):
    """Fails at some texts; at others, its process ends, but only once."""

    rowwise = True

    def transform(self, inp):
        for text in inp['text']:
            if 'poison' in text:
                raise ValueError('poisoned')
            if 'marker' in text and not os.path.exists(file := text.split()[-1]):
                open(file, 'w').close()
                os._exit(7)
        return super().transform(inp)


def test_processes_give_what_one_gives_and_poison_fails_alone(tmp_path):
    inp, model = pairs(16), toy_cross_encoder()
    inp.loc[9, 'text'] = 'Bread keeps poison'
    inp.loc[1, 'text'] = f'Bread keeps marker {tmp_path / "marker"}'
    good = inp.drop(index=[8, 9, 10, 11])
    stage = Distributed(Troubled(model), tmp_path / 'units', rows=4, workers=1)
    with pytest.raises(FailedUnitsError, match=r'1 units of 4 rows failed 3 times.*Queries: 2. .*poisoned') as raised:
        stage(inp)
    assert raised.value.qids == ['2'] and (tmp_path / 'marker').exists()
    assert stage.status(inp).done == 12
    equal(stage(good), Resumable(Troubled(model), tmp_path / 'alone', rows=4)(good))


class Engine:
    """Two workers that answer at once."""

    size = 2
    died = (EOFError,)

    def __init__(self, *_):
        self.asked, self.dead, self.restarted = Counter(), set(), 0

    def submit(self, worker, frame, digests):
        text, future = frame['text'].iloc[0], Future()
        if worker in self.dead:
            future.set_exception(EOFError())
            return future
        self.asked[text] += 1
        if 'kill' in text:
            self.dead.add(worker)
            future.set_exception(EOFError('gone'))
        elif 'poison' in text:
            future.set_exception(ValueError('bad'))
        else:
            future.set_result(text)
        return future

    def restart(self, worker):
        self.dead.remove(worker)
        self.restarted += 1

    def close(self):
        self.closed = True


def test_who_is_next_to_a_unit_that_kills_is_not_blamed():
    texts = ['a', 'kill', 'b', 'c', 'poison', 'd', 'kill too', 'e', 'f']
    inp = pd.DataFrame({'qid': '1', 'docno': texts, 'query': 'q', 'text': texts})
    rows, engine = inside.Rows.of(toy_cross_encoder(), inp), Engine()
    jobs = [inside.resumable.Job(number, unit) for number, unit in enumerate(rows.units(1))]
    found = {job.number: (name, error) for job, name, error in inside.distributed._dispatched(jobs, rows, engine)}
    bad = {number for number, (_, error) in found.items() if error is not None}
    assert bad == {1, 4, 6} and len(found) == 9 and engine.restarted == 6
    assert all(engine.asked[text] == (3 if number in bad else 1) for number, text in enumerate(texts))


@pytest.mark.parametrize('error', [inside.WorkerError('other weights'), OSError('full')])
def test_what_is_no_fault_of_a_unit_ends_the_run(error, monkeypatch, tmp_path):
    class Failing(Engine):
        def submit(self, *_):
            engines.append(self)
            future = Future()
            future.set_exception(error)
            return future

    engines = []
    monkeypatch.setitem(inside.ENGINES, 'processes', Failing)
    with pytest.raises(type(error), match=str(error)):
        Distributed(toy_cross_encoder(), tmp_path)(frame_of(2))
    assert engines[0].closed


def test_a_worker_with_other_weights_computes_nothing(tmp_path):
    stage, other = (inside.Store(tmp_path, inside.stage_digest(toy_cross_encoder(seed=seed))) for seed in (0, 1))
    worker = inside.Worker(pickle.dumps((toy_cross_encoder(), other)))
    with pytest.raises(inside.WorkerError, match='gives other numbers in a worker'):
        worker.compute(frame_of(1), [b''])
    with pytest.raises(inside.WorkerError, match='a worker cannot load the stage: UnpicklingError'):
        inside.Worker(b'nothing').compute(frame_of(1), [b''])
    assert not list(tmp_path.iterdir()) and stage.stage != other.stage


@pytest.mark.parametrize('settings', [{'workers': 0}, {'gpus_per_worker': -1}, {'engine': 'threads'}])
def test_settings_are_checked(settings, tmp_path):
    with pytest.raises(ValueError, match=f'{next(iter(settings))} must be'):
        Distributed(toy_cross_encoder(), tmp_path, **settings)


def test_ray_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r'pip install pyterrier-mech\[ray\]'):
        Distributed(toy_cross_encoder(), tmp_path, engine='ray')(frame_of(2))


# -- in processes of their own

RUN = """
import sys
import pandas as pd
from toys import pairs, toy_cross_encoder
from pyterrier_mech import Distributed, PatchHeads, Resumable

def main(engine, folder):
    if engine == 'ray':
        import ray
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    stage = PatchHeads(toy_cross_encoder())
    res = Distributed(stage, folder, rows=2, engine=engine, workers=2)(pairs(16))
    pd.testing.assert_frame_equal(res, Resumable(stage, folder + '-alone', rows=2)(pairs(16)), check_exact=True)
    print('equal')

if __name__ == '__main__':
    main(*sys.argv[1:])
"""


def started(engine, tmp_path):
    script = tmp_path / 'run.py'
    script.write_text(RUN)
    here = {'PYTHONPATH': os.pathsep.join(sys.path), 'RAY_AUTH_MODE': 'disabled'}
    command = [sys.executable, '-W', 'ignore', str(script), engine, str(tmp_path / 'units')]
    return subprocess.Popen(command, env={**os.environ, **here}, stdout=subprocess.PIPE, text=True)


def alive(pid):
    """Whether a process runs; one that nobody has asked for its end does not."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='children are found by /proc')
def test_killed_in_the_middle_its_workers_end_too(tmp_path):
    driver = started('processes', tmp_path)
    while not list(tmp_path.glob('units/*.parquet')):
        assert driver.poll() is None
        time.sleep(0.02)
    tasks = Path(f'/proc/{driver.pid}/task').glob('*/children')
    children = {pid for task in tasks for pid in task.read_text().split()}
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert len(children) >= 2
    for _ in range(3000):
        if not any(map(alive, children)):
            break
        time.sleep(0.02)
    assert not any(map(alive, children)), 'workers outlive the process that gave them work'
    stage = Resumable(PatchHeads(toy_cross_encoder()), tmp_path / 'units', rows=2)
    assert stage.status(pairs(16)).done >= 2
    equal(stage(pairs(16)), Resumable(stage.stage, tmp_path / 'alone', rows=2)(pairs(16)))


@pytest.mark.skipif(importlib.util.find_spec('ray') is None, reason='Ray is not installed')
def test_actors_of_ray_give_what_one_process_gives(tmp_path):
    assert started('ray', tmp_path).communicate()[0].endswith('equal\n')


# -- the command line

PIPELINE = """
from toys import frame_of, toy_cross_encoder
from pyterrier_mech import PatchHeads, Perturb

model = toy_cross_encoder()
pipeline = model >> Perturb(lambda query, text: f'{text} bread') >> PatchHeads(model)
topics = frame_of(12)
"""


@pytest.fixture
def run(tmp_path):
    file = tmp_path / 'pipeline.py'
    file.write_text(PIPELINE)

    def call(*options, code=0):
        result = CliRunner().invoke(
            app, ['run', str(file), '--out', str(tmp_path / 'effects'), '--rows', '4', *options]
        )
        assert result.exit_code == code, result.output
        return result.output

    return call


def test_the_command_line_runs_a_file_and_shares_it(run, tmp_path):
    file = tmp_path / 'effects' / 'result.parquet'
    # The first stage, then the second one; who comes last goes on to the end.
    assert '8 rows of others are missing' in run('--shard', '0/3')
    assert '4 rows of others are missing' in run('--shard', '1/3')
    assert '8 rows of others are missing' in run('--shard', '2/3')
    assert '4 rows of others are missing' in run('--shard', '0/3') and not file.exists()
    assert '12 rows in' in run('--shard', '1/3')
    shared = read_frame(file)
    file.unlink()
    run()
    equal(read_frame(file), shared)
    spaces = {}
    exec(PIPELINE, spaces)
    pd.testing.assert_frame_equal(spaces['pipeline'](spaces['topics']), shared)


def test_what_the_command_line_cannot_run_is_said(run, tmp_path):
    for shard in ('3', '2/2', 'a/b', '-1/2'):
        assert 'a shard must be I/N' in ' '.join(run('--shard', shard, code=2).split())
    (tmp_path / 'pipeline.py').write_text('topics = 3')
    assert 'pipeline=NoneType' in run(code=2)
    (tmp_path / 'pipeline.py').unlink()
    assert 'There is no file' in run(code=2)
