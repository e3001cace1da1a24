"""Saved folders: other people's files, killed and rival writers, long names, NumPy's numbers, damaged files."""

import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest
from inside import read_meta, write_atomic

from pyterrier_mech.results import Circuit, HeadEffects, NeuronEffects


def circuit(name='L0H1', **settings):
    return Circuit.of_tables(pd.DataFrame({'name': [name]}), settings=settings)


def neurons():
    frame = pd.DataFrame({'qid': ['1', '2'], 'docno': 'd', 'completeness_error.neurons': 0.0})
    frame['neurons'] = [np.ones((1, 3)), np.zeros((1, 3))]
    return NeuronEffects.from_frame(frame, pd.DataFrame({'qid': ['1', '2'], 'docno': 'd', 'label': [1, 0]}))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# -- what else stands in the folder


@pytest.mark.parametrize('where', ['heads.pdf', 'figures/heads.pdf', '.notes', 'neurons.parquet.bak'])
def test_files_of_the_user_are_never_deleted(tmp_path, where):
    saved = circuit().save(tmp_path / 'c')
    (tmp_path / 'c' / where).parent.mkdir(exist_ok=True)
    (tmp_path / 'c' / where).write_text('a figure')
    with pytest.raises(FileExistsError, match=f'would delete them: {where}. Move them'):
        circuit('L1H1').save(tmp_path / 'c', overwrite=True)
    assert (tmp_path / 'c' / where).read_text() == 'a figure' and Circuit.load(tmp_path / 'c') == saved
    (tmp_path / 'c' / where).unlink()
    circuit('L1H1').save(tmp_path / 'c', overwrite=True)
    assert Circuit.load(tmp_path / 'c') == circuit('L1H1') and names(tmp_path) == ['c']


def test_what_appeared_meanwhile_is_spared_too(tmp_path):
    one = circuit()
    tables = dict(one._tables)

    class Late(dict):
        def __getitem__(self, name):
            (tmp_path / 'c').mkdir(exist_ok=True)
            (tmp_path / 'c' / 'thesis.tex').write_text('three years')
            return tables[name]

    one._tables = Late()
    for overwrite, message in ((False, 'already exists'), (True, 'holds no saved Circuit')):
        with pytest.raises(FileExistsError, match=message):
            one.save(tmp_path / 'c', overwrite=overwrite)
    assert names(tmp_path) == ['c'] and names(tmp_path / 'c') == ['thesis.tex']


# -- writers that die, and writers that race

KILLED = """
import os, pathlib, signal, sys
import pandas as pd
from pyterrier_mech import Circuit

rename = pathlib.Path.rename

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def save(path, moment):
    Circuit.from_units(['L0H1']).save(path)
    if moment == 'writing':
        pd.DataFrame.to_parquet = die
    elif moment == 'between the renames':
        pathlib.Path.rename = lambda self, to: die() if to == path else rename(self, to)
    else:
        pathlib.Path.rename = lambda self, to: die(rename(self, to)) if to == path else rename(self, to)
    Circuit.from_units(['L5H5']).save(path, overwrite=True)

for moment in sys.argv[2:]:
    child = os.fork()
    if not child:
        save(pathlib.Path(sys.argv[1], moment, 'c'), moment)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""
MOMENTS = ['writing', 'between the renames', 'after']


def test_what_a_killed_writer_leaves_is_cleared_by_the_next(tmp_path):
    subprocess.run([sys.executable, '-c', KILLED, str(tmp_path), *MOMENTS], env=os.environ, check=True, timeout=200)
    for moment in MOMENTS:
        folder, kept = tmp_path / moment, Circuit.from_units(['L5H5' if moment == 'after' else 'L0H1'])
        assert any(name.startswith('.') for name in names(folder))
        # Nothing is lost and nothing is left: the folder is the old one, or the new one where it was complete.
        if moment == 'between the renames':
            assert Circuit.load(folder / 'c') == kept
        with pytest.raises(FileExistsError, match='already exists'):
            circuit('L2H2').save(folder / 'c')
        assert names(folder) == ['c'] and Circuit.load(folder / 'c') == kept


def test_other_hidden_folders_stay(tmp_path):
    for name in ('.git', '.c.new', '.12345678.mech', '.config.mech'):
        (tmp_path / name).mkdir()
    circuit().save(tmp_path / 'c')
    circuit('L1H1').save(tmp_path / 'c', overwrite=True)
    assert names(tmp_path) == sorted(['.12345678.mech', '.c.new', '.config.mech', '.git', 'c'])


def test_a_living_writer_is_not_disturbed(tmp_path):
    started, finish, slow = threading.Event(), threading.Event(), circuit('L1H1')
    tables = dict(slow._tables)

    class Slow(dict):
        def __getitem__(self, name):
            started.set()
            assert finish.wait(20)
            return tables[name]

    slow._tables = Slow()
    errors = []

    def write():
        try:
            slow.save(tmp_path / 'c')
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    assert started.wait(20)
    first = circuit().save(tmp_path / 'c')
    finish.set()
    thread.join(60)
    # The other one was faster: this one says so, and its work is not mixed into the other's.
    assert [type(error) for error in errors] == [FileExistsError] and 'already exists' in str(errors[0])
    assert Circuit.load(tmp_path / 'c') == first and names(tmp_path) == ['c']


def test_two_writers_that_both_overwrite(tmp_path):
    ones = [Circuit.from_units([(i, h) for h in range(3)], qids=[str(i)]) for i in range(3)]
    ones[0].save(tmp_path / 'c')
    errors, mixtures, stop = [], [], time.monotonic() + 1.5

    def write(one):
        one = Circuit.of_tables(one.heads, one.neurons, qids=one.qids)
        while time.monotonic() < stop:
            try:
                one.save(tmp_path / 'c', overwrite=True)
            except Exception as error:
                errors.append(error)

    def read():
        while time.monotonic() < stop:
            try:
                loaded = Circuit.load(tmp_path / 'c')
            except Exception as error:
                errors.append(error)
            else:
                mixtures.extend([] if loaded in ones else [loaded])

    threads = [threading.Thread(target=write, args=[one]) for one in ones[1:]] + [threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not mixtures
    assert not errors
    assert names(tmp_path) == ['c'] and Circuit.load(tmp_path / 'c') in ones[1:]


@pytest.mark.parametrize('length', [200, 211, 255])
def test_long_names(tmp_path, length):
    path = tmp_path / ('c' * length)
    circuit().save(path)
    circuit('L1H1').save(path, overwrite=True)
    assert Circuit.load(path) == circuit('L1H1') and names(tmp_path) == [path.name]


# -- NumPy's numbers


@pytest.mark.parametrize(
    ('given', 'stored'),
    [
        (np.int64(5), 5),
        (np.float32(0.5), 0.5),
        (np.float64(0.25), 0.25),
        (np.bool_(True), True),
        (np.str_('mean'), 'mean'),
        (np.arange(3), [0, 1, 2]),
        ((np.int32(1), {'deep': [np.float16(2)]}), [1, {'deep': [2.0]}]),
        (float('nan'), None),
        (np.float32('nan'), None),
    ],
)
def test_numbers_of_numpy_are_plain_ones(tmp_path, given, stored):
    saved = circuit(k=given).save(tmp_path / 'c')
    text = (tmp_path / 'c' / 'pt_meta.json').read_text()
    assert json.loads(text, parse_constant=pytest.fail)['summary']['settings'] == {'k': stored}
    assert Circuit.load(tmp_path / 'c') == saved


# -- damaged folders

META = {
    'no JSON': '{"type": ',
    'a list': '[1, 2]',
    'nothing': '',
    'no summary': '{"type": "circuit", "format": "mech"}',
    'a summary that is a list': '{"type": "circuit", "format": "mech", "summary": []}',
    'no qids': '{"type": "circuit", "format": "mech", "summary": {"settings": {}}}',
}


@pytest.mark.parametrize('damage', META)
def test_damaged_metadata(tmp_path, damage):
    circuit().save(tmp_path / 'c')
    (tmp_path / 'c' / 'pt_meta.json').write_text(META[damage])
    with pytest.raises(ValueError, match=r'c.pt_meta.json. is damaged'):
        Circuit.load(tmp_path / 'c')


@pytest.mark.parametrize('make', [circuit, neurons])
@pytest.mark.parametrize('damage', ['other columns', 'a column less', 'no Parquet', 'torn', 'gone'])
def test_damaged_tables(tmp_path, make, damage):
    saved = make().save(tmp_path / 'c')
    for name, table in saved._tables.items():
        file = tmp_path / 'c' / f'{name}.parquet'
        content = file.read_bytes()
        if damage == 'other columns':
            pd.DataFrame({'a': [1]}).to_parquet(file)
        elif damage == 'a column less':
            table.iloc[:, 1:].to_parquet(file)
        elif damage == 'gone':
            file.unlink()
        else:
            file.write_bytes(content[: len(content) // 2] if damage == 'torn' else b'PK')
        with pytest.raises(ValueError, match=rf'c.{name}.parquet. is damaged'):
            type(saved).load(tmp_path / 'c')
        file.write_bytes(content)
    assert type(saved).load(tmp_path / 'c') == saved


def test_the_summary_of_head_effects_is_whole(tmp_path):
    (tmp_path / 'e').mkdir()
    (tmp_path / 'e' / 'pt_meta.json').write_text('{"type": "head_effects", "format": "mech", "summary": {"seed": 0}}')
    with pytest.raises(ValueError, match="pt_meta.json. is damaged: its summary has no 'confidence', 'n_resamples', "):
        HeadEffects.load(tmp_path / 'e')
    with pytest.raises(ValueError, match='is damaged'):
        (tmp_path / 'pt_meta.json').write_text('[]')
        read_meta(tmp_path)


# -- single files


@pytest.mark.parametrize('content', ['größer\n', b'\x00\x01', ''])
def test_a_file_appears_whole(tmp_path, content):
    path = tmp_path / 'plan.json'
    for _ in range(2):
        write_atomic(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names(tmp_path) == ['plan.json']


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / ('p' * 255)
    write_atomic(path, 'old')
    monkeypatch.setattr(os, 'fsync', lambda _: (_ for _ in ()).throw(OSError('no space left on device')))
    with pytest.raises(OSError, match='no space'):
        write_atomic(path, 'new')
    assert path.read_text() == 'old' and names(tmp_path) == [path.name]
