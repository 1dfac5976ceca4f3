"""What the benchmarks share: their options, running a suite case by case, and telling its results."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from moba_lab.bench.cases import Shape
from moba_lab.bench.machine import DTYPES
from moba_lab.bench.report import Panels, Records, Rows, plot_growth, table, write

TokensOption = Annotated[int | None, typer.Option(help="Measure one case of this many tokens, not the suite.", min=1)]
HeadsOption = Annotated[int, typer.Option(help="Query heads of the one case.", min=1)]
KvHeadsOption = Annotated[int | None, typer.Option(help="Key/value heads of the one case; as many by default.", min=1)]
HeadDimOption = Annotated[int, typer.Option(help="Head dim of the one case.", min=1)]
BlockSizeOption = Annotated[int, typer.Option(help="Block size of the one case.", min=1)]
TopkOption = Annotated[int, typer.Option(help="Top-k of the one case, the own block included.", min=1)]
DtypeOption = Annotated[str, typer.Option(help="fp32, bf16 or fp16, for the one case.")]
DeviceOption = Annotated[str, typer.Option(help='"cpu", "cuda", or "auto".')]
BackendOption = Annotated[str, typer.Option(help="Backend to measure.")]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", "--output", "-o", metavar="PREFIX", help="Write PREFIX.json, PREFIX.md and PREFIX.png."),
]
RepeatsOption = Annotated[int, typer.Option(help="Measured runs of each, of which the median is taken.", min=1)]


def dtype_of(name: str) -> torch.dtype:
    """The dtype that `--dtype` names.

    Raises:
        typer.BadParameter: if it names none.
    """
    if name not in DTYPES:
        raise typer.BadParameter(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def run_suite(
    cases: Sequence[Shape],
    device: torch.device,
    header: dict[str, str],
    out: Path | None,
    run: Callable[[Any], dict[str, Any]],
    rows: Rows,
    panels: Panels,
) -> None:
    """Measure every case, write OUT's files, print the table and the whole result as JSON.

    Raises:
        typer.Exit: with 1 if a case failed its check.
    """
    records: Records = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=case.name)
            records.append(run(case))
            if device.type == "cuda":
                torch.cuda.empty_cache()
            progress.advance(task)
            if out is not None:  # after every case, so that a run cut short keeps what it measured
                write(header, records, out, rows)
    tell(header, records, rows)
    if out is not None:
        plot_growth(header["device"], *panels(records), out.with_suffix(".png"))
    if any("failed" in record for record in records):
        raise typer.Exit(1)


def tell(header: dict[str, str], records: Records, rows: Rows) -> None:
    """Print the header, the table, and last the whole result in one line of JSON."""
    for name, value in header.items():
        typer.echo(f"{name:>9}: {value}")
    Console(width=220).print(table(records, rows))
    typer.echo(json.dumps({"header": header, "records": records}))
