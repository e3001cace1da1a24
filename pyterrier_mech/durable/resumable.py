"""A stage whose finished work is kept in a folder, so that a run that was killed goes on where it was."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyterrier as pt

from pyterrier_mech.attribute.path import Integrating, warn_of
from pyterrier_mech.durable.digests import ranker_of, stage_digest
from pyterrier_mech.durable.rows import Rows, Table, computed, quiet, why_not
from pyterrier_mech.durable.store import Store, places_of
from pyterrier_mech.frames import with_columns
from pyterrier_mech.patch.pairs import PATCHABLE, warn_of_problems
from pyterrier_mech.provenance import ANALYSIS, Analysis, noted, seen_by, with_seen
from pyterrier_mech.stage import Keeping, Stage

Shard = tuple[int, int]


class Job(NamedTuple):
    """A unit of work: its number among those of the frame, and the rows of it that no file has."""

    number: int
    rows: np.ndarray


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
        done: Rows of the frame that are stored.
        missing: Rows that are not; rows of equal texts are computed once.
        units: How many units of work are left.
        seconds_left: What they will take one after the other, by the time that stored rows took; NaN where none is.
    """

    done: int
    missing: int
    units: int
    seconds_left: float


@dataclass(eq=False, repr=False)
class Resumable(Stage):
    """Keeps the finished work of a stage in a folder: a run that is killed goes on where it was.

    Rows are computed in units, and each finished unit is a file, which appears when it is complete. The next run over
    the same texts with the same model and settings reads it, and computes what is missing. Its result is that of a run
    that was never interrupted, to the bit on the same hardware with the same number of threads. Whatever else is
    changed, the model's weights, a setting, a text, is computed anew, in the same folder if you like.

    **Input columns** and **Output columns** are those of the stage. Rows stay in their order; ranks are made over the
    whole frame.

    Several processes may work on one folder at once, also on several machines that share it. What they must not do is
    `compact` or `clear` it meanwhile.

    Args:
        stage: A stage that treats every row by itself: one that patches, ablates, attributes or reads activations, or a
            ranker.
        folder: Where finished units are; it is made if it is not there.
        rows: Rows of a unit, at most; what a kill loses. Queries are kept together up to this size.
        verbose: Shows a progress bar over all rows; by default as the stage does.

    Raises:
        TypeError: If the stage is not one of these, with the reason; or a setting cannot be told apart in another
            process, such as a function.
        ValueError: If the model has hooks or adapters; and whatever the stage raises. What was finished is stored.
        OSError: If the folder is full, or cannot be written to while something is missing.
    """

    stage: Any
    folder: str | Path
    _: KW_ONLY
    rows: int = 256
    verbose: bool | None = None

    def __post_init__(self) -> None:
        """Checks the settings."""
        self.check()

    def check(self) -> None:
        """Checks the settings, before any work."""
        super().check()
        if reason := why_not(self.stage):
            raise TypeError(f'the rows of this stage cannot be stored one by one: {reason}')
        if not isinstance(self.rows, int) or self.rows < 1:
            raise ValueError(f'rows must be a number of rows from 1; got {self.rows!r}')
        self.stage.check()

    def key(self) -> tuple[Any, ...]:
        """Returns everything that the result depends on: where it is kept makes no difference."""
        return type(self), self.stage

    @property
    def model(self) -> Any:
        """The ranker that runs."""
        return ranker_of(self.stage)

    def fuse_rank_cutoff(self, k: int) -> pt.Transformer | None:
        """Cuts before the stage, if the ranking is the same after it."""
        return pt.RankCutoff(k) >> self if isinstance(self.stage, Keeping) else None

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Returns what the stage gives for a frame, and stores what is not stored yet."""
        self.check()
        if not len(inp):
            return self.stage.transform(inp)
        rows, store = self._read(inp)
        table, bad = Table(len(rows.digests)), set[str]()
        seen: set[str] = set()

        def put(places: np.ndarray, name: str, piece: pd.DataFrame) -> None:
            seen.update(seen_by(piece))
            table.put(places, piece, places_of(piece, [rows.digests[place] for place in places]))

        while True:
            files, jobs = self._plan(rows, store, bad)
            before = len(bad)
            for name, places in files.items():
                if not table.there[places].all():
                    piece = store.read(name)
                    if piece is None:
                        bad.add(name)
                    else:
                        put(places, name, piece)
            if len(bad) == before:
                break
        for job, name in self._worked(jobs, rows, store):
            piece = store.read(name)
            if piece is None:
                raise OSError(f'{str(store.folder / name)!r} was written, and is not there or not whole any more')
            put(job.rows, name, piece)
        return self._result(inp, table.rows(rows.place), seen)

    # -- what is there, and what is not

    def status(self, inp: pd.DataFrame) -> Status:
        """Returns how far a run over a frame is, from the names of the files in the folder."""
        self.check()
        if not len(inp):
            return Status(0, 0, 0, 0.0)
        return self._status(*self._read(inp))

    def _status(self, rows: Rows, store: Store) -> Status:
        _, jobs = self._plan(rows, store)
        missing = np.concatenate([job.rows for job in jobs]) if jobs else np.zeros(0, dtype=np.int64)
        seconds = len(missing) * store.seconds_per_row(store.names()) if jobs else 0.0
        n_missing = int(np.isin(rows.place, missing).sum())
        return Status(len(rows.place) - n_missing, n_missing, len(jobs), seconds)

    def work(self, inp: pd.DataFrame, shard: Shard = (0, 1)) -> Status:
        """Computes and stores units of a frame that are missing, and returns how far it is then.

        Args:
            inp: The whole frame, the same in every process.
            shard: (i, n): only the units whose number leaves i when divided by n, so that n processes share the work.

        Raises:
            ValueError: If the shard is not one.
        """
        part, parts = shard
        if not 0 <= part < parts:
            raise ValueError(f'shard must be (i, n) with i from 0 to n - 1; got {shard!r}')
        self.check()
        if not len(inp):
            return self.status(inp)
        rows, store = self._read(inp)
        _, jobs = self._plan(rows, store)
        for _ in self._worked([job for job in jobs if job.number % parts == part], rows, store):
            pass
        return self._status(rows, store)

    def compact(self) -> int:
        """Puts the many files of the stage together into few; returns how many there are then.

        Where units of different runs have a row in common, one of them stays: they differ in rounding at most.
        """
        return self._store().compact()

    def clear(self) -> None:
        """Removes from the folder what is stored of this stage with this model, and nothing else."""
        self._store().clear()

    def _store(self) -> Store:
        return Store(self.folder, stage_digest(self.stage))

    def _read(self, inp: pd.DataFrame) -> tuple[Rows, Store]:
        # Of a frame that it cannot read, the stage says why in its own words.
        self.stage.transform(inp.iloc[:0])
        return Rows.of(self.stage, inp), self._store()

    def _plan(self, rows: Rows, store: Store, bad: Collection[str] = ()) -> tuple[dict[str, np.ndarray], list[Job]]:
        """Returns which rows are in which files, and the jobs for the others.

        A unit whose file is there is read from it. The rows of any other are looked up in all files: those of a run
        with another cut-off have some of them. What is left of a unit is one job, whatever was done of other units, so
        that a job is the same after an interruption.
        """
        units, names = rows.units(self.rows), store.names() - set(bad)
        files: dict[str, list[int]] = defaultdict(list)
        rest = []
        for number, unit in enumerate(units):
            name = store.name([rows.digests[row] for row in unit])
            if name in names:
                files[name] += unit.tolist()
            else:
                rest.append(Job(number, unit))
        index = store.index(names - files.keys()) if rest else {}
        jobs = []
        for number, unit in rest:
            for row in unit:
                if (found := index.get(rows.digests[row])) is not None:
                    files[found].append(int(row))
            left = [int(row) for row in unit if rows.digests[row] not in index]
            if left:
                jobs.append(Job(number, np.asarray(left)))
        return {name: np.asarray(places) for name, places in files.items()}, jobs

    # -- work

    def _worked(self, jobs: list[Job], rows: Rows, store: Store) -> Iterator[tuple[Job, str]]:
        """Computes and stores; yields each job when it is done, with the name of its file."""
        if not jobs:
            return
        store.ready()
        counts = np.bincount(rows.place, minlength=len(rows.digests))
        left = sum(int(counts[job.rows].sum()) for job in jobs)
        shows = bool(self.verbose if self.verbose is not None else getattr(self.stage, 'shows', self.model.verbose))
        settings: dict[str, Any] = {'desc': type(self.stage).__name__, 'unit': 'row', 'disable': not shows}
        with pt.tqdm(total=len(rows.place), initial=len(rows.place) - left, **settings) as bar:
            for job, name in self._computed(jobs, rows, store):
                yield job, name
                bar.update(int(counts[job.rows].sum()))

    def _computed(self, jobs: list[Job], rows: Rows, store: Store) -> Iterator[tuple[Job, str]]:
        stage = quiet(self.stage)
        for job in jobs:
            yield job, stored(stage, store, rows.frame.iloc[job.rows], [rows.digests[row] for row in job.rows])

    # -- the result

    def _result(self, inp: pd.DataFrame, columns: dict[str, np.ndarray], seen: set[str]) -> pd.DataFrame:
        if isinstance(self.stage, Integrating):
            errors = next(values for name, values in columns.items() if name.startswith('completeness_error.'))
            warn_of(errors, self.stage.grid)
        if 'patchable' in columns:
            warn_of_problems(['' if said == PATCHABLE else said for said in columns['patchable']], 4)
        if not isinstance(self.stage, Keeping):
            return with_seen(pt.model.add_ranks(inp.assign(**columns)), seen)
        analysis = None
        if ANALYSIS in columns:
            analysis = Analysis.parse(columns[ANALYSIS][0])
            if 'model' in analysis.settings:
                # The same weights may have been loaded from another place.
                analysis = replace(analysis, settings={**analysis.settings, 'model': noted(self.model)})
        added = {name: values for name, values in columns.items() if name != ANALYSIS}
        return with_seen(with_columns(inp, added, analysis), seen)


def stored(stage: Any, store: Store, frame: pd.DataFrame, digests: list[bytes]) -> str:
    """Computes a unit, if no other process has done so meanwhile, and stores it; returns the name of its file."""
    name = store.name(digests)
    if (store.folder / name).exists() and store.read(name) is not None:
        return name
    start = time.perf_counter()
    columns = computed(stage, frame.reset_index(drop=True))
    return store.write(digests, columns, time.perf_counter() - start)
