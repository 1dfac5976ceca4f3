"""MoBA over vLLM's attention on CPUs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from moba.block_means import moba_attention_paged
from moba.vllm.backend import MoBABuilder, MoBAImpl
from moba.vllm.step import Part


class MoBACPUBuilder(MoBABuilder, CPUAttentionMetadataBuilder):
    """See MoBABuilder."""


class MoBACPUImpl(MoBAImpl, CPUAttentionBackendImpl):
    """See MoBAImpl. The engine's kernels interleave keys in pages of full layers; MoBA layers store them plainly."""

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Store new keys and values [total, G, D]; a slot below 0 is padding."""
        if not self.attends_with_moba(layer):
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        slots = slot_mapping[: key.shape[0]].long()
        is_real, page_size = slots >= 0, kv_cache.shape[2]
        slots = slots[is_real]
        for pages, new in zip(self.pages(kv_cache), (key, value), strict=True):
            pages[slots // page_size, slots % page_size] = new[: len(is_real)][is_real]

    def dense(self, layer: Any, q: Tensor, kv_cache: Tensor, part: Part, attn_metadata: Any) -> Tensor:
        """Full attention: MoBA that selects every block."""
        assert self.moba is not None
        assert self._block_means is not None
        k_pages, v_pages = self.pages(kv_cache)
        block_size = self.moba.block_size
        num_blocks = part.page_table.shape[1] * k_pages.shape[1] // block_size
        return moba_attention_paged(
            q=q[:, None], k_pages=k_pages, v_pages=v_pages, page_table=part.page_table, key_end=part.key_end,
            block_means=self._block_means, block_size=block_size, topk=num_blocks, scale=self.scale,
        )[:, 0]  # fmt: skip


class MoBACPUBackend(CPUAttentionBackend):
    """vLLM's attention on CPUs, where layers of models with a MoBA config attend with MoBA."""

    @staticmethod
    def get_impl_cls() -> type[MoBACPUImpl]:
        """See AttentionBackend."""
        return MoBACPUImpl

    @staticmethod
    def get_builder_cls() -> type[MoBACPUBuilder]:
        """See AttentionBackend."""
        return MoBACPUBuilder
