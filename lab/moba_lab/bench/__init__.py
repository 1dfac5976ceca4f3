"""`moba bench`: measurements a sceptic can repeat. Each command checks correctness first and ends in one JSON line."""

import typer

from moba_lab.bench import attention, decode, parallel

app = typer.Typer(
    help="Measure MoBA beside dense attention on this machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(attention.attention)
app.command()(decode.decode)
app.command()(parallel.parallel)
