"""Tables of runs that differ in their attention: losses, and the others' differences from the dense run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from from_scratch_report.runs import (
    FULL,
    ROUTING_PARTS,
    Family,
    Result,
    difference,
    mean_and_error,
    own_positions,
    routing_curves,
    training_gaps,
)
from moba_lab.bench.report import to_markdown


def tables(families: Sequence[Family]) -> str:
    """Markdown: every table of the first family's first seed, the losses of the others."""
    lines = ["# MoBA beside full attention, from scratch", "", *_heading(families[0])]
    lines += _all_tables(families[0].of_first_seed(), families[0].stopped_of_first_seed())
    for family in families[1:]:
        lines += [*_heading(family), *_losses(family)]
    return "\n".join(lines).rstrip() + "\n"


def _heading(family: Family) -> list[str]:
    first = family.of_first_seed()
    dense = first["dense"]
    header, context = dense["header"], dense["recipe"]["data"]["context"]
    sources = "; ".join(
        f"{source} {about['rows']} out of {about['documents']} documents" for source, about in dense["sources"].items()
    )
    return [
        f"## {dense['parameters'] / 1e6:.1f}M parameters, {dense['checkpoints'][-1]['tokens'] / 1e6:.3g}M tokens, "
        f"{context:,} a row",
        "",
        f"- {dense['unique_tokens'] / 1e6:.3g}M different tokens are read, as often as it takes",
        *(f"- {name}: {header[name]}" for name in ("device", "versions", "commit", "date")),
        *(_origin(name, run, header) for name, run in first.items()),
        *(_origin_of_stopped(name, run) for name, run in family.stopped_of_first_seed().items()),
        f"- evaluated in {dense['precision']}, seeds {', '.join(map(str, family.runs))}",
        f"- held-out rows: {sources}",
        "- ±: standard error over rows; differences are taken row by row",
        "",
    ]


def _origin(name: str, run: Result, header: Mapping[str, str]) -> str:
    """The command that measured a run, where that differs from `header`, and the run's note."""
    own = run["header"]
    differing = [f"{key} {own[key]}" for key in ("device", "versions", "commit") if own[key] != header[key]]
    return f"- {name}: " + "; ".join([f"`{own['command']}`", *differing, *_note(run)])


def _origin_of_stopped(name: str, run: Result) -> str:
    return f"- {name}: " + "; ".join([f"stopped at step {run['log']['train'][-1][0]:,}, not measured", *_note(run)])


def _note(run: Result) -> list[str]:
    return [run["note"]] if "note" in run else []


def _all_tables(runs: Mapping[str, Result], stopped: Mapping[str, Result]) -> list[str]:
    return [
        *_summary(runs),
        *_losses(Family(list(runs.values()))),
        *_split(runs),
        *_by_position(runs),
        *_copying(runs),
        *_routing_tables(runs),
        *_training(runs),
        *_until_stopped(runs, stopped),
    ]


def _table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]], level: int = 3) -> list[str]:
    return [f"{'#' * level} {title}", to_markdown({}, [], lambda _: (list(columns), [list(line) for line in lines]))]


def _summary(runs: Mapping[str, Result]) -> list[str]:
    sources = list(runs["dense"]["sources"])
    lines = []
    for name, run in runs.items():
        line = [name]
        for what in ("loss", "last"):
            values = [mean_and_error(own_positions(run)[source][what]) for source in sources]
            line.append(
                f"{_mean_of_sources(values)[0]:.4f}"
                if name == "dense"
                else _with_error(*_gap_of_sources(run, runs["dense"], sources, what), sign="+")
            )
        ours, theirs = _last_tenth(run), _last_tenth(runs["dense"])
        line.append(
            f"{statistics.mean(ours):.4f}" if name == "dense" else _with_error(*difference(ours, theirs), sign="+")
        )
        rate = run["log"]["tokens_per_s"]
        lines.append([*line, "" if rate is None else f"{rate:,.0f}"])
    columns = ["run", "held-out loss", "its last eighth of a row", "training loss, last tenth of the steps", "tokens/s"]
    return _table("Dense, and the others' difference (nats; held-out: the mean of the sources)", columns, lines)


def _gap_of_sources(run: Result, dense: Result, sources: Sequence[str], what: str) -> tuple[float, float]:
    ours, theirs = own_positions(run), own_positions(dense)
    return _mean_of_sources([difference(ours[source][what], theirs[source][what]) for source in sources])


def _losses(family: Family) -> list[str]:
    sources = list(family.of_first_seed()["dense"]["sources"])
    has_seeds = len(family.runs) > 1
    result = ["### Held-out loss at the end (nats)", ""]
    for part in ([sources] if len(sources) > 1 else []) + [[source] for source in sources]:
        lines = []
        for seed, runs in sorted(family.runs.items()):
            for name, run in {"dense": runs["dense"], **runs}.items():
                line = [name, *([str(seed)] if has_seeds else [])]
                for what in ("loss", "last"):
                    values = [mean_and_error(own_positions(run)[source][what]) for source in part]
                    gap = _gap_of_sources(run, runs["dense"], part, what)
                    line.append(_with_error(*_mean_of_sources(values)))
                    line.append("" if name == "dense" else _with_error(*gap, sign="+"))
                lines.append(line)
        columns = ["run", *(["seed"] if has_seeds else []), "loss", "− dense", "last eighth", "− dense"]
        result += _table(part[0] if len(part) == 1 else "Mean of the sources", columns, lines, level=4)
    return result


def _mean_of_sources(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of means and standard errors of independent rows, each source counted alike."""
    return statistics.mean(mean for mean, _ in parts), math.hypot(*(error for _, error in parts)) / len(parts)


def read_losses(run: Result, source: str) -> dict[str, float]:
    """Attention that the last model is read with -> mean held-out loss of a source."""
    return {name: statistics.mean(read["positions"][source]["loss"]) for name, read in run["final"].items()}


def _split(runs: Mapping[str, Result]) -> list[str]:
    """What each model loses by its weights and by its reading, and its losses with every attention."""
    sources = list(runs["dense"]["sources"])
    names = list(dict.fromkeys(name for run in runs.values() for name in run["final"]))
    parts: list[list[Any]] = []
    losses: list[list[str]] = []
    for source in sources:
        dense = read_losses(runs["dense"], source)[FULL]
        for title, run in runs.items():
            read = read_losses(run, source)
            own = read[run["own"]]
            losses.append([source, title, *(f"{read[name]:.4f}" if name in read else "" for name in names)])
            if title != "dense":
                parts.append([source, title, own - dense, read[FULL] - dense, own - read[FULL]])
    if len(sources) > 1:
        for title, run in reversed(list(runs.items())):
            reads = [read_losses(run, source) for source in sources]
            cells = [f"{statistics.mean(r[name] for r in reads):.4f}" if name in reads[0] else "" for name in names]
            losses.insert(0, ["mean", title, *cells])
    means = [
        ["mean", title, *(statistics.mean(part[i] for part in parts if part[1] == title) for i in (2, 3, 4))]
        for title in runs
        if title != "dense"
    ]
    differences = [[*part[:2], *(f"{value:+.4f}" for value in part[2:])] for part in [*means, *parts]]
    columns = ["source", "run", "− dense", "of that with full attention", "of that by reading with its own"]
    return [
        *_table("The difference, split: what a reading with full attention leaves, and the rest", columns, differences),
        *_table("Each last model read with each attention: held-out loss", ["source", "run", *names], losses),
    ]


def _by_position(runs: Mapping[str, Result]) -> list[str]:
    bins = runs["dense"]["bins"]
    others = [name for name in runs if name != "dense"]
    result = ["### Loss by position: dense, and each run's difference", ""]
    for source in runs["dense"]["sources"]:
        theirs = own_positions(runs["dense"])[source]["bins"]
        lines = [
            [f"{start:,} … {stop - 1:,}", f"{statistics.mean(theirs[i]):.4f}"]
            + [_with_error(*difference(own_positions(runs[n])[source]["bins"][i], theirs[i]), sign="+") for n in others]
            for i, (start, stop) in enumerate(pairwise(bins))
        ]
        result += _table(source, ["position", "dense", *others], lines, level=4)
    return result


def _copying(runs: Mapping[str, Result]) -> list[str]:
    copies = {name: run["final"][run["own"]]["copy"] for name, run in runs.items()}
    distances = list(copies["dense"])
    lines = []
    for source in runs["dense"]["sources"]:
        for name, copy in copies.items():
            values = [copy[distance][source] for distance in distances]
            lines.append(
                [
                    source,
                    name,
                    *(f"{statistics.mean(v['second']):.3f} ({statistics.mean(v['first']):.3f})" for v in values),
                ]
            )
    return [
        *_table(
            "A passage that comes twice: its loss the second time (the first time)",
            ["source", "run", *(f"{int(distance):,} tokens later" for distance in distances)],
            lines,
        ),
        "A model that copies would lose almost nothing the second time. These hardly do: what the second time costs is",
        "decided by where the passage stands, at the end of the row and out of the text that led to it.",
        "",
    ]


def _routing_tables(runs: Mapping[str, Result]) -> list[str]:
    curves = routing_curves(runs)
    tokens = sorted({count for points in curves.values() for count in points})
    result = ["### Attention mass over the training", ""]
    for what, title in ROUTING_PARTS.items():
        lines = [
            [name, *(f"{points[count][what]:.1%}" if count in points else "" for count in tokens)]
            for name, points in curves.items()
        ]
        result += _table(
            title.capitalize(), ["million tokens read", *(f"{count / 1e6:.1f}" for count in tokens)], lines, 4
        )
    layers = [
        [name, f"{count / 1e6:.1f}", *(f"{values['covered']:.0%}" for values in points[count]["layers"].values())]
        for name, points in curves.items()
        for count in (min(points), max(points))
    ]
    width = max(map(len, layers))
    layers = [line + [""] * (width - len(line)) for line in layers]
    columns = ["run", "million tokens read", *map(str, range(width - 2))]
    return result + _table("In the chosen blocks, by layer that routes", columns, layers, 4)


def _training(runs: Mapping[str, Result]) -> list[str]:
    dense = runs["dense"]
    steps = [0, *(point["step"] for point in dense["checkpoints"])]
    columns = [f"… {point['tokens'] / 1e6:.0f}M" for point in dense["checkpoints"]]
    losses = [(step, loss) for step, _, loss, _ in dense["log"]["train"]]
    lines = [["dense", *(f"{mean:.4f}" for mean in _means_between(losses, steps))]]
    lines += [[name, *_gaps_between(run, dense, steps)] for name, run in runs.items() if name != "dense"]
    return _table(
        "Training loss between checkpoints: dense, and each run's difference", ["tokens read", *columns], lines
    )


def _until_stopped(runs: Mapping[str, Result], stopped: Mapping[str, Result]) -> list[str]:
    """For each run that did not end, its differences from the dense run, and those of the others up to that step."""
    dense, result = runs["dense"], []
    for title, short in stopped.items():
        last, tokens, *_ = short["log"]["train"][-1]
        before = [point for point in dense["checkpoints"] if point["step"] < last]
        steps = [0, *(point["step"] for point in before), last]
        columns = [f"… {count / 1e6:.0f}M" for count in [*(point["tokens"] for point in before), tokens]]
        lines = []
        for name, run in {title: short, **runs}.items():
            if name != "dense":
                gaps = [gap for step, _, gap in training_gaps(run, dense) if step <= last]
                extremes = [f"{min(gaps):+.4f}", f"{max(gaps):+.4f}"]
                lines.append([name, *_gaps_between(run, dense, steps), *extremes])
        result += _table(
            f"Training loss minus dense until {title} was stopped: between checkpoints, and the least and most logged",
            ["tokens read", *columns, "least", "most"],
            lines,
        )
    return result


def _gaps_between(run: Result, dense: Result, steps: Sequence[int]) -> list[str]:
    gaps = [(step, gap) for step, _, gap in training_gaps(run, dense)]
    return [f"{mean:+.4f}" for mean in _means_between(gaps, steps)]


def _means_between(values: Sequence[tuple[int, float]], steps: Sequence[int]) -> list[float]:
    """The mean of what was logged after each step, until and with the next."""
    return [statistics.mean(value for step, value in values if start < step <= stop) for start, stop in pairwise(steps)]


def _last_tenth(run: Result) -> list[float]:
    losses = [loss for _, _, loss, _ in run["log"]["train"]]
    return losses[-max(2, len(losses) // 10) :]


def _with_error(mean: float, error: float, sign: str = "") -> str:
    return f"{mean:{sign}.4f} ± {error:.4f}"
