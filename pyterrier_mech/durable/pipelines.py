"""A pipeline of a Python file, run over its topics with all work kept in a folder: what the command line does."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyterrier as pt

from pyterrier_mech.durable.distributed import Distributed
from pyterrier_mech.durable.resumable import Resumable, Shard
from pyterrier_mech.durable.rows import why_not
from pyterrier_mech.tables import write_frame

RESULT = 'result.parquet'


class Outcome(NamedTuple):
    """What a run gave: the result; or None, and the stage of which rows of other shards are missing."""

    result: pd.DataFrame | None
    stage: Any = None
    missing: int = 0


def read_pipeline(file: Path) -> tuple[list[Any], pd.DataFrame]:
    """Runs a Python file; returns the stages of its `pipeline` and the frame of its `topics`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not define both.
    """
    if not file.is_file():
        raise FileNotFoundError(f'There is no file {str(file)!r}. Give a Python file that defines pipeline and topics.')
    found = runpy.run_path(str(file))
    pipeline, topics = found.get('pipeline'), found.get('topics')
    if not isinstance(pipeline, pt.Transformer) or not isinstance(topics, pd.DataFrame):
        raise ValueError(
            f'{str(file)!r} must define pipeline, a PyTerrier pipeline, and topics, the frame that it is run over; '
            f'got pipeline={type(pipeline).__name__} and topics={type(topics).__name__}'
        )
    return list(getattr(pipeline, '_transformers', [pipeline])), topics


def run_pipeline(
    stages: Sequence[Any], topics: pd.DataFrame, out: Path, *, shard: Shard = (0, 1), rows: int = 256, **settings: Any
) -> Outcome:
    """Runs stages one after the other; those that treat every row by itself keep their work in a folder.

    With a shard, this process computes its share of the units of a stage. If the other shares are there too, it goes on
    with the next stage, and who goes on to the end writes the result; else it stops.

    Args:
        stages: The stages of a pipeline.
        topics: What the first one reads.
        out: The folder, for units and result.
        shard: (i, n): this process is the i-th of n, from 0.
        rows: Rows of a unit, at most.
        **settings: What `Distributed` takes; `Resumable` runs without.
    """
    frame: Any = topics
    for stage in stages:
        if why_not(stage):
            frame = stage(frame)
            continue
        kept = (Distributed if settings else Resumable)(stage, out, rows=rows, verbose=True, **settings)
        if shard[1] > 1:
            status = kept.work(frame, shard)
            if status.missing:
                return Outcome(None, stage, status.missing)
        frame = kept(frame)
    out.mkdir(parents=True, exist_ok=True)
    write_frame(frame, out / RESULT)
    return Outcome(frame)


def parse_shard(text: str) -> Shard:
    """Returns (i, n) of 'i/n'.

    Raises:
        ValueError: If it is something else.
    """
    part, slash, parts = text.partition('/')
    if not (slash and part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise ValueError(f"a shard must be I/N with I from 0 to N - 1, such as '0/4'; got {text!r}")
    return int(part), int(parts)
