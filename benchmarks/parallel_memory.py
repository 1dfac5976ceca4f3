"""Memory of one layer's forward on one GPU and on each of several, counted tensor by tensor, without a GPU.

    python benchmarks/parallel_memory.py

The code that runs on GPUs runs here on tensors that have a shape and no memory (torch's "meta" device), at full size:
moba.parallel, its transfers, and the plans of the Triton backend with their workspace. Only launches and messages are
left out, and of transport="selective" which blocks are chosen is given, not computed. Every storage is counted from its
making to its end. Cases that GPUs measured stand beside what is counted of them. Writes
benchmarks/results/parallel-memory.json and .md.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import typer
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moba import backends, moba_attention
from moba.backends import triton
from moba.backends.triton.launch import Plan
from moba.parallel import TRANSPORTS, Shards, context_parallel_attention, selective
from moba.parallel import attention as parallel_attention
from moba_lab.bench import machine
from moba_lab.bench.cases import ParallelCase
from moba_lab.bench.report import Records, write

RESULTS = Path(__file__).parent / "results"
K = 1024
CASES = (
    ParallelCase(2048 * K, 32, 8, 128, 4096, 12, torch.bfloat16),
    ParallelCase(512 * K, 16, 16, 128, 512, 8, torch.bfloat16),
)
# Shares of the blocks before a rank's that its queries choose, for transport="selective".
CHOSEN = (1.0, 0.1)
# The kernels' tile sizes are those of an H100 or H200.
ARCH = 90


class Allocations(TorchDispatchMode):
    """Bytes of the storages made inside: `now`, and the `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and count what it made."""
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in self._known | given:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._end, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _end(self, number: int, num_bytes: int) -> None:
        self._known.discard(number)
        self.now -= num_bytes


@contextmanager
def without_a_gpu() -> Iterator[None]:
    """The Triton backend on "meta": it allocates what it would, and launches nothing."""
    with ExitStack() as stack:
        for file, name in (("attention", "_attend"), ("decoding", "_append_means"), ("routing", "select")):
            module = import_module(f"moba.backends.triton.{file}")
            stack.enter_context(patch.object(module, name, getattr(module, name).plain))
            stack.enter_context(patch.object(module, "arch_of", lambda device: ARCH))
        stack.enter_context(patch.object(Plan, "_launch_all", lambda *_: None))
        stack.enter_context(patch.object(triton, "unsupported", lambda q, k: None))
        stack.enter_context(patch.object(torch, "autocast", lambda *_, **__: nullcontext()))  # knows no "meta"
        stack.enter_context(patch.dict(backends.AUTO, {"meta": ("triton",)}))
        yield


def peak_of(run: Callable[..., object], tensors: Sequence[Tensor]) -> int:
    """Bytes that a forward takes beyond its inputs."""
    with torch.no_grad(), without_a_gpu():
        run(*tensors)  # makes the plans, whose stand-ins are no memory of a GPU
        with Allocations() as allocations:
            run(*tensors)
    return allocations.peak


def inputs(case: ParallelCase, num_tokens: int) -> list[Tensor]:
    """q, k and v of so many tokens."""
    return [
        torch.empty(1, num_tokens, heads, case.head_dim, dtype=case.dtype, device="meta")
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    ]


def on_one(case: ParallelCase) -> int:
    """Bytes of a forward on one GPU, beyond its inputs."""
    options = {"block_size": case.block_size, "topk": case.topk}
    return peak_of(lambda *x: moba_attention(*x, **options), inputs(case, case.tokens))


def on_rank(case: ParallelCase, num_ranks: int, rank: int, transport: str, chosen: float = 1.0) -> int:
    """Bytes of a forward on a rank, beyond its inputs, if each rank's queries choose this share of blocks before it."""
    length = case.tokens // num_ranks
    dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=FakeStore())
    shards = Shards((length,) * num_ranks, rank, dist.group.WORLD)
    options = {"block_size": case.block_size, "topk": case.topk, "transport": transport, "shards": shards}
    try:
        with patch.object(dist, "batch_isend_irecv", lambda operations: []), _chosen(case, shards, chosen):
            return peak_of(lambda *x: context_parallel_attention(*x, **options), inputs(case, length))
    finally:
        dist.destroy_process_group()


@contextmanager
def _chosen(case: ParallelCase, shards: Shards, share: float) -> Iterator[None]:
    """Every rank's queries choose this share of the blocks before it, evenly spread, the same for all heads."""
    per_rank = shards.lengths[0] // case.block_size
    every = round(1 / share)

    def chosen_by(rank: int) -> Tensor:
        chosen = torch.arange(rank * per_rank) % every == 0
        return chosen[:, None, None].expand(-1, 1, case.kv_heads)

    def answers(*_: object) -> Tensor:
        mine = slice(shards.rank * per_rank, (shards.rank + 1) * per_rank)
        later = [chosen_by(rank)[mine] for rank in range(shards.rank + 1, len(shards.lengths))]
        return torch.cat([*later, torch.empty(0, 1, case.kv_heads)])

    def wishes(chosen: Tensor, *rest: Any) -> list[selective.Wishes]:
        found = selective.all_wishes(chosen_by(shards.rank), *rest)
        return [
            replace(
                wish, row=wish.row.to("meta"), slot=wish.slot.to("meta"), head=wish.head.to("meta"),
                slots=wish.slots.to("meta"), places=[tuple(x.to("meta") for x in place) for place in wish.places],
            )
            for wish in found
        ]  # fmt: skip

    with patch.object(parallel_attention, "all_wishes", wishes), patch.object(selective, "send_and_receive", answers):
        yield


def count(case: ParallelCase, num_ranks: int) -> dict[str, Any]:
    """All memory of a forward, inputs included: on one GPU, and on every rank for each transport."""
    one = on_one(case) + sum(x.nbytes for x in inputs(case, case.tokens))
    own = sum(x.nbytes for x in inputs(case, case.tokens // num_ranks))
    ways = {}
    for transport in TRANSPORTS:
        if transport == "heads" and case.kv_heads % num_ranks:
            continue
        for chosen in CHOSEN if transport == "selective" else CHOSEN[:1]:
            name = transport if transport != "selective" else f"selective, {chosen:.0%} of the remote blocks chosen"
            ways[name] = [on_rank(case, num_ranks, rank, transport, chosen) + own for rank in range(num_ranks)]
    return {"case": case.name, "ranks": num_ranks, "one": one, "ways": ways}


def measured() -> Records:
    """What GPUs measured of a forward on one of them, beside what is counted."""
    found: Records = []
    for name, way in (("attention-h100", "moba"), ("parallel-h200x2", "one")):
        for record in json.loads((RESULTS / f"{name}.json").read_text())["records"]:
            times = record.get(way) or record.get("ways", {}).get(way, {})
            if "forward_peak_bytes" in times and record["tokens"] >= 128 * K:
                case = ParallelCase(
                    *(record[key] for key in ("tokens", "heads", "kv_heads", "head_dim", "block_size", "topk")),
                    getattr(torch, record["dtype"]),
                )
                found.append({"case": case.name, "measured in": name, "counted": on_one(case),
                              "measured": times["forward_peak_bytes"]})  # fmt: skip
    return found


def rows(records: Records) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells."""
    titles = ["case", "GPUs", "way", "GiB of each rank", "largest, of one GPU's", "measured GiB"]
    cells = []
    for record in records:
        if "counted" in record:
            cells.append([record["case"], "1", f"beyond inputs, {record['measured in']}", _gib(record["counted"]),
                          "", _gib(record["measured"])])  # fmt: skip
            continue
        line = [record["case"], "1", "one", _gib(record["one"]), "", ""]
        cells += [] if line in cells else [line]
        for way, by_rank in record["ways"].items():
            shown = ", ".join(_gib(x) for x in by_rank)
            cells.append([record["case"], str(record["ranks"]), way, shown, f"{max(by_rank) / record['one']:.1%}", ""])
    return titles, cells


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}"


def main(
    ranks: Annotated[list[int], typer.Option(help="Numbers of GPUs.")] = [2, 4, 8],  # noqa: B006
    out: Annotated[Path, typer.Option(help="PREFIX.json and .md are written.")] = RESULTS / "parallel-memory",
) -> None:
    """Write the table."""
    records = [count(case, num_ranks) for case in CASES for num_ranks in ranks] + measured()
    write(machine.describe(torch.device("cpu")), records, out, rows)


if __name__ == "__main__":
    typer.run(main)
