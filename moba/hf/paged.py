"""transformers' continuous batching (`generate_batch`, `init_continuous_batching`) with MoBA.

transformers keeps the keys and values of many requests in pages; MoBA keeps the block means beside them, under the
same page numbers. How it gets in: continuous batching accepts an attention whose name contains "flash" (and then makes
no T × S masks), so the model bears such a name while a manager serves it, and no other model's attention is touched.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from math import ceil
from types import MethodType
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moba.config import MODEL_ROUTERS, MoBAConfig
from moba.hf.attention import read_config
from moba.hf.extensions import wanted_parts
from moba.hf.paged_step import PagedMoBA, paged_attention_forward
from moba.hf.pages import PageBook, find_page_book
from moba.hf.switch import require_interface, warn_if_untested

# Up to 5.18 transformers puts "paged|" before a name that lacks it, from 5.20 on it takes it away.
ATTENTION = "paged|moba_flash" if "paged|sdpa" in ALL_ATTENTION_FUNCTIONS else "moba_flash"
USUAL_PAGE_SIZE = 256


def enable_paged(model: PreTrainedModel, config: MoBAConfig | None = None) -> None:
    """Make this model's `generate_batch` and `init_continuous_batching` attend with MoBA.

    Prompts are read with MoBA, in chunks or whole; later tokens follow `config.decode`; `full_layers` stay full. Every
    request gets the tokens it would get alone. Only this model changes, and its `generate` and `forward` do not.

    With `decode="moba"` a step of MoBA layers reads the means and the selected keys where they lie. Full attention
    copies each request's keys out of the pages first, as transformers' own does. For batches that also read prompts,
    and for every batch of `decode="full"`, transformers itself lists the place of each cached token.

    Pages (`page_size` of ContinuousBatchingConfig; `block_size` in transformers 5.17) must hold a multiple of
    `config.block_size`, or with `allow_block_sharing=False` a divisor of it. Without a ContinuousBatchingConfig their
    size is chosen: the multiple nearest above 256. Equal beginnings of prompts share pages; with `decode="full"` the
    pages of a request's output are not offered to later prompts that repeat it, because full attention made them.

    CUDA graphs are off unless asked for with `use_cuda_graph=(False, True)`, for decode steps.

    Args:
        model: a causal language model whose layers all have full attention.
        config: None takes the config that the model carries (`set_moba_config`). Calling again replaces it for
            managers made from then on.

    Raises:
        ValueError: if the installed transformers or the model cannot be served, or no config fits it. The two methods
            raise it for a ContinuousBatchingConfig that cannot be honoured. A request too long for the cache fails
            alone, with the reason in its `error`.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model must be a transformers model, got {type(model).__name__}")
    if config is not None and not isinstance(config, MoBAConfig):
        raise ValueError(f"config must be a MoBAConfig or None, got {config!r}")
    text_config = model.config.get_text_config(decoder=True)
    chosen = config or read_config(text_config)
    if chosen is None:
        raise ValueError("no MoBA config: give enable_paged one, or write it to the model with set_moba_config")
    chosen.check_layers(text_config.num_hidden_layers)
    if chosen.router in MODEL_ROUTERS or wanted_parts(text_config):
        raise ValueError(
            f"continuous batching keeps nothing beside keys and values in its pages, which router={chosen.router!r} or "
            "this model's key convolution needs"
        )
    warn_if_untested()
    book_type = find_page_book()
    _check_model(model, text_config)
    AttentionInterface.register(ATTENTION, paged_attention_forward)

    def init_continuous_batching(
        self: PreTrainedModel,
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        workload_hints: Any = None,
    ) -> Any:
        """As transformers' own, with a manager that attends with MoBA."""
        return _start_manager(self, chosen, book_type, generation_config, continuous_batching_config, workload_hints)

    served: Any = model
    served.init_continuous_batching = MethodType(init_continuous_batching, model)


def _check_model(model: PreTrainedModel, text_config: Any) -> None:
    require_interface(model)
    window = getattr(text_config, "sliding_window", None)
    kinds = getattr(text_config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"]
    if set(kinds) != {"full_attention"}:
        raise ValueError(f"layer_types must all be full_attention for MoBA in pages, got {sorted(set(kinds))}")


def _start_manager(
    model: Any,
    config: MoBAConfig,
    book_type: type[PageBook],
    generation_config: Any,
    batching: Any,
    workload_hints: Any,
) -> Any:
    """A manager whose cache has block means, made while the model bears our attention's name."""
    kept = getattr(model, "_cached_continuous_batching_manager", None)
    if kept is not None and getattr(kept, "moba_config", None) != config:
        raise ValueError(
            "the model keeps a persistent manager that was made without this config: "
            "call destroy_cached_continuous_batching_manager() first"
        )
    batching = batching or getattr(generation_config or model.generation_config, "continuous_batching_config", None)
    batching = _resolve(batching, config, book_type)
    if model.config._attn_implementation != ATTENTION:
        model._attention_when_not_serving = model.config._attn_implementation
    # Not by set_attn_implementation, which takes every name with "flash" in it for a kernel to be downloaded.
    model.config._attn_implementation = ATTENTION
    try:
        manager = type(model).init_continuous_batching(model, generation_config, batching, workload_hints)
    except BaseException:
        model.config._attn_implementation = model._attention_when_not_serving
        raise
    manager._original_attn_impl = model._attention_when_not_serving
    if kept is None:
        manager.moba_config = config
        _fit_manager(manager, model, batching, book_type)
    return manager


def _fit_manager(manager: Any, model: Any, batching: Any, book_type: type[PageBook]) -> None:
    """Have the manager's processor made with page tables, block means, and a check of what each request needs."""
    text_config = model.config.get_text_config(decoder=True)
    config: MoBAConfig = manager.moba_config
    # transformers resets this for every attention but its own two. It makes it hand over page tables in decode steps.
    num_pages = 0
    if config.decode == "moba":
        num_pages = batching.max_blocks_per_request
        if num_pages is None:
            longest = getattr(text_config, "max_position_embeddings", None) or 2**17
            num_pages = ceil(longest / getattr(batching, book_type.page_size_field))
    manager.continuous_batching_config.max_blocks_per_request = num_pages
    create = manager._create_batch_processor

    def create_batch_processor() -> Any:
        processor = create()
        if not hasattr(processor.cache, "moba"):
            book = book_type(processor.cache)
            processor.cache.moba = PagedMoBA(processor, book, config, text_config.num_hidden_layers)
            processor.cache.update = partial(_leave_to_attention, processor.cache)
            _refuse_oversized(processor.scheduler, book)
        return processor

    manager._create_batch_processor = create_batch_processor


def _leave_to_attention(
    cache: Any, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """A paged cache's `update` that hands the new keys and values on, and the cache as `kwargs["cache"]`.

    From transformers 5.24 on layers call `update` themselves; before, they passed `cache` to the attention function.
    """
    kwargs["cache"] = cache
    return key_states, value_states


def _refuse_oversized(scheduler: Any, book: PageBook) -> None:
    """Fail a request that the whole cache could not hold: transformers would go on until every request is lost."""
    add = scheduler.add_waiting_request

    def add_waiting_request(state: Any) -> None:
        num_prompt = len(state.initial_tokens)
        if num_prompt == 0:
            raise ValueError(f"request {state.request_id} has an empty prompt")
        # The last token made is never read again. Without a limit, what the prompt alone needs is asked for.
        needed = num_prompt + max((state.max_new_tokens or 1) - 1, 0)
        if needed > book.capacity:
            raise ValueError(
                f"request {state.request_id} needs room for {needed} tokens ({num_prompt} of prompt, max_new_tokens="
                f"{state.max_new_tokens}) and the cache holds {book.capacity}: shorten it or raise num_blocks"
            )
        add(state)

    scheduler.add_waiting_request = add_waiting_request


def _resolve(batching: Any, config: MoBAConfig, book_type: type[PageBook]) -> Any:
    """A copy of the ContinuousBatchingConfig that MoBA can honour, with a fitting page size if none was given."""
    from transformers import ContinuousBatchingConfig

    name, block_size = book_type.page_size_field, config.block_size
    if batching is None:
        page_size: Any = {name: ceil(USUAL_PAGE_SIZE / block_size) * block_size}
        batching = ContinuousBatchingConfig(**page_size)
    batching = deepcopy(batching)
    page_size = getattr(batching, name)
    # Where a block spans pages, its mean lies under the first, which requests with other continuations may share.
    if page_size % block_size and (block_size % page_size or batching.allow_block_sharing):
        raise ValueError(
            f"{name}={page_size} must be a multiple of the MoBA block_size {block_size}, or with allow_block_sharing="
            f"False divide it: ContinuousBatchingConfig({name}={ceil(page_size / block_size) * block_size})"
        )
    graphs = batching.use_cuda_graph
    graphs = (False, False) if graphs is None else (graphs, graphs) if isinstance(graphs, bool) else tuple(graphs)
    if graphs[0] or (graphs[1] and config.decode == "full"):
        raise ValueError(
            f"use_cuda_graph={batching.use_cuda_graph}: MoBA reads prompts, and every batch of decode='full', outside "
            "CUDA graphs; use (False, True) with decode='moba', or (False, False)"
        )
    batching.use_cuda_graph = graphs
    if batching.cpu_offload_space:
        raise ValueError(
            f"cpu_offload_space={batching.cpu_offload_space}: block means are not offloaded; leave it at 0, and "
            "evicted requests are read again"
        )
    return batching
