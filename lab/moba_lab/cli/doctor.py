"""`moba doctor`: what this machine has, and whether it computes MoBA correctly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from moba_lab.doctor import Check


def doctor(
    selftest: Annotated[
        bool,
        typer.Option(
            "--selftest", help="Check every backend that runs here, forward and backward; exit code 1 if one fails."
        ),
    ] = False,
) -> None:
    """Show versions, devices, and which backend "auto" takes on each device and why."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from moba_lab.doctor import backend_states, devices, versions

    console = Console(highlight=False)
    for title, facts in (("versions", versions()), ("devices", devices())):
        table = Table(title, "", box=SIMPLE_HEAD)
        for name, value in facts.items():
            table.add_row(name, value, style="dim" if value == "not installed" else None)
        console.print(table)
    table = Table("device", "backend", '"auto"', "", box=SIMPLE_HEAD)
    for state in backend_states():
        table.add_row(state.device, state.backend, "taken" if state.is_auto else "", state.reason or state.why)
    console.print(table)
    if selftest and not _print_selftest(console):
        raise typer.Exit(1)


def _print_selftest(console: Console) -> bool:
    """Run the self-test and show each check; whether all passed."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from moba_lab.doctor import selftest

    groups: dict[tuple[str, str, str], list[Check]] = {}
    with console.status("checking …"):
        for check in selftest():
            dtype = str(check.dtype).removeprefix("torch.")
            groups.setdefault((check.device, check.backend, dtype), []).append(check)
    table = Table("self-test", "output error", "gradient error", "bound", "", box=SIMPLE_HEAD)
    failures = []
    for names, checks in groups.items():
        worst = [max(c.out_error for c in checks), max(c.grad_error for c in checks), checks[0].bound]
        problems = [f"{' '.join(names)}, {c.case}: {c.problem}" for c in checks if c.problem]
        verdict = "[red]fails[/red]" if problems else "passes"
        table.add_row(" ".join(names), *(f"{x:.1e}" for x in worst), verdict)
        failures += problems
    console.print(table)
    for failure in failures:
        console.print(f"[red]failed:[/red] {escape(failure)}", soft_wrap=True)
    if not failures:
        console.print(
            "Blocks as the reference's, results repeat bit for bit, errors (relative, against fp64) in bounds."
        )
    return not failures
