"""What the results share: tables and a summary, in memory or in a folder that appears when it is complete."""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import pandas as pd
import pyterrier as pt

from pyterrier_mech.draws import digest

META = 'pt_meta.json'

Tables = dict[str, pd.DataFrame]
_Self = TypeVar('_Self', bound='SavedResult')


class SavedResult(pt.Artifact):
    """Base of the results. Subclasses name their tables and say how they are made.

    What a subclass annotates stands in its summary, and becomes an attribute of the object.

    Attributes:
        TABLES: The tables, which are Parquet files of these names, and the columns that each has at least.
        MADE_BY: The call that makes one, as errors show it.
    """

    ARTIFACT_FORMAT = 'mech'
    ARTIFACT_PACKAGE_HINT = 'pyterrier-mech'

    TABLES: ClassVar[Mapping[str, tuple[str, ...]]]
    MADE_BY: ClassVar[str]

    def __init__(self, path: Any, *, tables: Tables | None = None, summary: dict[str, Any] | None = None) -> None:
        """Holds tables and summary in memory, or reads both from the folder `path`.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If the folder holds something else.
        """
        super().__init__(path)
        if tables is None or summary is None:
            if path is pt.Artifact.NO_PATH:
                raise ValueError(f'Without a path there is nothing to read. Use {self.MADE_BY}.')
            # A folder that is replaced meanwhile would give the summary of one result and the tables of another.
            with _held(Path(path).parent):
                tables, summary = self._read(Path(path))
        self._tables = tables
        self._summary = summary
        for key in self._names():
            setattr(self, key, summary[key])

    def save(self: _Self, path: str | Path, *, overwrite: bool = False) -> _Self:
        """Saves to a folder, from which `load(path)` of the class or `pt.Artifact.load(path)` reads it back.

        The folder appears when it is complete, or not at all.

        Args:
            path: The folder to make.
            overwrite: Whether to replace a result of the same kind that was saved there before. Nothing else is ever
                replaced: where the folder holds other files too, it stays.

        Returns:
            This object, whose `path` is now the folder.

        Raises:
            FileExistsError: If `path` exists and may not be replaced.
        """
        path = Path(path)
        with appearing(path, type(self), overwrite=overwrite) as new:
            for name in self.TABLES:
                self._tables[name].to_parquet(new / f'{name}.parquet', index=False)
            write_meta(new, self._meta())
        self.path = path
        return self

    def __eq__(self, other: object) -> bool:
        """Compares the content; where it is saved does not matter."""
        if type(other) is not type(self) or not isinstance(other, SavedResult):
            return NotImplemented
        same = all(self._tables[name].equals(other._tables[name]) for name in self.TABLES)
        return same and self._meta() == other._meta()

    def __hash__(self) -> int:
        """Hashes part of the content."""
        return hash((type(self), *(tuple(self._tables[name].iloc[:, 0]) for name in self.TABLES)))

    @classmethod
    def _names(cls) -> list[str]:
        above = SavedResult.__mro__
        return [name for one in cls.__mro__ if one not in above for name in inspect.get_annotations(one)]

    def _meta(self) -> dict[str, Any]:
        return {**header(type(self)), 'summary': plain(self._summary)}

    def _read(self, path: Path) -> tuple[Tables, dict[str, Any]]:
        name = type(self).__name__
        if not path.exists():
            _tidy(path)
        if not path.exists():
            raise FileNotFoundError(f'There is no {str(path)!r}. Make it with {self.MADE_BY}.save(path).')
        meta = read_meta(path)
        if not is_of(type(self), meta):
            raise ValueError(
                f'{str(path)!r} holds no saved {name} (type={meta.get("type")!r}, format={meta.get("format")!r}). '
                f'Give the folder that {name}.save(path) made.'
            )
        summary = meta.get('summary')
        if missing := [key for key in self._names() if not isinstance(summary, dict) or key not in summary]:
            raise damaged(path / META, f'its summary has no {", ".join(map(repr, missing))}')
        found = {key: math.nan if value is None else value for key, value in meta['summary'].items()}
        return {name: self._table_of(path, name) for name in self.TABLES}, found

    def _table_of(self, path: Path, name: str) -> pd.DataFrame:
        file = path / f'{name}.parquet'
        try:
            # A folder named like 'fold=1' is no partition: without this, Arrow adds a column 'fold'.
            table = pd.read_parquet(file, partitioning=None)
        except (OSError, ValueError) as error:
            raise damaged(file, error) from error
        if missing := [column for column in self.TABLES[name] if column not in table.columns]:
            raise damaged(file, f'it has no {", ".join(map(repr, missing))}, only {list(table.columns)}')
        return table


@contextmanager
def appearing(path: Path, artifact: type[pt.Artifact], *, overwrite: bool) -> Iterator[Path]:
    """Gives a new folder to fill in the block, which appears at `path` when the block ends, or not at all.

    The block writes the metadata too; the names of all files are added to it, so that files of the user, which stand
    in the folder beside ours, are seen when it shall be replaced.

    Args:
        path: Where it shall be.
        artifact: The class that reads it.
        overwrite: Whether a folder of the same class may be replaced.

    Raises:
        FileExistsError: If `path` exists and may not be replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with _held(path.parent):
            _tidy(path)
            _check_free(path, artifact, overwrite)
            # The name is short, whatever that of path, and tells writers of the same path from others.
            (room := path.with_name(f'.{uuid.uuid4().hex[:8]}{_suffix(path)}')).mkdir()
            stack.enter_context(_held(room))
        new, old = room / 'folder.new', room / 'folder.old'
        try:
            new.mkdir()
            yield new
            names = sorted(file.relative_to(new).as_posix() for file in new.rglob('*') if not file.is_dir())
            write_meta(new, {**read_meta(new), 'files': names})
            with _held(path.parent):
                # Again: the work may have taken long.
                _check_free(path, artifact, overwrite)
                if path.exists():
                    path.rename(old)
                new.rename(path)
        finally:
            with _held(path.parent):
                _clear(room, path)


def header(artifact: Any) -> dict[str, str]:
    """Returns what the metadata of a folder say of the class that reads it."""
    names = {'type': 'ARTIFACT_TYPE', 'format': 'ARTIFACT_FORMAT', 'package_hint': 'ARTIFACT_PACKAGE_HINT'}
    return {key: getattr(artifact, name) for key, name in names.items()}


def is_of(artifact: Any, meta: Mapping[str, Any]) -> bool:
    """Whether a folder with these metadata is read by a class."""
    return (meta.get('type'), meta.get('format')) == (artifact.ARTIFACT_TYPE, artifact.ARTIFACT_FORMAT)


def _check_free(path: Path, artifact: type[pt.Artifact], overwrite: bool) -> None:
    what = artifact.__name__
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f'{str(path)!r} already exists; pass overwrite=True to replace it.')
    meta = read_meta(path)
    if not is_of(artifact, meta):
        raise FileExistsError(f'{str(path)!r} holds no saved {what}, so it stays. Choose another path.')
    known = {META, *meta.get('files', ())}
    there = (file.relative_to(path).as_posix() for file in path.rglob('*') if not file.is_dir())
    if others := sorted(set(there) - known):
        raise FileExistsError(
            f'{str(path)!r} holds files that {what} did not save, and replacing it would delete them: '
            f'{", ".join(others[:5])}{" …" if len(others) > 5 else ""}. Move them, or choose another path.'
        )


def _suffix(path: Path) -> str:
    return f'.{digest(path.name).hex()[:8]}.mech'


def _tidy(path: Path) -> None:
    """Clears away what writers of `path` have left who were killed."""
    for room in path.parent.glob(f'.*{_suffix(path)}'):
        with _held(room, wait=False) as dead:
            if dead:
                _clear(room, path)


def _clear(room: Path, path: Path) -> None:
    """Removes a room to work in; a folder that was taken away from `path`, and not replaced, goes back."""
    with suppress(OSError):
        (room / 'folder.old').rename(path)
    shutil.rmtree(room, ignore_errors=True)


@contextmanager
def _held(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Holds a folder during the block, or till the process ends; gives whether it does.

    It does not where another one holds it and `wait` is False, or where the system cannot hold folders: there, what
    killed writers leave stays, and of two writers at the same moment one may end with an error of the system.
    """
    with ExitStack() as stack:
        held = False
        with suppress(ImportError, OSError):
            import fcntl

            lock = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        yield held


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file that appears when it is complete, or replaces another one then. Text is written as UTF-8."""
    new = path.with_name(f'.{uuid.uuid4().hex[:8]}.new')
    try:
        with new.open('xb') as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        _sync(path.parent)
    finally:
        new.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Has the names in a folder survive a loss of power, where the system can."""
    with suppress(OSError):
        place = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)


def read_meta(path: Path) -> dict[str, Any]:
    """Returns the metadata of a saved folder; empty where there is none.

    Raises:
        ValueError: If the file is damaged.
    """
    file = path / META
    if not file.is_file():
        return {}
    try:
        meta = json.loads(file.read_text(encoding='utf-8'))
    except ValueError as error:
        raise damaged(file, error) from error
    if not isinstance(meta, dict):
        raise damaged(file, 'it must hold a JSON object')
    return meta


def damaged(file: Path, why: object) -> ValueError:
    """Returns the error of a file that cannot be what was saved."""
    return ValueError(f'{str(file)!r} is damaged: {why}. Save the folder again, or copy it again.')


def plain(value: Any) -> Any:
    """Returns a value as JSON has it: NumPy's numbers as plain ones, NaN, which JSON lacks, as None."""
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return plain(value.tolist())
    return None if isinstance(value, float) and math.isnan(value) else value


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """Writes the metadata of a folder, as plain values."""
    (folder / META).write_text(json.dumps(plain(meta), indent=2) + '\n', encoding='utf-8')
