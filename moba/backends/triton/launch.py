"""Launches as data: a `Plan` is built once for the shapes of a call and run with the tensors of every such call.

Building takes host code: choosing tiles, cutting chunks, a kernel's forty arguments. It sees stand-ins of the tensors,
on the "meta" device, so aot.py builds the same plans without a GPU. Running takes the tensors' pointers, one allocation
for all buffers, and one driver call a kernel.

A plan may use several streams: number 0 is the caller's current stream, the others are side streams of the device. A
stream waits for what it needs of another by an event; by a plan's end its stream 0 has waited for all others. Where
there are no streams, on a CPU, steps run in the order in which they were added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Buffers begin at multiples of this many bytes.
ALIGNMENT = 256
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


class _Kernel(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


class _Zero(NamedTuple):
    source: int


class _Record(NamedTuple):
    event: int


class _Wait(NamedTuple):
    event: int


@dataclass(frozen=True)
class _Run:
    """What the steps of one run work with. Sources are the plan's tensors, then its buffers as bytes."""

    sources: Sequence[Tensor | None]
    pointers: Sequence[int]
    streams: Sequence[torch.cuda.Stream]
    events: Sequence[torch.cuda.Event]


_Action = Callable[[_Run], object]


class Plan:
    """The launches of one operator, for tensors of given shapes, strides, dtypes and alignment.

    Args:
        tensors: what the launches read and write, None where absent: on "meta", each with a storage of its own.
    """

    def __init__(self, *tensors: Tensor | None) -> None:
        self._num_tensors = len(tensors)
        self._stand_ins = list(tensors)
        self._sizes: list[int] = []
        self._steps: list[tuple[int, _Kernel | _Zero | _Record | _Wait]] = []
        self._num_streams = 1
        self._num_events = 0
        self._stream = 0
        self._ready: list[_Action] | None = None

    def buffer(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory that lives while the plan runs: a stand-in, which may be viewed and sliced, to give to `launch`."""
        buffer = torch.empty(shape, dtype=dtype, device="meta")
        self._stand_ins.append(buffer)
        self._sizes.append(cdiv(buffer.numel() * buffer.element_size(), ALIGNMENT) * ALIGNMENT)
        return buffer

    @contextmanager
    def on_stream(self, stream: int) -> Iterator[None]:
        """Steps that are added inside run on this stream."""
        before, self._stream = self._stream, stream
        self._num_streams = max(self._num_streams, stream + 1)
        yield
        self._stream = before

    def record(self) -> int:
        """An event: all that was added to this stream so far is done."""
        self._add(_Record(self._num_events))
        self._num_events += 1
        return self._num_events - 1

    def wait(self, event: int) -> None:
        """What is added to this stream from here on begins after the event."""
        self._add(_Wait(event))

    def zero(self, tensor: Tensor) -> None:
        """Fill a tensor or buffer, not a view of one, with zeros."""
        self._add(_Zero(self._place(tensor).source))

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """Run a kernel on a grid. Tensors among its arguments are tensors or buffers of the plan, or views of them."""
        named = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
        arguments = {name: self._place(x) if isinstance(x, (Tensor, Tiles)) else x for name, x in named.items()}
        self._add(_Kernel(kernel, (*grid, 1, 1)[:3], arguments))

    def _add(self, step: _Kernel | _Zero | _Record | _Wait) -> None:
        self._steps.append((self._stream, step))

    def _place(self, x: Tensor | Tiles) -> _Place:
        tensor = x if isinstance(x, Tensor) else x.tensor
        storage = tensor.untyped_storage()._cdata
        for source, known in enumerate(self._stand_ins):
            if known is not None and known.untyped_storage()._cdata == storage:
                return _Place(source, int(tensor.storage_offset()), x if isinstance(x, Tiles) else None)
        raise AssertionError(f"a tensor of shape {tuple(tensor.shape)} is none of the plan's")

    def launches(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Every kernel with its arguments by name, tensors on "meta"."""
        for _, step in self._steps:
            if isinstance(step, _Kernel):
                yield step.kernel, {name: _argument(x, self._stand_ins) for name, x in step.arguments.items()}

    def run(self, *tensors: Tensor | None, device: torch.device) -> None:
        """Run every step on tensors like those that the plan was built for."""
        with _current(device):
            memory = torch.empty(sum(self._sizes), dtype=torch.uint8, device=device).split(self._sizes)
            sources = [*tensors, *memory]
            streams: list[torch.cuda.Stream] = []
            if self._num_streams > 1 and device.type == "cuda":
                streams = [torch.cuda.current_stream(device), *_side_streams(device)[: self._num_streams - 1]]
            events = [torch.cuda.Event() for _ in range(self._num_events)] if streams else []
            run = _Run(sources, [0 if x is None else x.data_ptr() for x in sources], streams, events)
            if self._ready is None:
                self._first_run(run)
                return
            for action in self._ready:
                action(run)

    def _first_run(self, run: _Run) -> None:
        """Run every step, kernels through Triton, which compiles what it has to."""
        num = self._num_tensors
        buffers = zip(run.sources[num:], self._stand_ins[num:], strict=True)
        typed = [*run.sources[:num], *(x.view(y.dtype) for x, y in buffers if x is not None and y is not None)]
        ready: list[_Action] = []
        for stream, step in self._steps:
            if isinstance(step, _Kernel):
                arguments = {name: _argument(x, typed) for name, x in step.arguments.items()}
                with torch.cuda.stream(run.streams[stream]) if run.streams else nullcontext():
                    compiled = step.kernel[step.grid](**arguments)
                if compiled is not None:  # the interpreter compiles nothing
                    ready.append(self._relaunch(stream, step, compiled))
            else:
                action = self._action(stream, step)
                action(run)
                ready.append(action)
        if len(ready) == len(self._steps):
            self._ready = ready

    def _action(self, stream: int, step: _Zero | _Record | _Wait) -> _Action:
        if isinstance(step, _Zero):
            source = step.source

            def zero(run: _Run) -> None:
                tensor = run.sources[source]
                assert tensor is not None
                with torch.cuda.stream(run.streams[stream]) if run.streams else nullcontext():
                    tensor.zero_()

            return zero
        event = step.event

        def record(run: _Run) -> None:
            if run.streams:
                run.events[event].record(run.streams[stream])

        def wait(run: _Run) -> None:
            if run.streams:
                run.streams[stream].wait_event(run.events[event])

        return record if isinstance(step, _Record) else wait

    def _relaunch(self, stream: int, step: _Kernel, compiled: Any) -> _Action:
        """Launch a compiled kernel again: in place of tensors, their pointers."""
        launch = compiled[step.grid]
        template = [step.arguments[name] for name in step.kernel.arg_names]
        places = [(i, x) for i, x in enumerate(template) if isinstance(x, _Place)]
        pointers = [(i, x.source, x.offset * self._element_size(x.source)) for i, x in places if x.tiles is None]
        tiles = [(i, x.source, x.tiles[1:]) for i, x in places if x.tiles is not None]

        def relaunch(run: _Run) -> None:
            values = template.copy()
            for i, source, offset in pointers:
                values[i] = run.pointers[source] + offset
            for i, source, parts in tiles:
                values[i] = _Descriptor(run.sources[source], *parts)
            launch(*values, stream=run.streams[stream].cuda_stream if run.streams else None)

        return relaunch

    def _element_size(self, source: int) -> int:
        stand_in = self._stand_ins[source]
        assert stand_in is not None
        return stand_in.element_size()


def _argument(x: Any, sources: Sequence[Tensor | None]) -> Any:
    """An argument as Triton takes it."""
    if not isinstance(x, _Place):
        return x
    tensor = sources[x.source]
    assert tensor is not None
    if x.tiles is not None:
        _, shape, strides, tile = x.tiles
        return TensorDescriptor(tensor, list(shape), list(strides), list(tile))
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + x.offset) if x.offset else tensor


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are launched on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@cache
def _side_streams(device: torch.device) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(2)]


_plans: dict[Any, Plan] = {}


def run_planned(build: Callable[..., None], *tensors: Tensor | None, device: torch.device, **constants: Any) -> None:
    """Run the launches of `build(plan, *stand-ins of the tensors, **constants)`, built once for such tensors."""
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
    plan.run(*tensors, device=device)


def make_plan(build: Callable[..., None], *tensors: Tensor | None, **constants: Any) -> Plan:
    """The plan that `build(plan, *stand-ins of the tensors, **constants)` makes."""
    stand_ins = [
        None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in tensors
    ]
    plan = Plan(*stand_ins)
    build(plan, *stand_ins, **constants)
    return plan
