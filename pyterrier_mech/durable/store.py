"""The folder of finished units: one Parquet file a unit, whose name is the digest of what is in it.

No file says what is done but the units themselves. A file appears when it is complete. Two processes that compute one
unit write the same rows under the same name, and the last one wins; so there are no locks.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pyterrier_mech.draws import digest
from pyterrier_mech.tables import read_frame, write_frame

_logger = logging.getLogger('pyterrier_mech')

ROW = 'row'
"""Column of the files with the digest of each row's texts."""
SECONDS = 'pyterrier_mech.seconds'
"""Key in the `attrs` of a file: how long it took."""

_NAME = re.compile(r'([0-9a-f]{16})-[0-9a-f]{40}\.parquet')
_COMPACT = 65536
_STALE = 3600.0


class Store:
    """The units of one stage in a folder, which other stages may share."""

    def __init__(self, folder: str | Path, stage: str) -> None:
        """Takes the folder and the digest of a stage."""
        self.folder = Path(folder)
        self.stage = stage

    def name(self, rows: Sequence[bytes]) -> str:
        """Returns the name of the file of some rows, by their digests."""
        return f'{self.stage[:16]}-{digest(self.stage, *rows).hex()[:40]}.parquet'

    def names(self) -> set[str]:
        """Returns the names of the files of the stage."""
        try:
            found = os.listdir(self.folder)
        except FileNotFoundError:
            return set()
        except NotADirectoryError as error:
            raise NotADirectoryError(f'{str(self.folder)!r} must be a folder; it is a file') from error
        matches = map(_NAME.fullmatch, found)
        return {match[0] for match in matches if match is not None and match[1] == self.stage[:16]}

    # -- reading

    def read(self, name: str) -> pd.DataFrame | None:
        """Returns a unit, with the column `ROW`; None, with a warning in the log, where the file is not what it says.

        None without a warning where another process has put the file together with others meanwhile.
        """
        path = self.folder / name
        try:
            frame = read_frame(path)
            return frame if self._fits(name, frame[ROW].tolist()) else None
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever a torn file makes the reader stumble over
            _unusable(path, error)
            return None

    def index(self, names: Iterable[str]) -> dict[bytes, str]:
        """Returns in which file each row is; of several files, the first by name."""
        import pyarrow.parquet as pq

        found: dict[bytes, str] = {}
        for name in sorted(names):
            try:
                with pq.ParquetFile(self.folder / name) as file:
                    rows = file.read([ROW])[ROW].to_pylist()
            except FileNotFoundError:
                continue
            except Exception as error:
                _unusable(self.folder / name, error)
                continue
            if self._fits(name, rows):
                for row in rows:
                    found.setdefault(row, name)
        return found

    def seconds_per_row(self, names: Iterable[str]) -> float:
        """Returns what a row took, over some of the files; NaN where none says it."""
        rows, seconds = 0, 0.0
        for name in sorted(names)[:16]:
            frame = self.read(name)
            if frame is not None and SECONDS in frame.attrs:
                rows, seconds = rows + len(frame), seconds + frame.attrs[SECONDS]
        return seconds / rows if rows else float('nan')

    def _fits(self, name: str, rows: list[bytes]) -> bool:
        if self.name(rows) == name:
            return True
        _unusable(self.folder / name, 'its rows are not those that its name stands for')
        return False

    # -- writing

    def ready(self) -> None:
        """Makes the folder, sees that it can be written to, and removes what killed writers left.

        Raises:
            OSError: If not; the message says what to do.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f'.{os.getpid()}-{time.monotonic_ns()}.new'
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise self._failed(error, 'nothing was computed') from error
        for left in self.folder.glob('.*.new'):
            try:
                if time.time() - left.stat().st_mtime > _STALE:
                    left.unlink()
            except OSError:
                pass  # another process was faster

    def write(self, rows: Sequence[bytes], columns: pd.DataFrame, seconds: float) -> str:
        """Writes a unit; returns its name.

        Raises:
            OSError: If the folder is full or cannot be written to.
        """
        name = self.name(rows)
        frame = columns.assign(**{ROW: pd.Series(list(rows), index=columns.index, dtype=object)})
        frame.attrs = {**columns.attrs, SECONDS: seconds}
        try:
            write_frame(frame.reset_index(drop=True), self.folder / name)
        except OSError as error:
            raise self._failed(error, 'what was finished is stored, and the next run goes on from there') from error
        return name

    def _failed(self, error: OSError, left: str) -> OSError:
        return type(error)(
            error.errno,
            f'the folder of finished units cannot be written to ({error.strerror or error}); {left}. Make room, or '
            'give a folder that can be written to',
            str(self.folder),
        )

    # -- the whole

    def compact(self) -> int:
        """Puts the files of the stage together into few; returns how many there are then."""
        self.ready()
        parts: list[pd.DataFrame] = []
        merged: list[str] = []

        def flush() -> None:
            if len(parts) > 1:
                whole = pd.concat(parts, ignore_index=True).drop_duplicates(ROW, ignore_index=True)
                whole.attrs = dict(parts[0].attrs)
                whole_seconds = sum(part.attrs.get(SECONDS, 0.0) for part in parts)
                new = self.write(whole[ROW].tolist(), whole.drop(columns=ROW), whole_seconds)
                for name in merged:
                    if name != new:
                        (self.folder / name).unlink(missing_ok=True)
            parts.clear()
            merged.clear()

        for name in sorted(self.names()):
            frame = self.read(name)
            if frame is None or len(frame) >= _COMPACT // 2:
                continue
            parts.append(frame)
            merged.append(name)
            if sum(map(len, parts)) >= _COMPACT:
                flush()
        flush()
        return len(self.names())

    def clear(self) -> None:
        """Removes the files of the stage, and nothing else."""
        for name in self.names():
            (self.folder / name).unlink(missing_ok=True)


def places_of(frame: pd.DataFrame, rows: Sequence[bytes]) -> np.ndarray:
    """Returns where in a unit each of some rows is."""
    at = {row: place for place, row in enumerate(frame[ROW].tolist())}
    return np.asarray([at[row] for row in rows], dtype=np.int64)


def _unusable(path: Path, why: Any) -> None:
    _logger.warning('%s is not used, and its rows are computed again: %s', path, why)
