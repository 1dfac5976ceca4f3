"""MoBA over vLLM's Triton attention on NVIDIA GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from moba.attention import moba_attention_varlen
from moba.vllm.backend import MoBABuilder, MoBAImpl
from moba.vllm.config import read_config
from moba.vllm.step import Part


class MoBATritonBuilder(MoBABuilder, TritonAttentionMetadataBuilder):
    """See MoBABuilder. Adds the engine's metadata of the single tokens with full attention, as `moba_dense`."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Steps of single tokens: all of them with `decode="moba"`; with "full" some may belong to prompts."""
        config = read_config(vllm_config)
        if config is not None and config.decode == "moba":
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.NEVER

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """See MoBABuilder."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        for part in metadata.moba_parts:
            if part.is_dense:
                num_rows = part.key_end.shape[0]
                metadata.moba_dense = replace(
                    metadata,
                    num_actual_tokens=num_rows,
                    max_query_len=1,
                    query_start_loc=torch.arange(num_rows + 1, dtype=torch.int32, device=self.device),
                    seq_lens=part.key_end,
                    block_table=part.page_table,
                )
        return metadata


class MoBATritonImpl(MoBAImpl, TritonAttentionImpl):
    """See MoBAImpl."""

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
        """See MoBAImpl."""
        if attn_metadata is None and kv_cache.numel() == 0 and self.attends_with_moba(layer):
            self._try_memory(query, key)
        return super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
        )

    def dense(self, layer: Any, q: Tensor, kv_cache: Tensor, part: Part, attn_metadata: Any) -> Tensor:
        """Full attention: the engine's own."""
        out = torch.empty_like(q)
        TritonAttentionImpl.forward(self, layer, q, None, None, kv_cache, attn_metadata.moba_dense, out)
        return out

    def _try_memory(self, query: Tensor, key: Tensor) -> None:
        """Attend to as many keys as any step may, while the engine measures what it must leave beside its cache."""
        assert self.moba is not None
        k, v = (key.new_empty(self.most_keys, *key.shape[1:]) for _ in range(2))
        num_tokens = min(query.shape[0], self.most_keys)
        cu_q, cu_k = (
            torch.tensor([0, num], dtype=torch.int32, device=key.device) for num in (num_tokens, self.most_keys)
        )
        moba_attention_varlen(
            q=query[:num_tokens], k=k, v=v, cu_seqlens=cu_q, cu_seqlens_k=cu_k, scale=self.scale,
            backend=self.moba.backend, **self.moba.selection,
        )  # fmt: skip


class MoBATritonBackend(TritonAttentionBackend):
    """The attention of models with a MoBA config on NVIDIA GPUs; vLLM calls it CUSTOM."""

    @staticmethod
    def get_name() -> str:
        """See AttentionBackend."""
        return "CUSTOM"

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """See AttentionBackend. MoBA's kernels split their sums by what a batch holds."""
        return False

    @staticmethod
    def get_impl_cls() -> type[MoBATritonImpl]:
        """See AttentionBackend."""
        return MoBATritonImpl

    @staticmethod
    def get_builder_cls() -> type[MoBATritonBuilder]:
        """See AttentionBackend."""
        return MoBATritonBuilder
