"""What runs of `loss_against_time.py` show: losses over seconds and over tokens, as a table and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from from_scratch_report import DENSE, read_records

from moba.files import write_json
from moba_lab.bench.report import require_writable
from moba_lab.pictures.routings import INK, OWN_COLOUR, SHARE_COLOURS

_COLOURS = (OWN_COLOUR, SHARE_COLOURS[2], "#7a5195")

# The moments of an arm, the first at 0 seconds.
Run = list[dict[str, Any]]


def report(files: Sequence[Path], out: Path) -> None:
    """Write OUT.json (all moments), OUT.md and OUT.png.

    Args:
        files: of `loss_against_time.py train`, or an earlier OUT.json.

    Raises:
        ValueError: if dense attention or another arm was not trained to the end, or contexts differ.
    """
    require_writable(out)
    runs = complete(moment for path in files for moment in read_records(path, "moments"))
    arms = {run[-1]["arm"] for run in runs}
    if DENSE not in arms or len(arms) < 2:
        raise ValueError(f"dense and another arm must have ended, got {sorted(arms)} in {', '.join(map(str, files))}")
    if len(contexts := {run[-1]["context"] for run in runs}) > 1:
        raise ValueError(f"one report is of one context, got {sorted(contexts)}")
    write_json(out.with_suffix(".json"), {"moments": [moment for run in runs for moment in run]}, indent=None)
    out.with_suffix(".md").write_text(_markdown(runs))
    _picture(runs, out.with_suffix(".png"))


def complete(moments: Any) -> list[Run]:
    """Runs that ended, dense first; of an arm and seed that was trained again, the last."""
    runs: dict[tuple[str, int, int], Run] = {}
    for moment in moments:
        key = moment["arm"], moment["context"], moment["seed"]
        runs[key] = [*([] if moment["steps"] == 0 else runs.get(key, [])), moment]
    return sorted((run for run in runs.values() if "recipe" in run[-1]), key=lambda run: run[-1]["arm"] != DENSE)


def held_out(moment: dict[str, Any], which: str = "loss") -> float:
    """The mean of the sources' losses."""
    return statistics.mean(moment[which].values())


def training_loss(run: Run) -> list[tuple[float, float, float]]:
    """(seconds, tokens, loss) of about 60 stretches of the steps."""
    steps = [step for moment in run for step in moment["train"]]
    per_step = run[-1]["tokens"] / run[-1]["steps"]
    width = max(1, len(steps) // 60)
    parts = [steps[i : i + width] for i in range(0, len(steps) - width + 1, width)]
    return [
        (statistics.mean(at for at, _ in part), (i + 0.5) * width * per_step, statistics.mean(x for _, x in part))
        for i, part in enumerate(parts)
    ]


def passes(run: Run, loss: float) -> float | None:
    """Seconds after which a run's held-out loss is at most `loss`, between moments along a line; None: never."""
    if held_out(run[0]) <= loss:
        return 0.0
    for before, after in pairwise(run):
        high, low = held_out(before), held_out(after)
        if low <= loss:
            share = (high - loss) / (high - low)
            return float(before["seconds"] + share * (after["seconds"] - before["seconds"]))
    return None


def _name(run: Run) -> str:
    attention = run[-1]["recipe"]["attention"]
    if attention["schedule"] == "full":
        return DENSE
    kept = ", nearest kept" if attention["keep_recent"] else ""
    return f"MoBA {attention['block_size']} × {attention['topk']}{kept}"


def _markdown(runs: Sequence[Run]) -> str:
    first = runs[0][-1]
    start, sources = first["start"], list(first["loss"])
    begun = (
        f"one dense training on {start['tokens'] / 1e6:.1f}M tokens in rows of {start['context']:,} "
        f"({start['seconds']:.0f} s)"
        if start
        else "random weights"
    )
    lines = [
        f"# Loss against time at {first['context']:,} tokens of context",
        "",
        f"- {first['parameters'] / 1e6:.1f}M parameters; both arms start from {begun}",
        *(f"- {name}: {value}" for name, value in first["header"].items() if name != "threads"),
        "- seconds: of training steps alone; losses in nats; held-out: the mean of the sources",
        "",
        "| arm | seed | seconds | steps | tokens | tokens/s | share of the peak | GiB | training loss, last tenth "
        "| held-out | its last quarter of a row | " + " | ".join(sources) + " |",
        "|---|" + "---|" * (10 + len(sources)),
    ]
    for run in runs:
        end = run[-1]
        losses = [loss for moment in run for _, loss in moment["train"]]
        cells = [
            _name(run),
            end["seed"],
            f"{end['seconds']:.1f}",
            f"{end['steps']:,}",
            f"{end['tokens'] / 1e6:.1f}M",
            f"{end['tokens'] / end['seconds']:,.0f}",
            f"{end['flops_share']:.0%}",
            "" if end["memory"] is None else f"{end['memory']:.1f}",
            f"{statistics.mean(losses[-max(1, len(losses) // 10) :]):.4f}",
            f"{held_out(end):.4f}",
            f"{held_out(end, 'last'):.4f}",
            *(f"{end['loss'][source]:.4f}" for source in sources),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines.append("")
    for run in runs:
        dense = next((other for other in runs if _name(other) == DENSE and other[-1]["seed"] == run[-1]["seed"]), None)
        if dense is None or dense is run:
            continue
        end, goal = run[-1], held_out(dense[-1])
        times = passes(run, goal)
        reached = "never reaches dense's last loss" if times is None else f"has dense's last loss after {times:.0f} s"
        lines.append(
            f"- {_name(run)}, seed {end['seed']}: {end['tokens'] / dense[-1]['tokens']:.2f} times the tokens in the "
            f"same time; ends {held_out(end) - goal:+.4f} held-out, "
            f"{held_out(end, 'last') - held_out(dense[-1], 'last'):+.4f} in the last quarter of a row; {reached}"
        )
    return "\n".join(lines) + "\n"


def _picture(runs: Sequence[Run], path: Path) -> None:
    """Held-out losses with points, training losses thin: over seconds, and over tokens."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(12, 4.4), sharey=True, layout="constrained")
    arms = list(dict.fromkeys(_name(run) for run in runs))
    colours = {arm: INK if arm == DENSE else _COLOURS[(i - 1) % len(_COLOURS)] for i, arm in enumerate(arms)}
    shown: set[str] = set()
    for run in runs:
        arm = _name(run)
        label, colour = arm if arm not in shown else None, colours[arm]
        shown.add(arm)
        smooth = training_loss(run)
        for panel, name, place, unit in ((panels[0], "seconds", 0, 1.0), (panels[1], "tokens", 1, 1e6)):
            at = [moment[name] / unit for moment in run]
            panel.plot(at, [held_out(moment) for moment in run], "o-", color=colour, markersize=5, label=label)
            panel.plot([part[place] / unit for part in smooth], [part[2] for part in smooth], color=colour,
                       linewidth=0.8, alpha=0.5)  # fmt: skip
    goal = min(held_out(run[-1]) for run in runs if _name(run) == DENSE)
    for panel, text in zip(panels, ("seconds of training", "million tokens read"), strict=True):
        panel.axhline(goal, color=INK, linewidth=0.8, linestyle=":")
        panel.set_xlabel(text)
    panels[0].set_ylabel("loss (nats)")
    panels[0].plot([], [], color=INK, linewidth=0.8, alpha=0.5, label="training")
    panels[0].plot([], [], color=INK, linewidth=0.8, linestyle=":", label="dense attention's last, held-out")
    panels[0].legend(fontsize=8)
    end = runs[0][-1]
    device = end["header"]["device"]
    figure.suptitle(f"The same time at {end['context']:,} tokens of context, {end['parameters'] / 1e6:.0f}M, {device}")
    figure.savefig(path, dpi=120)
    plt.close(figure)
