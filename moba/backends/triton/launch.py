"""Launches as data: a `Plan` is built once for the shapes of a call and run with the tensors of every such call.

Building takes host code: choosing tiles, cutting chunks, a kernel's arguments. It sees stand-ins of the tensors, on the
"meta" device, so that plans are built ahead of time without a GPU. Running takes the tensors' pointers, one allocation
for all buffers, and one driver call a kernel.

variants.py states what the kernels are compiled for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moba.backends.triton.variants import Matrix, Variant, compiled, variant

# Triton settles this when kernels are imported. A constant, as torch.compile cannot trace the question.
IS_INTERPRETED = triton.knobs.runtime.interpret
# Buffers begin at multiples of this many bytes.
ALIGNMENT = 256
# Thread blocks that CUDA takes along a grid's second and third axis, where rows x heads are.
MAX_GRID_YZ = 65535
# Plans that are kept; the oldest makes room.
MAX_PLANS = 1024


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own functions take microseconds on the host."""
    return -(-a // b)


def next_power_of_2(a: int) -> int:
    """The least power of two that is at least a; 1 for a < 1."""
    return 1 << max(0, a - 1).bit_length()


@dataclass(frozen=True)
class Number:
    """An argument that differs from run to run: its index among the run's numbers."""

    index: int


@dataclass(frozen=True)
class _TensorRef:
    """A tensor argument: number of the tensor or buffer in the plan, and the element that it begins at."""

    source: int
    offset: int
    matrix: Matrix | None = None


class _Descriptor(NamedTuple):
    """What a launch reads of a `TensorDescriptor`, without the checks of making one."""

    base: Tensor | None
    shape: tuple[int, int]
    strides: tuple[int, int]
    block_shape: tuple[int, int]
    padding: str = "zero"


class _Step(NamedTuple):
    """One launch, arguments in the order of the kernel's parameters; without a kernel, the zeroing of a tensor."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


# A launch that is ready: it takes all pointers, the tensors, the memory of the buffers, the run's numbers, the stream.
_Launch = Callable[[list[int], Sequence[Tensor | None], Tensor, Sequence[int], Any], object]


class Plan:
    """The launches of one operator, for tensors of given shapes, strides, dtypes and alignment.

    Args:
        tensors: what the launches read and write, None where absent: on "meta", each with a storage of its own.
        aligned: for each, whether it begins at a multiple of 16 bytes.
    """

    def __init__(self, tensors: Sequence[Tensor | None], aligned: Sequence[bool]) -> None:
        self._num_tensors = len(tensors)
        self._tensors = list(tensors)
        self._aligned = list(aligned)
        self._offsets: list[int] = []
        self._num_bytes = 0
        self._steps: list[_Step] = []
        self._foreseen: list[_Step] = []
        self._ready: list[_Launch] | None = None

    def buffer(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory that lives while the plan runs: a stand-in, which may be viewed and sliced, to give to `launch`."""
        buffer = torch.empty(shape, dtype=dtype, device="meta")
        self._tensors.append(buffer)
        self._aligned.append(True)
        self._offsets.append(self._num_bytes)
        self._num_bytes += cdiv(buffer.numel() * buffer.element_size(), ALIGNMENT) * ALIGNMENT
        return buffer

    def zero(self, tensor: Tensor) -> None:
        """Fill a tensor or buffer, not a view of one, with zeros."""
        self._steps.append(_Step(None, (), (self._ref(tensor),), {}))

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        """Run a kernel on a grid.

        Args:
            args, named: the kernel's arguments, and launch options (num_warps, maxnreg, …). Tensors among them, and in
                tuples among them, are tensors or buffers of the plan, or views of them.

        Raises:
            ValueError: if the grid is larger than CUDA takes.
        """
        if (most := max(grid[1:], default=0)) > MAX_GRID_YZ:
            raise ValueError(
                f"the triton backend takes at most {MAX_GRID_YZ:,} rows x key/value heads in a call, got {most:,}; "
                "split the batch"
            )
        self._steps.append(self._step(kernel, grid, args, named))

    def foresee(self, kernel: Any, *args: Any, **named: Any) -> None:
        """Compile what other lengths would launch, together with what this one does. Arguments as for `launch`."""
        self._foreseen.append(self._step(kernel, (), args, named))

    def _step(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], named: dict[str, Any]) -> _Step:
        named = {**dict(zip(kernel.arg_names, args, strict=False)), **named}
        arguments = tuple(_mapped(self._argument, named.pop(name)) for name in kernel.arg_names)
        return _Step(kernel, grid, arguments, named)

    def is_aligned(self, tensor: Tensor) -> bool:
        """Whether a tensor of the plan, or a view of one, begins at a multiple of 16 bytes."""
        ref = self._ref(tensor)
        return self._aligned[ref.source] and ref.offset * tensor.element_size() % 16 == 0

    def _argument(self, x: Any) -> Any:
        return self._ref(x) if isinstance(x, (Tensor, Matrix)) else x

    def _ref(self, x: Tensor | Matrix) -> _TensorRef:
        tensor = x if isinstance(x, Tensor) else x.tensor
        storage = tensor.untyped_storage()._cdata
        for source, known in enumerate(self._tensors):
            if known is not None and known.untyped_storage()._cdata == storage:
                return _TensorRef(source, int(tensor.storage_offset()), x if isinstance(x, Matrix) else None)
        raise AssertionError(f"a tensor of shape {tuple(tensor.shape)} is none of the plan's")

    def variants(self) -> Iterator[Variant]:
        """What every launch needs compiled, in order, then what is foreseen."""
        for step in (*self._steps, *self._foreseen):
            if step.kernel is not None:
                arguments = _mapped(self._stand_in, step.arguments)
                yield variant(step.kernel, arguments, step.options, self.is_aligned)

    def _stand_in(self, x: Any) -> Any:
        if not isinstance(x, _TensorRef) or x.matrix is not None:
            return x.matrix if isinstance(x, _TensorRef) else x
        tensor = self._tensors[x.source]
        assert tensor is not None
        return tensor.as_strided((1,), (1,), x.offset) if x.offset else tensor

    def run(
        self,
        *tensors: Tensor | None,
        device: torch.device,
        numbers: Sequence[int] = (),
        following: Callable[[], Iterable[Variant]] | None = None,
    ) -> None:
        """Run every launch on the device's current stream, on tensors like those that the plan was built for.

        Args:
            following: see `compiled`.
        """
        with _on(device):
            memory = torch.empty(self._num_bytes, dtype=torch.uint8, device=device)
            if IS_INTERPRETED:
                self._interpret(tensors, memory, numbers)
            else:
                if self._ready is None:
                    self._ready = self._launches(iter(compiled(self.variants(), device, following)))
                self._launch_all(self._ready, tensors, memory, numbers)

    def _launches(self, kernels: Iterator[Any]) -> list[_Launch]:
        return [
            self._zeroing(step) if step.kernel is None else self._launching(step, next(kernels)) for step in self._steps
        ]

    def _launch_all(
        self, ready: list[_Launch], tensors: Sequence[Tensor | None], memory: Tensor, numbers: Sequence[int]
    ) -> None:
        start = memory.data_ptr()
        pointers = [0 if x is None else x.data_ptr() for x in tensors]
        pointers += [start + offset for offset in self._offsets]
        stream = torch.cuda.current_stream(memory.device).cuda_stream
        for launch in ready:
            launch(pointers, tensors, memory, numbers, stream)

    def _interpret(self, tensors: Sequence[Tensor | None], memory: Tensor, numbers: Sequence[int]) -> None:
        """Run every launch in Triton's interpreter, which takes tensors and compiles nothing."""
        sources = [*tensors, *self._buffers(memory)]

        def argument(x: Any) -> Any:
            if isinstance(x, Number):
                return numbers[x.index]
            if not isinstance(x, _TensorRef):
                return x
            tensor = sources[x.source]
            assert tensor is not None
            if x.matrix is not None:
                return TensorDescriptor(tensor, list(x.matrix.shape), list(x.matrix.strides), list(x.matrix.tile))
            return tensor.as_strided((1,), (1,), tensor.storage_offset() + x.offset) if x.offset else tensor

        for step in self._steps:
            arguments = _mapped(argument, step.arguments)
            if step.kernel is None:
                arguments[0].zero_()
            else:
                step.kernel[step.grid](*arguments, **step.options)

    def _buffers(self, memory: Tensor) -> list[Tensor]:
        """The plan's buffers in its memory, flat."""
        stand_ins = self._tensors[self._num_tensors :]
        return [
            memory[start : start + x.numel() * x.element_size()].view(x.dtype)
            for start, x in zip(self._offsets, stand_ins, strict=True)
            if x is not None
        ]

    def _zeroing(self, step: _Step) -> _Launch:
        source = step.arguments[0].source
        if source < self._num_tensors:
            return lambda pointers, tensors, memory, numbers, stream: tensors[source].zero_()
        stand_in = self._tensors[source]
        start = self._offsets[source - self._num_tensors]
        end = start + stand_in.numel() * stand_in.element_size()
        return lambda pointers, tensors, memory, numbers, stream: memory[start:end].zero_()

    def _launching(self, step: _Step, kernel: Any) -> _Launch:
        """Launch a compiled kernel: in place of tensors, their pointers."""
        run = kernel[(*step.grid, 1, 1)[:3]]
        # What is to be filled in, every tensor and number: indices of the parameter and in its tuple.
        template = [list(x) if isinstance(x, tuple) else x for x in step.arguments]
        pointers_at, numbers_at, matrices_at, tuples_at = [], [], [], []
        for i, x in enumerate(step.arguments):
            if isinstance(x, tuple):
                tuples_at.append(i)
            for j, leaf in enumerate(x if isinstance(x, tuple) else (x,)):
                at = (i, j if isinstance(x, tuple) else None)
                if isinstance(leaf, Number):
                    numbers_at.append((*at, leaf.index))
                elif isinstance(leaf, _TensorRef) and leaf.matrix is not None:
                    matrix = leaf.matrix
                    matrices_at.append((i, leaf.source, (matrix.shape, matrix.strides, matrix.tile)))
                elif isinstance(leaf, _TensorRef):
                    stand_in = self._tensors[leaf.source]
                    assert stand_in is not None
                    pointers_at.append((*at, leaf.source, leaf.offset * stand_in.element_size()))

        def launch(
            pointers: list[int],
            tensors: Sequence[Tensor | None],
            memory: Tensor,
            numbers: Sequence[int],
            stream: Any,
        ) -> None:
            values = template.copy()
            for i in tuples_at:
                values[i] = template[i].copy()
            for i, j, source, offset in pointers_at:
                if j is None:
                    values[i] = pointers[source] + offset
                else:
                    values[i][j] = pointers[source] + offset
            for i, j, index in numbers_at:
                if j is None:
                    values[i] = numbers[index]
                else:
                    values[i][j] = numbers[index]
            for i, source, matrix in matrices_at:
                values[i] = _Descriptor(tensors[source], *matrix)
            for i in tuples_at:
                values[i] = tuple(values[i])
            run(*values, stream=stream)

        return launch


def _mapped(function: Callable[[Any], Any], x: Any) -> Any:
    """The same tuples, with the function applied to what is in them."""
    if not isinstance(x, tuple):
        return function(x)
    values = [_mapped(function, y) for y in x]
    return type(x)(*values) if hasattr(x, "_fields") else tuple(values)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are launched on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


_plans: dict[Any, Plan] = {}


def run_planned(
    build: Callable[..., None],
    *tensors: Tensor | None,
    device: torch.device,
    numbers: Sequence[int] = (),
    following: Callable[[], Iterable[Variant]] | None = None,
    **constants: Any,
) -> None:
    """Run the launches of `build(plan, *stand-ins of the tensors, **constants)`, built once for such tensors.

    Args:
        numbers: what the plan's `Number`s stand for: they may differ from run to run.
        following: see `compiled`.
    """
    key = (
        build,
        device,
        tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16) for x in tensors]),
        tuple(constants.values()),
    )
    plan = _plans.get(key)
    if plan is None:
        plan = make_plan(build, *tensors, **constants)
        if len(_plans) >= MAX_PLANS:
            del _plans[next(iter(_plans))]
        _plans[key] = plan
    plan.run(*tensors, device=device, numbers=numbers, following=following)


def make_plan(build: Callable[..., None], *tensors: Tensor | None, **constants: Any) -> Plan:
    """The plan that `build(plan, *stand-ins of the tensors, **constants)` makes."""
    stand_ins = [
        None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in tensors
    ]
    plan = Plan(stand_ins, [x is None or x.is_meta or x.data_ptr() % 16 == 0 for x in tensors])
    build(plan, *stand_ins, **constants)
    return plan
