"""The contract of a backend, and the one table that resolves "auto".

A backend is a module with eight functions over tensors q [R, T, H, D], k [R, S, G, D] and v [R, S, G, Dv] (any strides
with a contiguous last dimension) and the `Sequences` that lie in them:

    unsupported(q, k, *, own_block=True) -> str | None
        Why this backend cannot run on these tensors and as asked (see `attend`), or None if it can.
    route(q, k, sequences, selection, means=None) -> indices
        int32 [R, T, H, K], or [R, T, G, K] where the query heads of a kv head choose together: ascending block numbers,
        own block included, then -1 (also where `selection.top_p` makes do with fewer blocks than there are places for);
        -1 everywhere in padded rows. By the given means of finished blocks (see below) if they are there; k is then not
        read and may be None.
    attend(q, k, v, indices, sequences, *, block_size, scale, softcap=None, own_block=True) -> (out, lse)
        out [R, T, H, Dv] in q's dtype, zeros in padded rows; lse fp32 (fp64 for fp64) [R, T, H], -inf there.
        Differentiable in q, k and v through both results. `indices` have H heads, or G, each of which its query heads
        share. Entries outside 0 … own block are ignored; the last of a query's K entries is its own block or -1. With
        own_block=False the own block is read only where `indices` hold it; a query that then has no block gives what a
        padded row gives. With softcap c, the logits are c · tanh(scale · q Kᵀ / c).

Three of them serve the steps of decoding: no gradients, no value of the device read by the host, and nothing allocated
or copied that grows with the context except scores of blocks and, where two means are the same, these. They read and
write the means of finished blocks, [R, N, G, D] in k's dtype with N >= S // block_size; block j of row r is counted
from the row's key_start. An entry that stands for an unfinished block holds anything, NaN included, and is never used.
With `sequences.page_table`, k and v are pages [P, page_size, G, D] and the means [P, page_size // block_size, G, D],
each where its keys lie; or [P, 1, G, D] where a block spans pages, each under the page of its block's first key.

    append_means(means, k, sequences, block_size) -> None
        Write the means of the blocks that the last T (= sequences.num_queries) keys of each row finished: the bits that
        `route` would score. Nothing else is written.
    decode(q, k, v, means, sequences, selection, *, scale, softcap=None) -> (out, lse, indices)
        `route`, by the given means, and `attend` for at most MAX_DECODE_QUERIES queries a row; never packed sequences.
        Reads the selected keys only.
    attend_step(q, k, v, indices, sequences, *, block_size, scale, softcap=None, own_block=True) -> (out, lse)
        `attend` in the manner of `decode`. `indices`, [R, T, H, K], hold the own block where it is read.

Two serve the loss of a learned router: no gradients, and one sequence, q [T, H, D] and k [S, G, D], whose queries are
its last tokens. Both return [H, T, ceil(S / block_size)], fp32 (fp64 for fp64):

    log_masses(q, k, block_size, scale, softcap) -> masses
        log Σ exp(logit) over each block's keys up to the query; undefined in blocks after the own block.
    largest_products(q, k, block_size) -> products
        `routers.max_token_scores`, max over the block's keys of ⟨q_t, k_i⟩; undefined in blocks that are not past.
"""

from __future__ import annotations

import logging
from types import ModuleType

import torch
from torch import Tensor

logger = logging.getLogger("moba")

# Queries of a row that are one step of decoding: several where tokens are proposed and checked together.
MAX_DECODE_QUERIES = 16

NAMES = ("reference", "pytorch", "triton")

# What "auto" tries, in order, by the device type of the tensors.
AUTO = {"cuda": ("triton", "pytorch")}
AUTO_OTHERWISE = ("pytorch",)

_announced: set[tuple[str, str]] = set()


def load(name: str) -> ModuleType:
    """The backend's module, imported at its first use.

    Raises:
        ValueError: if what it needs is not installed.
    """
    try:
        # Import statements, which torch.compile can trace.
        if name == "triton":
            from moba.backends import triton

            return triton
        if name == "pytorch":
            from moba.backends import pytorch

            return pytorch
        from moba.backends import reference

        return reference
    except ImportError as error:
        raise ValueError(f"backend={name!r} is not available here: {error}") from error


def unavailable(name: str, q: Tensor, k: Tensor, **asked: bool) -> str | None:
    """Why the backend cannot run on these tensors here, as asked, or None if it can."""
    try:
        return load(name).unsupported(q, k, **asked)
    except ValueError as error:
        return str(error)


def resolve(name: str, q: Tensor, k: Tensor, **asked: bool) -> ModuleType:
    """The module of the named backend, or of the one that "auto" takes for these tensors.

    Args:
        asked: what else the call asks for, as `unsupported` takes it.

    Raises:
        ValueError: if the named backend cannot run on them; it says why.
    """
    if q.is_meta and "meta" not in AUTO:
        raise ValueError("q, k and v must hold values, got tensors on the device meta")
    if name != "auto":
        backend = load(name)
        if reason := backend.unsupported(q, k, **asked):
            raise ValueError(f"backend={name!r} cannot run here: {reason}")
        return backend
    candidates = AUTO.get(q.device.type, AUTO_OTHERWISE)
    chosen = next((c for c in candidates if unavailable(c, q, k, **asked) is None), candidates[-1])
    if not torch.compiler.is_compiling() and (q.device.type, chosen) not in _announced:
        _announced.add((q.device.type, chosen))
        reason = "" if chosen == candidates[0] else f": {unavailable(candidates[0], q, k, **asked)}"
        # A GPU without its kernels is many times slower, which nobody should have to find out.
        level = logging.WARNING if reason and q.device.type == "cuda" else logging.INFO
        logger.log(level, 'backend="auto" takes %r on %s%s', chosen, q.device, reason)
    return load(chosen)
