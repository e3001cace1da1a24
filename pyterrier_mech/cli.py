"""The command line: `python -m pyterrier_mech …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
