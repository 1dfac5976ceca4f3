"""Decode results as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moba_lab.bench.cases import length_name
from moba_lab.bench.report import Records

MARKS = "os^vDP"


def best_dense(record: dict[str, Any]) -> tuple[str, float] | None:
    """The fastest dense baseline and its time in ms, None if none ran."""
    times: dict[str, float] = record.get("dense_ms", {})
    return min(times.items(), key=lambda item: item[1]) if times else None


def rows(records: Records) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells: MoBA's step, the best dense one, each baseline with how many times longer it takes."""
    names = list(dict.fromkeys(name for r in records for name in (*r.get("dense_ms", {}), *r.get("dense_failed", {}))))
    titles = ["case", "MoBA µs", "µs a token", "MB read", "of copy rate", "best dense µs", "times longer", "MB",
              "of copy rate", "dense byte bound µs"]  # fmt: skip
    titles += names
    cells = []
    for record in records:
        if "failed" in record or "skipped" in record:
            what = "failed" if "failed" in record else "skipped"
            cells.append([record["case"], f"{what}: {record[what]}", *[""] * (len(titles) - 2)])
            continue
        ms, best = record["moba_ms"], best_dense(record)
        line = [
            record["case"],
            _us(ms) + (" (dense)" if record["is_dense"] else ""),
            _us(ms / record["batch"] / record["queries"]),
            _mb(record["moba_bytes"]),
        ]
        line.append(_share(record["moba_bound_ms"], ms))
        if best is None:
            line += [""] * 3
        else:
            line += [f"{_us(best[1])} ({best[0]})", f"{best[1] / ms:.3g}", _mb(record["dense_bytes"])]
        line += ["" if best is None else _share(record["dense_bound_ms"], best[1]), _us(record["dense_bound_ms"])]
        for name in names:
            time = record["dense_ms"].get(name)
            is_failed = name in record["dense_failed"]
            line.append("does not run" if is_failed else "" if time is None else f"{_us(time)} ({time / ms:.2g})")
        cells.append(line)
    return titles, cells


def plot(header: dict[str, str], records: Records, path: Path) -> None:
    """Time of a step against length, both axes logarithmic, one panel for each batch size."""
    import matplotlib.pyplot as plt

    done = [record for record in records if "moba_ms" in record]
    batches = sorted({record["batch"] for record in done}) or [1]
    figure, panels = plt.subplots(
        1, len(batches), figsize=(5.5 * len(batches), 4.5), layout="constrained", squeeze=False, sharey=True
    )
    for batch, axes in zip(batches, panels[0], strict=True):
        lines: dict[str, dict[int, float]] = {}
        for record in (record for record in done if record["batch"] == batch):
            rule = f"MoBA {record['block_size']}/{record['topk']}"
            lines.setdefault(rule, {})[record["tokens"]] = record["moba_ms"]
            if best := best_dense(record):
                lines.setdefault("best dense", {})[record["tokens"]] = best[1]
            lines.setdefault("dense, byte bound", {})[record["tokens"]] = record["dense_bound_ms"]
        for i, (label, points) in enumerate(lines.items()):
            style = ":" if "bound" in label else "--" if "dense" in label else "-"
            axes.plot(list(points), [1e3 * ms for ms in points.values()], style, marker=MARKS[i % 6], label=label)
        ticks = sorted({tokens for points in lines.values() for tokens in points})
        axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="a step, µs", title=f"batch {batch}")
        axes.set_xticks(ticks, [length_name(n) for n in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside the axes: no point lies under it
    figure.suptitle(header["device"])
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _us(ms: float) -> str:
    return f"{1e3 * ms:.0f}" if ms >= 0.1 else f"{1e3 * ms:.3g}"


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f}" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.3g}"


def _share(bound_ms: float, ms: float) -> str:
    return f"{bound_ms / ms:.0%}"
