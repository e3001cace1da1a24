"""Killed at any moment, a run goes on where it was; and what others leave in the folder is not trusted."""

import errno
import os
import random
import signal
import time
import traceback
from pathlib import Path

import inside
import pandas as pd
import pytest
from toys import frame_of, pairs, toy_cross_encoder, toy_module, wordpiece_tokenizer

from pyterrier_mech import AttributeNeurons, CrossEncoder, PatchHeads, PatchLayers, Resumable

pytestmark = [
    pytest.mark.skipif(not hasattr(os, 'fork'), reason='processes are forked'),
    pytest.mark.filterwarnings('ignore:.*cannot be patched'),
]
KILLED = 9


def equal(res, expected):
    pd.testing.assert_frame_equal(res, expected, check_exact=True)


def forked(work):
    """The number of a process that does some work."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended(child):
    return os.waitpid(child, 0)[1]


class Written:
    """A file whose `write` is another."""

    def __init__(self, file, write):
        self.file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


class Clock:
    """Ends the process at the n-th moment."""

    def __init__(self, n):
        self.left = n

    def tick(self):
        self.left -= 1
        if not self.left:
            os._exit(KILLED)

    def around(self, function):
        def call(*args, **settings):
            self.tick()
            result = function(*args, **settings)
            self.tick()
            return result

        return call

    def opened(self, function):
        def call(*args, **settings):
            file = function(*args, **settings)
            if args[1:] == ('xb',):
                write = file.write
                self.tick()

                def halves(content):
                    write(content[: len(content) // 2])
                    file.flush()
                    self.tick()
                    write(content[len(content) // 2 :])
                    file.flush()
                    self.tick()

                return Written(file, halves)
            return file

        return call


def ending_at(n, stage, inp):
    """Runs a stage in a process that ends at the n-th moment around a write, fsync or rename."""

    def work():
        clock = Clock(n)
        os.fsync = clock.around(os.fsync)
        Path.replace = clock.around(Path.replace)
        Path.open = clock.opened(Path.open)
        stage(inp)

    return os.waitstatus_to_exitcode(ended(forked(work)))


def test_a_process_that_ends_around_any_write_loses_one_unit_at_most(tmp_path):
    inp, n = pairs(8), 1
    whole = Resumable(PatchHeads(toy_cross_encoder()), tmp_path / 'whole', rows=4)
    expected = whole(inp)
    names = {file.name for file in (tmp_path / 'whole').iterdir()}
    done = []
    while True:
        stage = Resumable(PatchHeads(toy_cross_encoder()), tmp_path / str(n), rows=4)
        code = ending_at(n, stage, inp)
        if code == 0:
            break
        assert code == KILLED
        done.append(stage.status(inp).done)
        equal(stage(inp), expected)
        left = {file.name for file in stage.folder.iterdir()}
        assert names <= left and all(name.endswith('.new') for name in left - names)
        n += 1
    # Two units, each with three moments of a write, and two around each fsync and rename.
    assert len(done) == 18 and done == sorted(done) and set(done) == {0, 4, 8}


@pytest.mark.parametrize(
    'make, inp', [(PatchHeads, pairs), (AttributeNeurons, frame_of), (PatchLayers, pairs)], ids=lambda one: one.__name__
)
def test_killed_at_random_moments_and_run_again(make, inp, tmp_path):
    frame, moments = inp(12), random.Random(make.__name__)
    start = time.perf_counter()
    expected = Resumable(make(toy_cross_encoder()), tmp_path / 'whole', rows=2)(frame)
    seconds = time.perf_counter() - start
    stage = Resumable(make(toy_cross_encoder()), tmp_path / 'killed', rows=2)
    for _ in range(4):
        child = forked(lambda: stage(frame))
        time.sleep(moments.random() * seconds)
        os.kill(child, signal.SIGKILL)
        ended(child)
    equal(stage(frame), expected)


def test_several_processes_on_one_folder_at_once(tmp_path):
    inp, model = pairs(8), toy_cross_encoder()
    expected = Resumable(PatchHeads(model), tmp_path / 'alone', rows=2)(inp)
    stage = Resumable(PatchHeads(model), tmp_path / 'shared', rows=2)
    other = Resumable(PatchHeads(toy_cross_encoder(seed=1)), tmp_path / 'shared', rows=2)
    children = [forked(lambda run=run: run(inp)) for run in (stage, stage, other)]
    equal(stage(inp), expected)
    assert [ended(child) for child in children] == [0, 0, 0]
    equal(stage(inp), expected)
    equal(other(inp), Resumable(other.stage, tmp_path / 'other', rows=2)(inp))
    names = {file.name for name in ('alone', 'other') for file in (tmp_path / name).iterdir()}
    assert {file.name for file in (tmp_path / 'shared').iterdir()} == names


def test_other_weights_under_the_same_name_are_computed_anew(tmp_path):
    folder, inp = tmp_path / 'model', pairs(4)
    wordpiece_tokenizer().save_pretrained(folder)
    found = []
    for seed in (0, 1, 0):
        toy_module('bert', seed=seed)[0].save_pretrained(folder)
        stage = PatchHeads(CrossEncoder(str(folder), dtype='float64'))
        found.append(Resumable(stage, tmp_path / 'effects')(inp))
        pd.testing.assert_frame_equal(found[-1], stage(inp))
    equal(found[2], found[0])
    assert not found[0].equals(found[1])
    assert len(list((tmp_path / 'effects').iterdir())) == 2
    # The same weights at another place are the same, and the frame says where they are now.
    (tmp_path / 'model').rename(tmp_path / 'moved')
    stage = PatchHeads(CrossEncoder(str(tmp_path / 'moved'), dtype='float64'))
    res = Resumable(stage, tmp_path / 'effects')(inp)
    assert len(list((tmp_path / 'effects').iterdir())) == 2
    equal(res, stage(inp)[res.columns].assign(**found[0][[c for c in res if c.startswith('L')]]))


# -- what is in the folder


def half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zeros(file):
    content = file.read_bytes()
    file.write_bytes(content[:100] + bytes(len(content) - 200) + content[-100:])


def foreign(file):
    pd.DataFrame({'qid': ['1'], 'row': [b'0' * 16]}).to_parquet(file)


def swapped(file):
    other = next(path for path in file.parent.glob('*.parquet') if path != file)
    file.write_bytes(other.read_bytes())


@pytest.mark.parametrize('damage', [half, zeros, foreign, swapped, lambda file: file.write_bytes(b'')])
def test_a_file_that_is_not_what_it_says_is_named_and_computed_again(damage, tmp_path, caplog):
    inp, stage = pairs(8), Resumable(PatchHeads(toy_cross_encoder()), tmp_path, rows=4)
    expected = stage(inp)
    file = sorted(tmp_path.glob('*.parquet'))[0]
    whole = file.read_bytes()
    damage(file)
    equal(stage(inp), expected)
    assert str(file) in caplog.text and 'computed again' in caplog.text
    assert len(file.read_bytes()) == pytest.approx(len(whole), abs=100)
    caplog.clear()
    damage(file)
    # Rows that are looked up in the files of other units.
    close_to = stage(inp.iloc[2:6])
    assert str(file) in caplog.text
    pd.testing.assert_frame_equal(close_to, expected.iloc[2:6], check_exact=False)


def test_files_of_others_stay(tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    (tmp_path / 'result.parquet').write_text('mine too')
    stage = Resumable(toy_cross_encoder(), tmp_path)
    stage(frame_of(4))
    old, new = tmp_path / '.0.new', tmp_path / '.1.new'
    for file in (old, new):
        file.write_text('')
    os.utime(old, (0, 0))
    stage(frame_of(8))
    assert not old.exists() and new.exists()
    stage.clear()
    assert {file.name for file in tmp_path.iterdir()} == {'notes.txt', 'result.parquet', '.1.new'}


# -- folders that cannot be written to


def test_a_full_disk_is_said_and_loses_nothing(tmp_path, monkeypatch):
    inp, stage = pairs(8), Resumable(PatchHeads(toy_cross_encoder()), tmp_path, rows=4)
    sync, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) == 3:  # of the second unit; each has its file and its folder
            raise OSError(errno.ENOSPC, 'No space left on device')
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', full)
        with pytest.raises(OSError, match='No space left on device.*what was finished is stored') as raised:
            stage(inp)
    assert raised.value.errno == errno.ENOSPC and str(tmp_path) in str(raised.value)
    assert stage.status(inp).done == 4 and len(list(tmp_path.iterdir())) == 1
    equal(stage(inp), Resumable(PatchHeads(toy_cross_encoder()), tmp_path / 'whole', rows=4)(inp))


def test_a_folder_that_is_read_only_is_read(tmp_path, monkeypatch):
    inp, stage = pairs(4), Resumable(PatchHeads(toy_cross_encoder()), tmp_path)
    expected = stage(inp)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, 'Permission denied')

    monkeypatch.setattr(Path, 'touch', refuse)
    equal(stage(inp), expected)
    monkeypatch.setattr(inside.resumable, 'computed', None)
    with pytest.raises(PermissionError, match='Permission denied.*nothing was computed.*Make room'):
        stage(pairs(8))


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / 'file').write_text('')
    for folder in ('file', 'file/below'):
        with pytest.raises(OSError, match='file'):
            Resumable(toy_cross_encoder(), tmp_path / folder)(frame_of(2))
