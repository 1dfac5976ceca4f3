"""Mixture of Block Attention (MoBA, arXiv 2502.13189): trainable block-sparse attention for long contexts."""

from moba.attention import moba_attention, moba_attention_varlen
from moba.combine import combine
from moba.config import MoBAConfig
from moba.routing import Routing

__all__ = ["MoBAConfig", "Routing", "combine", "moba_attention", "moba_attention_varlen"]
