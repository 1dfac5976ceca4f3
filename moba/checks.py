"""What the public functions are given, checked: a ValueError names the argument, what it was and what is valid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require_tensors(**arguments: object) -> None:
    """Check that these are tensors at all."""
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {describe(x)}")


def check_tensors(ndim: int, **tensors: Tensor) -> None:
    """Check dimensions, dtypes, devices, strides and head dims of tensors [.., heads, D], called by these names."""
    names = _listed(list(tensors))
    layout = "[B, T, H, D]" if ndim == 4 else "[total, H, D]"
    first, q = next(iter(tensors.items()))
    for name, x in tensors.items():
        if x.ndim != ndim:
            raise ValueError(f"{name} must be {layout}, got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            got = f"{name} is {x.dtype}" + (f", {first} {q.dtype}" if name != first else "")
            raise ValueError(f"{names} must share one dtype of fp16, bf16, fp32, fp64; {got}")
        if x.device != q.device:
            raise ValueError(f"{names} must be on one device; {name} is on {x.device}, {first} on {q.device}")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"the last dimension of {name} must be contiguous, got strides {x.stride()}")
    head_dim = q.shape[-1]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head dim must be 1 to {MAX_HEAD_DIM}, got {head_dim}")
    if any(x.shape[-1] != head_dim for x in tensors.values()):
        got = _listed([str(x.shape[-1]) for x in tensors.values()])
        raise ValueError(f"{names} must have one head dim, got {got}")


def check_scale(scale: float | None, head_dim: int) -> float:
    """The scale of the scores: D^−0.5 where none is given."""
    if scale is None:
        return head_dim**-0.5
    try:
        value = math.nan if isinstance(scale, str) else float(scale)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"scale must be a finite number or None, got {scale!r}")
    return value


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    """Check that query heads share key/value heads evenly."""
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"key/value heads must divide query heads, got {num_heads} query and {num_kv_heads} key/value heads"
        )


def check_attention(ndim: int, **tensors: Tensor) -> None:
    """Check queries, keys and values, given in this order by their names."""
    check_tensors(ndim, **tensors)
    q, k, v = tensors.values()
    if k.shape != v.shape:
        names = _listed(list(tensors)[1:])
        raise ValueError(f"{names} must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    check_heads(q.shape[-2], k.shape[-2])


def check_page_numbers(pages_in_use: Tensor, num_pages: int) -> None:
    """Check that every row's keys lie in pages that there are."""
    if not pages_in_use.numel():
        return
    least, largest = (int(bound) for bound in pages_in_use.aminmax())
    if least < 0 or largest >= num_pages:
        raise ValueError(
            f"page_table must hold numbers from 0 to {num_pages - 1} for the pages of each row's keys, "
            f"got {least if least < 0 else largest}"
        )


def check_bound(name: str, bound: Tensor | None, q: Tensor) -> None:
    """Check key_start or key_end, int32 [B] beside q [B, ...]."""
    if bound is None:
        return
    if not isinstance(bound, Tensor) or bound.dtype != torch.int32 or bound.shape != q.shape[:1]:
        raise ValueError(f"{name} must be an int32 tensor [B] = [{q.shape[0]}], got {describe(bound)}")
    if bound.device != q.device:
        raise ValueError(f"{name} must be on {q.device} like q, got {bound.device}")


def check_key_range(key_start: Tensor | None, key_end: Tensor | None, num_keys: int) -> None:
    """Check 0 <= key_start <= key_end <= S, where values can be read."""
    bounds = [bound for bound in (key_start, key_end) if bound is not None]
    if not is_readable(bounds[0]):
        return
    ordered = torch.stack([torch.zeros_like(bounds[0]), *bounds, torch.full_like(bounds[0], num_keys)])
    if bool((ordered.diff(dim=0) < 0).any()):
        got = ", ".join(
            f"{name}={bound.tolist()}"
            for name, bound in (("key_start", key_start), ("key_end", key_end))
            if bound is not None
        )
        raise ValueError(f"0 <= key_start <= key_end <= S = {num_keys} must hold in every row, got {got}")


def check_means(name: str, means: Tensor, k: Tensor, num_blocks: int) -> None:
    """Check means [B, N, G, D] of keys [B, S, G, D], N at least num_blocks."""
    is_tensor = isinstance(means, Tensor)
    if (
        not is_tensor
        or means.dtype != k.dtype
        or means.ndim != 4
        or means.shape[1] < num_blocks
        or ((means.shape[0], *means.shape[2:]) != (k.shape[0], *k.shape[2:]))
    ):
        batch, _, num_kv_heads, head_dim = k.shape
        raise ValueError(
            f"{name} must be {k.dtype} [{batch}, at least {num_blocks}, {num_kv_heads}, {head_dim}] like the blocks of "
            f"k, got {describe(means)}"
        )
    if means.device != k.device:
        raise ValueError(f"{name} must be on {k.device} like k, got {means.device}")
    if means.stride(-1) != 1 and means.shape[-1] > 1:
        raise ValueError(f"the last dimension of {name} must be contiguous, got strides {means.stride()}")


def check_cu_seqlens(name: str, cu: Tensor, device: torch.device, total: int | None) -> None:
    """Check the bounds of sequences packed into q, k or v [total, ...]; None: of a length that is not known yet."""
    if not isinstance(cu, Tensor) or cu.dtype not in (torch.int32, torch.int64) or cu.ndim != 1 or cu.numel() < 1:
        raise ValueError(f"{name} must be an int32 tensor [num_sequences + 1], got {describe(cu)}")
    if cu.device != device:
        raise ValueError(f"{name} must be on {device} like q, got {cu.device}")
    if not is_readable(cu):
        return
    is_ascending = cu[0] == 0 and not bool((cu.diff() < 0).any())
    if not is_ascending or (total is not None and cu[-1] > total):
        end = "" if total is None else f" to at most {total}"
        raise ValueError(f"{name} must ascend from 0{end}, got {cu.tolist()}")


def is_readable(x: Tensor) -> bool:
    """Whether values can be checked: reading a GPU's would make it wait, reading a traced graph's would break it."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def describe(x: object) -> str:
    """What something is, for a message."""
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)


def _listed(words: list[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
