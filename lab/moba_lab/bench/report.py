"""Results as a table, as files and as a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from moba.files import write_json
from moba_lab.bench.cases import length_name
from moba_lab.checks import require_packages

Records = list[dict[str, Any]]
# Column titles and cells of records.
Rows = Callable[[Records], tuple[list[str], list[list[str]]]]
# The name of the vertical axis, and title -> line -> tokens -> value.
Growth = Mapping[str, Mapping[str, Mapping[int, float]]]
Panels = Callable[[Records], tuple[str, Growth]]


def table(records: Records, rows: Rows) -> Table:
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


def earlier_records(out: Path, header: dict[str, str], names: Sequence[str]) -> Records:
    """The records that a run of the same command left in OUT.json, if its header agrees in these names; else none.

    Raises:
        ValueError: if the file was not written by this command.
    """
    path = out.with_suffix(".json")
    if not path.exists():
        return []
    try:
        earlier = json.loads(path.read_text())
        records: Records = earlier["records"]
        same = all(earlier["header"].get(name) == header[name] for name in names)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"--out: {path} is no result of this command; name another file") from None
    return records if same else []


def write(header: dict[str, str], records: Records, out: Path, rows: Rows) -> None:
    """Write OUT.json and OUT.md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.with_suffix(".json"), {"header": header, "records": records}, indent=1)
    out.with_suffix(".md").write_text(to_markdown(header, records, rows))


def to_markdown(header: dict[str, str], records: Records, rows: Rows) -> str:
    """For a file."""
    titles, cells = rows(records)
    lines = [f"- {name}: {value}" for name, value in header.items()]
    lines += ["", "| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join(lines) + "\n"


def plot_growth(title: str, y_label: str, panels: Growth, path: Path) -> None:
    """Times against length, both axes logarithmic."""
    import matplotlib.pyplot as plt

    # What was measured at one length says little in a picture of growth; the table has it.
    grown = {name: lines for name, lines in panels.items() if any(len(points) > 1 for points in lines.values())}
    panels = grown or panels or {"nothing measured": {}}
    size = (2 + 6 * len(panels), 5)
    figure, all_axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axes, (name, lines) in zip(all_axes[0], panels.items(), strict=True):
        for label, points in lines.items():
            style = "-o" if label.startswith("MoBA") else ":" if "bound" in label else "--s"
            lengths = sorted(points)
            axes.plot(lengths, [points[n] for n in lengths], style, label=label, markersize=4)
        ticks = sorted({n for points in lines.values() for n in points})
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=y_label, title=name)
        axes.set_xticks(ticks, [length_name(n) for n in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside the axes: no point lies under it
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
