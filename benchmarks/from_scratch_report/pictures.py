"""Pictures of runs that differ in their attention, over tokens read and over positions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from from_scratch_report.runs import ROUTING_PARTS, Result, difference, own_positions, routing_curves, training_gaps
from moba_lab.pictures.evaluations import Panel, plot_panels

MILLION = 1e6
TOKENS_READ = "million tokens read"
# Colours go by place: where differences from the dense run are drawn, it has no curve, and keeps its colour.
NO_CURVE: tuple[list[float], list[float]] = ([], [])
AT_ZERO = {"dense": 0.0}


def pictures(runs: Mapping[str, Result], stopped: Mapping[str, Result]) -> dict[str, Any]:
    """Name -> matplotlib figure: training loss, held-out loss, both over tokens; loss by position; routing.

    Runs that did not end are in the first of them.
    """
    dense = runs["dense"]
    size = f"{dense['parameters'] / MILLION:.0f}M parameters, rows of {dense['recipe']['data']['context']:,} tokens"
    middle = [(start + stop) / 2 for start, stop in pairwise(dense["bins"])]
    loss = _losses_and_gaps(
        runs,
        TOKENS_READ,
        lambda run: [point["tokens"] / MILLION for point in run["checkpoints"]],
        lambda run, source: [point["sources"][source]["loss"] for point in run["checkpoints"]],
    )
    positions = _losses_and_gaps(
        runs, "position", lambda run: middle, lambda run, source: own_positions(run)[source]["bins"]
    )
    return {
        "training": plot_panels([_training(runs, stopped)], f"Training loss · {size}"),
        "loss": plot_panels(loss, f"Held-out loss over training · {size}"),
        "positions": plot_panels(positions, f"Loss by position · {size}"),
        "routing": plot_panels([_routing(runs)], f"What routing covers over training · {size}"),
    }


def _losses_and_gaps(
    runs: Mapping[str, Result],
    x_label: str,
    places: Callable[[Result], list[float]],
    rows: Callable[[Result, str], Sequence[Sequence[float]]],
) -> list[list[Panel]]:
    """Above the mean held-out losses, below their differences from the dense run; a panel for each source.

    Args:
        runs: by their names.
        x_label: of the places.
        places: run -> x.
        rows: run and source -> at each place, the losses of the rows.
    """
    dense = runs["dense"]
    others = {name: run for name, run in runs.items() if name != "dense"}

    def losses(run: Result, source: str) -> list[list[float]]:
        return [places(run), [statistics.mean(part) for part in rows(run, source)]]

    def gaps(run: Result, source: str) -> list[list[float]]:
        pairs = zip(rows(run, source), rows(dense, source), strict=True)
        return [places(run), *map(list, zip(*(difference(a, b) for a, b in pairs), strict=True))]

    above = [
        Panel({name: losses(run, source) for name, run in runs.items()}, x_label, "held-out loss (nats)", source)
        for source in dense["sources"]
    ]
    below = [
        Panel(
            {"dense": NO_CURVE, **{name: gaps(run, source) for name, run in others.items()}},
            x_label, "minus dense", marks=AT_ZERO,
        )
        for source in dense["sources"]
    ]  # fmt: skip
    return [above, below]


def _routing(runs: Mapping[str, Result]) -> list[Panel]:
    """The attention mass of the choices of blocks."""
    curves = routing_curves(runs)
    return [
        Panel(
            {n: ([t / MILLION for t in points], [v[what] for v in points.values()]) for n, points in curves.items()},
            TOKENS_READ, "share of the attention mass", title,
        )
        for what, title in ROUTING_PARTS.items()
    ]  # fmt: skip


def _training(runs: Mapping[str, Result], stopped: Mapping[str, Result]) -> list[Panel]:
    """The training loss, and the differences from the dense run."""
    shown = {**runs, **{f"{name}, stopped": run for name, run in stopped.items()}}
    logs = {name: run["log"]["train"] for name, run in shown.items()}
    losses = {name: ([step[1] / MILLION for step in log], [step[2] for step in log]) for name, log in logs.items()}
    gaps = {name: smooth_gaps(run, runs["dense"]) for name, run in shown.items() if name != "dense"}
    return [
        Panel(losses, TOKENS_READ, "training loss (nats)"),
        Panel({"dense": NO_CURVE, **gaps}, TOKENS_READ, "minus dense, mean of 5 logged", marks=AT_ZERO),
    ]


def smooth_gaps(run: Result, dense: Result) -> tuple[list[float], list[float]]:
    """Million tokens read, and the mean difference of five logged losses, of which it is the middle one's."""
    gaps = training_gaps(run, dense)
    middle = range(2, len(gaps) - 2)
    means = [statistics.mean(gap for _, _, gap in gaps[i - 2 : i + 3]) for i in middle]
    return [gaps[i][1] / MILLION for i in middle], means
