"""What runs of `from_scratch.py` show: arms beside dense attention, seed by seed, as a table and a picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from from_scratch_measure import COPY_DISTANCES

from moba.files import write_json
from moba_lab.bench.report import require_writable
from moba_lab.pictures.routings import INK, OWN_COLOUR, SHARE_COLOURS

Run = dict[str, Any]
DENSE = "dense"


def report(files: Sequence[Path], out: Path) -> None:
    """Write OUT.json (all runs), OUT.md and OUT.png.

    Args:
        files: of `from_scratch.py train`, or an earlier OUT.json.

    Raises:
        ValueError: if no run of dense attention is among them.
    """
    require_writable(out)
    runs = [run for path in files for run in read_records(path, "runs")]
    ended = [run for run in runs if "error" not in run]
    if not any(run["arm"] == DENSE for run in ended):
        raise ValueError(f"there is no run of dense attention in {', '.join(map(str, files))}")
    write_json(out.with_suffix(".json"), {"runs": runs}, indent=None)
    out.with_suffix(".md").write_text(_markdown(ended, [run for run in runs if "error" in run]))
    _picture(ended, out.with_suffix(".png"))


def read_records(path: Path, key: str) -> list[dict[str, Any]]:
    """The lines of a .jsonl file, or what an earlier report's .json holds under a key."""
    text = path.read_text()
    if path.suffix == ".json":
        records: list[dict[str, Any]] = json.loads(text)[key]
        return records
    return [json.loads(line) for line in text.splitlines()]


def _mean(values: dict[str, float]) -> float:
    return statistics.mean(values.values())


def last_tenth(run: Run) -> float:
    """The training loss over the last tenth of the steps."""
    return statistics.mean(run["train"][-max(1, len(run["train"]) // 10) :])


def copied(distance: int) -> Callable[[Run], float]:
    """What a passage costs the second time less than the first, in the mean of the sources."""
    return lambda run: statistics.mean(x["first"] - x["second"] for x in run["copy"][str(distance)].values())


def differences(runs: Sequence[Run], arm: str, value: Callable[[Run], float]) -> list[float]:
    """A value of an arm's runs minus that of dense attention, for each seed that both have."""
    dense = {run["seed"]: value(run) for run in runs if run["arm"] == DENSE}
    return [value(run) - dense[run["seed"]] for run in runs if run["arm"] == arm and run["seed"] in dense]


def _told(values: Sequence[float], sign: str = "+") -> str:
    """Mean ± standard error, of one value without the error."""
    if not values:
        return ""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{error}"


def _columns(runs: Sequence[Run]) -> dict[str, Callable[[Run], float]]:
    sources = runs[0]["loss"]
    by_source = {source: lambda run, source=source: run["loss"][source] for source in sources}
    return {
        "held-out": lambda run: _mean(run["loss"]),
        **by_source,
        "last 1,024": lambda run: _mean(run["last"]),
        "training, last tenth": last_tenth,
        **{f"copy at {distance:,}": copied(distance) for distance in COPY_DISTANCES},
    }


def _markdown(runs: Sequence[Run], failed: Sequence[Run]) -> str:
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    columns, first = _columns(runs), runs[0]
    recipe = first["recipe"]
    tokens = recipe["training"]["tokens"]
    lines = [
        "# MoBA beside dense attention, from random weights",
        "",
        f"- {first['parameters'] / 1e6:.1f}M parameters, {tokens:,} tokens, rows of {recipe['data']['context']:,}",
        *(f"- {name}: {value}" for name, value in first["header"].items() if name != "threads"),
        "- losses in nats; an arm's are differences from dense attention, seed by seed: mean ± standard error over "
        "seeds, none for one seed; dense's own ± is over seeds, too",
        "- held-out: the mean of the sources; copy: how much less a passage costs when it is read again so many tokens "
        "later",
        *(f"- {run['arm']}, seed {run['seed']} failed: {run['error']}" for run in failed),
        "",
        "| arm | seeds | " + " | ".join(columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for arm in arms:
        mine = [run for run in runs if run["arm"] == arm]
        cells = [
            _told([value(run) for run in mine], "") if arm == DENSE else _told(differences(runs, arm, value))
            for value in columns.values()
        ]
        lines.append(f"| {arm} | {len(mine)} | " + " | ".join(cells) + " |")
    lines += ["", "| arm | mass covered | best choice | tokens/s | share of the peak |", "|---|---|---|---|---|"]
    for arm in arms:
        mine = [run for run in runs if run["arm"] == arm]
        masses = [
            f"{statistics.mean(run[name] for run in mine):.3f}" if all(name in run for run in mine) else ""
            for name in ("covered", "best")
        ]
        rate, share = (statistics.median(run[name] for run in mine) for name in ("tokens_per_s", "flops_share"))
        lines.append(f"| {arm} | {masses[0]} | {masses[1]} | {rate:,.0f} | {share:.0%} |")
    lines += [
        "",
        "Mass covered: by the chosen blocks, of the model's attention where a query has more blocks than places; of "
        "dense attention, read with the blocks that MoBA would choose. The arms' settings: ARMS in from_scratch.py.",
    ]
    return "\n".join(lines) + "\n"


def _picture(runs: Sequence[Run], path: Path) -> None:
    """Each seed's difference from dense attention, by arm; and the training losses' over tokens."""
    import matplotlib.pyplot as plt
    import numpy as np

    arms = [arm for arm in dict.fromkeys(run["arm"] for run in runs) if arm != DENSE]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 1.8 + 0.42 * max(4, len(arms))), layout="constrained")
    shown = {"held-out": (SHARE_COLOURS[3], "o", -0.16), "last 1,024 tokens of a row": (OWN_COLOUR, "s", 0.16)}
    for name, (colour, marker, shift) in shown.items():
        key = "loss" if name == "held-out" else "last"
        for place, arm in enumerate(arms):
            values = differences(runs, arm, lambda run, key=key: _mean(run[key]))
            left.plot(values, [place + shift] * len(values), marker, color=colour, alpha=0.45, markersize=5)
            if values:
                label = name if place == 0 else None
                left.plot([statistics.mean(values)], [place + shift], "|", color=colour, markersize=16, label=label)
    left.axvline(0, color=INK, linewidth=1)
    left.set_yticks(range(len(arms)), arms)
    left.invert_yaxis()
    left.set_xlabel("loss − dense attention's (nats); a point is a seed, a bar their mean")
    left.legend(fontsize=8)
    dense = {run["seed"]: np.array(run["train"]) for run in runs if run["arm"] == DENSE}
    recipe = runs[0]["recipe"]
    per_step = recipe["training"]["rows_per_step"] * recipe["data"]["context"] / 1e6
    for place, arm in enumerate(arms):
        curves = [
            np.array(run["train"]) - dense[run["seed"]] for run in runs if run["arm"] == arm and run["seed"] in dense
        ]
        if not curves:
            continue
        steps = len(curves[0])
        width = max(1, steps // 24)
        smooth = np.mean(curves, axis=0)[: steps // width * width].reshape(-1, width).mean(axis=1)
        right.plot((np.arange(len(smooth)) + 0.5) * width * per_step, smooth, color=plt.cm.tab10(place % 10), label=arm)
    right.axhline(0, color=INK, linewidth=1)
    right.set_xlabel("million tokens read")
    right.set_ylabel("training loss − dense attention's")
    right.legend(fontsize=8)
    figure.suptitle(f"MoBA beside dense attention, {runs[0]['parameters'] / 1e6:.0f}M parameters from random weights")
    figure.savefig(path, dpi=120)
    plt.close(figure)
