"""What the results share: tables and a summary, in memory or in a folder that appears when it is complete."""

from __future__ import annotations

import json
import math
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pandas as pd
import pyterrier as pt

META = 'pt_meta.json'

Tables = dict[str, pd.DataFrame]
_Self = TypeVar('_Self', bound='SavedResult')


class SavedResult(pt.Artifact):
    """Base of the results. Subclasses name their tables and say how they are made.

    Attributes:
        TABLES: Names of the tables, which are those of the Parquet files.
        MADE_BY: The call that makes one, as errors show it.
    """

    ARTIFACT_FORMAT = 'mech'
    ARTIFACT_PACKAGE_HINT = 'pyterrier-mech'

    TABLES: ClassVar[tuple[str, ...]]
    MADE_BY: ClassVar[str]

    def __init__(self, path: Any, tables: Tables | None, summary: dict[str, Any] | None) -> None:
        """Holds tables and summary in memory, or reads both from the folder `path`.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If the folder holds something else.
        """
        super().__init__(path)
        if tables is None or summary is None:
            if path is pt.Artifact.NO_PATH:
                raise ValueError(f'Without a path there is nothing to read. Use {self.MADE_BY}.')
            tables, summary = self._read(Path(path))
        self._tables = tables
        self._summary = summary

    def save(self: _Self, path: str | Path, *, overwrite: bool = False) -> _Self:
        """Saves to a folder, from which `load(path)` of the class or `pt.Artifact.load(path)` reads it back.

        The folder appears when it is complete, or not at all.

        Args:
            path: The folder to make.
            overwrite: Whether to replace a result of the same kind that was saved there before. Nothing else is ever
                replaced.

        Returns:
            This object, whose `path` is now the folder.

        Raises:
            FileExistsError: If `path` exists and may not be replaced.
        """
        path = Path(path)
        with appearing(path, overwrite=overwrite, ours=self._is_ours, what=type(self).__name__) as new:
            for name in self.TABLES:
                self._tables[name].to_parquet(new / f'{name}.parquet', index=False)
            (new / META).write_text(json.dumps(self._meta(), indent=2) + '\n', encoding='utf-8')
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

    def _meta(self) -> dict[str, Any]:
        # JSON has no NaN.
        summary = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in self._summary.items()}
        return {
            'type': self.ARTIFACT_TYPE,  # type: ignore[attr-defined]
            'format': self.ARTIFACT_FORMAT,
            'package_hint': self.ARTIFACT_PACKAGE_HINT,
            'summary': summary,
        }

    def _is_ours(self, meta: dict[str, Any]) -> bool:
        return (meta.get('type'), meta.get('format')) == (self.ARTIFACT_TYPE, self.ARTIFACT_FORMAT)  # type: ignore[attr-defined]

    def _read(self, path: Path) -> tuple[Tables, dict[str, Any]]:
        name = type(self).__name__
        if not path.exists():
            raise FileNotFoundError(f'There is no {str(path)!r}. Make it with {self.MADE_BY}.save(path).')
        meta = read_meta(path)
        if not self._is_ours(meta):
            raise ValueError(
                f'{str(path)!r} holds no saved {name} (type={meta.get("type")!r}, format={meta.get("format")!r}). '
                f'Give the folder that {name}.save(path) made.'
            )
        summary = {key: math.nan if value is None else value for key, value in meta['summary'].items()}
        # A folder named like 'fold=1' is no partition: without this, Arrow adds a column 'fold'.
        tables = {table: pd.read_parquet(path / f'{table}.parquet', partitioning=None) for table in self.TABLES}
        return tables, summary


@contextmanager
def appearing(path: Path, *, overwrite: bool, ours: Callable[[dict[str, Any]], bool], what: str) -> Iterator[Path]:
    """Gives a new folder to fill in the block, which appears at `path` when the block ends, or not at all.

    Args:
        path: Where it shall be.
        overwrite: Whether a folder of the same kind may be replaced.
        ours: Tells from the metadata of a folder whether it is of that kind.
        what: The kind, as errors call it.

    Raises:
        FileExistsError: If `path` exists and may not be replaced.
    """
    if path.exists():
        if not overwrite:
            raise FileExistsError(f'{str(path)!r} already exists; pass overwrite=True to replace it.')
        if not ours(read_meta(path)):
            raise FileExistsError(f'{str(path)!r} holds no saved {what}, so it stays. Choose another path.')
    new, old = (path.with_name(f'.{path.name}.{uuid.uuid4().hex}.{end}') for end in ('new', 'old'))
    new.mkdir(parents=True)
    try:
        yield new
        if path.exists():
            path.rename(old)
        new.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def read_meta(path: Path) -> dict[str, Any]:
    """Returns the metadata of a saved folder; empty where there is none."""
    meta = path / META
    return json.loads(meta.read_text(encoding='utf-8')) if meta.is_file() else {}
