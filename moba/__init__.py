"""Mixture of Block Attention (MoBA, arXiv 2502.13189): trainable block-sparse attention for long contexts."""

from __future__ import annotations

from moba.attention import moba_attention, moba_attention_varlen
from moba.block_means import append_block_means, moba_attention_paged, moba_route
from moba.compat import moba_attn_varlen, moba_attn_varlen_naive
from moba.compilation import warmup
from moba.config import MoBAConfig
from moba.merge import merge_partials
from moba.module import MoBAttention
from moba.routing import Routing

__all__ = [
    "MoBAConfig",
    "MoBAttention",
    "Routing",
    "append_block_means",
    "merge_partials",
    "moba_attention",
    "moba_attention_paged",
    "moba_attention_varlen",
    "moba_attn_varlen",
    "moba_attn_varlen_naive",
    "moba_route",
    "register_moba",
    "warmup",
]


def register_moba(config: MoBAConfig | None = None) -> None:
    """Make `attn_implementation="moba"` and `"moba_naive"` known to transformers, as `moba.hf.register_moba` says.

    Raises:
        ImportError: without transformers, which is imported here and not by `import moba`.
    """
    try:
        from moba import hf
    except ImportError as error:
        raise ImportError("register_moba needs transformers >= 5.17: pip install 'moba[hf]'") from error
    hf.register_moba(config)
