"""Tile sizes, warps and pipeline stages of every kernel: a committed table, so that nothing is tuned at run time.

A kernel's rows stand from special to general; the first that fits the device, head dim and block size is taken. No row
changes a result: what must be the same everywhere (selections, the order of a sum) never depends on this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

# Compute capabilities (major · 10 + minor) that kernels are compiled for ahead of time.
ARCHITECTURES = (80, 86, 89, 90, 100)
# Those that give one program 160 KiB of shared memory and more; the others give 99.
LARGE_CHIPS = (80, 90, 100)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        config: keyword arguments of the launch: the kernel's tile sizes, `num_warps`, `num_stages`.
        arch: compute capabilities it is for, None for all.
        max_head_dim: largest head dim, of keys or values, padded to a power of two, it is for.
        max_block_size: largest block size it is for, None for all.
        element_bytes: sizes of q's elements it is for, None for all.
        is_packed: whether it is for routings that query heads share alone, True, or for all, None.
    """

    config: Mapping[str, int]
    arch: tuple[int, ...] | None = None
    max_head_dim: int = 256
    max_block_size: int | None = None
    element_bytes: int | None = None
    is_packed: bool | None = None

    def fits(self, arch: int, head_dim: int, block_size: int, element_bytes: int, is_packed: bool = False) -> bool:
        """Whether this row is for such a launch."""
        return (
            (self.arch is None or arch in self.arch)
            and head_dim <= self.max_head_dim
            and (self.max_block_size is None or block_size <= self.max_block_size)
            and (self.element_bytes is None or element_bytes == self.element_bytes)
            and (self.is_packed is None or is_packed == self.is_packed)
        )


TABLE: dict[str, tuple[Row, ...]] = {
    "count_entries": (Row({"STEP": 1024, "num_warps": 4}),),
    "scatter_entries": (Row({"STEP": 256, "num_warps": 4}),),
    "select": (
        Row({"TILE_M": 32, "num_warps": 4, "num_stages": 1}, element_bytes=4),
        # Three tiles of queries take the memory of all but two programs, so these may have all registers.
        Row({"TILE_M": 64, "num_warps": 4, "num_stages": 2}, arch=LARGE_CHIPS, max_head_dim=128, is_packed=True),
        Row({"TILE_M": 32, "num_warps": 4, "num_stages": 1}, is_packed=True),
        Row({"TILE_M": 64, "num_warps": 4, "num_stages": 2, "maxnreg": 120}, arch=(90,)),
        Row({"TILE_M": 64, "num_warps": 4, "num_stages": 2}, arch=(100,)),
        Row({"TILE_M": 64, "num_warps": 4, "num_stages": 2, "maxnreg": 168}, max_head_dim=128),
        Row({"TILE_M": 32, "num_warps": 4, "num_stages": 2, "maxnreg": 168}),
    ),
    # For at least MIN_BLOCKS blocks; no kernel without.
    "select_once": (
        Row(
            {"MIN_BLOCKS": 1024, "TILE_M": 128, "num_warps": 8, "num_stages": 2, "maxnreg": 128},
            arch=(90,),
            max_head_dim=128,
            element_bytes=2,
            is_packed=False,
        ),
        Row({}),
    ),
    "select_scored": (Row({"TILE_M": 32, "num_warps": 4, "num_stages": 1}),),
    "block_scores": (
        Row(
            {"TILE_M": 128, "TILE_N": 128, "num_warps": 8, "num_stages": 3},
            arch=LARGE_CHIPS,
            max_head_dim=64,
            element_bytes=2,
        ),
        Row(
            {"TILE_M": 128, "TILE_N": 128, "num_warps": 8, "num_stages": 2},
            arch=LARGE_CHIPS,
            max_head_dim=128,
            element_bytes=2,
        ),
        Row({"TILE_M": 64, "TILE_N": 64, "num_warps": 4, "num_stages": 2}, max_head_dim=128, element_bytes=2),
        Row({"TILE_M": 64, "TILE_N": 32, "num_warps": 4, "num_stages": 2}, element_bytes=2),
        Row({"TILE_M": 32, "TILE_N": 64, "num_warps": 4, "num_stages": 1}),
    ),
    "attend_past_stationary": (
        Row(
            {"TILE_M": 64, "WINDOW": 1024, "BLOCK_COST": 192, "NUM_STAGES": 3, "num_warps": 4},
            arch=LARGE_CHIPS,
            element_bytes=2,
        ),
        Row({"TILE_M": 32, "WINDOW": 1024, "BLOCK_COST": 128, "NUM_STAGES": 1, "num_warps": 4}),
    ),
    "attend_past_streaming": (
        Row(
            {"TILE_M": 64, "TILE_N": 64, "WINDOW": 128, "BLOCK_COST": 32, "NUM_STAGES": 3, "num_warps": 4},
            arch=LARGE_CHIPS,
            max_head_dim=128,
            element_bytes=2,
        ),
        Row(
            {"TILE_M": 64, "TILE_N": 32, "WINDOW": 128, "BLOCK_COST": 32, "NUM_STAGES": 2, "num_warps": 4},
            element_bytes=2,
        ),
        Row({"TILE_M": 32, "TILE_N": 32, "WINDOW": 128, "BLOCK_COST": 32, "NUM_STAGES": 1, "num_warps": 8}),
    ),
    "merge_and_attend_own": (
        Row(
            {"TILE_M": 64, "TILE_N": 32, "NUM_STAGES": 2, "MERGE_STAGES": 3, "num_warps": 4, "maxnreg": 168},
            arch=(90,),
            max_head_dim=128,
            max_block_size=128,
            element_bytes=2,
        ),
        Row(
            {"TILE_M": 64, "TILE_N": 64, "NUM_STAGES": 2, "MERGE_STAGES": 3, "num_warps": 4},
            arch=LARGE_CHIPS,
            max_head_dim=128,
            element_bytes=2,
        ),
        Row({"TILE_M": 64, "TILE_N": 32, "NUM_STAGES": 1, "MERGE_STAGES": 2, "num_warps": 4}, element_bytes=2),
        Row({"TILE_M": 16, "TILE_N": 32, "NUM_STAGES": 1, "MERGE_STAGES": 1, "num_warps": 8}),
    ),
    "dkv": (
        Row(
            {"TILE_M": 64, "TILE_N": 128, "NUM_STAGES": 2, "num_warps": 8},
            arch=(90,),
            max_head_dim=128,
            max_block_size=128,
            element_bytes=2,
        ),
        Row(
            {"TILE_M": 64, "TILE_N": 128, "NUM_STAGES": 3, "num_warps": 8},
            arch=(90,),
            max_head_dim=128,
            element_bytes=2,
        ),
        Row(
            {"TILE_M": 32, "TILE_N": 128, "NUM_STAGES": 2, "num_warps": 8},
            arch=LARGE_CHIPS,
            max_head_dim=128,
            element_bytes=2,
        ),
        Row({"TILE_M": 32, "TILE_N": 64, "NUM_STAGES": 1, "num_warps": 4}, max_head_dim=128, element_bytes=2),
        Row({"TILE_M": 32, "TILE_N": 32, "NUM_STAGES": 1, "num_warps": 4}, element_bytes=2),
        Row({"TILE_M": 16, "TILE_N": 16, "NUM_STAGES": 1, "num_warps": 4}),
    ),
    # No kernel without.
    "dkv_hopper": (
        Row(
            {"TILE_M": 64, "TILE_N": 128, "NUM_STAGES": 3, "num_warps": 8},
            arch=(90,),
            max_head_dim=128,
            element_bytes=2,
            is_packed=False,
        ),
        Row({}),
    ),
    "dq_past": (
        Row(
            {"TILE_M": 64, "TILE_N": 64, "WINDOW": 128, "BLOCK_COST": 32, "NUM_STAGES": 2, "num_warps": 4},
            arch=LARGE_CHIPS,
            max_head_dim=128,
            element_bytes=2,
        ),
        Row(
            {"TILE_M": 32, "TILE_N": 32, "WINDOW": 128, "BLOCK_COST": 32, "NUM_STAGES": 1, "num_warps": 4},
            element_bytes=2,
        ),
        Row({"TILE_M": 16, "TILE_N": 16, "WINDOW": 128, "BLOCK_COST": 32, "NUM_STAGES": 1, "num_warps": 8}),
    ),
    "dq_own": (
        Row(
            {"TILE_M": 64, "TILE_N": 32, "NUM_STAGES": 2, "MERGE_STAGES": 3, "num_warps": 4, "maxnreg": 168},
            arch=LARGE_CHIPS,
            max_head_dim=128,
            element_bytes=2,
        ),
        Row({"TILE_M": 32, "TILE_N": 32, "NUM_STAGES": 1, "MERGE_STAGES": 2, "num_warps": 4}, element_bytes=2),
        Row({"TILE_M": 16, "TILE_N": 16, "NUM_STAGES": 1, "MERGE_STAGES": 1, "num_warps": 8}),
    ),
    "decode_score": (
        Row({"TILE_N": 64, "num_warps": 4}, element_bytes=2),
        Row({"TILE_N": 32, "num_warps": 4}),
    ),
    "decode_attend": (
        Row(
            {"TILE_N": 64, "PART": 512, "NUM_STAGES": 2, "num_warps": 4},
            arch=LARGE_CHIPS,
            max_head_dim=128,
            element_bytes=2,
        ),
        Row({"TILE_N": 32, "PART": 512, "NUM_STAGES": 2, "num_warps": 4}, element_bytes=2),
        Row({"TILE_N": 16, "PART": 512, "NUM_STAGES": 1, "num_warps": 4}),
    ),
    "decode_merge": (Row({"TILE_P": 32, "TILE_D": 32, "num_warps": 2}),),
}


def lookup(
    kernel: str, arch: int, *, head_dim: int, block_size: int, element_bytes: int, is_packed: bool = False
) -> Mapping[str, int]:
    """The launch configuration of a kernel: the first row of its table that fits.

    Args:
        kernel: a key of `TABLE`.
        arch: compute capability, major · 10 + minor. See `arch_of`.
        head_dim: as padded to a power of two, the larger one of keys and values.
        element_bytes: size of an element of q.
        is_packed: whether query heads share the routing.
    """
    for row in TABLE[kernel]:
        if row.fits(arch, head_dim, block_size, element_bytes, is_packed):
            return row.config
    raise AssertionError(f"the last row of {kernel!r} must fit everything")


@lru_cache
def arch_of(device: torch.device) -> int:
    """The device's compute capability as one of `ARCHITECTURES`: the newest that is not newer; the oldest for a CPU.

    Unknown minor versions share the chip limits of the older entry, so a configuration for that one fits.
    """
    if device.type != "cuda":
        return ARCHITECTURES[0]
    major, minor = torch.cuda.get_device_capability(device)
    return max((arch for arch in ARCHITECTURES if arch <= 10 * major + minor), default=ARCHITECTURES[0])
