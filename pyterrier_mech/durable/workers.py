"""Workers that compute units: processes of this machine, or actors of Ray. Each loads its model once.

An engine has `size` workers. `submit` hands a unit to one and returns a future; where a worker has died, its futures
fail with an error that `died` knows, and `restart` puts another in its place. Who decides what is tried again is
`distributed.py`, the same for both.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any, Protocol

import pandas as pd
import torch

from pyterrier_mech.durable.digests import stage_digest
from pyterrier_mech.durable.resumable import stored
from pyterrier_mech.durable.rows import quiet
from pyterrier_mech.durable.store import Store

THREADS = 'OMP_NUM_THREADS'
_GPUS = 'CUDA_VISIBLE_DEVICES'


class WorkerError(RuntimeError):
    """A worker cannot begin, or has loaded other weights than the process that hands out the work."""


class Worker:
    """A stage with its loaded model, and the folder that it writes to."""

    def __init__(self, payload: bytes) -> None:
        """Takes a pickled stage and store; nothing is read or loaded yet, so that no error is lost."""
        self.payload = payload
        self.ready: tuple[Any, Store] | None = None

    def compute(self, frame: pd.DataFrame, digests: list[bytes]) -> str:
        """Computes and stores a unit; returns the name of its file.

        Raises:
            WorkerError: If the stage or its model cannot be loaded here, or the model is another one.
        """
        if self.ready is None:
            self.ready = self._begin()
        return stored(*self.ready, frame, digests)

    def _begin(self) -> tuple[Any, Store]:
        try:
            stage, store = pickle.loads(self.payload)
            found = stage_digest(stage)
        except Exception as error:
            raise WorkerError(f'a worker cannot load the stage: {type(error).__name__}: {error}') from error
        if found != store.stage:
            raise WorkerError(
                f'{stage!r} gives other numbers in a worker than here: the folder of the model has changed or is '
                'another one there, or the worker has another device or other releases of libraries'
            )
        return quiet(stage), store


class Engine(Protocol):
    """Some workers."""

    size: int
    died: tuple[type[BaseException], ...]

    def submit(self, worker: int, frame: pd.DataFrame, digests: list[bytes]) -> Future[str]:
        """Hands a unit to a worker."""

    def restart(self, worker: int) -> None:
        """Puts another worker in the place of one that has died."""

    def close(self) -> None:
        """Ends all workers."""


# -- processes

_worker: Worker | None = None


def _begin(payload: bytes, gpu: str | None, threads: int) -> None:
    global _worker
    if gpu is not None:
        os.environ[_GPUS] = gpu
    if THREADS not in os.environ:
        torch.set_num_threads(threads)
    parent = parent_process()
    if parent is not None:
        # When the process that hands out the work is killed, nobody else ends its workers.
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
    _worker = Worker(payload)


def _end_after(process: Any) -> None:
    process.join()
    os._exit(1)


def _compute(frame: pd.DataFrame, digests: list[bytes]) -> str:
    if _worker is None:
        raise RuntimeError('the worker has not begun')
    return _worker.compute(frame, digests)


class Processes:
    """New Python processes of this machine, one pool of a single process for each worker."""

    died = (BrokenProcessPool,)

    def __init__(self, stage: Any, store: Store, workers: int | None, gpus: float) -> None:
        """Starts them, one a GPU or half of the CPU cores if not said."""
        there = _visible_gpus() if gpus else []
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
        if gpus and not there:
            raise ValueError(f'gpus_per_worker={gpus} and there is no GPU: use gpus_per_worker=0')
        self.size = workers or (max(1, int(len(there) / gpus)) if gpus else max(1, cores // 2))
        self._of = [there[int(i * gpus) % len(there)] if gpus else None for i in range(self.size)]
        # Pickled here: multiprocessing would move the weights of this process to shared memory.
        self._payload, self._threads = pickle.dumps((stage, store)), max(1, cores // self.size)
        self._pools = [self._pool(i) for i in range(self.size)]

    def _pool(self, worker: int) -> ProcessPoolExecutor:
        settings = self._payload, self._of[worker], self._threads
        # Forked processes could not use CUDA, and would have the locks of this one.
        return ProcessPoolExecutor(1, mp_context=get_context('spawn'), initializer=_begin, initargs=settings)

    def submit(self, worker: int, frame: pd.DataFrame, digests: list[bytes]) -> Future[str]:
        """Hands a unit to a worker."""
        try:
            return self._pools[worker].submit(_compute, frame, digests)
        except BrokenProcessPool as error:
            failed: Future[str] = Future()
            failed.set_exception(error)
            return failed

    def restart(self, worker: int) -> None:
        """Puts another worker in the place of one that has died."""
        self._pools[worker].shutdown(wait=False, cancel_futures=True)
        self._pools[worker] = self._pool(worker)

    def close(self) -> None:
        """Ends all workers, also in the middle of a unit."""
        for pool in self._pools:
            for process in list((getattr(pool, '_processes', None) or {}).values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)


def _visible_gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    said = os.environ.get(_GPUS)
    return said.split(',') if said else [str(i) for i in range(torch.cuda.device_count())]


# -- Ray


class RayActors:
    """Actors of Ray, on as many machines as its cluster has; all see the folder under the same path."""

    def __init__(self, stage: Any, store: Store, workers: int | None, gpus: float) -> None:
        """Joins the cluster that there is, or begins one; starts them, one a GPU or CPU core of it if not said.

        Raises:
            ImportError: If Ray is not installed.
        """
        if importlib.util.find_spec('ray') is None:
            raise ImportError("engine='ray' needs Ray: run 'pip install pyterrier-mech[ray]'")
        ray: Any = importlib.import_module('ray')
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        self._ray = ray
        self.died = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError)
        there = ray.cluster_resources()
        each = max(1, int(there.get('GPU', 0) / gpus)) if gpus else max(1, int(there.get('CPU', 1)))
        self.size = workers or each
        # Ray's way of pickling takes the classes of a notebook along.
        self._payload = ray.put(ray.cloudpickle.dumps((stage, store)))
        self._kind = ray.remote(num_cpus=1, num_gpus=gpus)(Worker)
        self._actors = [self._kind.remote(self._payload) for _ in range(self.size)]

    def submit(self, worker: int, frame: pd.DataFrame, digests: list[bytes]) -> Future[str]:
        """Hands a unit to a worker."""
        return self._actors[worker].compute.remote(frame, digests).future()

    def restart(self, worker: int) -> None:
        """Puts another worker in the place of one that has died, on whichever machine has room."""
        self._ray.kill(self._actors[worker])
        self._actors[worker] = self._kind.remote(self._payload)

    def close(self) -> None:
        """Ends all workers; Ray itself stays as it is."""
        for actor in self._actors:
            self._ray.kill(actor)


ENGINES: dict[str, Any] = {'processes': Processes, 'ray': RayActors}
