"""Results as a table, as files and as a picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

Records = list[dict[str, Any]]
# Column titles and cells of records.
Rows = Callable[[Records], tuple[list[str], list[list[str]]]]

BASELINES = {"dense": "dense", "dense_fa2": "dense FA2", "dense_cudnn": "dense cuDNN", "dense_fa3": "dense FA3",
             "flex": "FlexAttention", "masked_sdpa": "dense, boolean mask", "reference": "reference"}  # fmt: skip


def rows(records: Records) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells: MoBA's times, then each baseline's with how many times longer it takes."""
    present = [name for name in BASELINES if any(name in record for record in records)]
    titles = ["case", "MoBA fwd ms", "of that routing", "fwd+bwd ms", "TFLOP/s", "peak MiB"]
    titles += [f"{BASELINES[name]} {what}" for name in present for what in ("fwd ms (×)", "fwd+bwd ms (×)")]
    cells = []
    for record in records:
        if problem := record.get("failed") or record["moba"].get("failed"):
            cells.append([record["case"], f"failed: {problem}", *[""] * (len(titles) - 2)])
            continue
        moba = record["moba"]
        line = [record["case"], _ms(moba["forward_ms"]), _ms(moba["routing_ms"]), _ms(moba.get("train_ms"))]
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


def write(header: dict[str, str], records: Records, out: Path, rows: Rows = rows) -> None:
    """Write OUT.json and OUT.md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps({"header": header, "records": records}, indent=1) + "\n")
    out.with_suffix(".md").write_text(to_markdown(header, records, rows))


def to_markdown(header: dict[str, str], records: Records, rows: Rows = rows) -> str:
    """For a file."""
    titles, cells = rows(records)
    lines = [f"- {name}: {value}" for name, value in header.items()]
    lines += ["", "| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join(lines) + "\n"


def plot(header: dict[str, str], records: Records, path: Path) -> None:
    """Forward time against length, a line for each shape and baseline, both axes logarithmic."""
    import matplotlib.pyplot as plt

    from moba.bench.cases import length_name

    lines: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if "failed" in record:
            continue
        fixed = record["tokens"] == 64 * record["block_size"] and record["heads"] == 1
        shape = "64 blocks" if fixed else f"{record['block_size']}"
        heads = f"{record['heads']} heads" if record["heads"] == record["kv_heads"] else "GQA"
        label = f"MoBA {shape}/{record['topk']}, {heads}, {record['dtype']}"
        lines.setdefault(label, []).append((record["tokens"], record["moba"].get("forward_ms")))
        for name, title in BASELINES.items():
            if record.get(name, {}).get("forward_ms") is not None:
                points = lines.setdefault(f"{title}, {heads}, {record['dtype']}", [])
                if record["tokens"] not in [tokens for tokens, _ in points]:
                    points.append((record["tokens"], record[name]["forward_ms"]))
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for label, points in lines.items():
        points.sort()
        style = "o-" if label.startswith("MoBA") else "s--"
        axes.plot([n for n, _ in points], [ms for _, ms in points], style, label=label, markersize=4)
    ticks = sorted({n for points in lines.values() for n, _ in points})
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="forward, ms", title=header["device"])
    axes.set_xticks(ticks, [length_name(n) for n in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left")
    figure.savefig(path, dpi=130)
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
