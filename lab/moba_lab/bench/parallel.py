"""`moba bench parallel`: MoBA over a sequence split between GPUs, beside the same work on one.

torchrun --nproc-per-node 2 -m moba_lab bench parallel --out parallel
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import typer
from torch import Tensor

from moba.attention import moba_attention
from moba.parallel import TRANSPORTS, Shards, context_parallel_attention
from moba.parallel.process import end_process
from moba.parallel.routing import SharedRouting
from moba.parallel.shards import process_group
from moba.routing import Routing
from moba_lab.bench import machine, suite
from moba_lab.bench.cases import ParallelCase, parallel_suite
from moba_lab.bench.link import free, gathered, measure_link, on_first, rate
from moba_lab.bench.measure import measure_call
from moba_lab.bench.report import Records, earlier_records, require_writable, write

# How far, as ‖difference‖ / ‖result‖, ranks may be from one device: both round partial results to the inputs' dtype.
BOUND = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2.4e-2}
UNFINISHED = "the run ended in this case"
# What a rank waits for another that does the same.
TIMEOUT = timedelta(seconds=60)


def parallel(
    backend: suite.BackendOption = "auto",
    tokens: suite.TokensOption = None,
    heads: suite.HeadsOption = 16,
    kv_heads: suite.KvHeadsOption = None,
    head_dim: suite.HeadDimOption = 128,
    block_size: suite.BlockSizeOption = 512,
    topk: suite.TopkOption = 8,
    dtype: suite.DtypeOption = "bf16",
    repeats: suite.RepeatsOption = 3,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "--output", "-o", metavar="PREFIX", help="Write PREFIX.json and PREFIX.md, after every case."
        ),
    ] = None,
) -> None:
    """Time a forward, and one with its backward, over all ranks and on one, and count the bytes that travel.

    Start it with torchrun, a process for each GPU (or without GPUs, over gloo). Before anything is timed, a smaller
    problem of the same kind is compared with one device. A run that was cut short goes on from PREFIX.json: the cases
    that it holds, the one that ended it included, are not measured again. The last line is the whole result as JSON.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys():
        raise typer.BadParameter("start it with torchrun: torchrun --nproc-per-node 2 -m moba_lab bench parallel")
    case_dtype = suite.dtype_of(dtype)
    # What is not valid is said by the command line, once, so long as no rank waits for another.
    device, num_ranks = _own_device(), int(os.environ["WORLD_SIZE"])
    if tokens is None:
        cases = [case.for_ranks(num_ranks) for case in parallel_suite(device)]
    else:
        cases = [ParallelCase(tokens, heads, kv_heads or heads, head_dim, block_size, topk, case_dtype)]
    for case in cases:
        case.check(num_ranks, backend, device)
    header = {**machine.describe(device), "ranks": str(num_ranks)}
    earlier: Records = []
    if os.environ["RANK"] == "0" and out is not None:
        require_writable(out)
        earlier = earlier_records(out, header, ("device", "versions", "commit", "ranks"))
    with _process_group(device):
        records = _run(cases, device, backend, repeats, out, header, earlier)
        if dist.get_rank() == 0:
            suite.tell(header, records, rows)
        end_process(
            any("failed" in found for record in records for found in (record, *record.get("ways", {}).values()))
        )


def _own_device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if here > gpus:
        raise ValueError(f"--nproc-per-node must be at most {gpus}, the GPUs of this machine, got {here}")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


@contextmanager
def _process_group(device: torch.device) -> Iterator[None]:
    """The group of all ranks."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield
    except Exception:
        # An orderly end would wait for the other ranks, which wait for this one.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _run(
    cases: list[ParallelCase],
    device: torch.device,
    backend: str,
    repeats: int,
    out: Path | None,
    header: dict[str, str],
    earlier: Records,
) -> Records:
    """The records of all cases, the same on every rank, those that the first has from earlier among them."""
    records: Records = on_first(lambda: earlier)

    def save() -> None:
        if dist.get_rank() == 0 and out is not None:
            write(header, records, out, rows)

    if not records:
        records.append({"case": "link", "link": measure_link(device)})
        save()
    link = records[0]["link"]
    header["link"] = f"{link['topology']}, {rate(link, 'p2p') / 1e9:.4g} GB/s one way, " + (
        f"{rate(link, 'both ways') / 1e9:.4g} GB/s each way at once"
    )
    for case in cases:
        if any(record["case"] == case.name for record in records):
            continue
        _tell(case.name)
        records.append({"case": case.name, "failed": UNFINISHED})
        save()
        records[-1] = run_case(case, device, backend, repeats)
        save()
    return records


def run_case(case: ParallelCase, device: torch.device, backend: str, repeats: int) -> dict[str, Any]:
    """Measure one case with every transport and on one device; the same record on every rank."""
    num_ranks = dist.get_world_size()
    options = {"block_size": case.block_size, "topk": case.topk, "backend": backend}
    ways: dict[str, dict[str, Any]] = {}

    def take(way: str, run: Callable[[], dict[str, Any]]) -> None:
        _tell(f"  {way} ...")
        ways[way] = run()
        _tell(f"  {way}: " + (ways[way].get("failed") or f"forward {ways[way]['forward_ms']:.4g} ms"))

    def checked(transport: str) -> dict[str, Any]:
        problem = _check(case, device, options, transport)
        return {"failed": problem} if problem else _on_all(case, device, options, transport, repeats)

    share = replace(case, tokens=case.tokens // num_ranks)
    take("one", partial(_on_one, case, device, options, repeats))
    take("share", partial(_on_one, share, device, options, repeats))
    _tell("  routing ...")
    routing_ms = _routing_times(case, device, options, repeats)
    for transport in TRANSPORTS:
        if transport != "heads" or case.kv_heads % num_ranks == 0:
            take(transport, partial(checked, transport))
    return {**case.to_dict(), "ranks": num_ranks, "routing_ms": routing_ms, "ways": ways}


def _tell(line: str) -> None:
    """Say on standard error, once for all ranks, where the run stands and since when."""
    if dist.get_rank() == 0:
        typer.echo(f"{time.strftime('%H:%M:%S')} {line}", err=True)


def _check(case: ParallelCase, device: torch.device, options: dict[str, Any], transport: str) -> str | None:
    """Compare out and gradients of a short sequence with one device; on every rank the first problem of any."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    length = 2 * case.block_size
    whole = replace(case, backward=True).make_inputs(device, num_ranks * length)
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
        if not error <= BOUND[case.dtype]:
            problem = problem or f"relative error of {name} is {error:.1e}"
    return next((found for found in gathered(problem) if found), None)


def _on_one(case: ParallelCase, device: torch.device, options: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Times and peak of the first rank alone with a whole sequence."""

    def run() -> dict[str, Any]:
        try:
            tensors = case.make_inputs(device, case.tokens)
            return _measure(case, tensors, device, repeats, lambda *x: moba_attention(*x, **options))
        except Exception as error:
            traceback.print_exc()
            return {"failed": in_one_line(error)}

    result: dict[str, Any] = on_first(run)
    free(device)
    return result


def in_one_line(error: BaseException) -> str:
    """What went wrong first: a compiler wraps that in exceptions which say where it was."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _routing_times(
    case: ParallelCase, device: torch.device, options: dict[str, Any], repeats: int
) -> dict[str, list[float]]:
    """What each rank takes until it knows the blocks of its tokens, if each routes its own and if they lend queries."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    length = case.tokens // num_ranks
    q, k, *_ = replace(case, backward=False).make_inputs(device, length, first=rank * length)
    shards = Shards((length,) * num_ranks, rank, process_group(None))
    selection = {**options, "keep_first": 0, "keep_recent": 0, "router": "mean"}
    times = {}
    for name, lends in (("own", False), ("lending", True)):
        run = partial(_route, q, k, shards, selection, lends)
        times[name] = gathered(measure_call(run, device, warmups=1, repeats=repeats).ms)
    free(device)
    return times


def _route(q: Tensor, k: Tensor, shards: Shards, selection: dict[str, Any], lends: bool) -> Routing:
    return SharedRouting(q, k, shards, selection, lends).finish()


def _on_all(
    case: ParallelCase, device: torch.device, options: dict[str, Any], transport: str, repeats: int
) -> dict[str, Any]:
    """Times of the slowest rank and of the fastest, the largest peak, and the bytes that all ranks sent.

    Timed as layers behind a model's first are, which need not compare what the ranks were given.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    length = case.tokens // num_ranks
    tensors = case.make_inputs(device, length, first=rank * length)
    attend = partial(context_parallel_attention, **options, transport=transport)
    try:
        with torch.no_grad(), _sent_bytes() as sent:
            _, shards = attend(*tensors[:3], return_shards=True)
        mine: dict[str, Any] = {"sent": sum(sent)}
        mine |= _measure(case, tensors, device, repeats, partial(attend, shards=shards))
    except torch.OutOfMemoryError:
        mine = {"failed": "out of memory"}
    every = gathered(mine)
    free(device)
    if failed := [part["failed"] for part in every if "failed" in part]:
        return {"failed": failed[0]}
    result: dict[str, Any] = {"sent": sum(part["sent"] for part in every)}
    for name in ("forward_ms", "train_ms", "forward_peak_bytes", "forward_bytes", "train_peak_bytes"):
        values = [part[name] for part in every if part.get(name) is not None]
        if values:
            result[name], result[f"least_{name}"] = max(values), min(values)
    return result


def _measure(
    case: ParallelCase, tensors: list[Tensor], device: torch.device, repeats: int, attend: Callable[..., Tensor]
) -> dict[str, Any]:
    """Times and peaks; "forward_bytes" is all the memory of a forward, its inputs included."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]

    def forward() -> object:
        with torch.no_grad():
            return attend(*leaves)

    def train() -> object:
        return torch.autograd.grad(attend(*leaves), leaves, tensors[3])

    repeats = repeats if case.backward else 1  # the longest cases
    # One warm-up in `measure_call`, so that every rank runs the same number of times, and one before it, in which
    # kernels are compiled and the allocator finds its blocks.
    if case.backward:
        forward()
    first = measure_call(forward, device, warmups=1, repeats=repeats)
    result: dict[str, Any] = {"forward_ms": first.ms, "forward_peak_bytes": first.peak_bytes}
    if first.peak_bytes is not None:
        result["forward_bytes"] = first.peak_bytes + sum(x.numel() * x.element_size() for x in leaves)
    if case.backward:
        train()
        both = measure_call(train, device, warmups=1, repeats=repeats)
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

    with patch.object(dist, "batch_isend_irecv", counting):
        yield sizes


def rows(records: Records) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells: a line for each way of each case."""
    titles = ["case", "way", "fwd ms", "× one", "fwd+bwd ms", "× one", "a share's time of this", "memory MiB",
              "of one's", "GB sent, fwd"]  # fmt: skip
    cells = []
    for record in records:
        if "failed" in record:
            cells.append([record["case"], f"failed: {record['failed']}", *[""] * (len(titles) - 2)])
        if "ways" not in record:
            continue
        one, share, num_ranks = record["ways"]["one"], record["ways"]["share"], record["ranks"]
        longest = "train_ms" if "train_ms" in share else "forward_ms"
        names = {"one": "one", "share": f"one, 1/{num_ranks} of the tokens", **{name: name for name in TRANSPORTS}}
        for way, name in names.items():
            found = record["ways"].get(way)
            if found is None or "failed" in found:
                if found:
                    cells.append([record["case"], name, f"failed: {found['failed']}", *[""] * (len(titles) - 3)])
                continue
            is_parallel, sent = way in TRANSPORTS, found.get("sent")
            cells.append([
                record["case"], name, f"{found['forward_ms']:.4g}",
                _ratio(one.get("forward_ms"), found["forward_ms"]) if is_parallel else "",
                f"{found['train_ms']:.4g}" if "train_ms" in found else "",
                _ratio(one.get("train_ms"), found.get("train_ms")) if is_parallel else "",
                _ratio(share.get(longest), found.get(longest)) if is_parallel else "",
                f"{found['forward_bytes'] / 2**20:.0f}" if found.get("forward_bytes") else "",
                _ratio(found.get("forward_bytes"), one.get("forward_bytes")) if is_parallel else "",
                "" if sent is None else f"{sent / 1e9:.3g}",
            ])  # fmt: skip
        for name, times in record["routing_ms"].items():
            by_rank = ", ".join(f"{ms:.3g}" for ms in times)
            cells.append([record["case"], f"routing by rank, {name}", by_rank, *[""] * (len(titles) - 3)])
    return titles, cells


def _ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.3g}" if a and b else ""
