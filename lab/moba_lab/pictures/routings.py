"""Pictures of a routing: which blocks the queries of every layer and head attend to.

Letters: T query tokens, H query heads, K = topk, N blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from moba.routing import Routing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OWN_COLOUR = "#e8590c"
# From "never chosen" to "chosen by every query of the block".
SHARE_COLOURS = ("#e9e7e1", "#b9d6dc", "#5fa8b8", "#1f6f8b", "#0b3954")
INK = "#22272e"
FAINT = "#adb5bd"

_MAX_CELLS = 96
_GAP = 0.16


def choice_counts(routing: Routing, num_blocks: int, row: int = 0) -> np.ndarray:
    """How many queries of each block attend to each block.

    Args:
        routing: indices [B, T, H, K].
        num_blocks: N, at least one more than the largest index.
        row: the sequence of the batch.

    Returns:
        int64 [H, N, N]: head, block of the query, block attended to. The diagonal holds the queries of a block, as
        every query attends to its own.
    """
    indices = routing.indices[row].long()  # [T, H, K]
    num_heads = indices.shape[1]
    own = routing.own_block()[row].long()  # [T, H]
    head = torch.arange(num_heads, device=indices.device)
    cell = ((head * num_blocks + own)[..., None] * num_blocks + indices)[indices >= 0]
    counts = torch.bincount(cell.cpu(), minlength=num_heads * num_blocks * num_blocks)
    return counts.view(num_heads, num_blocks, num_blocks).numpy()


def choice_shares(counts: np.ndarray) -> np.ndarray:
    """Share of a block's queries that attend to each block, NaN in the future: `choice_counts` as float32 [H, N, N]."""
    queries = np.maximum(np.diagonal(counts, axis1=-2, axis2=-1), 1)
    shares = (counts / queries[..., None]).astype(np.float32)
    future = np.triu(np.ones(counts.shape[-2:], dtype=bool), k=1)
    return np.where(future, np.float32("nan"), shares)


def layers_and_blocks(routings: Mapping[int, Routing]) -> tuple[list[int], int]:
    """The layers in order, and the number of blocks up to the largest one attended to."""
    if not routings:
        raise ValueError("routings must hold at least one layer's routing, got none")
    return sorted(routings), max(int(r.indices.max()) for r in routings.values()) + 1


def shares_by_layer(routings: Mapping[int, Routing], row: int = 0) -> dict[int, np.ndarray]:
    """`choice_shares` of every layer, float32 [H, N, N], in the order of the layers."""
    layers, num_blocks = layers_and_blocks(routings)
    return {layer: choice_shares(choice_counts(routings[layer], num_blocks, row)) for layer in layers}


def farthest_reaching(shares: Mapping[int, np.ndarray]) -> list[tuple[int, int]]:
    """Of each quarter of the layers, the (layer, head) whose queries choose the most distant blocks on average.

    The first block, which many settings always keep, does not count.
    """
    num_blocks = next(iter(shares.values())).shape[-1]
    block = np.arange(num_blocks)
    distance = np.tril(block[:, None] - block, k=-1)
    distance[:, 0] = 0
    reach = {}
    for layer, share in shares.items():
        chosen = np.where(distance > 0, share, 0.0)
        means = (chosen * distance).sum(axis=(1, 2)) / np.maximum(chosen.sum(axis=(1, 2)), 1e-9)
        reach.update({(layer, head): float(mean) for head, mean in enumerate(means)})
    quarters = [part.tolist() for part in np.array_split(sorted(shares), min(4, len(shares)))]
    return [max((key for key in reach if key[0] in layers), key=lambda key: reach[key]) for layers in quarters]


def plot_routings(
    routings: Mapping[int, Routing],
    *,
    title: str = "Which blocks each query attends to",
    detail: Sequence[tuple[int, int]] | None = None,
    row: int = 0,
) -> Figure:
    """Large maps of a few heads above small multiples of every layer and head.

    A cell's colour is the share of the queries of one block (down) that attend to another block (across).

    Args:
        routings: layer index -> routing [B, T, H, K] of that layer; all of one shape and block size.
        title: the first line of the figure.
        detail: (layer, head) of each large map, at most four; by default the head that reaches farthest back in
            each quarter of the layers.
        row: the sequence of the batch.

    Returns:
        A matplotlib figure that belongs to no global state: `figure.savefig(path)` writes it.

    Raises:
        ValueError: if there is no routing, or `detail` names a layer or head that has none.
    """
    from matplotlib.figure import Figure

    layers, num_blocks = layers_and_blocks(routings)
    first = routings[layers[0]]
    num_tokens, num_heads = first.indices.shape[1:3]
    shares = shares_by_layer(routings, row)
    detail = farthest_reaching(shares) if detail is None else list(detail)
    if not 1 <= len(detail) <= 4 or any(layer not in shares or not 0 <= head < num_heads for layer, head in detail):
        raise ValueError(
            f"detail must be 1 to 4 pairs (layer, head) of layers {layers}, heads 0-{num_heads - 1}, got {detail}"
        )

    # All sizes in inches, counted from the top.
    width, left, right, between, header = 12.0, 0.62, 0.2, 0.42, 1.0
    side = (width - left - right - 3 * between) / 4
    pitch = (width - left - right) / max(len(layers) - _GAP, 2 * num_heads)
    small_top = header + side + 0.85
    small_height = num_heads * pitch
    height = small_top + small_height + 0.55
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")

    def place(x: float, y: float, wide: float, high: float) -> Axes:
        return figure.add_axes((x / width, 1 - (y + high) / height, wide / width, high / height))

    for i, (layer, head) in enumerate(detail):
        axes = place(left + i * (side + between), header, side, side)
        _draw_map(axes, shares[layer][head], first.block_size)
        axes.set_title(f"layer {layer}, head {head}", fontsize=10, color=INK, loc="left")
        axes.set_xlabel("key position", color=INK, fontsize=8, labelpad=2)
        if i == 0:
            axes.set_ylabel("query position", color=INK, fontsize=8, labelpad=2)
    _draw_mosaic(place(left, small_top, len(layers) * pitch, small_height), shares, detail)
    figure.text(left / width, 1 - 0.32 / height, title, fontsize=14, color=INK, weight="bold")
    blocks = f"{num_tokens:,} tokens  ·  block size {first.block_size}  ·  top-k {first.topk} of {num_blocks} blocks"
    figure.text(left / width, 1 - 0.57 / height, blocks, fontsize=10, color=INK)
    _draw_legend(figure, place(width - right - 2.6, 0.24, 2.4, 0.1))
    return figure


def save_routings(path: str | Path, routings: Mapping[int, Routing], token_ids: np.ndarray, row: int = 0) -> None:
    """Save one sequence's routings and the masks they mean as a compressed `.npz`.

    The file holds `layers` [L], `indices` (the block numbers, -1 for none) [L, T, H, K], `mask_bits` (which blocks
    each query attends to; `np.unpackbits(mask_bits, axis=-1, count=num_blocks)` gives [L, T, H, N]), `num_blocks`,
    `block_size` and `token_ids` [T].

    Raises:
        ValueError: if there is no routing.
    """
    layers, num_blocks = layers_and_blocks(routings)
    masks = [np.packbits(routings[layer].block_mask(num_blocks)[row].cpu().numpy(), axis=-1) for layer in layers]
    narrow = np.int16 if num_blocks < 2**15 else np.int32
    np.savez_compressed(
        path,
        layers=np.array(layers),
        indices=np.stack([routings[layer].indices[row].cpu().numpy().astype(narrow) for layer in layers]),
        mask_bits=np.stack(masks),
        num_blocks=num_blocks,
        block_size=routings[layers[0]].block_size,
        token_ids=token_ids,
    )


def _paint(share: np.ndarray) -> np.ndarray:
    """Colours of a map of shares [N, N]: RGBA [N, N, 4], transparent in the future, the own blocks set apart."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    image = LinearSegmentedColormap.from_list("share", SHARE_COLOURS)(np.nan_to_num(share))
    image[np.isnan(share)] = 0.0
    diagonal = np.arange(share.shape[0])
    image[diagonal, diagonal] = to_rgba(OWN_COLOUR)
    return image


def _shrink(share: np.ndarray) -> np.ndarray:
    """Average blocks together until a map has at most _MAX_CELLS a side."""
    factor = -(-share.shape[0] // _MAX_CELLS)
    if factor == 1:
        return share
    side = -(-share.shape[0] // factor)
    padded = np.full((side * factor, side * factor), np.nan, dtype=share.dtype)
    padded[: share.shape[0], : share.shape[1]] = share
    cells = padded.reshape(side, factor, side, factor)
    known = np.maximum((~np.isnan(cells)).sum(axis=(1, 3)), 1)
    means = np.nansum(cells, axis=(1, 3)) / known
    return np.where(np.triu(np.ones_like(means, dtype=bool), k=1), np.nan, means)


def _draw_map(axes: Axes, share: np.ndarray, block_size: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    end = share.shape[0] * block_size
    axes.imshow(_paint(_shrink(share)), interpolation="nearest", extent=(0, end, end, 0))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}K" if end >= 4000 and x else f"{x:g}"))
    axes.tick_params(labelsize=8, colors=INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)


def _draw_mosaic(axes: Axes, shares: Mapping[int, np.ndarray], detail: Sequence[tuple[int, int]]) -> None:
    """Small multiples as one image: hundreds of matplotlib axes would take many seconds."""
    from matplotlib.patches import Rectangle

    layers = sorted(shares)
    num_heads = shares[layers[0]].shape[0]
    side = _shrink(shares[layers[0]][0]).shape[0]
    pitch = side * (1 + _GAP)
    end_x, end_y = len(layers) * pitch, num_heads * pitch
    axes.set(xlim=(0, end_x), ylim=(end_y, 0))
    scale = max(1, round(24 / side))
    cell_pitch = round(pitch * scale)
    image = np.zeros((num_heads * cell_pitch, len(layers) * cell_pitch, 4))
    for column, layer in enumerate(layers):
        for head in range(num_heads):
            top, left = head * cell_pitch, column * cell_pitch
            panel = _paint(_shrink(shares[layer][head])).repeat(scale, axis=0).repeat(scale, axis=1)
            image[top : top + side * scale, left : left + side * scale] = panel
    axes.imshow(image, interpolation="antialiased", extent=(0, end_x, end_y, 0), aspect="auto")
    step = -(-len(layers) // 32)
    axes.set_xticks([i * pitch + side / 2 for i in range(0, len(layers), step)], [str(x) for x in layers[::step]])
    axes.set_yticks([i * pitch + side / 2 for i in range(num_heads)], [str(head) for head in range(num_heads)])
    axes.set_xlabel("layer", color=INK, fontsize=8, labelpad=2)
    axes.set_ylabel("head", color=INK, fontsize=8, labelpad=2)
    axes.set_title("every layer and head", fontsize=10, color=INK, loc="left")
    axes.tick_params(labelsize=8, colors=INK, length=0)
    axes.spines[:].set_visible(False)
    for layer, head in detail:
        corner = (layers.index(layer) * pitch, head * pitch)
        axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=INK, linewidth=0.8, clip_on=False))


def _draw_legend(figure: Figure, axes: Axes) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.patches import Patch

    colours = LinearSegmentedColormap.from_list("share", SHARE_COLOURS)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 100), colours), cax=axes, orientation="horizontal")
    bar.set_label("of a block's queries attend to the block", color=INK, fontsize=8)
    bar.ax.tick_params(labelsize=8, colors=INK, length=2)
    bar.ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0f} %")
    bar.ax.spines[:].set_visible(False)
    own = Patch(color=OWN_COLOUR, label="own block: always attended")
    axes.legend(handles=[own], loc="center right", bbox_to_anchor=(-0.06, 0.5), frameon=False, fontsize=8)
