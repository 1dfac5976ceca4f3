"""Launches as data: a `Plan` is built once for the shapes of a call and run with the tensors of every such call.

Building takes host code: choosing tiles, cutting chunks, a kernel's forty arguments. It sees stand-ins of the tensors,
on the "meta" device, so aot.py builds the same plans without a GPU. Running takes the tensors' pointers, one allocation
for all buffers, and one driver call a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

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


class Tiles(NamedTuple):
    """An argument for the tensor memory accelerator: tiles of a matrix that begins where `tensor` does."""

    tensor: Tensor
    shape: tuple[int, int]
    strides: tuple[int, int]
    tile: tuple[int, int]


class Number(NamedTuple):
    """An argument that differs from run to run: its place among the run's numbers. No kernel may specialise on it."""

    place: int


class _Place(NamedTuple):
    """A tensor argument: number of the tensor or buffer in the plan, and the element that it begins at."""

    source: int
    offset: int
    tiles: Tiles | None = None


class _Descriptor(NamedTuple):
    """What a launch reads of a `TensorDescriptor`, without the checks of making one."""

    base: Tensor | None
    shape: tuple[int, int]
    strides: tuple[int, int]
    block_shape: tuple[int, int]
    padding: str = "zero"


class _Step(NamedTuple):
    """One launch; without a kernel, the zeroing of a tensor."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


# A launch that is ready: it takes all pointers, the tensors, the memory of the buffers, and the run's numbers.
_Launch = Callable[[list[int], Sequence[Tensor | None], Tensor, Sequence[int]], object]


class Plan:
    """The launches of one operator, for tensors of given shapes, strides, dtypes and alignment.

    Args:
        tensors: what the launches read and write, None where absent: on "meta", each with a storage of its own.
    """

    def __init__(self, *tensors: Tensor | None) -> None:
        self._num_tensors = len(tensors)
        self._tensors = list(tensors)
        self._offsets: list[int] = []
        self._num_bytes = 0
        self._steps: list[_Step] = []
        self._ready: list[_Launch] | None = None

    def buffer(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory that lives while the plan runs: a stand-in, which may be viewed and sliced, to give to `launch`."""
        buffer = torch.empty(shape, dtype=dtype, device="meta")
        self._tensors.append(buffer)
        self._offsets.append(self._num_bytes)
        self._num_bytes += cdiv(buffer.numel() * buffer.element_size(), ALIGNMENT) * ALIGNMENT
        return buffer

    def zero(self, tensor: Tensor) -> None:
        """Fill a tensor or buffer, not a view of one, with zeros."""
        self._steps.append(_Step(None, (), {"tensor": self._place(tensor)}))

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """Run a kernel on a grid. Tensors among its arguments are tensors or buffers of the plan, or views of them.

        Raises:
            ValueError: if the grid is larger than CUDA takes.
        """
        if (most := max(grid[1:], default=0)) > MAX_GRID_YZ:
            raise ValueError(
                f"the triton backend takes at most {MAX_GRID_YZ:,} rows x key/value heads in a call, got {most:,}; "
                "split the batch"
            )
        named = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
        arguments = {name: self._place(x) if isinstance(x, (Tensor, Tiles)) else x for name, x in named.items()}
        for parameter in getattr(kernel, "params", ()):
            assert parameter.do_not_specialize or not isinstance(named.get(parameter.name), Number), parameter.name
        self._steps.append(_Step(kernel, grid, arguments))

    def _place(self, x: Tensor | Tiles) -> _Place:
        tensor = x if isinstance(x, Tensor) else x.tensor
        storage = tensor.untyped_storage()._cdata
        for source, known in enumerate(self._tensors):
            if known is not None and known.untyped_storage()._cdata == storage:
                return _Place(source, int(tensor.storage_offset()), x if isinstance(x, Tiles) else None)
        raise AssertionError(f"a tensor of shape {tuple(tensor.shape)} is none of the plan's")

    def launches(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Every kernel with its arguments by name, tensors on "meta"."""
        for step in self._steps:
            if step.kernel is not None:
                yield step.kernel, {name: _argument(x, self._tensors, None) for name, x in step.arguments.items()}

    def run(self, *tensors: Tensor | None, device: torch.device, numbers: Sequence[int] = ()) -> None:
        """Run every launch on the device's current stream, on tensors like those that the plan was built for."""
        with _on(device):
            memory = torch.empty(self._num_bytes, dtype=torch.uint8, device=device)
            if self._ready is None:
                self._first_run(tensors, memory, numbers)
                return
            start = memory.data_ptr()
            pointers = [0 if x is None else x.data_ptr() for x in tensors]
            pointers += [start + offset for offset in self._offsets]
            for launch in self._ready:
                launch(pointers, tensors, memory, numbers)

    def _first_run(self, tensors: Sequence[Tensor | None], memory: Tensor, numbers: Sequence[int]) -> None:
        """Launch through Triton, which compiles what it has to."""
        ends = [*self._offsets, self._num_bytes][1:]
        stand_ins = self._tensors[self._num_tensors :]
        buffers = [
            memory[start:end].view(x.dtype)
            for start, end, x in zip(self._offsets, ends, stand_ins, strict=True)
            if x is not None
        ]
        sources = [*tensors, *buffers]
        ready: list[_Launch] = []
        for step in self._steps:
            if step.kernel is None:
                ready.append(self._zeroing(step))
                ready[-1]([], tensors, memory, numbers)
                continue
            arguments = {name: _argument(x, sources, numbers) for name, x in step.arguments.items()}
            compiled = step.kernel[step.grid](**arguments)
            if compiled is not None:  # the interpreter compiles nothing
                ready.append(self._repeat(step, compiled))
        if len(ready) == len(self._steps):
            self._ready = ready

    def _zeroing(self, step: _Step) -> _Launch:
        source = step.arguments["tensor"].source
        if source < self._num_tensors:
            return lambda pointers, tensors, memory, numbers: tensors[source].zero_()
        stand_in = self._tensors[source]
        start = self._offsets[source - self._num_tensors]
        end = start + stand_in.numel() * stand_in.element_size()
        return lambda pointers, tensors, memory, numbers: memory[start:end].zero_()

    def _repeat(self, step: _Step, compiled: Any) -> _Launch:
        """Launch a compiled kernel again: in place of tensors, their pointers."""
        run = compiled[(*step.grid, 1, 1)[:3]]
        template = [step.arguments[name] for name in step.kernel.arg_names]
        pointers_at, tiles_at = [], []
        numbers_at = [(i, x.place) for i, x in enumerate(template) if isinstance(x, Number)]
        for i, x in enumerate(template):
            if isinstance(x, _Place):
                tensor = self._tensors[x.source]
                assert tensor is not None
                if x.tiles is None:
                    pointers_at.append((i, x.source, x.offset * tensor.element_size()))
                else:
                    tiles_at.append((i, x.source, x.tiles[1:]))

        def launch(
            pointers: list[int], tensors: Sequence[Tensor | None], memory: Tensor, numbers: Sequence[int]
        ) -> None:
            values = template.copy()
            for i, place in numbers_at:
                values[i] = numbers[place]
            for i, source, offset in pointers_at:
                values[i] = pointers[source] + offset
            for i, source, tiles in tiles_at:
                values[i] = _Descriptor(tensors[source], *tiles)
            run(*values)

        return launch


def _argument(x: Any, sources: Sequence[Tensor | None], numbers: Sequence[int] | None) -> Any:
    """An argument as Triton takes it; without numbers, any stands for them."""
    if isinstance(x, Number):
        return 0 if numbers is None else numbers[x.place]
    if not isinstance(x, _Place):
        return x
    tensor = sources[x.source]
    assert tensor is not None
    if x.tiles is not None:
        _, shape, strides, tile = x.tiles
        return TensorDescriptor(tensor, list(shape), list(strides), list(tile))
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + x.offset) if x.offset else tensor


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
    **constants: Any,
) -> None:
    """Run the launches of `build(plan, *stand-ins of the tensors, **constants)`, built once for such tensors.

    `numbers` are what the plan's `Number`s stand for: they may differ from run to run.
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
    plan.run(*tensors, device=device, numbers=numbers)


def make_plan(build: Callable[..., None], *tensors: Tensor | None, **constants: Any) -> Plan:
    """The plan that `build(plan, *stand-ins of the tensors, **constants)` makes."""
    stand_ins = [
        None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in tensors
    ]
    plan = Plan(*stand_ins)
    build(plan, *stand_ins, **constants)
    return plan
