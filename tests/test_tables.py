"""Frames through Parquet: every cell comes back as it was, or is refused with the name of its column."""

import math

import numpy as np
import pandas as pd
import pytest
from toys import frame_of, toy_cross_encoder

from pyterrier_mech import AttributeNeurons, NeuronEffects, read_frame, write_frame

NAN = float('nan')


def cells(*values):
    return pd.Series(list(values), dtype=object)


COLUMNS = {
    'matrices': cells(np.eye(3, dtype=np.float32)[:, :2], None, np.asarray([[NAN, -0.0]], np.float32)),
    'columns first': cells(*(np.asfortranarray(np.arange(6.0).reshape(2, 3)) for _ in range(3))),
    'other dimensions': cells(np.zeros((2, 0, 3)), np.asarray(2.5), np.zeros(0)),
    'vectors': cells(np.asarray([1, NAN], np.float32), np.zeros(0, np.float32), NAN),
    'whole numbers': cells(*(np.asarray([[1, -2]], np.int8) for _ in range(3))),
    'half': cells(*(np.asarray([1.5], np.float16) for _ in range(3))),
    'booleans': cells(np.asarray([True, False]), None, np.zeros((1, 2), bool)),
    'tokens': cells(['[CLS]', 'a'], [], None),
    'lists of numbers': cells([1, 2], [3], []),
    'lists with gaps': cells(['a', None], [None], ['b']),
    'tuples': cells((1.5, 2.0), (), None),
    'strings of objects': cells('yes', None, NAN),
    'floats of objects': cells(1.0, NAN, None),
    'nothing': cells(None, None, None),
    'flags': cells(True, False, None),
    'strings': pd.Series(['a', None, 'c'], dtype='str'),
    'float32': pd.Series([1, NAN, math.inf], dtype='float32'),
    'Int64': pd.array([1, None, 3], dtype='Int64'),
    'categories': pd.Categorical(['x', 'y', None]),
    'times': pd.to_datetime(['2024-01-01', None, '2024-01-03']),
}
INDEXES = {'plain': range(3), 'repeated': [4, 4, 1], 'named': pd.Index(list('xyz'), name='key')}


def same(mine, theirs):
    pd.testing.assert_frame_equal(mine, theirs, check_exact=True)
    for column in theirs:
        for one, other in zip(mine[column], theirs[column], strict=True):
            assert type(one) is type(other), column
            if isinstance(other, np.ndarray):
                assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
                assert one.flags.writeable


@pytest.mark.parametrize('index', INDEXES)
@pytest.mark.parametrize('name', [*COLUMNS, 'all'])
def test_round_trip(name, index, tmp_path):
    frame = pd.DataFrame(COLUMNS if name == 'all' else {name: COLUMNS[name]}).set_index(pd.Index(INDEXES[index]))
    frame.attrs = {'pyterrier_mech.fitted_on': ['1', '2']}
    before = frame.copy(deep=True)
    # Arrow forgets the categories of a column without rows.
    for rows in (
        frame,
        *([] if name == 'categories' else [frame.iloc[:0].drop(columns='categories', errors='ignore')]),
    ):
        write_frame(rows, tmp_path / 'fold=1.parquet')
        read = read_frame(tmp_path / 'fold=1.parquet')
        same(read, rows)
        assert read.attrs == frame.attrs
    same(frame, before)


def test_other_programs_read_it_too(tmp_path):
    write_frame(pd.DataFrame(COLUMNS), str(tmp_path / 'f.parquet'))
    read = pd.read_parquet(tmp_path / 'f.parquet')
    assert list(read) == list(COLUMNS)
    assert list(read['tokens'][0]) == ['[CLS]', 'a'] and read['vectors'][0].tolist()[0] == 1
    assert list(read['matrices'][0]['shape']) == [3, 2] and len(read['matrices'][0]['values']) == 6


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ([{'a': 1}], 'dict'),
        ([['a', 1]], 'list'),
        ([[['a']]], 'list'),
        ([[1], ['a']], 'list of int and list of str'),
        ([[1], (1,)], 'list of int and tuple of int'),
        ([np.asarray(['a'])], 'ndarray'),
        ([np.zeros(1), np.zeros(1, np.float32)], 'array of float64 and array of float32'),
        ([np.zeros(1), 'a'], 'array of float64 and scalar of str'),
        (['a', 1], 'scalar of str and scalar of int'),
        ([1.5, 'a', NAN], 'scalar of float and scalar of str'),
        ([np.float32(1)], 'float32'),
        ([pd.NA], 'NAType'),
        ([2**70], 'too large'),
        (['\ud800'], 'surrogates not allowed'),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name_and_leaves_no_file(values, message, tmp_path):
    with pytest.raises(TypeError, match=f"column 'odd' cannot be stored: it holds .*{message}"):
        write_frame(pd.DataFrame({'qid': '1', 'odd': cells(*values)}), tmp_path / 'f.parquet')
    assert not list(tmp_path.iterdir())


def test_odd_frames_and_files(tmp_path):
    file = tmp_path / 'f.parquet'
    with pytest.raises(ValueError, match="2 columns called 'a'"):
        write_frame(pd.DataFrame([[1, 2]], columns=['a', 'a']), file)
    with pytest.raises(TypeError, match='names of columns must be strings; got 0'):
        write_frame(pd.DataFrame([[1]]), file)
    odd = pd.DataFrame({'a': [1]})
    odd.attrs['model'] = object()
    with pytest.raises(TypeError, match='cannot be written: .*object is not JSON'):
        write_frame(odd, file)
    with pytest.raises(FileNotFoundError, match='Make it with write_frame'):
        read_frame(file)
    write_frame(pd.DataFrame(), file)
    same(read_frame(file), pd.DataFrame())
    pd.DataFrame({'a': [1]}).to_parquet(file)
    with pytest.raises(ValueError, match='not written by write_frame.*pandas.read_parquet'):
        read_frame(file)
    file.write_bytes(b'PAR1 and no more')
    with pytest.raises(ValueError, match='is damaged'):
        read_frame(file)


def test_an_index_with_the_name_of_a_column(tmp_path):
    indexes = [pd.Index([5, 6], name='tokens'), pd.MultiIndex.from_arrays([[5, 6], [7, 8]], names=['n', 'tokens'])]
    for index in indexes:
        frame = pd.DataFrame({'tokens': cells(['a'], ['b', 'c']), 'n': [3, 4]}, index=index)
        write_frame(frame, tmp_path / 'f.parquet')
        same(read_frame(tmp_path / 'f.parquet'), frame)


def test_what_attribution_writes_is_aggregated_alike_after_it(tmp_path):
    res = AttributeNeurons(toy_cross_encoder('bert'), points=5, tolerance=1.0)(frame_of(4))
    write_frame(res, tmp_path / 'neurons.parquet')
    read = read_frame(tmp_path / 'neurons.parquet')
    same(read, res)
    qrels = res[['qid', 'docno']].assign(label=[1, 0, 1, 0])
    assert NeuronEffects.from_frame(read, qrels) == NeuronEffects.from_frame(res, qrels)
