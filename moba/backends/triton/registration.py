"""Python functions as PyTorch operators that torch.compile keeps whole.

`torch.library.custom_op` does the same, but its first call imports the whole compiler, which takes four seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("moba", "FRAGMENT")


def operator(name: str, *, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Register a function of tensors, numbers and None as `torch.ops.moba.<name>`, and return that operator.

    Its attribute `plain` is the function itself.

    Args:
        mutates_args: the arguments that it writes.
    """

    def register(function: Callable[..., Any]) -> Any:
        _library.define(name + torch.library.infer_schema(function, mutates_args=mutates_args))
        _library.impl(name, function, "CompositeExplicitAutograd")
        registered = getattr(torch.ops.moba, name).default
        registered.plain = function
        return registered

    return register


def fake(of: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what an operator's results look like, for tracing."""
    return torch.library.register_fake(of.name(), lib=_library)


def differentiable(of: Any, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Register an operator's backward."""
    torch.library.register_autograd(of.name(), backward, setup_context=setup_context, lib=_library)
