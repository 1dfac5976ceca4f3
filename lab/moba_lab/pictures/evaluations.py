"""Pictures of the evaluations, in the colours of `moba_lab.pictures.routings`. Every function returns a matplotlib
figure.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moba_lab.pictures.routings import FAINT, INK, OWN_COLOUR, SHARE_COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE_COLOURS = (SHARE_COLOURS[3], OWN_COLOUR, SHARE_COLOURS[2], SHARE_COLOURS[4], FAINT, "#8e5ea2", "#c59b08", INK)
LINE_MARKERS = "osD^vPX*"
# Characters of a panel's title that fit over the panel.
_TITLE_WIDTH = 46
_PANELS_IN_A_ROW = 4
Grid = Mapping[tuple[int, float], float]


def plot_needle(grids: Mapping[str, Grid], title: str) -> Figure:
    """The heat map: how often the needle was found, by length of the prompt and depth of the needle.

    Args:
        grids: name of a panel -> (length, depth) -> share found, as `moba_lab.evals.needle.grid` gives it. Cells that
            were not measured stay white.
        title: the first line.
    """
    depths = sorted({depth for grid in grids.values() for _, depth in grid})
    return _heat_maps(grids, depths, [f"{depth:.0%}" for depth in depths], title, "found", "depth of the needle")


def plot_scores(grids: Mapping[str, Mapping[tuple[int, str], float]], tasks: Sequence[str], title: str) -> Figure:
    """Heat maps of scores: name of a panel -> (length, task) -> score in 0 … 1."""
    return _heat_maps(grids, tasks, tasks, title, "on average", "")


def _heat_maps(
    grids: Mapping[str, Mapping[tuple[int, Any], float]],
    rows: Sequence[Any],
    labels: Sequence[str],
    title: str,
    what: str,
    y_label: str,
) -> Figure:
    """A panel for each grid: lengths from left to right, rows with their labels from top to bottom."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("found", (OWN_COLOUR, "#f4e3c1", SHARE_COLOURS[3]))
    columns = min(len(grids), _PANELS_IN_A_ROW)
    num_rows = math.ceil(len(grids) / columns)
    figure, panels = _figure(columns, title, height=0.4 + (1.5 + 0.32 * len(rows)) * num_rows, rows=num_rows)
    for axes in panels[len(grids) :]:
        axes.set_visible(False)
    for axes, (name, grid) in zip(panels, grids.items(), strict=False):
        lengths = sorted({length for length, _ in grid})
        values = np.array([[grid.get((length, row), np.nan) for length in lengths] for row in rows])
        image = axes.imshow(values, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_xticks(range(len(lengths)), [in_thousands(length) for length in lengths])
        axes.set_yticks(range(len(rows)), labels)
        heading = textwrap.fill(f"{name}: {np.nanmean(values):.0%} {what}", _TITLE_WIDTH)
        axes.set_title(heading, fontsize=10, color=INK, loc="left")
        axes.set_xlabel("tokens in the prompt", fontsize=8, color=INK)
        axes.set_xticks(np.arange(len(lengths) - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="both", length=0, labelsize=8)
        axes.spines[:].set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel(y_label, fontsize=8, color=INK)
    _share_bar(figure, image, panels)
    return figure


class Panel(NamedTuple):
    """Lines in one pair of axes.

    Attributes:
        curves: name -> x, y.
        is_log: whether y is drawn by its logarithm.
        marks: name -> y of horizontal lines, the first in the colour of the first curve, and so on.
    """

    curves: Mapping[str, Sequence[Sequence[float]]]
    x_label: str
    y_label: str
    title: str = ""
    is_log: bool = False
    marks: Mapping[str, float] = {}


def plot_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    *,
    x_label: str,
    y_label: str,
    is_log: bool = False,
    marks: Mapping[str, float] | None = None,
) -> Figure:
    """One panel of lines: name -> x and y; the others are those of `Panel`."""
    return plot_panels([[Panel(curves, x_label, y_label, is_log=is_log, marks=marks or {})]], title)


def plot_panels(panels: Sequence[Sequence[Panel]], title: str) -> Figure:
    """Rows of as many panels each. A curve has the colour and marker of its place in its panel.

    The first panel has the legend, the figure where there are many curves.
    """
    figure, grid = _figure(len(panels[0]), title, rows=len(panels), height=0.9 + 3.3 * len(panels), sharey=False)
    for axes, panel in zip(grid, (panel for row in panels for panel in row), strict=True):
        _draw(axes, panel)
    if len(panels[0][0].curves) <= 5:
        grid[0].legend(frameon=False, fontsize=8)
    else:
        lines, names = grid[0].get_legend_handles_labels()
        figure.legend(lines, names, loc="outside lower left", ncols=4, frameon=False, fontsize=9)
    return figure


def _draw(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    places: list[float] = []
    for (name, (x, y)), colour, marker in zip(panel.curves.items(), _colours(), LINE_MARKERS * 4, strict=False):
        places += x
        axes.plot(x, y, marker=marker, markersize=3.5, linewidth=1.6, color=colour, label=name)
    for (name, level), colour in zip(panel.marks.items(), _colours(), strict=False):
        axes.axhline(level, color=colour, linewidth=1.2, linestyle="--", label=name)
    if panel.is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if str(value)[0] in "25" else "")
    if all(isinstance(place, int) for place in places):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(panel.title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(panel.x_label, fontsize=9, color=INK)
    axes.set_ylabel(panel.y_label, fontsize=9, color=INK)
    axes.tick_params(which="both", labelsize=8, colors=INK)
    axes.grid(color="#e9e7e1", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)


def plot_sparsity(means: Mapping[str, Mapping[str, float]], title: str) -> Figure:
    """Perplexity of the text, and of a passage's second copy, against the share of keys that is read.

    Args:
        means: setting, such as "128x8 first=1" -> keys_read, perplexity, perplexity_second; "full" among them. Settings
            that differ in their blocks only make one line.
        title: the first line.
    """
    lines: dict[str, list[Mapping[str, float]]] = {}
    for setting, values in means.items():
        if setting != "full":
            lines.setdefault(setting.partition(" ")[2] or "mean", []).append(values)
    panels = [
        Panel(
            {
                name: zip(*sorted((100 * v["keys_read"], v[key]) for v in points), strict=True)  # type: ignore[misc]
                for name, points in lines.items()
            },
            "% of the keys that full attention reads", "perplexity", what, is_log=True,
            marks={"full attention": means["full"][key]},
        )
        for key, what in (("perplexity", "text"), ("perplexity_second", "second copy of a passage"))
    ]  # fmt: skip
    return plot_panels([panels], title)


def plot_routing_quality(records: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> Figure:
    """Maps over layers and heads: attention mass covered, the best possible, and how often the needle was chosen.

    Args:
        records: name of a row of panels -> the records of `moba_lab.evals.routing.routing_quality`.
        title: the first line.
    """
    names = {"covered": "mass of the chosen blocks", "best": "of the best possible", "recent": "of first and nearest"}
    first = next(iter(records.values()))
    if "needle_chosen" in first[0]:
        names["needle_chosen"] = "needle's block chosen"
    layers = sorted({record["layer"] for record in first})
    height = (1.9 + 0.14 * len(layers)) * len(records)
    figure, panels = _figure(len(names), title, height=height, width=2.9, rows=len(records))
    for row, (attention, heads) in enumerate(records.items()):
        axes_of_row = panels[row * len(names) : (row + 1) * len(names)]
        for axes, (key, name) in zip(axes_of_row, names.items(), strict=True):
            image = _map_heads(axes, heads, key, name)
        axes_of_row[0].set_ylabel(f"{attention}\nlayer" if len(records) > 1 else "layer", fontsize=8, color=INK)
    _share_bar(figure, image, panels)
    return figure


def _map_heads(axes: Axes, records: Sequence[Mapping[str, Any]], key: str, name: str) -> Any:
    """A statistic by layer and head, as an image."""
    layers = sorted({record["layer"] for record in records})
    heads = sorted({record["head"] for record in records})
    by_cell = {(record["layer"], record["head"]): record[key] for record in records}
    values = np.array([[by_cell[layer, head] for head in heads] for layer in layers])
    image = axes.imshow(values, vmin=0, vmax=1, aspect="auto", interpolation="nearest", cmap=_share_colours())
    axes.set_title(f"{name}: {values.mean():.0%}", fontsize=9, color=INK, loc="left")
    axes.set_xlabel("head", fontsize=8, color=INK)
    axes.set_xticks(range(0, len(heads), -(-len(heads) // 10)), heads[:: -(-len(heads) // 10)])
    axes.set_yticks(range(0, len(layers), -(-len(layers) // 10)), layers[:: -(-len(layers) // 10)])
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    return image


def _share_bar(figure: Figure, image: Any, panels: Sequence[Axes]) -> None:
    bar = figure.colorbar(image, ax=panels, fraction=0.03, pad=0.02)
    bar.ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)


def in_thousands(tokens: int) -> str:
    """512, 8K, 128K, 1M."""
    for unit, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens >= unit:
            return f"{tokens / unit:.3g}{letter}"
    return str(tokens)


def _figure(
    panels: int, title: str, *, height: float, width: float = 4.6, rows: int = 1, sharey: bool = True
) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, width * panels + 1), height), dpi=120, facecolor="white", layout="constrained")
    axes = figure.subplots(rows, panels, squeeze=False, sharey="row" if sharey else False).flatten()
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK, weight="bold")
    return figure, list(axes)


def _share_colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("share", SHARE_COLOURS)


def _colours() -> Sequence[str]:
    return LINE_COLOURS * 4
