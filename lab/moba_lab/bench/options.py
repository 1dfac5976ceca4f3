"""Options that the benchmarks share: one case instead of the suite, and how often it is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

TokensOption = Annotated[int | None, typer.Option(help="Measure one case of this many tokens, not the suite.", min=1)]
HeadsOption = Annotated[int, typer.Option(help="Query heads of the one case.", min=1)]
KvHeadsOption = Annotated[int | None, typer.Option(help="Key/value heads of the one case; as many by default.", min=1)]
HeadDimOption = Annotated[int, typer.Option(help="Head dim of the one case.", min=1)]
BlockSizeOption = Annotated[int, typer.Option(help="Block size of the one case.", min=1)]
TopkOption = Annotated[int, typer.Option(help="Top-k of the one case, the own block included.", min=1)]
DtypeOption = Annotated[str, typer.Option(help="fp32, bf16 or fp16, for the one case.")]
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
