"""What a kernel file offers for ahead-of-time compilation. See aot.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One kernel as one launch specialises it.

    Args:
        name: what the table shows: kernel, dtype, head dim, what else is special.
        kernel: the `@triton.jit` function.
        arguments: every argument by name, as given at launch: tensors (device "meta" will do; taken to be 16-byte
            aligned, as torch allocates them), ints, floats, None, values of constexpr parameters, and launch options
            (`num_warps`, `num_stages`, ...).
        representative: whether CI compiles it.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, Any] = field(repr=False)
    representative: bool = False
