"""Check the arguments of the public functions; a ValueError names the argument, what it was and what is valid."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from moba.numerics import to_autocast_dtype
from moba.sequences import Sequences, page_means_shape

MAX_HEAD_DIM = 256
# No model has so many query heads in a layer.
MOST_HEADS = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require_tensors(**arguments: object) -> None:
    """Check that all of these are tensors."""
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {describe(x)}")


def check_tensors(ndim: int, **tensors: Tensor) -> None:
    """Check dimensions, dtypes, devices, strides and the range of head dims of tensors [.., heads, D], called by these
    names.
    """
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
    for name, x in tensors.items():
        if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(f"head dim must be 1 to {MAX_HEAD_DIM}, got {x.shape[-1]} for {name}")


def check_head_dim(**tensors: Tensor) -> None:
    """Check that these tensors [.., D] have one head dim."""
    if len({x.shape[-1] for x in tensors.values()}) > 1:
        got = _listed([str(x.shape[-1]) for x in tensors.values()])
        raise ValueError(f"{_listed(list(tensors))} must have one head dim, got {got}")


def check_scale(scale: float | None, head_dim: int) -> float:
    """Check the scale of the scores and return it; D^−0.5 if it is None."""
    if scale is None:
        return head_dim**-0.5
    try:
        value = math.nan if isinstance(scale, str) else float(scale)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"scale must be a finite number or None, got {scale!r}")
    return value


def check_softcap(softcap: float | None) -> float | None:
    """The bound on the scores, None for none."""
    if softcap is None:
        return None
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)) or not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a finite number > 0 or None, got {softcap!r}")
    return float(softcap)


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    """Check that query heads share key/value heads evenly."""
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"key/value heads must divide query heads, got {num_heads} query and {num_kv_heads} key/value heads: heads "
            "are the last dimension but one, [B, T, H, D] and [B, S, G, D]"
        )


def check_attention(ndim: int, **tensors: Tensor) -> None:
    """Check queries, keys and values, given in this order by their names. Values may have a head dim of their own."""
    check_tensors(ndim, **tensors)
    q, k, v = tensors.values()
    check_head_dim(**dict(list(tensors.items())[:2]))
    if k.shape[:-1] != v.shape[:-1]:
        names = _listed(list(tensors)[1:])
        raise ValueError(f"{names} must have one shape but for the head dim, got {tuple(k.shape)} and {tuple(v.shape)}")
    check_heads(q.shape[-2], k.shape[-2])


def warn_of_layout(q: Tensor) -> None:
    """Warn where q [B, T, H, D] looks like [B, H, T, D]: more heads than any model has, and fewer tokens."""
    num_tokens, num_heads = q.shape[1:3]
    if num_heads > max(num_tokens, MOST_HEADS) and not torch.compiler.is_compiling():
        warnings.warn(
            f"q {tuple(q.shape)} is {num_tokens} tokens of {num_heads} heads, as q, k and v are [B, T, H, D]: "
            "transpose (1, 2) what scaled_dot_product_attention takes",
            stacklevel=3,
        )


def check_route_by(
    route_by: tuple[Tensor, Tensor] | None, q: Tensor, k: Tensor, **others: object
) -> tuple[Tensor, Tensor] | None:
    """Check the queries and keys to route by against q and k, and cast them as autocast does; `others` must be None."""
    if route_by is None:
        return None
    for name, other in others.items():
        if other is not None:
            raise ValueError(f"route_by serves to choose a routing, so it cannot be combined with {name}")
    if not isinstance(route_by, tuple) or len(route_by) != 2:
        raise ValueError(f"route_by must be a pair of queries and keys, got {type(route_by).__name__}")
    by_q, by_k = route_by
    require_tensors(**{"route_by[0]": by_q, "route_by[1]": by_k})
    by_q, by_k, _ = to_autocast_dtype(by_q, by_k, by_k)
    check_attention(q.ndim, **{"route_by[0]": by_q, "route_by[1]": by_k, "route_by[1] again": by_k})
    if by_q.shape[:-1] != q.shape[:-1] or by_k.shape[:-1] != k.shape[:-1] or by_q.device != q.device:
        raise ValueError(
            f"route_by must have the shapes of q and k except the head dim, {tuple(q.shape)} and {tuple(k.shape)} on "
            f"{q.device}, got {tuple(by_q.shape)} and {tuple(by_k.shape)} on {by_q.device}"
        )
    return by_q, by_k


def check_block_indices(
    block_indices: object, q: Tensor, num_kv_heads: int, topk: int | None, own_block: object, **others: object
) -> int:
    """Check a selection of blocks given beside q [.., T, H, D], and that what chooses one is not; return its K.

    Args:
        others: arguments that serve to choose a routing, by name; all must be None.
    """
    for name, other in others.items():
        if other is not None:
            raise ValueError(f"block_indices say which blocks to attend to, so they cannot be combined with {name}")
    if not isinstance(own_block, bool):
        raise ValueError(f"own_block must be True or False, got {own_block!r}")
    layout = "[B, T, H or G, K]" if q.ndim == 4 else "[total, H or G, K]"
    if (
        not isinstance(block_indices, Tensor)
        or block_indices.dtype not in (torch.int32, torch.int64)
        or block_indices.ndim != q.ndim
        or block_indices.shape[:-2] != q.shape[:-2]
        or block_indices.shape[-2] not in (q.shape[-2], num_kv_heads)
        or block_indices.shape[-1] < 1
    ):
        raise ValueError(
            f"block_indices must be int32 or int64 {layout} with a K >= 1 beside q {tuple(q.shape)} and {num_kv_heads} "
            f"key/value heads, got {describe(block_indices)}"
        )
    if block_indices.device != q.device:
        raise ValueError(f"block_indices must be on {q.device} like q, got {block_indices.device}")
    places = block_indices.shape[-1]
    if topk not in (None, places):
        raise ValueError(f"topk must be left out or be the {places} places of block_indices, got {topk!r}")
    return places


def check_choice(
    router: object, keep_first: int, keep_recent: int, own_block: object, *, routing: object, block_indices: object,
    route_by: object,
) -> None:  # fmt: skip
    """Check that blocks are chosen in one way: by a router, or by a routing or block_indices that are given."""
    for name, given in (("routing", routing), ("block_indices", block_indices)):
        if given is not None and (router != "mean" or keep_first or keep_recent):
            raise ValueError(
                f"router, keep_first and keep_recent choose blocks, so they cannot be combined with {name}, "
                f"got {router!r}, {keep_first} and {keep_recent}"
            )
    if block_indices is None and own_block is not True:
        raise ValueError(f"own_block says how block_indices are read, and there are none: got {own_block!r}")
    if route_by is not None and router in ("recent", "sink"):
        raise ValueError(f"route_by serves to score blocks, and router={router!r} scores none")


def check_sinks(sinks: object, q: Tensor) -> None:
    """Check one sink a head of q [.., H, D], None for none."""
    if sinks is None:
        return
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point() or sinks.shape != q.shape[-2:-1]:
        raise ValueError(f"sinks must be a floating-point tensor [H] = [{q.shape[-2]}], got {describe(sinks)}")
    if sinks.device != q.device:
        raise ValueError(f"sinks must be on {q.device} like q, got {sinks.device}")


def check_bounds(key_start: Tensor | None, key_end: Tensor | None, rows: Tensor, num_keys: int) -> None:
    """Check key_start and key_end, int32 [B] for rows [B, ...].

    If values can be read, 0 <= key_start <= key_end <= S must hold.
    """
    bounds = {name: x for name, x in (("key_start", key_start), ("key_end", key_end)) if x is not None}
    for name, bound in bounds.items():
        if not isinstance(bound, Tensor) or bound.dtype != torch.int32 or bound.shape != rows.shape[:1]:
            raise ValueError(f"{name} must be an int32 tensor [B] = [{rows.shape[0]}], got {describe(bound)}")
        if bound.device != rows.device:
            raise ValueError(f"{name} must be on {rows.device} like q, got {bound.device}")
    first = next(iter(bounds.values()), None)
    if first is None or not is_readable(first):
        return
    ordered = torch.stack([torch.zeros_like(first), *bounds.values(), torch.full_like(first, num_keys)])
    if bool((ordered.diff(dim=0) < 0).any()):
        got = ", ".join(f"{name}={bound.tolist()}" for name, bound in bounds.items())
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
    _check_beside(name, means, k, "k")


def check_pages(pages: Tensor, page_table: Tensor, key_end: Tensor | None, num_rows: int | None) -> None:
    """Check the page table and row lengths of pages [P, page_size, G, D]; num_rows is q's batch size or None."""
    if not isinstance(page_table, Tensor) or page_table.dtype != torch.int32 or page_table.ndim != 2:
        raise ValueError(f"page_table must be an int32 tensor [B, pages], got {describe(page_table)}")
    if page_table.shape[1] < 1:
        raise ValueError("page_table must have at least one column, got none")
    if num_rows is not None and page_table.shape[0] != num_rows:
        raise ValueError(f"page_table must have a row for each of q's {num_rows}, got {page_table.shape[0]}")
    if page_table.device != pages.device:
        raise ValueError(f"page_table must be on {pages.device} like the pages, got {page_table.device}")
    if pages.shape[0] < 1 or pages.shape[1] < 1:
        raise ValueError(f"there must be at least one page of one key, got shape {tuple(pages.shape)}")
    if key_end is None:
        raise ValueError("key_end must be given with a page_table: the number of keys of each row")
    check_bounds(None, key_end, page_table, page_table.shape[1] * pages.shape[1])


def check_page_means(name: str, means: Tensor | None, pages: Tensor, block_size: int) -> None:
    """Check means beside pages [P, page_size, G, D]."""
    expected = page_means_shape(pages, block_size)
    if not isinstance(means, Tensor) or tuple(means.shape) != expected or means.dtype != pages.dtype:
        raise ValueError(f"{name} must be {pages.dtype} {expected} beside these pages, got {describe(means)}")
    _check_beside(name, means, pages, "the pages")


def check_page_numbers(sequences: Sequences, num_pages: int) -> None:
    """Check that every row's keys lie in existing pages, if values can be read."""
    assert sequences.page_table is not None
    if not is_readable(sequences.page_table):
        return
    pages_in_use = sequences.pages_in_use()
    if not pages_in_use.numel():
        return
    least, largest = (int(bound) for bound in pages_in_use.aminmax())
    if least < 0 or largest >= num_pages:
        raise ValueError(
            f"page_table must hold numbers from 0 to {num_pages - 1} for the pages of each row's keys, "
            f"got {least if least < 0 else largest}"
        )


def _check_beside(name: str, means: Tensor, keys: Tensor, of_keys: str) -> None:
    if means.device != keys.device:
        raise ValueError(f"{name} must be on {keys.device} like {of_keys}, got {means.device}")
    if means.stride(-1) != 1 and means.shape[-1] > 1:
        raise ValueError(f"the last dimension of {name} must be contiguous, got strides {means.stride()}")


def check_cu_seqlens(name: str, cu: Tensor, device: torch.device, total: int | None) -> None:
    """Check the bounds of sequences packed into q, k or v [total, ...]; total is None while it is not known."""
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
    """Whether values may be read here: reading would wait for a GPU, and would break a graph that is traced."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def describe(x: object) -> str:
    """Describe a value in an error message."""
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)


def _listed(words: list[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
