"""Mixture of Block Attention (MoBA, arXiv 2502.13189): trainable block-sparse attention for long contexts."""

from __future__ import annotations

from typing import Any

from moba.attention import moba_attention, moba_attention_varlen
from moba.combine import combine
from moba.compat import moba_attn_varlen, moba_attn_varlen_naive
from moba.config import MoBAConfig
from moba.module import MoBAttention
from moba.routing import Routing

__all__ = [
    "MoBAConfig",
    "MoBAttention",
    "Routing",
    "combine",
    "moba_attention",
    "moba_attention_varlen",
    "moba_attn_varlen",
    "moba_attn_varlen_naive",
    "register_moba",
]


def __getattr__(name: str) -> Any:
    """`register_moba` is fetched when it is asked for, so that `import moba` does not import transformers."""
    if name == "register_moba":
        from moba.hf import register_moba

        return register_moba
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
