"""Many workers on one folder, each with a model of its own."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import KW_ONLY, dataclass
from typing import Any

from pyterrier_mech.durable.resumable import Job, Resumable
from pyterrier_mech.durable.rows import Rows
from pyterrier_mech.durable.store import Store
from pyterrier_mech.durable.workers import ENGINES, Engine, WorkerError
from pyterrier_mech.stage import choice

TRIES = 3
_IN_FLIGHT = 2


class FailedUnitsError(RuntimeError):
    """Units that could not be computed; all others are stored.

    Attributes:
        qids: The queries of their rows.
    """

    def __init__(self, message: str, qids: Sequence[str]) -> None:
        """Takes the message and the qids."""
        super().__init__(message)
        self.qids = list(qids)


@dataclass(eq=False, repr=False)
class Distributed(Resumable):
    """A stage whose units are computed by many workers, each of which loads the model once and writes its own files.

    The folder and the result are those of `Resumable`, whichever engine has computed what, on the same hardware with as
    many threads. Where a worker dies, another takes its place. A unit that has failed three times is left out, all
    others are computed and stored, and then an error names its queries.

    **Input columns** and **Output columns** are those of the stage.

    Args:
        stage: As `Resumable` takes it; its model is best given by name, so that each worker loads it itself.
        folder: Where finished units are; of all workers under the same path.
        rows: Rows of a unit, at most.
        engine: 'processes', of this machine: new Python processes, so that a script must start its work below
            ``if __name__ == '__main__':``. 'ray', actors of Ray (``pip install pyterrier-mech[ray]``): of the cluster
            that `ray.init` has joined before, or of this machine.
        workers: How many; by default one for each GPU with `gpus_per_worker`, else half of the CPU cores, or with Ray
            one for each.
        gpus_per_worker: GPUs that each worker has for itself; 0 for work on the CPU, a part of one to share it.
        verbose: Shows a progress bar over all rows; by default as the stage does.

    Raises:
        FailedUnitsError: If units failed again and again.
        WorkerError: If a worker cannot load the stage, or loads other weights.
        ImportError: If Ray is wanted and not installed.
        TypeError, ValueError, OSError: As `Resumable`.
    """

    _: KW_ONLY
    engine: str = choice(tuple(ENGINES))
    workers: int | None = None
    gpus_per_worker: float = 0

    def check(self) -> None:
        """Checks the settings, before any work."""
        super().check()
        if self.workers is not None and self.workers < 1:
            raise ValueError(f'workers must be 1 or more, or None; got {self.workers!r}')
        if self.gpus_per_worker < 0:
            raise ValueError(f'gpus_per_worker must be 0 or more; got {self.gpus_per_worker!r}')

    def _computed(self, jobs: list[Job], rows: Rows, store: Store) -> Iterator[tuple[Job, str]]:
        workers = None if self.workers is None else min(self.workers, len(jobs))
        engine = ENGINES[self.engine](self.stage, store, workers, self.gpus_per_worker)
        failed: list[tuple[Job, BaseException]] = []
        try:
            for job, name, error in _dispatched(jobs, rows, engine):
                if error is None:
                    yield job, name
                else:
                    failed.append((job, error))
        finally:
            engine.close()
        if failed:
            raise _failure(failed, rows)


def _dispatched(jobs: Sequence[Job], rows: Rows, engine: Engine) -> Iterator[tuple[Job, str, BaseException | None]]:
    """Yields every job when it is done, with its file, or with the error of its last try.

    A worker has two units, so that it never waits for the next one.
    """
    waiting, tries = deque(jobs), Counter[int]()
    given: list[deque[tuple[Future[str], Job]]] = [deque() for _ in range(engine.size)]
    while waiting or any(given):
        for worker, queue in enumerate(given):
            while waiting and len(queue) < _IN_FLIGHT:
                job = waiting.popleft()
                digests = [rows.digests[row] for row in job.rows]
                queue.append((engine.submit(worker, rows.frame.iloc[job.rows], digests), job))
        wait([future for queue in given for future, _ in queue], return_when=FIRST_COMPLETED)
        for worker, queue in enumerate(given):
            # Units are done in their order, so that of a dead worker the first one left has been under way.
            while queue and queue[0][0].done():
                future, job = queue.popleft()
                error = future.exception()
                if error is None:
                    yield job, future.result(), None
                    continue
                if isinstance(error, engine.died):
                    waiting.extendleft(later for _, later in reversed(queue))
                    queue.clear()
                    engine.restart(worker)
                cause: Any = getattr(error, 'cause', None) or error  # Ray wraps what a unit raises
                if isinstance(cause, (WorkerError, OSError)):
                    raise cause
                tries[job.number] += 1
                if tries[job.number] < TRIES:
                    waiting.append(job)
                else:
                    yield job, '', cause


def _failure(failed: Sequence[tuple[Job, BaseException]], rows: Rows) -> FailedUnitsError:
    n_rows = sum(len(job.rows) for job, _ in failed)
    qids = [str(qid) for job, _ in failed for qid in rows.frame['qid'].iloc[job.rows].unique()]
    error = failed[0][1]
    result = FailedUnitsError(
        f'{len(failed)} units of {n_rows} rows failed {TRIES} times each, all others are stored. Queries: '
        f'{", ".join(qids[:20])}{" …" if len(qids) > 20 else ""}. The first error: {type(error).__name__}: {error}',
        qids,
    )
    result.__cause__ = error
    return result
