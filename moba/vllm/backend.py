"""What MoBA adds to an attention backend of vLLM: two mixins, put before the engine's own builder and implementation.

vLLM calls, in each forward pass: the builder's `build` once; then for each layer `do_kv_cache_update`, which stores the
new keys and values in the pages, and `forward`. Full layers are the engine's own attention throughout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index

from moba import backends
from moba.vllm import step
from moba.vllm.config import check_layer, check_page_size, read_config


def most_keys(vllm_config: Any) -> int:
    """Keys that are copied out of their pages at a time, for chunks of prompts: as many as one request can have."""
    return max(vllm_config.model_config.max_model_len, vllm_config.scheduler_config.max_num_batched_tokens)


class MoBABuilder:
    """Lays a forward pass out once for all layers; the engine's metadata carry the parts as `moba_parts`."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        engine: Any = super()
        engine.__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.moba = read_config(vllm_config)
        self._page_size = kv_cache_spec.block_size
        self._most_keys = most_keys(vllm_config)
        if self.moba is not None:
            check_page_size(self._page_size, self.moba)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """The engine's metadata, with the parts."""
        engine: Any = super()
        metadata = engine.build(common_prefix_len, common_attn_metadata, fast_build)
        if self.moba is not None:
            metadata.moba_parts = self._lay_out(common_attn_metadata)
        return metadata

    def _lay_out(self, common: Any) -> list[step.Part]:
        table, key_end, page_size = common.block_table_tensor, common.seq_lens, self._page_size
        is_sparse = self.moba is not None and self.moba.decode == "moba"
        if common.max_query_len == 1 and is_sparse:
            return step.lay_out_single_tokens(table, key_end, longest=common.max_seq_len, page_size=page_size)
        # Both are on the host; exact for requests that are reading their prompts.
        query_start, num_keys = common.query_start_loc_cpu.tolist(), common.seq_lens_cpu_upper_bound.tolist()
        is_dense = [False] * len(num_keys) if is_sparse else (~common.is_prefilling).tolist()
        return step.lay_out(
            query_start, num_keys, table, key_end, page_size=page_size, is_dense=is_dense, most_keys=self._most_keys
        )


class MoBAImpl:
    """One layer's attention, with its block means."""

    head_size: int
    scale: float

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: Any = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        engine: Any = super()
        engine.__init__(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap,
            attn_type, kv_sharing_target_layer_name, **kwargs,
        )  # fmt: skip
        vllm_config = get_current_vllm_config()
        self.moba = read_config(vllm_config)
        self._block_means: Tensor | None = None
        self._is_sparse: bool | None = None
        if self.moba is not None:
            check_layer(self, attn_type, kv_sharing_target_layer_name)
            self._num_layers = vllm_config.model_config.hf_text_config.num_hidden_layers
            self.most_keys = most_keys(vllm_config)
            example = torch.empty(1, 1, num_heads, head_size)
            backends.resolve(self.moba.backend, example, example)

    def attends_with_moba(self, layer: Any) -> bool:
        """Whether this layer, the one that the implementation belongs to, is not a full one."""
        if self._is_sparse is None:
            index = extract_layer_index(layer.layer_name) if self.moba else 0
            self._is_sparse = self.moba is not None and not self.moba.is_full_layer(index, self._num_layers)
        return self._is_sparse

    def pages(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, [P, page_size, G, D] each, of a layer's cache [P, G, page_size, 2 D]: views."""
        pages = kv_cache.transpose(1, 2)
        return pages[..., : self.head_size], pages[..., self.head_size :]

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of query [total, H, D] into output [total, H, D]; without metadata, a trial of the memory."""
        engine: Any = super()
        if attn_metadata is None or not self.attends_with_moba(layer):
            return engine.forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        config = self.moba
        assert config is not None
        if output_scale is not None or output_block_scale is not None:
            raise ValueError(
                "MoBA in vLLM does not quantise its output: leave the fusion of attention and quantisation"
            )
        k_pages, v_pages = self.pages(kv_cache)
        self._block_means = step.means_beside(self._block_means, k_pages, config.block_size)
        step.attend(
            attn_metadata.moba_parts, query, k_pages, v_pages, self._block_means, output, config, scale=self.scale,
            dense=lambda q, part: self.dense(layer, q, kv_cache, part, attn_metadata),
        )  # fmt: skip
        return output

    def dense(self, layer: Any, q: Tensor, kv_cache: Tensor, part: step.Part, attn_metadata: Any) -> Tensor:
        """Full attention of single tokens, q [R, H, D]."""
        raise NotImplementedError
