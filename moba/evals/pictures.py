"""Pictures of the evaluations, in the colours of `moba.viz`. Every function returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moba.viz import FAINT, INK, OWN_COLOUR, SHARE_COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE_COLOURS = (SHARE_COLOURS[3], OWN_COLOUR, SHARE_COLOURS[2], SHARE_COLOURS[4], FAINT)
Grid = Mapping[tuple[int, float], float]


def plot_needle(grids: Mapping[str, Grid], title: str) -> Figure:
    """The heat map: how often the needle was found, by length of the prompt and depth of the needle.

    Args:
        grids: name of a panel -> (length, depth) -> share found, as `moba.evals.needle.grid` gives it. Cells that were
            not measured stay white.
        title: the first line.
    """
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("found", (OWN_COLOUR, "#f4e3c1", SHARE_COLOURS[3]))
    lengths = sorted({length for grid in grids.values() for length, _ in grid})
    depths = sorted({depth for grid in grids.values() for _, depth in grid})
    figure, panels = _figure(len(grids), title, height=1.9 + 0.32 * len(depths))
    for axes, (name, grid) in zip(panels, grids.items(), strict=True):
        values = np.array([[grid.get((length, depth), np.nan) for length in lengths] for depth in depths])
        image = axes.imshow(values, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_xticks(range(len(lengths)), [in_thousands(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_title(f"{name}: {np.nanmean(values):.0%} found", fontsize=10, color=INK, loc="left")
        axes.set_xlabel("tokens in the prompt", fontsize=8, color=INK)
        axes.set_xticks(np.arange(len(lengths) - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(len(depths) - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="both", length=0, labelsize=8)
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel("depth of the needle", fontsize=8, color=INK)
    bar = figure.colorbar(image, ax=panels, fraction=0.03, pad=0.02)
    bar.ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)
    return figure


class Panel(NamedTuple):
    """Lines in one pair of axes.

    Attributes:
        curves: name -> x, y, and maybe the standard error of y, which is drawn as a band.
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
    """Rows of as many panels each. A curve has the colour of its place in its panel; the first panel has the legend."""
    figure, grid = _figure(len(panels[0]), title, rows=len(panels), height=0.9 + 3.3 * len(panels), sharey=False)
    for axes, panel in zip(grid, (panel for row in panels for panel in row), strict=True):
        _draw(axes, panel)
    grid[0].legend(frameon=False, fontsize=8)
    return figure


def _draw(axes: Axes, panel: Panel) -> None:
    for (name, (x, y, *error)), colour in zip(panel.curves.items(), _colours(), strict=False):
        axes.plot(x, y, marker="o", markersize=3.5, linewidth=1.6, color=colour, label=name)
        for band in error:
            low, high = np.array(y) - band, np.array(y) + band
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    for (name, level), colour in zip(panel.marks.items(), _colours(), strict=False):
        axes.axhline(level, color=colour, linewidth=1.2, linestyle="--", label=name)
    if panel.is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if str(value)[0] in "25" else "")
    axes.set_title(panel.title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(panel.x_label, fontsize=9, color=INK)
    axes.set_ylabel(panel.y_label, fontsize=9, color=INK)
    axes.tick_params(which="both", labelsize=8, colors=INK)
    axes.grid(color="#e9e7e1", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)


def plot_routing_quality(records: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Maps over layers and heads: attention mass covered, the best possible, and how often the needle was chosen."""
    names = {"covered": "mass of the chosen blocks", "best": "of the best possible", "recent": "of first and nearest"}
    if "needle_chosen" in records[0]:
        names["needle_chosen"] = "needle's block chosen"
    layers = sorted({record["layer"] for record in records})
    heads = sorted({record["head"] for record in records})
    figure, panels = _figure(len(names), title, height=1.9 + 0.14 * len(layers), width=2.9)
    for axes, (key, name) in zip(panels, names.items(), strict=True):
        by_cell = {(record["layer"], record["head"]): record[key] for record in records}
        values = np.array([[by_cell[layer, head] for head in heads] for layer in layers])
        image = axes.imshow(values, vmin=0, vmax=1, aspect="auto", interpolation="nearest", cmap=_share_colours())
        axes.set_title(f"{name}: {values.mean():.0%}", fontsize=9, color=INK, loc="left")
        axes.set_xlabel("head", fontsize=8, color=INK)
        axes.set_xticks(range(0, len(heads), -(-len(heads) // 10)), heads[:: -(-len(heads) // 10)])
        axes.set_yticks(range(0, len(layers), -(-len(layers) // 10)), layers[:: -(-len(layers) // 10)])
        axes.tick_params(length=0, labelsize=8)
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel("layer", fontsize=8, color=INK)
    bar = figure.colorbar(image, ax=panels, fraction=0.03, pad=0.02)
    bar.ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)
    return figure


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
    axes = figure.subplots(rows, panels, squeeze=False, sharey=sharey).flatten()
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK, weight="bold")
    return figure, list(axes)


def _share_colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("share", SHARE_COLOURS)


def _colours() -> Sequence[str]:
    return LINE_COLOURS * 4
