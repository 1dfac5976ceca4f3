"""The attention function that transformers' models call, layer by layer.

Letters: B batch, T query tokens, S key tokens, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moba.attention import moba_attention, moba_attention_varlen
from moba.config import PROVIDED_ROUTERS, MoBAConfig
from moba.hf.extensions import require_parts, route_by
from moba.hf.hand_over import take, warn_of_loss
from moba.hf.indexed import given_blocks
from moba.hf.indexer import choose_by_index, index_vectors
from moba.hf.indexer_training import keep_loss
from moba.hf.layout import SWITCH_PART, PackedRows, PaddedRows, decode_layout, is_local, require
from moba.hf.local import attend_locally
from moba.hf.switch import PROMPT_FIELD
from moba.numerics import to_autocast_dtype
from moba.routing import Routing

if TYPE_CHECKING:
    from moba.block_means import CachedMeans

logger = logging.getLogger("moba")
_has_advised = False
_parsed: dict[str, MoBAConfig] = {}

# What models pass along that does not change the attention itself.
HARMLESS = frozenset(
    {
        "cache_position",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "return_dict",
        "use_cache",
    }
)


def moba_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    default: MoBAConfig | None,
    backend: str | None,
    observe: Callable[[nn.Module, Routing], None] | None = None,
    replay: Callable[[nn.Module, Tensor, Tensor, Any], Routing | None] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    block_indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """MoBA, or full attention where the config says so, for one layer of a transformers model.

    A call with one query and several keys is a decode step and follows `config.decode`, and so does every token behind
    the prompt in assisted generation, whose steps read several proposed tokens. A prompt's last chunk cannot be told
    from a step if it has one token, except inside `MoBACache.reading`.

    Args:
        module: the attention layer; its `config.moba` overrides `default`.
        query: [B, H, T, D]. key, value: [B, G, S, D], rotated, the cache already applied.
        attention_mask: what `layout_mask` made of the padding mask.
        default: the config given to `register_moba`.
        backend: takes the place of the config's backend unless None.
        observe: called with the module and its routing when this call is MoBA (see `moba.hf.record`).
        replay: asked for the routing of a call that is MoBA, of the module, q, k and the layout (see `moba.hf.replay`).
        dropout, scaling, is_causal, position_ids, cu_seq_lens_q, cu_seq_lens_k: as models pass them.
        s_aux: [H], sinks. softcap: the logits' bound.
        block_indices: [B, G, T, K], the blocks that the layer's own indexer selected.
        kwargs: anything else must be None, False or known not to change the attention.

    Returns:
        [B, T, H, D] and None for the attention weights.

    Raises:
        ValueError: naming what MoBA cannot honour.
    """
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    layout = _layout(q, k, attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k, module)
    if is_local(layout):
        kwargs.pop("sliding_window", None)
    refuse_unknown(module, dropout, is_causal, kwargs, is_packed=cu_seq_lens_q is not None)
    require_parts(module)
    softmax = {"scale": scaling, "sinks": s_aux, "softcap": softcap}
    if is_local(layout):
        return attend_locally(module, query, key, value, layout, scaling, sinks=s_aux, softcap=softcap), None
    config = layer_config(module, default)
    backend = backend or config.backend
    given, holds = take(module, key)
    if block_indices is not None:
        said = given_blocks(module, block_indices, layout)
        return _attend(q, k, v, layout, softmax, {**said, "backend": backend}), None
    is_decode = q.shape[1] == 1 and k.shape[1] > 1 and not (given is not None and given.block_means.phase.is_prefill)

    is_full = is_full_layer(module, config)
    is_provided, is_indexed = config.router in PROVIDED_ROUTERS, config.router == "indexer"
    is_idle = is_full or is_provided or is_indexed
    cached = given.block_means if given is not None and holds else None
    means = None if cached is None else _block_means(cached, k, layout, config, backend, is_idle)
    index_keys = None if given is None else given.index_keys
    by_index = index_vectors(module, q, k, index_keys, layout) if is_indexed else None
    num_full = 0
    if config.decode == "full":
        num_full = 1 if is_decode else _num_proposed(module, q, k, layout)
    if is_full or 0 < num_full == q.shape[1]:
        if by_index is not None:
            keep_loss(module, by_index, q, k, layout, softmax, config.block_size, None, backend)
        return _attend_fully(module, query, key, value, layout, softmax, backend), None
    if given is not None and not holds and not is_idle:
        warn_of_loss(module)
    elif is_decode and cached is None and not is_idle:
        _advise_cache()
    options = {
        **config.selection,
        **({"router": "mean"} if is_provided else {}),
        "backend": backend,
        **({} if means is None else {"block_means": means}),
        **({"route_by": route_by(module, config.router, q, k)} if is_provided else {}),
    }
    routing = None if replay is None else replay(module, q, k, layout)
    if routing is not None:
        options = {"block_size": config.block_size, "topk": config.topk, "backend": backend, "routing": routing}
    elif by_index is not None:
        blocks = choose_by_index(module, *by_index, layout, config, backend)
        options = {"block_size": config.block_size, "backend": backend, "block_indices": blocks}
        keep_loss(module, by_index, q, k, layout, softmax, config.block_size, blocks, backend)
    if observe is None:
        out = _attend(q, k, v, layout, softmax, options)
    elif layout is None or isinstance(layout, PaddedRows):
        out, routing = _attend(q, k, v, layout, softmax, {**options, "return_routing": True})
        observe(module, routing)
    else:
        raise ValueError("the routing of packed sequences cannot be recorded; give one sequence a row")
    if num_full:
        proposed = _attend_fully(module, query[:, :, -num_full:], key, value, layout, softmax, backend)
        out = torch.cat([out[:, :-num_full], proposed], dim=1)
    return out, None


def _num_proposed(module: nn.Module, q: Tensor, k: Tensor, layout: Any) -> int:
    """How many of the last queries stand behind the prompt of an assisted generation."""
    num_prompt = getattr(getattr(module, "config", None), PROMPT_FIELD, None)
    if num_prompt is None:
        return 0
    num_keys = int(layout.query_end.max()) if isinstance(layout, PaddedRows) else k.shape[1]
    return min(max(num_keys - num_prompt, 0), q.shape[1])


def _attend_fully(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PaddedRows | PackedRows | tuple[Tensor, Tensor] | None,
    softmax: dict[str, Any],
    backend: str,
) -> Tensor:
    """Full attention of query [B, H, T, D] over key and value [B, G, S, D]: [B, T, H, D]."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    scaling, is_plain = softmax["scale"], softmax["sinks"] is None and softmax["softcap"] is None
    if layout is None and is_plain:
        if num_queries in (1, num_keys):
            return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)[0]
        # The bias calls kernels of its own, which autocast does not reach.
        query, key, value = to_autocast_dtype(query, key, value)
        last = causal_lower_right(num_queries, num_keys)
        is_grouped = query.shape[1] != key.shape[1]
        heads_first = scaled_dot_product_attention(query, key, value, last, scale=scaling, enable_gqa=is_grouped)
        return heads_first.transpose(1, 2)
    if num_queries == 1 and num_keys > 1 and isinstance(layout, PaddedRows) and is_plain:
        column = torch.arange(num_keys, device=key.device)
        real = (column >= layout.key_start[:, None]) & (column < layout.query_end[:, None])
        # transformers repeats the keys of a group in memory where there is a mask: at 128K keys, 18 times as slow.
        is_grouped = query.shape[1] != key.shape[1]
        mask = real[:, None, None]
        step = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=is_grouped)
        return step.transpose(1, 2)
    # One block that holds every key is full attention, with sinks and softcap, and needs no T × S mask for padding.
    whole = {"block_size": max(num_keys, 1), "topk": 1, "backend": backend}
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    out: Tensor = _attend(q, k, v, layout, softmax, whole)
    return out


def _block_means(
    cached: CachedMeans,
    k: Tensor,
    layout: PaddedRows | PackedRows | tuple[Tensor, Tensor] | None,
    config: MoBAConfig,
    backend: str,
    is_idle: bool,
) -> Tensor | None:
    """The cache's means, brought up to date with k [B, S, G, D]; None where they do not serve."""
    is_packed = isinstance(layout, (PackedRows, tuple))
    if is_idle or is_packed or torch.is_autocast_enabled(k.device.type):
        cached.skip()
        return None
    start, end = (layout.key_start, layout.query_end) if isinstance(layout, PaddedRows) else (None, None)
    return cached.update(k, block_size=config.block_size, key_start=start, key_end=end, backend=backend)


def _advise_cache() -> None:
    """Say once that decoding computes all block means anew at every step."""
    global _has_advised
    if not _has_advised and not torch.compiler.is_compiling():
        _has_advised = True
        logger.warning(
            'decode="moba" without a MoBACache computes the means of all blocks at every step; pass '
            "past_key_values=moba.hf.cache.MoBACache(model.config) to generate or to the model"
        )


def layer_config(module: nn.Module, default: MoBAConfig | None) -> MoBAConfig:
    """The config that holds for a layer: `module.config.moba`, or else `default`."""
    config = read_config(getattr(module, "config", None)) or default
    if config is None:
        raise ValueError("no MoBA config: give register_moba one, or write it to the model with set_moba_config")
    return config


def read_config(model_config: Any) -> MoBAConfig | None:
    """The MoBAConfig that a model's config carries, or None; parsed once for each content.

    Raises:
        ValueError: if its `moba` is not what `set_moba_config` writes.
    """
    values = getattr(model_config, "moba", None)
    if values is None:
        return None
    # A graph would be made anew whenever the parsed configs, which it read, grow.
    if torch.compiler.is_compiling():
        return _parse(values)
    # By what is written there: the numbers 1, 1.0 and True are equal, and only one of them is valid.
    content = repr(values)
    if content not in _parsed:
        _parsed[content] = _parse(values)
    return _parsed[content]


def _parse(values: Any) -> MoBAConfig:
    try:
        return MoBAConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"config.moba: {error}") from None


def is_full_layer(module: nn.Module, config: MoBAConfig) -> bool:
    """Whether a layer's attention is full by its config."""
    if not config.full_layers:
        return False
    if config.full_layers == getattr(module.config, "num_hidden_layers", None):
        return True
    layer: int | None = getattr(module, "layer_idx", None)
    if layer is None:
        raise ValueError(
            f"full_layers={config.full_layers!r} cannot be honoured: {type(module).__name__} has no layer_idx"
        )
    model_config: Any = module.config
    return config.is_full_layer(layer, model_config.num_hidden_layers)


def refuse_unknown(
    module: nn.Module, dropout: float, is_causal: bool | None, kwargs: dict[str, Any], *, is_packed: bool = False
) -> None:
    """Raise for everything that would change the attention and that MoBA does not know.

    Beside the cu_seq_lens of packed sequences, `seq_idx` says the same once more, for layers of other kinds.
    """
    if dropout:
        config: Any = getattr(module, "config", object)
        names = [name for name, value in vars(config).items() if "drop" in name and value == dropout]
        own_name = min(names, key=lambda name: "att" not in name, default="attention_dropout")
        raise ValueError(f"dropout={dropout}: MoBA has no attention dropout; set config.{own_name}=0.0")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"is_causal=False: MoBA is causal and cannot serve encoders or cross-attention; {SWITCH_PART}")
    for name, value in kwargs.items():
        known = name in HARMLESS or (is_packed and name == "seq_idx")
        if not known and value is not None and value is not False:
            got = f"tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{name}: MoBA cannot honour what this model passes, got {got}")


def _layout(
    q: Tensor,
    k: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    module: nn.Module,
) -> PaddedRows | PackedRows | tuple[Tensor, Tensor] | None:
    """How the rows are laid out; a pair of cu_seqlens where the caller gave them. Padding masks, then cu_seqlens, then
    positions are believed, as transformers' own varlen attention does; a contradiction is refused.
    """
    layout = decode_layout(attention_mask)
    if cu_q is not None or cu_k is not None:
        if isinstance(layout, PaddedRows) and not is_local(layout):
            raise ValueError("cu_seq_lens_q cannot be combined with an attention_mask that has padding")
        if q.shape[0] != 1:
            raise ValueError(f"cu_seq_lens_q needs sequences packed into one row, got a batch of {q.shape[0]}")
        if cu_q is None or cu_k is None:
            raise ValueError("cu_seq_lens_q and cu_seq_lens_k must be given together")
        if is_local(layout):
            if q.shape[1] != k.shape[1]:
                raise ValueError("cu_seq_lens_k must be cu_seq_lens_q: this layer's window has as many keys as queries")
            return PackedRows(cu_q.int()[None], layout.local)
        return cu_q.int(), cu_k.int()
    # The positions are the same for every layer, and reading them makes a GPU wait: there only the first layer looks.
    # A compiled graph does not wait, and asking for the layer would make it one layer's graph.
    is_free = q.device.type == "cpu" or torch.compiler.is_compiling()
    looks = is_free or getattr(module, "layer_idx", None) in (0, None)
    if position_ids is not None and looks and q.shape[1] > 1 and not isinstance(layout, PackedRows):
        _check_positions(position_ids, layout, q.shape[1], k.shape[1])
    return layout


def _check_positions(position_ids: Tensor, layout: PaddedRows | None, num_queries: int, num_keys: int) -> None:
    if position_ids.ndim != 2 or position_ids.shape[1] != num_queries:
        raise ValueError(f"position_ids must be [B, T] with T = {num_queries}, got {tuple(position_ids.shape)}")
    ascends = position_ids.diff(dim=1) == 1
    if layout is not None:
        token = torch.arange(num_queries - 1, device=position_ids.device)
        token = token + (layout.query_end - num_queries)[:, None]
        ascends = ascends | (token < layout.key_start[:, None]) | (token + 1 >= layout.real_end[:, None])
    require(
        ascends.all(),
        "position_ids must ascend by one over each row's real tokens; sequences packed into a row are recognised "
        "without attention_mask and with use_cache=False, or by cu_seq_lens_q and cu_seq_lens_k (the only way under "
        "torch.compile)",
    )


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PaddedRows | PackedRows | tuple[Tensor, Tensor] | None,
    softmax: dict[str, Any],
    options: dict[str, Any],
) -> Any:
    """The output, or with `return_routing` among the options also the routing, over rows in any layout."""
    if layout is None:
        return moba_attention(q, k, v, **softmax, **options)
    if isinstance(layout, PaddedRows):
        return moba_attention(q, k, v, key_start=layout.key_start, key_end=layout.query_end, **softmax, **options)
    if isinstance(layout, PackedRows):
        rows = [
            moba_attention_varlen(q[row], k[row], v[row], cu_seqlens=cu, **softmax, **_of_row(options, row))
            for row, cu in enumerate(layout.cu_seqlens)
        ]
        return torch.stack(rows)
    cu_q, cu_k = layout
    options = _of_row(options, 0)
    return moba_attention_varlen(q[0], k[0], v[0], cu_seqlens=cu_q, cu_seqlens_k=cu_k, **softmax, **options)[None]


def _of_row(options: dict[str, Any], row: int) -> dict[str, Any]:
    """The options for one row of the batch."""
    options = dict(options)
    if "route_by" in options:
        options["route_by"] = tuple(x[row] for x in options["route_by"])
    if "routing" in options:
        options["routing"] = Routing(options["routing"].indices[row], options["routing"].block_size)
    if "block_indices" in options:
        options["block_indices"] = options["block_indices"][row]
    return options
