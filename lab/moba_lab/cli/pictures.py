"""Writing what a run's routing looks like into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from moba.routing import Routing
from moba_lab.cli.session import messages, say


def write_pictures(out: Path, routings: dict[int, Routing], tokenizer: Any, ids: Tensor, title: str) -> list[Path]:
    """Write routing.png, routing.html and routing.npz, and say where.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        OSError: if the folder cannot be written.
    """
    from moba_lab.pictures.page import write_page
    from moba_lab.pictures.routings import plot_routings, save_routings

    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"routing.{ending}" for ending in ("png", "html", "npz")]
    tokens = [tokenizer.decode([token]) for token in ids.tolist()]
    with messages.status("drawing …"):
        plot_routings(routings).savefig(paths[0])
        write_page(paths[1], routings, tokens, title=title)
        save_routings(paths[2], routings, ids.numpy())
    for path, what in zip(paths, ("picture", "page: layers, heads, tokens", "indices and masks"), strict=True):
        say(f"{what:<28} {path}")
    return paths
