"""`moba bench parallel`: MoBA over a sequence split between GPUs, beside the same work on one.

torchrun --nproc-per-node 2 -m moba bench parallel
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from torch import Tensor

from moba.attention import moba_attention
from moba.bench import machine
from moba.bench.attention import DTYPES
from moba.bench.cases import length_name
from moba.bench.measure import measure
from moba.bench.report import Records, table, write
from moba.parallel import TRANSPORTS, context_parallel_attention
from moba.routing import Routing

# Blocks that queries look for in clustered cases.
POPULAR_BLOCKS = 16
# How far, as ‖difference‖ / ‖result‖, ranks may be from one device: both round partial results to the inputs' dtype.
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


@dataclass(frozen=True)
class ParallelCase:
    """One problem: batch 1. `clustered`: queries resemble keys of a few blocks, so that routings touch few blocks."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    topk: int
    dtype: torch.dtype
    clustered: bool = False
    backward: bool = True

    @property
    def name(self) -> str:
        """Short, for tables."""
        heads = str(self.heads) if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        kind = ", clustered" if self.clustered else ""
        return f"{length_name(self.tokens)}, {heads} heads, {self.block_size}/{self.topk}{kind}"


def suite(device: torch.device, num_ranks: int) -> list[ParallelCase]:
    """A fixed total, a fixed length a rank, few key/value heads, and clustered routings."""
    if device.type != "cuda":
        fp32 = torch.float32
        return [ParallelCase(4096, 4, 4, 32, 64, 4, fp32), ParallelCase(4096, 4, 4, 32, 64, 4, fp32, clustered=True)]
    bf16, k = torch.bfloat16, 1024
    return [
        ParallelCase(512 * k, 16, 16, 128, 512, 8, bf16),
        ParallelCase(512 * k, 16, 16, 128, 512, 8, bf16, clustered=True),
        ParallelCase(128 * k * num_ranks, 16, 16, 128, 512, 3, bf16),
        ParallelCase(512 * k, 32, 8, 128, 4096, 12, bf16),
        ParallelCase(2048 * k, 32, 8, 128, 4096, 12, bf16, backward=False),
    ]


def parallel(
    backend: Annotated[str, typer.Option(help="Backend to measure.")] = "auto",
    tokens: Annotated[int | None, typer.Option(help="Measure one case of this many tokens, not the suite.")] = None,
    heads: Annotated[int, typer.Option(help="Query heads of the one case.")] = 16,
    kv_heads: Annotated[int | None, typer.Option(help="Key/value heads of the one case; as many by default.")] = None,
    head_dim: Annotated[int, typer.Option(help="Head dim of the one case.")] = 128,
    block_size: Annotated[int, typer.Option(help="Block size of the one case.")] = 512,
    topk: Annotated[int, typer.Option(help="Top-k of the one case, the own block included.")] = 8,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16, for the one case.")] = "bf16",
    clustered: Annotated[bool, typer.Option(help="Routings that touch few blocks, for the one case.")] = False,
    repeats: Annotated[int, typer.Option(help="Measured runs of each, of which the median is taken.", min=1)] = 3,
    out: Annotated[Path | None, typer.Option(help="Write PREFIX.json and PREFIX.md.")] = None,
) -> None:
    """Time a forward, and one with its backward, over all ranks and on one, and count the bytes that travel.

    Start it with torchrun, a process for each GPU (or without GPUs, over gloo). Before anything is timed, a smaller
    problem of the same kind is compared with one device. The last line is the whole result as JSON.
    """
    if "RANK" not in os.environ:
        raise typer.BadParameter("start it with torchrun: torchrun --nproc-per-node 2 -m moba bench parallel")
    if dtype not in DTYPES:
        raise typer.BadParameter(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=5))
    try:
        num_ranks = dist.get_world_size()
        cases = suite(device, num_ranks)
        if tokens is not None:
            cases = [
                ParallelCase(tokens, heads, kv_heads or heads, head_dim, block_size, topk, DTYPES[dtype], clustered)
            ]
        header = {**machine.describe(device), "ranks": str(num_ranks), "link": f"{_link_rate(device) / 1e9:.4g} GB/s"}
        records: Records = []
        is_first = dist.get_rank() == 0
        for case in cases:
            if is_first:
                Console(stderr=True).print(case.name)
            records.append(run_case(case, device, backend, repeats))
            if is_first and out is not None:
                write(header, records, out, rows)
        if is_first:
            for name, value in header.items():
                typer.echo(f"{name:>9}: {value}")
            Console(width=200).print(table(records, rows))
            typer.echo(json.dumps({"header": header, "records": records}))
    finally:
        dist.destroy_process_group()
    if any("failed" in record for record in records):
        raise typer.Exit(1)


def run_case(case: ParallelCase, device: torch.device, backend: str, repeats: int) -> dict[str, Any]:
    """Measure one case with every transport and on one device; the same record on every rank."""
    record: dict[str, Any] = {
        "case": case.name, "tokens": case.tokens, "heads": case.heads, "kv_heads": case.kv_heads,
        "head_dim": case.head_dim, "block_size": case.block_size, "topk": case.topk, "clustered": case.clustered,
        "dtype": str(case.dtype).removeprefix("torch."), "ranks": dist.get_world_size(),
    }  # fmt: skip
    options = {"block_size": case.block_size, "topk": case.topk, "backend": backend}
    transports = [name for name in TRANSPORTS if name != "heads" or case.kv_heads % dist.get_world_size() == 0]
    for transport in transports:
        if problem := _check(case, device, options, transport):
            record["failed"] = f"{transport}: {problem}"
            return record
    record["one"] = _on_one(case, device, options, repeats)
    for transport in transports:
        record[transport] = _on_all(case, device, options, transport, repeats)
    return record


def _inputs(case: ParallelCase, device: torch.device, num_tokens: int, first: int = 0) -> list[Tensor]:
    """q, k, v and the gradient of out of the whole sequence, or of a shard that begins at token `first`."""
    generator = torch.Generator(device).manual_seed(first)
    q, k, v, d_out = (
        torch.randn(1, num_tokens, n, case.head_dim, generator=generator, device=device, dtype=case.dtype)
        for n in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    )
    if case.clustered:
        # A direction for each of the popular blocks; all queries of a block look for one of them.
        size, shared = case.block_size, torch.Generator(device).manual_seed(POPULAR_BLOCKS)
        towards = torch.randn(POPULAR_BLOCKS, case.kv_heads, case.head_dim, generator=shared, device=device)
        block = torch.arange(first, first + num_tokens, device=device) // size
        every = max(1, case.tokens // size // POPULAR_BLOCKS)
        is_popular = (block % every == 0) & (block // every < POPULAR_BLOCKS)
        k += (towards[(block // every).clamp(max=POPULAR_BLOCKS - 1)] * is_popular[:, None, None]).to(case.dtype)
        looked = towards[block * 7 % POPULAR_BLOCKS].repeat_interleave(case.heads // case.kv_heads, dim=1)
        q += (4 * looked).to(case.dtype)
    return [q, k, v, d_out]


def _check(case: ParallelCase, device: torch.device, options: dict[str, Any], transport: str) -> str | None:
    """Compare out and gradients of a short sequence with one device; on every rank the first problem of any."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    length = 2 * case.block_size
    whole = _inputs(case, device, num_ranks * length)
    mine = slice(rank * length, (rank + 1) * length)

    def train(attend: Callable[..., Any], tensors: list[Tensor], **more: Any) -> tuple[Routing, list[Tensor]]:
        leaves = [x.detach().clone().requires_grad_() for x in tensors[:3]]
        out, routing = attend(*leaves, **options, **more, return_routing=True)
        return routing, [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]

    routing, actual = train(context_parallel_attention, [x[:, mine] for x in whole], transport=transport)
    expected_routing, expected = train(moba_attention, whole)
    problem = ""
    if not torch.equal(routing.indices, expected_routing.indices[:, mine]):
        problem = "another routing than on one device"
    for name, x, y in zip(("out", "d_q", "d_k", "d_v"), actual, expected, strict=True):
        error = ((x.double() - y[:, mine].double()).norm() / y[:, mine].double().norm()).item()
        if not error <= 2 * BOUND[case.dtype]:
            problem = problem or f"relative error of {name} is {error:.1e}"
    problems: list[Any] = [None] * num_ranks
    dist.all_gather_object(problems, problem)
    return next((found for found in problems if found), None)


def _on_one(case: ParallelCase, device: torch.device, options: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Times and peak of the first rank alone with the whole sequence."""
    result: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            tensors = _inputs(case, device, case.tokens)
            result = [_measure(case, tensors, device, repeats, lambda *x: moba_attention(*x, **options))]
        except torch.OutOfMemoryError:
            result = [{"failed": "out of memory"}]
    dist.broadcast_object_list(result)
    _free(device)
    measured: dict[str, Any] = result[0]
    return measured


def _on_all(
    case: ParallelCase, device: torch.device, options: dict[str, Any], transport: str, repeats: int
) -> dict[str, Any]:
    """Times of the slowest rank and of the fastest, the largest peak, and the bytes that all ranks sent."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    length = case.tokens // num_ranks
    tensors = _inputs(case, device, length, first=rank * length)

    def attend(*leaves: Tensor) -> Any:
        return context_parallel_attention(*leaves, **options, transport=transport)

    with torch.no_grad(), _sent_bytes() as sent:
        _, routing = context_parallel_attention(*tensors[:3], **options, transport=transport, return_routing=True)
    mine: dict[str, Any] = {"sent": sum(sent), "needed": _needed_bytes(case, routing, rank, num_ranks)}
    del routing
    try:
        mine |= _measure(case, tensors, device, repeats, attend)
    except torch.OutOfMemoryError:
        mine["failed"] = "out of memory"
    every: list[Any] = [None] * num_ranks
    dist.all_gather_object(every, mine)
    _free(device)
    if failed := [part["failed"] for part in every if "failed" in part]:
        return {"failed": failed[0]}
    result: dict[str, Any] = {name: sum(part[name] for part in every) for name in ("sent", "needed")}
    for name in ("forward_ms", "train_ms", "forward_peak_bytes", "train_peak_bytes"):
        values = [part[name] for part in every if part.get(name) is not None]
        if values:
            result[name], result[f"least_{name}"] = max(values), min(values)
    return result


def _measure(
    case: ParallelCase, tensors: list[Tensor], device: torch.device, repeats: int, attend: Callable[..., Tensor]
) -> dict[str, Any]:
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]

    def forward() -> object:
        with torch.no_grad():
            return attend(*leaves)

    def train() -> object:
        return torch.autograd.grad(attend(*leaves), leaves, tensors[3])

    repeats = repeats if case.backward else 1  # the longest cases
    # One warm-up, so that every rank runs the same number of times.
    first = measure(forward, device, warmups=1, repeats=repeats)
    result: dict[str, Any] = {"forward_ms": first.ms, "forward_peak_bytes": first.peak_bytes}
    if case.backward:
        both = measure(train, device, warmups=1, repeats=repeats)
        result |= {"train_ms": both.ms, "train_peak_bytes": both.peak_bytes}
    return result


@contextmanager
def _sent_bytes() -> Iterator[list[int]]:
    """The sizes of all tensors that this rank sends inside."""
    sizes: list[int] = []
    exchange = dist.batch_isend_irecv

    def counting(operations: list[dist.P2POp]) -> Any:
        sent = [operation.tensor for operation in operations if operation.op is dist.isend]
        sizes.extend(x.numel() * x.element_size() for x in sent)
        return exchange(operations)

    dist.batch_isend_irecv = counting  # type: ignore[assignment]
    try:
        yield sizes
    finally:
        dist.batch_isend_irecv = exchange


def _needed_bytes(case: ParallelCase, routing: Routing, rank: int, num_ranks: int) -> int:
    """Keys and values of the distinct blocks of other ranks that this rank's queries chose, for each kv head."""
    num_before = rank * (case.tokens // num_ranks // case.block_size)
    if not num_before:
        return 0
    group = case.heads // case.kv_heads
    indices = routing.indices[0].unflatten(1, (case.kv_heads, group)).transpose(0, 1).flatten(1).long()
    place = torch.where((indices >= 0) & (indices < num_before), indices, num_before)
    chosen = torch.zeros(case.kv_heads, num_before + 1, dtype=torch.bool, device=indices.device)
    count = int(chosen.scatter_(1, place, True)[:, :num_before].sum())
    return count * 2 * case.block_size * case.head_dim * case.dtype.itemsize


def _link_rate(device: torch.device) -> float:
    """Bytes a second from the first rank to the second; 0 with one rank."""
    if dist.get_world_size() < 2:
        return 0.0
    num_bytes = (1 << 30) if device.type == "cuda" else (1 << 24)
    block = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def move() -> None:
        if dist.get_rank() == 0:
            dist.send(block, 1)
        elif dist.get_rank() == 1:
            dist.recv(block, 0)

    rate = torch.tensor([num_bytes / measure(move, device, warmups=1, repeats=3).ms * 1e3], device=device)
    dist.broadcast(rate, 0)
    return float(rate)


def _free(device: torch.device) -> None:
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def rows(records: Records) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells: a line for each way of each case."""
    titles = ["case", "way", "fwd ms", "times as fast as one", "fwd+bwd ms", "times as fast as one",
              "fastest rank's fwd ms", "peak MiB", "of one's", "GB sent, fwd", "of the chosen blocks"]  # fmt: skip
    cells = []
    for record in records:
        if "failed" in record:
            cells.append([record["case"], f"failed: {record['failed']}", *[""] * (len(titles) - 2)])
            continue
        one = record["one"]
        for way in ("one", *(name for name in TRANSPORTS if name in record)):
            found = record[way]
            if "failed" in found:
                cells.append([record["case"], way, found["failed"], *[""] * (len(titles) - 3)])
                continue
            sent, needed = found.get("sent"), found.get("needed")
            cells.append([
                record["case"], way, f"{found['forward_ms']:.4g}", _ratio(one.get("forward_ms"), found["forward_ms"]),
                f"{found['train_ms']:.4g}" if "train_ms" in found else "",
                _ratio(one.get("train_ms"), found.get("train_ms")),
                f"{found['least_forward_ms']:.4g}" if "least_forward_ms" in found else "",
                f"{found['forward_peak_bytes'] / 2**20:.0f}" if found.get("forward_peak_bytes") else "",
                _ratio(found.get("forward_peak_bytes"), one.get("forward_peak_bytes")),
                "" if sent is None else f"{sent / 1e9:.3g}", "" if not needed else f"{sent / needed:.3g}",
            ])  # fmt: skip
    return titles, cells


def _ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.3g}" if a and b else ""
