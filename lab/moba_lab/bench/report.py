"""Results as a table, as files and as a picture."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from moba.files import write_json
from moba_lab.checks import require_packages

Records = list[dict[str, Any]]
# Column titles and cells of records.
Rows = Callable[[Records], tuple[list[str], list[list[str]]]]

BASELINES = {"dense": "dense", "dense_fa2": "dense FA2", "dense_cudnn": "dense cuDNN", "dense_fa3": "dense FA3",
             "flex": "FlexAttention", "masked_sdpa": "dense, boolean mask", "reference": "reference"}  # fmt: skip


def rows(records: Records) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells: MoBA's times, then each baseline's with how many times longer it takes."""
    present = [name for name in BASELINES if any(name in record for record in records)]
    titles = ["case", "MoBA fwd ms", "routing alone ms", "fwd+bwd ms", "TFLOP/s", "peak MiB"]
    titles += [f"{BASELINES[name]} {what}" for name in present for what in ("fwd ms (×)", "fwd+bwd ms (×)")]
    cells = []
    for record in records:
        if problem := record.get("failed") or record["moba"].get("failed"):
            cells.append([record["case"], f"failed: {problem}", *[""] * (len(titles) - 2)])
            continue
        moba = record["moba"]
        line = [record["case"], _ms(moba["forward_ms"]), _ms(moba.get("routing_ms")), _ms(moba.get("train_ms"))]
        line += [f"{record['moba_flops'] / moba['forward_ms'] / 1e9:.3g}", _mib(moba["forward_peak_bytes"])]
        for name in present:
            baseline = record.get(name, {})
            for what in ("forward_ms", "train_ms"):
                line.append(_beside(baseline, moba, what))
        cells.append(line)
    return titles, cells


def table(records: Records, rows: Rows = rows) -> Table:
    """For the terminal."""
    titles, cells = rows(records)
    result = Table()
    for i, title in enumerate(titles):
        result.add_column(title, justify="left" if i == 0 else "right")
    for line in cells:
        result.add_row(*line)
    return result


def require_writable(out: Path) -> None:
    """Make OUT's folder, and check that OUT.json, OUT.md and OUT.png can be written.

    Raises:
        ModuleNotFoundError: without matplotlib.
        ValueError, OSError: if they cannot.
    """
    require_packages("matplotlib")
    out.parent.mkdir(parents=True, exist_ok=True)
    for path in (out.with_suffix(".json"), out.with_suffix(".md")):
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"--out: {path} cannot be written")


def write(header: dict[str, str], records: Records, out: Path, rows: Rows = rows) -> None:
    """Write OUT.json and OUT.md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.with_suffix(".json"), {"header": header, "records": records}, indent=1)
    out.with_suffix(".md").write_text(to_markdown(header, records, rows))


def to_markdown(header: dict[str, str], records: Records, rows: Rows = rows) -> str:
    """For a file."""
    titles, cells = rows(records)
    lines = [f"- {name}: {value}" for name, value in header.items()]
    lines += ["", "| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join(lines) + "\n"


def plot(header: dict[str, str], records: Records, path: Path) -> None:
    """Forward time against length, both axes logarithmic: a panel for each kind of heads, a line for each way."""
    import matplotlib.pyplot as plt

    from moba_lab.bench.cases import length_name

    records = [record for record in records if "failed" not in record]
    fixed = all(record["tokens"] == 64 * record["block_size"] for record in records)
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for record in records:
        heads = f"{record['heads']} query, {record['kv_heads']} key/value heads, {record['dtype']}"
        lines = panels.setdefault(heads, {})
        ways = {f"MoBA {'64 blocks' if fixed else record['block_size']}/{record['topk']}": record["moba"]}
        ways |= {title: record[name] for name, title in BASELINES.items() if name in record}
        for title, times in ways.items():
            if "forward_ms" in times:
                lines.setdefault(title, {})[record["tokens"]] = times["forward_ms"]
    # Heads that were measured at one length say little in a picture of growth; the table has them.
    grown = {heads: lines for heads, lines in panels.items() if any(len(points) > 1 for points in lines.values())}
    panels = grown or panels or {"nothing measured": {}}
    figure, all_axes = plt.subplots(
        1, len(panels), figsize=(2 + 6 * len(panels), 5), layout="constrained", squeeze=False
    )  # fmt: skip
    for axes, (heads, lines) in zip(all_axes[0], panels.items(), strict=True):
        for title, points in lines.items():
            style = {"marker": "o"} if title.startswith("MoBA") else {"marker": "s", "linestyle": "--"}
            lengths = sorted(points)
            axes.plot(lengths, [points[n] for n in lengths], label=title, markersize=4, **style)
        ticks = sorted({n for points in lines.values() for n in points})
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="forward, ms", title=heads)
        axes.set_xticks(ticks, [length_name(n) for n in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside the axes: no point lies under it
    figure.suptitle(header["device"])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.0f}"


def _beside(baseline: dict[str, Any], moba: dict[str, Any], what: str) -> str:
    if "failed" in baseline:
        return "failed"
    if baseline.get(what) is None:
        return ""
    return f"{_ms(baseline[what])} ({baseline[what] / moba[what]:.2g})" if moba.get(what) else _ms(baseline[what])
