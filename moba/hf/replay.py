"""Replaying routings: train on the blocks that a rollout read.

set_moba_config(model, MoBAConfig(..., decode="moba"))     # so that generated tokens are routed, too
with record_routings(model) as record:
    texts = model.generate(prompts, attention_mask=mask)
rows = routing_rows(record, attention_mask_of_texts)       # of real tokens only, one for each row
save_routings("rollout.npz", rows)

with replay_routings(model, load_routings("rollout.npz")): # padded rows or packed ones, in this order
    loss = model(**batch).loss
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from os import PathLike
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from moba.files import replacing
from moba.hf.layout import row_spans
from moba.hf.record import RoutingRecord, require_moba
from moba.routing import Routing

# Layer index -> the routing [T, H, K] of one sequence, its blocks numbered within it.
RoutingRow = Mapping[int, Routing]


def routing_rows(record: RoutingRecord, attention_mask: Tensor | None = None) -> list[dict[int, Routing]]:
    """Cut a record into sequences.

    Args:
        record: what `record_routings` saw of one batch: a forward pass, or a prompt and the steps after it.
        attention_mask: [B, at least T], 1 for each row's real tokens, in one run; those behind the T that were read are
            left out, as the last token of a generation. None: all T are real.

    Returns:
        for each row, layer index -> routing [its tokens, H, K].

    Raises:
        ValueError: if the mask is not one of these rows, or layers saw different numbers of tokens.
    """
    joined = record.joined()
    shapes = {tuple(routing.indices.shape[:2]) for routing in joined.values()}
    if len(shapes) != 1:
        raise ValueError(
            f"record must hold the same tokens for every layer, got [B, T] {sorted(shapes)}: with decode='full' steps "
            "are not routed and cannot be replayed"
        )
    batch, length = shapes.pop()
    spans = [(0, length)] * batch
    if attention_mask is not None:
        if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
            raise ValueError(
                f"attention_mask must be [B, at least T] = {(batch, length)}, got {tuple(attention_mask.shape)}"
            )
        spans = [_run(row) for row in attention_mask[:, :length].bool().cpu()]
    return [
        {layer: Routing(r.indices[row, start:stop], r.block_size) for layer, r in joined.items()}
        for row, (start, stop) in enumerate(spans)
    ]


def save_routings(path: str | PathLike[str], rows: Sequence[RoutingRow]) -> None:
    """Write `routing_rows` to a compressed .npz file, in one or two bytes an index.

    Raises:
        ValueError: if the rows do not have the same layers, heads, topk and block size.
        OSError: if it cannot be written; a file that was there is left as it was.
    """
    layers = _layers(rows)
    sizes = {routing.block_size for row in rows for routing in row.values()}
    if len(sizes) != 1:
        raise ValueError(f"rows must have one block size, got {sorted(sizes)}")
    arrays: dict[str, Any] = {
        "block_size": np.array(sizes.pop()),
        "lengths": np.array([len(row[layers[0]].indices) for row in rows]),
    }
    for layer in layers:
        indices = torch.cat([row[layer].indices for row in rows]).cpu().numpy()
        # -1, for no block, is the dtype's largest number.
        dtype = np.uint8 if indices.max(initial=0) < 255 else np.uint16 if indices.max() < 65535 else np.uint32
        arrays[f"layer_{layer}"] = indices.astype(dtype)
    with replacing(path) as file:
        np.savez_compressed(cast(Any, file), **arrays)


def load_routings(path: str | PathLike[str]) -> list[dict[int, Routing]]:
    """The rows that `save_routings` wrote.

    Raises:
        ValueError: if it is no such file.
        OSError: if it cannot be read.
    """
    with np.load(path, allow_pickle=False) as arrays:
        if not {"block_size", "lengths"} <= set(arrays):
            raise ValueError(f"{path} holds no saved routings")
        block_size, lengths = int(arrays["block_size"]), arrays["lengths"].tolist()
        rows: list[dict[int, Routing]] = [{} for _ in lengths]
        for name in arrays.files:
            if name.startswith("layer_"):
                stored = arrays[name]
                indices = stored.astype(np.int32)
                indices[stored == np.iinfo(stored.dtype).max] = -1
                for row, part in zip(rows, torch.from_numpy(indices).split(lengths), strict=True):
                    row[int(name.removeprefix("layer_"))] = Routing(part, block_size)
    return rows


@contextmanager
def replay_routings(model: PreTrainedModel, rows: Sequence[RoutingRow]) -> Iterator[None]:
    """Let every MoBA layer of `model` attend over given routings, in each forward pass inside the block.

    Args:
        model: with the attention "moba" or "moba_naive", and the block size and topk of the rows.
        rows: a routing for each sequence of the batch, in its order: for each padded row, or for each of the sequences
            that are packed into rows. A sequence may have one token more than its routing, the last of a generation,
            which reads its own block.

    Raises:
        ValueError: if the model's attention is another, or in a forward pass rows, tokens or layers do not match, or
            keys come from a cache.
    """
    name = require_moba(model)
    _layers(rows)
    own_modules = set(model.modules())

    def replay(module: nn.Module, q: Tensor, k: Tensor, layout: Any) -> Routing | None:
        return _of_batch(module, q, k, layout, rows) if module in own_modules else None

    attention = AttentionInterface()[name]
    AttentionInterface.register(name, partial(attention, replay=replay))
    try:
        yield
    finally:
        AttentionInterface.register(name, attention)


def _of_batch(module: Any, q: Tensor, k: Tensor, layout: Any, rows: Sequence[RoutingRow]) -> Routing:
    """The routing [B, T, H, K] of a layer's call with q [B, T, H, D] and k [B, S, G, D]."""
    layer = int(module.layer_idx)
    if layer not in rows[0]:
        raise ValueError(f"rows have no routing for layer {layer}, which is MoBA's: they have {sorted(rows[0])}")
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"routings are replayed over whole sequences: {q.shape[1]} queries came with {k.shape[1]} keys"
        )
    spans = row_spans(layout, q.shape[0], q.shape[1])
    if len(spans) != len(rows):
        raise ValueError(f"rows must be as many as the batch has sequences, got {len(rows)} for {len(spans)}")
    first = rows[0][layer]
    indices = torch.full((*q.shape[:3], first.topk), -1, dtype=torch.int32)
    for number, ((row, start, stop), routings) in enumerate(zip(spans, rows, strict=True)):
        given = routings[layer].indices
        if not 0 <= stop - start - given.shape[0] <= 1:
            raise ValueError(
                f"rows[{number}] routes {given.shape[0]} tokens, and the batch's sequence has {stop - start}"
            )
        indices[row, start : start + given.shape[0]] = given.cpu()
    return Routing(indices.to(q.device), first.block_size)


def _layers(rows: Sequence[RoutingRow]) -> list[int]:
    """The layers that every row has."""
    layers = {tuple(sorted(row)) for row in rows}
    if len(layers) != 1 or layers == {()}:
        raise ValueError(f"rows must have routings of the same layers, got {sorted(layers)}")
    return list(layers.pop())


def _run(mask: Tensor) -> tuple[int, int]:
    """First and one past the last real token of a row."""
    places = mask.nonzero().flatten().tolist()
    if not places:
        return 0, 0
    if places[-1] - places[0] + 1 != len(places):
        raise ValueError("attention_mask must mark each row's real tokens in one run")
    return places[0], places[-1] + 1
