"""What kernels are compiled for, stated rather than guessed, and the kernels that are compiled for it.

A `Variant` never follows from the value of a number: it names dtypes, whether tensors and strides are multiples of 16
bytes and elements, which pointers are there, and the `tl.constexpr` arguments. So a length, a batch size or a number of
sequences that was not met before compiles nothing. What several launches need and is not compiled yet is compiled in
parallel.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

# Gluon, in which dkv_hopper.py is written, is experimental: the versions of Triton that ran it (3.7 to 3.9 compile it).
HAS_GLUON = triton.__version__.startswith("3.6.")
if HAS_GLUON:
    from triton.experimental.gluon._runtime import GluonASTSource

logger = logging.getLogger("moba")

# Compiling is announced once it has taken so long.
ANNOUNCE_AFTER_S = 2.0

POINTER_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Matrix:
    """An argument for the tensor memory accelerator: a matrix that begins where `tensor` does, read tile by tile."""

    tensor: Tensor
    shape: tuple[int, int]
    strides: tuple[int, int]
    tile: tuple[int, int]


class _OneByOne:
    """A kernel whose first stage, all of it Python, waits for other threads': together each would take their sum."""

    _is_python = Lock()

    def make_ir(self, *args: Any, **kwargs: Any) -> Any:
        with self._is_python:
            return super().make_ir(*args, **kwargs)  # type: ignore[misc]


class _Source(_OneByOne, ASTSource):
    pass


if HAS_GLUON:

    class _GluonSource(_OneByOne, GluonASTSource):
        pass


class Variant(NamedTuple):
    """What a kernel is compiled for: Triton's signature, constants and hints by parameter, and launch options."""

    kernel: Any
    signature: tuple[Any, ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    aligned: tuple[tuple[int, ...], ...]
    options: tuple[tuple[str, Any], ...]

    def compile(self, target: Any = None) -> Any:
        """Compile it, or load it from Triton's cache on disk; for another chip than this machine's, name the target."""
        source = (_GluonSource if self.kernel.is_gluon() else _Source)(
            self.kernel,
            dict(zip(self.kernel.arg_names, self.signature, strict=True)),
            dict(self.constants),
            {path: [["tt.divisibility", 16]] for path in self.aligned},
        )
        return triton.compile(source, target=target, options=dict(self.options))


def variant(
    kernel: Any, arguments: Sequence[Any], options: dict[str, Any], is_aligned: Callable[[Any], bool]
) -> Variant:
    """What a launch with these arguments needs compiled.

    Integers are 32-bit numbers, or 64-bit ones: those that need it, and always `stride_r`, which grows with the length.
    The strides of a tuple, its fields called `stride…`, are said to be multiples of 16 if all are and if its pointer is
    one to aligned floating-point numbers.

    Args:
        arguments: in the order of the kernel's parameters; tensors, matrices, numbers, None, and tuples of these.
        is_aligned: whether a tensor argument begins at a multiple of 16 bytes.
    """
    constants: list[tuple[tuple[int, ...], Any]] = []
    aligned: list[tuple[int, ...]] = []

    def kind(value: Any, path: tuple[int, ...], is_long: bool = False) -> Any:
        if isinstance(value, tuple):
            names = getattr(value, "_fields", ("",) * len(value))
            strides = [(*path, i) for i, name in enumerate(names) if name.startswith("stride")]
            kinds = [
                kind(x, (*path, i), name == "stride_r") for i, (x, name) in enumerate(zip(value, names, strict=True))
            ]
            if (*path, 0) in aligned and all(isinstance(value[i[-1]], int) and value[i[-1]] % 16 == 0 for i in strides):
                aligned.extend(strides)
            return type(value)(*kinds) if hasattr(value, "_fields") else tuple(kinds)
        if value is None:
            constants.append((path, None))
            return "constexpr"
        if isinstance(value, Tensor):
            if value.is_floating_point() and is_aligned(value):
                aligned.append(path)
            return POINTER_TYPES[value.dtype]
        if isinstance(value, Matrix):
            return f"tensordesc<{POINTER_TYPES[value.tensor.dtype][1:]}{list(value.tile)}>"
        if isinstance(value, float):
            return "fp32"
        if is_long or (isinstance(value, int) and not -(2**31) <= value < 2**31):
            return "i64"
        return "i32"

    signature = []
    for i, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        if parameter.is_constexpr:
            constants.append(((i,), value))
            signature.append("constexpr")
        else:
            signature.append(kind(value, (i,)))
    return Variant(kernel, tuple(signature), tuple(constants), tuple(aligned), tuple(sorted(options.items())))


_threads = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="moba-compile")
_compiling: dict[tuple[GPUTarget, Variant], Future[Any]] = {}
_kernels: dict[tuple[int, Variant], Any] = {}
_loading = Lock()


@triton.jit
def _nothing_kernel():
    pass


# Triton hashes its own files, 0.3 s, before it first looks for a kernel on disk: done while ours are imported.
_first = _threads.submit(lambda: triton.compile(_Source(_nothing_kernel, {}), GPUTarget("cuda", 80, 32)))


def compiled(
    variants: Iterable[Variant], device: torch.device, following: Callable[[], Iterable[Variant]] | None = None
) -> list[Any]:
    """These variants, ready to launch on the device: what is missing is compiled in parallel, or loaded from disk.

    Args:
        following: what later calls will need. Where something is missing, compiling it begins as well.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    variants = list(variants)
    missing = [v for v in dict.fromkeys(variants) if (index, v) not in _kernels]
    if missing:
        with torch.cuda.device(index):
            target = driver.active.get_current_target()
            wait([_first])
            started = [_begin(v, target) for v in missing]
            for v in following() if following is not None else ():
                if (index, v) not in _kernels:
                    _begin(v, target)
            if wait(started, timeout=ANNOUNCE_AFTER_S).not_done:
                logger.warning("compiling %d kernels for this setting; Triton keeps them on disk", len(missing))
            with _loading:
                for v, future in zip(missing, started, strict=True):
                    # A compiled kernel serves one device; another device's comes from disk.
                    _compiling.pop((target, v), None)
                    if (index, v) not in _kernels:
                        kernel = future.result()
                        kernel[(1, 1, 1)]  # loads it
                        _kernels[index, v] = kernel
    return [_kernels[index, v] for v in variants]


def _begin(v: Variant, target: GPUTarget) -> Future[Any]:
    """Compile a variant in the background, if that has not begun. Nothing is loaded: a capture would not allow it."""
    return _compiling.get((target, v)) or _compiling.setdefault((target, v), _threads.submit(_compile, v, target))


def _compile(v: Variant, target: GPUTarget) -> Any:
    kernel = v.compile(target)
    # A C compiler builds this, 0.5 s; loading the kernel then finds it on disk.
    driver.active.launcher_cls(kernel.src, kernel.metadata)
    return kernel
