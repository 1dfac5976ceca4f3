"""transformers' models over sequences that are split between ranks.

    parallelize(model, mesh["cp"])
    loss = model(**shard_batch(batch, mesh["cp"])).loss  # then backward; FSDP2 or DDP over all ranks average gradients

Letters: B batch, S tokens of the sequence, T tokens of this rank, H query heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from moba.config import MODEL_ROUTERS, require_one_of
from moba.hf import get_moba_config
from moba.hf.attention import is_full_layer, layer_config, refuse_unknown
from moba.hf.attention_modules import attentions
from moba.hf.layout import PaddedRows, decode_layout, is_local, layout_mask
from moba.hf.switch import refuse_other_models
from moba.parallel.attention import TRANSPORTS, context_parallel_attention
from moba.parallel.shards import Shards, agree, process_group

NAME = "moba_parallel"
IGNORED = -100
# A block that holds every key: full attention.
WHOLE = 1 << 30


class _Across:
    """The ranks that share a model's sequences; its attention modules hold this object."""

    def __init__(self, group: ProcessGroup | DeviceMesh | None, transport: str) -> None:
        self.group, self.transport = process_group(group), transport
        self.shards: Shards | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Across:
        """Copies of a model run on the same ranks."""
        return self


def parallelize(
    model: PreTrainedModel, group: ProcessGroup | DeviceMesh | None = None, *, transport: str = "gather"
) -> None:
    """Run a model's attention, of MoBA layers and of full ones, over sequences that are split between ranks.

    Every rank then calls the model on its part of each sequence, as `shard_batch` cuts it. Apply FSDP2, DDP or adapters
    as usual; they average gradients over all ranks, including those of this group.

    Args:
        model: with a MoBA config of its own (`set_moba_config`), on every rank; changed in place.
        group: the ranks that share a sequence: a process group, a mesh of one dimension, or None for all.
        transport: as in `context_parallel_attention`.

    Raises:
        ValueError: if the model has no such config, or has a router or convolutions that need more than a shard.
    """
    require_one_of("transport", transport, TRANSPORTS)
    config = get_moba_config(model)
    if config is None:
        raise ValueError("the model has no MoBA config of its own: call set_moba_config(model, config) first")
    text_config: Any = model.config.get_text_config(decoder=True)
    config.check_layers(text_config.num_hidden_layers)
    across = _Across(group, transport)
    for module in attentions(model):
        if hasattr(module, "key_convolution"):
            raise ValueError("key convolutions read the keys before a shard's first: they cannot be parallelized")
        module.moba_across = across
    refuse_other_models(NAME)
    AttentionInterface.register(NAME, parallel_attention_forward)
    AttentionMaskInterface.register(NAME, layout_mask)
    model.set_attn_implementation(NAME)


def parallel_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of one layer of a model that `parallelize` changed.

    Args:
        module: the attention layer.
        query: [B, H, T, D]. key, value: [B, G, T, D], rotated by the positions in the whole sequence.
        attention_mask: what `layout_mask` made of the padding mask: there must be no padding.
        cu_seq_lens_q, cu_seq_lens_k: int32, bounds of packed documents in the whole sequence.
        dropout, scaling, is_causal, position_ids, kwargs: as models pass them.
        shift_labels: used by the loss; transformers passes it to the layers, too.

    Returns:
        [B, T, H, D] and None for the attention weights.

    Raises:
        ValueError: naming what cannot be honoured.
    """
    across: _Across | None = getattr(module, "moba_across", None)
    if across is None:
        raise ValueError(f"attn_implementation={NAME!r} without ranks: call moba.parallel.models.parallelize(model)")
    config = layer_config(module, None)
    layer: int | None = getattr(module, "layer_idx", None)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def check() -> dict[str, int]:
        refuse_unknown(module, dropout, is_causal, kwargs, is_packed=cu_seq_lens_q is not None)
        _check_call(q, k, attention_mask, cu_seq_lens_q, config.router)
        return {}

    if layer in (0, None):
        # What one rank was given and cannot honour must end all of them, here and not in the middle of a step.
        shards = agree(q, across.group, check)
        agree(q, across.group, lambda: _check_positions(position_ids, shards, cu_seq_lens_q))
        across.shards = None
    else:
        check()
    options = config.selection
    if is_full_layer(module, config):
        options = {"block_size": WHOLE, "topk": 1}
    out, across.shards = context_parallel_attention(
        q, k, v, group=across.group, transport=across.transport, cu_seqlens=cu_seq_lens_q, scale=scaling,
        backend=config.backend, shards=across.shards, return_shards=True, **options,
    )  # fmt: skip
    return out, None


def _check_call(q: Tensor, k: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, router: object) -> None:
    if q.shape[1] != k.shape[1]:
        raise ValueError("models across ranks have no key/value cache: call them with use_cache=False")
    layout = decode_layout(attention_mask)
    if is_local(layout):
        raise ValueError("sliding_window: layers that read a window or chunk cannot run across ranks")
    if isinstance(layout, PaddedRows):
        raise ValueError("attention_mask: sequences across ranks cannot have padding; pack documents instead")
    if layout is not None and cu_seqlens is None:
        raise ValueError(
            "position_ids do not ascend by one: packed documents across ranks need cu_seq_lens_q and cu_seq_lens_k of "
            "the whole sequence, and shards are contiguous"
        )
    if router in MODEL_ROUTERS:
        raise ValueError(f"router={router!r} cannot be parallelized")


def _check_positions(position_ids: Tensor | None, shards: Shards, cu_seqlens: Tensor | None) -> dict[str, int]:
    """Check that positions are those of the whole sequence."""
    if position_ids is None:
        return {}
    expected = token = torch.arange(shards.start, shards.stop, device=position_ids.device)
    if cu_seqlens is not None:
        bounds = cu_seqlens.long()
        expected = token - bounds[torch.searchsorted(bounds, token, right=True) - 1]
    if bool((position_ids != expected).any()):
        raise ValueError(
            f"position_ids must count in the whole sequence, from {shards.start} on this rank: shard_batch makes them"
        )
    return {}


def shard_batch(batch: Mapping[str, Any], group: ProcessGroup | DeviceMesh | None = None) -> dict[str, Any]:
    """Cut this rank's part out of a batch that every rank of the group holds.

    Args:
        batch: input_ids [B, S]; optionally labels and position_ids of that shape, shift_labels (labels that are shifted
            already), and cu_seq_lens_q and cu_seq_lens_k, the bounds of documents packed into one row. Anything else,
            such as a mask, is refused unless it is None.
        group: the ranks that share each row.

    Returns:
        input_ids, position_ids (counted in the whole sequence), labels and shift_labels of this rank's T tokens; labels
        are shifted before the cut, so a shard's last token predicts the next shard's first. The documents' bounds,
        whole. num_items_in_batch: the model divides its loss by it, so that the mean over the group's ranks is the loss
        of the whole batch.

    Raises:
        ValueError: for what cannot be cut.
    """
    ranks = process_group(group)
    return cut_batch(batch, ranks.rank(), ranks.size())


def cut_batch(batch: Mapping[str, Any], rank: int, num_ranks: int) -> dict[str, Any]:
    """`shard_batch` for one rank of `num_ranks`."""
    cut = ("input_ids", "labels", "shift_labels", "position_ids")
    whole = ("cu_seq_lens_q", "cu_seq_lens_k")
    if unknown := sorted(name for name, x in batch.items() if name not in cut + whole and x is not None):
        raise ValueError(f"{unknown[0]} cannot be cut into shards; a batch may have {', '.join(cut + whole)}")
    values = {name: x for name, x in batch.items() if x is not None}
    length = values["input_ids"].shape[1]
    if "position_ids" not in values:
        if "cu_seq_lens_q" in values:
            raise ValueError("packed documents need position_ids")
        positions = torch.arange(length, device=values["input_ids"].device)
        values["position_ids"] = positions.expand(values["input_ids"].shape)
    if "labels" in values and "shift_labels" not in values:
        values["shift_labels"] = F.pad(values["labels"], (0, 1), value=IGNORED)[:, 1:]
    mine = slice(length * rank // num_ranks, length * (rank + 1) // num_ranks)
    shard = {name: x[:, mine].contiguous() if name in cut else x for name, x in values.items()}
    if "shift_labels" in values:
        shard["num_items_in_batch"] = max(1, int((values["shift_labels"] != IGNORED).sum())) / num_ranks
    return shard
