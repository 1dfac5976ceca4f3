"""`moba bench decode`: a step of sparse decoding beside dense attention over the same cache, in one run."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from moba.attention import moba_attention
from moba.block_means import append_block_means
from moba_lab.bench import machine
from moba_lab.bench.decode_cases import DecodeCase, cpu_suite, cuda_suite, free_bytes
from moba_lab.bench.decode_check import check_dense, check_means, check_step
from moba_lab.bench.decode_dense import dense_baselines
from moba_lab.bench.decode_report import plot, rows
from moba_lab.bench.measure import measure
from moba_lab.bench.options import (
    BackendOption,
    BlockSizeOption,
    DtypeOption,
    HeadDimOption,
    HeadsOption,
    OutOption,
    RepeatsOption,
    TokensOption,
    TopkOption,
    dtype_of,
)
from moba_lab.bench.report import require_writable, table, write

COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}


class Layer(NamedTuple):
    """One layer's cache as models hold it, [B, G, S, D], its block means [B, N, G, D], and a query [B, T, H, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    means: Tensor


def decode(
    device: Annotated[str, typer.Option(help='"cpu", "cuda", or "auto".')] = "auto",
    backend: BackendOption = "auto",
    tokens: TokensOption = None,
    batch: Annotated[int, typer.Option(help="Sequences of the one case.", min=1)] = 1,
    queries: Annotated[int, typer.Option(help="New tokens a step of the one case.", min=1, max=16)] = 1,
    heads: HeadsOption = 32,
    kv_heads: Annotated[int, typer.Option(help="Key/value heads of the one case.", min=1)] = 8,
    head_dim: HeadDimOption = 128,
    block_size: BlockSizeOption = 128,
    topk: TopkOption = 16,
    dtype: DtypeOption = "bf16",
    flex: Annotated[bool, typer.Option("--flex", help="Also FlexAttention, which compiles for a while.")] = False,
    repeats: RepeatsOption = 5,
    out: OutOption = None,
) -> None:
    """Time one step of decoding, and count the bytes it reads, beside dense attention over the same cache.

    A measurement goes through several layers' caches in turn, on a GPU inside one CUDA graph, and divides, so that no
    layer finds its keys in a cache. Each case first compares sampled heads with an fp64 computation; one that fails is
    reported without times, and the command then exits with 1. The last line is the whole result as JSON.
    """
    case_dtype = dtype_of(dtype)
    where = machine.device_of(device)
    if out is not None:
        require_writable(out)
    if tokens is not None:
        suite = [DecodeCase(tokens, batch, heads, kv_heads, head_dim, block_size, topk, case_dtype, queries=queries)]
    else:
        suite = cuda_suite() if where.type == "cuda" else cpu_suite()

    header = machine.describe(where)
    copy_rate = _copy_rate(where)
    header["copy"] = f"{copy_rate / 1e9:.4g} GB/s, read and written"
    records: list[dict[str, Any]] = []
    measured: dict[Any, dict[str, Any]] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(suite))
        for case in suite:
            progress.update(task, description=case.name)
            records.append(run_case(case, where, backend, repeats, flex, copy_rate, measured))
            if where.type == "cuda":
                torch.cuda.empty_cache()
            progress.advance(task)
            if out is not None:  # after every case, so that a run cut short keeps what it measured
                write(header, records, out, rows)

    for name, value in header.items():
        typer.echo(f"{name:>9}: {value}")
    Console(width=220).print(table(records, rows))
    if out is not None:
        plot(header, records, out.with_suffix(".png"))
    typer.echo(json.dumps({"header": header, "records": records}))
    if any("failed" in record for record in records):
        raise typer.Exit(1)


def run_case(
    case: DecodeCase,
    device: torch.device,
    backend: str,
    repeats: int,
    flex: bool,
    copy_rate: float,
    measured: dict[Any, dict[str, Any]],
) -> dict[str, Any]:
    """Measure one case: times in ms, bytes, or of what failed the check; "skipped" where memory does not allow it.

    Dense attention does not know of blocks: `measured` keeps its times for the next case of the same shape.
    """
    record: dict[str, Any] = {
        "case": case.name, "tokens": case.tokens, "batch": case.batch, "queries": case.queries, "heads": case.heads,
        "kv_heads": case.kv_heads, "head_dim": case.head_dim, "block_size": case.block_size, "topk": case.topk,
        "dtype": str(case.dtype).removeprefix("torch."), "copy_bytes_per_second": copy_rate,
        "dense_bytes": case.dense_bytes, "dense_bound_ms": case.dense_bytes / copy_rate * 1e3,
    }  # fmt: skip
    num_layers = case.num_layers(device, free_bytes(device))
    if num_layers == 0:
        record["skipped"] = f"{(case.dense_bytes + case.means_bytes) / 2**30:.1f} GiB do not fit the free memory"
        return record
    # A generator of its own: a baseline that fails as it is recorded would leave the device's unusable.
    generator = torch.Generator(device).manual_seed(0)
    layers = [_new_layer(case, generator, backend) for _ in range(num_layers)]
    record["layers"] = num_layers

    def moba(layer: Layer, **options: Any) -> Any:
        return moba_attention(
            layer.q, layer.k.transpose(1, 2), layer.v.transpose(1, 2), block_means=layer.means,
            block_size=case.block_size, topk=case.topk, backend=backend, **options,
        )  # fmt: skip

    out, routing = moba(layers[0], return_routing=True)
    keys, values = (x.transpose(1, 2) for x in layers[0][1:3])
    if problem := check_means(layers[0].means, keys, case.block_size) or check_step(
        layers[0].q, keys, values, layers[0].means, out, routing, case.topk
    ):
        record["failed"] = problem
        return record
    # "auto" takes dense attention where it is the same function.
    record["is_dense"] = backend == "auto" and case.queries == 1 and case.block_size * case.topk >= case.tokens
    record["moba_bytes"] = case.bytes_read(routing)
    record["moba_bound_ms"] = record["moba_bytes"] / copy_rate * 1e3
    record["moba_ms"] = _step_ms([partial(moba, layer) for layer in layers], device, repeats)
    if case.dense_shape not in measured:
        measured[case.dense_shape] = _dense_times(case, layers, device, repeats, flex)
    record["dense_ms"], record["dense_failed"] = measured[case.dense_shape].values()
    return record


def _new_layer(case: DecodeCase, generator: torch.Generator, backend: str) -> Layer:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device, dtype=case.dtype)

    q = draw(case.batch, case.queries, case.heads, case.head_dim)
    k, v = (draw(case.batch, case.kv_heads, case.tokens, case.head_dim) for _ in range(2))
    means = k.new_empty(case.batch, case.tokens // case.block_size, case.kv_heads, case.head_dim)
    append_block_means(means, k.transpose(1, 2), num_new=case.tokens, block_size=case.block_size, backend=backend)
    return Layer(q, k, v, means)


def _dense_times(
    case: DecodeCase, layers: list[Layer], device: torch.device, repeats: int, flex: bool
) -> dict[str, dict[str, Any]]:
    """Times in ms by baseline, and of those that do not run or are wrong, why."""
    times: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, dense in dense_baselines(device, case.queries, flex).items():
        try:
            q, k, v = layers[0].q.transpose(1, 2), layers[0].k, layers[0].v
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SDPA's reasons, one by one, why it cannot take a backend
                out = dense(q, k, v)
            if problem := check_dense(q, k, v, out):
                failed[name] = problem
                continue
            steps = [partial(dense, layer.q.transpose(1, 2), layer.k, layer.v) for layer in layers]
            times[name] = _step_ms(steps, device, repeats)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            failed[name] = str(error).splitlines()[0][:200]
    return {"ms": times, "failed": failed}


def _step_ms(steps: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> float:
    """Median time of a step, from running all of them one after another: on a GPU as one CUDA graph."""

    def run() -> None:
        with torch.no_grad():
            for step in steps:
                step()

    if device.type != "cuda":
        return measure(run, device, warmups=1, repeats=repeats).ms / len(steps)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()  # what compiles or fails does so before the recording
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return measure(graph.replay, device, warmups=2, repeats=repeats).ms / len(steps)


def _copy_rate(device: torch.device) -> float:
    """Bytes that a large copy reads and writes in a second."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    ms = measure(lambda: target.copy_(source), device, warmups=2, repeats=5).ms
    return 2 * COPY_BYTES[device.type] / ms * 1e3
