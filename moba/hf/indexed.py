"""Layers that select their blocks themselves: MiniMax-M3's, whose indexer hands them on as `block_indices`.

That indexer counts blocks from a row's first place, MoBA from its first real token. While such a model has MoBA's
attention its layers are told where each row begins, so a row that is padded on the left reads what it reads alone.

Letters: B batch, T query tokens, S key tokens, G key/value heads, K blocks a query.
"""

from __future__ import annotations

import sys
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moba.hf.layout import PackedRows, PaddedRows, decode_layout

NAMES = ("moba", "moba_naive")


def given_blocks(module: nn.Module, block_indices: Tensor, layout: Any) -> dict[str, Any]:
    """The options of `moba_attention` for a layer that passes block_indices [B, G, T, K].

    Raises:
        ValueError: for packed sequences, which the model's indexer does not tell apart.
    """
    if layout is not None and not isinstance(layout, PaddedRows):
        raise ValueError("block_indices: the model's indexer cannot tell packed sequences apart; give each one a row")
    config: Any = module.config
    return {
        "block_size": config.index_block_size,
        "block_indices": block_indices.transpose(1, 2),
        # Where a query's own block is always among those listed, backends that always read it serve, too.
        "own_block": config.index_local_blocks > 0,
    }


def count_from_first_token(model: PreTrainedModel) -> None:
    """Let the indexers of a model's class, if they are known, count blocks as `moba_attention` does."""
    classes: Any = sys.modules[type(model).__module__]
    attention, indexer = (getattr(classes, f"MiniMaxM3VL{part}", None) for part in ("Attention", "Indexer"))
    if attention is None or indexer is None or hasattr(attention.forward, "moba_counts"):
        return
    attend, select = attention.forward, indexer.forward

    @wraps(attend)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.indexer is None or self.config._attn_implementation not in NAMES:
            return attend(self, *args, **kwargs)
        layout = decode_layout(kwargs.get("attention_mask"))
        self.indexer.moba_rows = layout if isinstance(layout, PaddedRows) else None
        if isinstance(layout, PackedRows):
            given_blocks(self, torch.empty(0, 0, 0), layout)
        try:
            return attend(self, *args, **kwargs)
        finally:
            self.indexer.moba_rows = None

    @wraps(select)
    def select_blocks(self: Any, hidden: Tensor, rotary: Any, cache: Any, position_ids: Tensor) -> Tensor:
        rows: PaddedRows | None = getattr(self, "moba_rows", None)
        if rows is None:
            return select(self, hidden, rotary, cache, position_ids)
        token = torch.arange(hidden.shape[1], device=hidden.device)
        token = token + (rows.query_end - hidden.shape[1] - rows.key_start)[:, None]
        shifted = SimpleNamespace(update_index=lambda keys: _from_first(self, keys, cache, rows.key_start))
        layers = {self.layer_idx: shifted}
        return select(self, hidden, rotary, SimpleNamespace(layers=layers), token.clamp(min=0))

    forward.moba_counts = True  # type: ignore[attr-defined]
    attention.forward, indexer.forward = forward, select_blocks


def _from_first(indexer: Any, keys: Tensor, cache: Any, start: Tensor) -> Tensor:
    """An indexer's keys [B, 1, S, D], each row's from its first real one on; what follows its last is in the future."""
    if cache is not None:
        keys = cache.layers[indexer.layer_idx].update_index(keys)
    place = torch.arange(keys.shape[2], device=keys.device) + start[:, None]
    place = place.clamp(max=keys.shape[2] - 1).long()
    return keys.gather(2, place[:, None, :, None].expand_as(keys))
