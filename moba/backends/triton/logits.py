"""How products of queries and keys become logits, in log2: a scale, and where a call asks for it a softcap."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


class LogitScaling(NamedTuple):
    """How products of queries and keys become logits in log2: their scale, and their softcap or None.

    `product_scale` is the scale of the logits themselves, as gradients of queries and keys are multiplied by it.
    """

    scale: Any
    softcap: Any
    product_scale: Any


def logit_scaling(scale: float, softcap: float | None) -> LogitScaling:
    """Scale and softcap as an argument of kernels."""
    return LogitScaling(scale * LOG2_E.value, None if softcap is None else softcap * LOG2_E.value, scale)


@triton.jit
def scaled(products, scaling):
    """Logits in log2."""
    logits = products * scaling.scale
    if scaling.softcap is not None:
        logits = scaling.softcap * tanh(logits / scaling.softcap)
    return logits


@triton.jit
def tanh(x):
    """To a few units in the last place: 1 - 2 / (exp(2x) + 1), or near 0, where that cancels, a series."""
    square = x * x
    near = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(square < 0.0625, near, 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0))


@triton.jit
def through_cap(d_logits, logits, scaling):
    """Gradients of logits as those of what the softcap was given."""
    if scaling.softcap is not None:
        ratio = logits / scaling.softcap
        d_logits *= 1.0 - ratio * ratio
    return d_logits
