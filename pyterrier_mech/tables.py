"""Frames of results as Parquet files, with all that their cells may hold: arrays of any dimension, lists of strings.

`DataFrame.to_parquet` refuses arrays of two dimensions, such as `neurons` or the attention of a head, and gives lists
back as arrays. What `write_frame` writes is an ordinary Parquet file, which other programs read too: an array of one
dimension is a list there, and one of more is a pair of lists, its values in rows and its shape.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pyterrier_mech.frames import once
from pyterrier_mech.saving import damaged, write_atomic

# Key in the metadata of a file: the version of the format, the attrs of the frame, and what cells of objects were.
_KEY = b'pyterrier_mech'
_FORMAT = 1
_ARRAY, _LIST, _TUPLE, _SCALAR = 'array', 'list', 'tuple', 'scalar'
_PLAIN = (str, bool, int, float, bytes)
_NAN, _OTHER = ('nan', ''), ('other', '')

_Kind = tuple[str, str]


def write_frame(frame: pd.DataFrame, path: str | Path) -> None:
    """Writes a frame to a Parquet file, from which `read_frame` gives it back to the bit.

    A cell may hold what pandas stores by itself, a NumPy array of numbers or booleans, of any shape, a list or tuple of
    strings or of numbers, or None. Index and `attrs` are kept; the categories of a frame without rows are not. The file
    appears when it is complete, and replaces another of its name.

    Args:
        frame: The frame, e.g. of a stage.
        path: The file.

    Raises:
        TypeError: If a column has cells that cannot be stored, or `attrs` hold what JSON does not have.
        ValueError: If two columns have one name.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    once(frame)
    if strange := [name for name in frame.columns if not isinstance(name, str)]:
        raise TypeError(f'the names of columns must be strings; got {strange[0]!r}: rename it')
    objects = [name for name in frame.columns if frame[name].dtype == object]
    notes, columns = {}, {}
    for name in objects:
        notes[name], columns[name] = _stored(name, frame[name].tolist())
    simple = frame.drop(columns=objects)
    simple.attrs = {}
    # An index with the name of a column that is added later would stand there twice.
    index = [name if name in objects else None for name in simple.index.names]
    simple.index = simple.index.set_names([None if name in objects else name for name in simple.index.names])
    try:
        table = pa.Table.from_pandas(simple)
        attrs = json.dumps(frame.attrs)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise TypeError(f'the frame cannot be written: {error}') from error
    for number, name in enumerate(frame.columns):
        if name in columns:
            table = table.add_column(number, name, columns[name])
    meta = json.dumps(
        {'format': _FORMAT, 'columns': list(frame.columns), 'objects': notes, 'attrs': attrs, 'index': index}
    )
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _KEY: meta.encode()})
    file = io.BytesIO()
    pq.write_table(table, file)
    write_atomic(Path(path), file.getvalue())


def read_frame(path: str | Path) -> pd.DataFrame:
    """Reads a frame that `write_frame` has written.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or something else.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'There is no file {str(path)!r}. Make it with write_frame(frame, path).')
    try:
        # A folder named like 'fold=1' is no partition: without this, Arrow adds a column 'fold'.
        table = pq.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from error
    meta = json.loads((table.schema.metadata or {}).get(_KEY, b'{}'))
    if meta.get('format') != _FORMAT:
        raise ValueError(
            f'{str(path)!r} was not written by write_frame of this version (format={meta.get("format")!r}): read it '
            'with pandas.read_parquet'
        )
    notes = meta['objects']
    frame = table.drop_columns(list(notes)).to_pandas()
    cells = {name: _restored(table[name].combine_chunks(), note) for name, note in notes.items()}
    added = {name: pd.Series(values, index=frame.index, dtype=object) for name, values in cells.items()}
    frame = pd.concat([frame, pd.DataFrame(added, index=frame.index)], axis=1)[meta['columns']]
    names = zip(meta.get('index', frame.index.names), frame.index.names, strict=True)
    frame.index = frame.index.set_names([here if name is None else name for name, here in names])
    frame.attrs = json.loads(meta['attrs'])
    return frame


# -- columns of objects


def _stored(name: str, cells: list[Any]) -> tuple[dict[str, Any], Any]:
    """Returns what is noted of the cells of a column, and an Arrow array of them."""
    import pyarrow as pa

    found = [_kind(cell) for cell in cells]
    kinds = dict.fromkeys(kind for kind in found if kind is not None)
    gaps = []
    # NaN among anything but floats is a missing value, another one than None.
    if _NAN in kinds and (_SCALAR, 'float') not in kinds:
        gaps = [row for row, kind in enumerate(found) if kind == _NAN]
        cells = [None if kind == _NAN else cell for cell, kind in zip(cells, found, strict=True)]
    # An empty list is one of strings and of numbers.
    filled = {kind for kind, of in kinds if of}
    several = [(kind, of) for kind, of in kinds if kind != 'nan' and (of or kind not in filled)]
    bad = next((cell for cell, kind in zip(cells, found, strict=True) if kind == _OTHER), None)
    if len(several) > 1 or bad is not None:
        what = f'{type(bad).__name__} {bad!r:.60}' if bad is not None else ' and '.join(map(' of '.join, several))
        raise TypeError(_refusal(name, what))
    kind, of = next(iter(several), (_SCALAR, ''))
    try:
        array = _of_arrays(cells, np.dtype(of)) if kind == _ARRAY else pa.array(cells, from_pandas=False)
    except (pa.ArrowException, OverflowError, UnicodeError) as error:
        raise TypeError(_refusal(name, str(error))) from error
    return {'kind': kind, 'of': of, 'nan': gaps}, array


def _kind(cell: Any) -> _Kind | None:
    """Returns what a cell is, and of which type; None for None."""
    if cell is None:
        return None
    if isinstance(cell, np.ndarray):
        return (_ARRAY, cell.dtype.name) if cell.dtype.kind in 'biuf' and cell.dtype.isnative else _OTHER
    if type(cell) in (list, tuple):
        types = {type(part) for part in cell if part is not None}
        if len(types) > 1 or types - set(_PLAIN):
            return _OTHER
        return type(cell).__name__, next((one.__name__ for one in types), '')
    if type(cell) is float and math.isnan(cell):
        return _NAN
    return (_SCALAR, type(cell).__name__) if type(cell) in _PLAIN else _OTHER


def _refusal(name: str, what: str) -> str:
    return (
        f'column {name!r} cannot be stored: it holds {what}. The cells of a column must all be strings, numbers, NumPy '
        'arrays of numbers of one dtype, or lists of strings or of numbers; change it with frame[column].map(…) or '
        'leave it out with frame.drop(columns=…)'
    )


def _of_arrays(cells: Sequence[np.ndarray | None], dtype: np.dtype[Any]) -> Any:
    """Returns arrays as an Arrow array: lists, or values in rows and shapes where one has not one dimension."""
    import pyarrow as pa

    there = np.asarray([cell is not None for cell in cells])
    flat = [np.zeros(0, dtype) if cell is None else cell.ravel() for cell in cells]
    values = _lists(flat, pa.array(np.concatenate(flat)), there)
    if all(cell is None or cell.ndim == 1 for cell in cells):
        return values
    shapes = [np.zeros(0, np.int64) if cell is None else np.asarray(cell.shape, np.int64) for cell in cells]
    parts = [values, _lists(shapes, pa.array(np.concatenate(shapes)), there)]
    return pa.StructArray.from_arrays(parts, ['values', 'shape'], mask=pa.array(~there))


def _lists(parts: Sequence[np.ndarray], values: Any, there: np.ndarray) -> Any:
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    return pa.LargeListArray.from_arrays(pa.array(offsets), values, mask=pa.array(~there))


def _restored(column: Any, note: dict[str, Any]) -> list[Any]:
    """Returns the cells of a column of a file."""
    if note['kind'] == _ARRAY:
        cells = _to_arrays(column, np.dtype(note['of']))
    else:
        make = {_LIST: list, _TUPLE: tuple}.get(note['kind'], lambda cell: cell)
        cells = [None if cell is None else make(cell) for cell in column.to_pylist()]
    for row in note['nan']:
        cells[row] = math.nan
    return cells


def _to_arrays(column: Any, dtype: np.dtype[Any]) -> list[Any]:
    import pyarrow as pa

    there = column.is_valid().to_pylist()
    if not pa.types.is_struct(column.type):
        flat = _parts(column)
        return [part.astype(dtype) if here else None for part, here in zip(flat, there, strict=True)]
    flat, shapes = (_parts(column.field(name)) for name in ('values', 'shape'))
    rows = zip(flat, shapes, there, strict=True)
    return [part.astype(dtype).reshape(shape) if here else None for part, shape, here in rows]


def _parts(lists: Any) -> list[np.ndarray]:
    values, ends = lists.values.to_numpy(zero_copy_only=False), lists.offsets.to_numpy()
    return [values[start:end] for start, end in zip(ends[:-1], ends[1:], strict=True)]
