"""Where transformers' continuous batching keeps keys and values: one small class for each way its versions do it.

Both give pages [P, page_size, G, D] a layer, numbered alike in every layer, and the list of a request's pages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from typing import Any

import transformers
from torch import Tensor

CopyCallback = Callable[[list[int], list[int]], None]


class PageBook(ABC):
    """What is asked of a cache of transformers'.

    Attributes:
        page_size_field: the name of the page size in ContinuousBatchingConfig.
        page_size: tokens in a page.
        trash: a page that no request owns, for padding to write to.
        capacity: tokens that one request alone can have in the cache.
        table_step: what to divide the entries of transformers' block tables by to get page numbers.
    """

    page_size_field: str
    page_size: int
    trash: int
    capacity: int
    table_step: int

    @staticmethod
    @abstractmethod
    def is_offered() -> bool:
        """Whether the installed transformers keeps its cache in this way."""

    @abstractmethod
    def __init__(self, cache: Any) -> None: ...

    @abstractmethod
    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, [P, page_size, G, D] each: views, not contiguous from page to page."""

    @abstractmethod
    def table(self, request_id: str) -> list[int]:
        """The request's pages in order."""

    @abstractmethod
    def on_copy(self, callback: CopyCallback) -> None:
        """Have `callback` called with pages and where to, whenever transformers copies pages (a request forks)."""

    @abstractmethod
    def share_at_most(self, request: Any, num_pages: int) -> None:
        """Let only so many of the pages that this forward pass fills be offered to other requests."""


class TensorOfSectors(PageBook):
    """From 5.18 on: one tensor for all layers, where a page of one layer is followed by that of the next."""

    page_size_field = "page_size"

    @staticmethod
    def is_offered() -> bool:
        """See PageBook."""
        cache, allocator = _class("cache", "PagedAttentionCache"), _class("cache_allocators", "CacheAllocator")
        return hasattr(cache, "perform_cache_copy") and hasattr(allocator, "get_cache_for_block_table")

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        (self._allocator,) = cache.cache_allocators.values()
        stride = self._allocator.block_physical_stride
        self.page_size = self._allocator.tokens_per_page
        self.trash = self._allocator.write_trash_index // stride
        self.capacity = cache.num_blocks * self.page_size
        self.table_step = stride // self.page_size

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """See PageBook."""
        k, v = self._allocator.get_cache_for_block_table(layer)
        return k[:: self.table_step], v[:: self.table_step]

    def table(self, request_id: str) -> list[int]:
        """See PageBook."""
        return self._allocator.block_table[request_id]

    def on_copy(self, callback: CopyCallback) -> None:
        """See PageBook."""
        copy = self._cache.perform_cache_copy

        def perform_cache_copy(pairs: dict[str, tuple[list[int], list[int]]]) -> None:
            copy(pairs)
            for source, target in pairs.values():
                callback(source, target)

        self._cache.perform_cache_copy = perform_cache_copy

    def share_at_most(self, request: Any, num_pages: int) -> None:
        """See PageBook."""
        request.complete_blocks = {kind: min(num, num_pages) for kind, num in request.complete_blocks.items()}


class TensorsOfLayers(PageBook):
    """5.17: two tensors a layer."""

    page_size_field = "block_size"
    table_step = 1

    @staticmethod
    def is_offered() -> bool:
        """See PageBook."""
        cache = _class("cache", "PagedAttentionCache")
        return hasattr(cache, "copy_cache") and _class("cache_manager", "FullAttentionCacheAllocator") is not None

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        (self._allocator,) = cache.group_cache_managers
        self.page_size = cache.block_size
        self.trash = cache.write_trash_index // self.page_size
        # Its rounding asks for a page more than a request that fills its pages to the last two tokens needs.
        self.capacity = cache.num_blocks * self.page_size - 2

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """See PageBook."""
        _, place = self._cache.layer_index_to_group_indices[layer]
        k, v = self._cache.key_cache[place], self._cache.value_cache[place]
        return k.unflatten(0, (-1, self.page_size)), v.unflatten(0, (-1, self.page_size))

    def table(self, request_id: str) -> list[int]:
        """See PageBook."""
        return self._allocator.block_table[request_id]

    def on_copy(self, callback: CopyCallback) -> None:
        """See PageBook."""
        copy = self._cache.copy_cache

        def copy_cache(source: list[int], target: list[int]) -> None:
            copy(source, target)
            callback(source, target)

        self._cache.copy_cache = copy_cache

    def share_at_most(self, request: Any, num_pages: int) -> None:
        """See PageBook."""
        request.complete_blocks = min(request.complete_blocks, num_pages)


def find_page_book() -> type[PageBook]:
    """The class for the installed transformers.

    Raises:
        ValueError: naming its version and what is missing.
    """
    for book in (TensorOfSectors, TensorsOfLayers):
        if book.is_offered():
            return book
    raise ValueError(
        f"transformers {transformers.__version__} cannot serve MoBA: its PagedAttentionCache has neither "
        "perform_cache_copy with allocators that have get_cache_for_block_table (5.18 to 5.24), nor copy_cache with "
        "a cache_manager (5.17)"
    )


def _class(module: str, name: str) -> Any:
    """A class of transformers' continuous batching, or None where there is none of that name."""
    try:
        return getattr(import_module(f"transformers.generation.continuous_batching.{module}"), name, None)
    except ImportError:
        return None
