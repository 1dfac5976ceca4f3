"""MoBA in plain torch: CPU, Apple MPS, any CUDA card. What a backend offers; see `moba.backends` for the contract."""

from __future__ import annotations

from torch import Tensor

from moba.backends.pytorch.attention import attend as attend
from moba.backends.pytorch.block_scores import largest_products as largest_products
from moba.backends.pytorch.block_scores import log_masses as log_masses
from moba.backends.pytorch.decoding import append_means as append_means
from moba.backends.pytorch.decoding import attend_step as attend_step
from moba.backends.pytorch.decoding import decode as decode
from moba.routing import route as route


def unsupported(q: Tensor, k: Tensor, *, own_block: bool = True) -> str | None:
    """Why this backend cannot run on these tensors: None, it always can."""
    return None
