"""Context parallelism: MoBA over a sequence that is split between the ranks of a torch.distributed process group."""

from __future__ import annotations

from moba.parallel.attention import TRANSPORTS, context_parallel_attention
from moba.parallel.shards import Shards

__all__ = ["TRANSPORTS", "Shards", "context_parallel_attention"]
