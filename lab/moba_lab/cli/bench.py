"""`moba bench`: the benchmarks of this installation."""

from __future__ import annotations

import typer


def bench(context: typer.Context) -> None:
    """Time MoBA beside dense attention on this machine (`moba bench --help` lists the benchmarks)."""
    from moba_lab.bench import attention, decode, first_calls, parallel, train

    app = typer.Typer(
        help="Measure MoBA beside dense attention on this machine. Each command checks correctness first and ends in "
        "one line of JSON.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for command in (attention.attention, decode.decode, train.train, first_calls.first_calls, parallel.parallel):
        app.command()(command)
    code = app(context.args, prog_name="moba bench", standalone_mode=False)
    raise typer.Exit(code if isinstance(code, int) else 0)
