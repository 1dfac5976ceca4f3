"""Perplexity and copy recall against the share of keys that a selection reads."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor

from moba.config import MoBAConfig
from moba.hf.record import RoutingRecord, record_routings
from moba.routing import Routing
from moba_lab.evals.language import append_copy, summarise, summarise_copy
from moba_lab.evals.reader import Reader
from moba_lab.models.generation import num_keys_read


def evaluate_sparsity(reader: Reader, text: Tensor, *, num_copied: int, distance: int) -> dict[str, Any]:
    """Perplexity of a text, of a passage's second copy behind it, and the keys that reading both takes.

    Args:
        reader: of a model whose attention is "moba", by its own config.
        text: int64 [T].
        num_copied, distance: as for `append_copy`.

    Returns:
        the records of `summarise` (of the text) and of `summarise_copy`, and keys_read, the share of the keys that
        full attention reads; with a budget ("top_p=…") those of the blocks that were chosen.
    """
    whole = append_copy(text, num_copied=num_copied, distance=distance)
    config = MoBAConfig.from_dict(reader.model.config.moba)
    has_budget = str(config.router).startswith("top_p=")
    with record_routings(reader.model) if has_budget else nullcontext(RoutingRecord()) as record:
        losses = reader.losses(whole)
    num_layers = reader.model.config.get_text_config().num_hidden_layers
    read, dense = num_keys_read(config, num_layers, whole.numel())
    routings = record.joined()
    if routings:
        num_full = num_layers - len(routings)
        read = sum(map(num_chosen_keys, routings.values())) + num_full * dense / num_layers
    return {
        **summarise(losses[: text.numel() - 1]),
        **summarise_copy(losses, num_copied=num_copied, distance=distance),
        "keys_read": read / dense,
    }


def num_chosen_keys(routing: Routing) -> float:
    """Keys that the queries of one row read, averaged over the heads."""
    _, num_queries, num_heads, _ = routing.indices.shape
    of_own_blocks = sum(t % routing.block_size + 1 for t in range(num_queries))
    return (int(routing.num_selected().sum()) / num_heads - num_queries) * routing.block_size + of_own_blocks
