"""`moba bench`: the benchmarks of this installation."""

from __future__ import annotations

import typer


def bench(context: typer.Context) -> None:
    """Time MoBA beside dense attention on this machine (`moba bench --help` lists the benchmarks)."""
    from moba_lab.bench import app

    code = app(context.args, prog_name="moba bench", standalone_mode=False)
    raise typer.Exit(code if isinstance(code, int) else 0)
