"""The command line: `python -m pyterrier_mech …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Mechanistic interpretability of neural rankers as PyTerrier pipeline stages."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help='Folder for the results.')] = Path('mech-demo'),
    cutoff: Annotated[int, typer.Option(min=1, max=50, help='Documents of each query that are patched.')] = 3,
) -> None:
    """From BM25 to a heat map over the bundled collection, without a network."""
    from pyterrier_mech.lab.demo import run_demo

    run_demo(out, cutoff=cutoff)


@app.command()
def run(
    pipeline: Annotated[Path, typer.Argument(help='Python file that defines `pipeline` and `topics`.')],
    out: Annotated[Path, typer.Option(help='Folder of finished work and of the result.')],
    shard: Annotated[str, typer.Option(help='I/N: this process is number I, from 0, of N that share the work.')] = '',
    rows: Annotated[int, typer.Option(min=1, help='Rows of a unit of work, at most.')] = 256,
    workers: Annotated[int, typer.Option(min=1, help='Processes, or actors of Ray, with a model each.')] = 1,
    gpus: Annotated[float, typer.Option(min=0, help='GPUs that each worker has for itself.')] = 0,
    ray: Annotated[str, typer.Option(help="Address of a Ray cluster, or 'auto'.")] = '',
) -> None:
    """Runs a pipeline so that nothing is lost when it is killed: the same command goes on where it was."""
    from pyterrier_mech.durable.pipelines import RESULT, parse_shard, read_pipeline, run_pipeline

    settings: dict[str, Any] = {'workers': workers, 'gpus_per_worker': gpus} if workers > 1 or gpus or ray else {}
    try:
        (stages, topics), share = read_pipeline(pipeline), parse_shard(shard or '0/1')
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    if ray:
        import ray as ray_package

        ray_package.init(address=ray)
        settings['engine'] = 'ray'
    done = run_pipeline(stages, topics, out, shard=share, rows=rows, **settings)
    if done.result is None:
        typer.echo(f'Share {shard} of {done.stage!r} is done; {done.missing} rows of others are missing.')
        typer.echo('Run the same command again when they are there.')
    else:
        typer.echo(f'{len(done.result)} rows in {out / RESULT}: read them with pyterrier_mech.tables.read_frame.')
