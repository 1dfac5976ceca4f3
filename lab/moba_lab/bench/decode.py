"""`moba bench decode`: a step of sparse decoding beside dense attention over the same cache, in one run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

from moba.attention import moba_attention
from moba.block_means import append_block_means
from moba_lab.bench import machine, suite
from moba_lab.bench.cases import DecodeCase, decode_suite, free_bytes
from moba_lab.bench.check import check_dense, check_means, find_error
from moba_lab.bench.dense import decode_baselines
from moba_lab.bench.measure import measure_call
from moba_lab.bench.report import Growth, Records, require_writable

COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}


class Layer(NamedTuple):
    """One layer's cache as models hold it, [B, G, S, D], its block means [B, N, G, D], and a query [B, T, H, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    means: Tensor


def decode(
    device: suite.DeviceOption = "auto",
    backend: suite.BackendOption = "auto",
    tokens: suite.TokensOption = None,
    batch: Annotated[int, typer.Option(help="Sequences of the one case.", min=1)] = 1,
    queries: Annotated[int, typer.Option(help="New tokens a step of the one case.", min=1, max=16)] = 1,
    heads: suite.HeadsOption = 32,
    kv_heads: Annotated[int, typer.Option(help="Key/value heads of the one case.", min=1)] = 8,
    head_dim: suite.HeadDimOption = 128,
    block_size: suite.BlockSizeOption = 128,
    topk: suite.TopkOption = 16,
    dtype: suite.DtypeOption = "bf16",
    flex: Annotated[bool, typer.Option("--flex", help="Also FlexAttention, which compiles for a while.")] = False,
    repeats: suite.RepeatsOption = 5,
    out: suite.OutOption = None,
) -> None:
    """Time one step of decoding, and count the bytes it reads, beside dense attention over the same cache.

    A measurement goes through several layers' caches in turn, on a GPU inside one CUDA graph, and divides, so that no
    layer finds its keys in a cache. Each case first compares sampled heads with an fp64 computation; one that fails is
    reported without times, and the command then exits with 1. The last line is the whole result as JSON.
    """
    case_dtype = suite.dtype_of(dtype)
    where = machine.device_to_time(device)
    if out is not None:
        require_writable(out)
    cases = decode_suite(where)
    if tokens is not None:
        cases = [DecodeCase(tokens, heads, kv_heads, head_dim, block_size, topk, case_dtype, batch, queries)]
    header, copy_rate = machine.describe(where), _copy_rate(where)
    header["copy"] = f"{copy_rate / 1e9:.4g} GB/s, read and written"
    measured: dict[Any, dict[str, Any]] = {}
    run = partial(
        run_case, device=where, backend=backend, repeats=repeats, flex=flex, copy_rate=copy_rate, measured=measured
    )
    suite.run_suite(cases, where, header, out, run, rows, panels)


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
        **case.to_dict(), "batch": case.batch, "queries": case.queries, "copy_bytes_per_second": copy_rate,
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
    problem = check_means(layers[0].means, keys, case.block_size)
    problem = problem or find_error(layers[0].q, keys, values, out, routing, case.topk, means=layers[0].means)
    if problem:
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
    for name, dense in decode_baselines(device, case.queries, flex).items():
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
        return measure_call(run, device, warmups=1, repeats=repeats).ms / len(steps)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()  # what compiles or fails does so before the recording
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return measure_call(graph.replay, device, warmups=2, repeats=repeats).ms / len(steps)


def _copy_rate(device: torch.device) -> float:
    """Bytes that a large copy reads and writes in a second."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    ms = measure_call(lambda: target.copy_(source), device, warmups=2, repeats=5).ms
    return 2 * COPY_BYTES[device.type] / ms * 1e3


def best_dense(record: dict[str, Any]) -> tuple[str, float] | None:
    """The fastest dense baseline and its time in ms, None if none ran."""
    times: dict[str, float] = record.get("dense_ms", {})
    return min(times.items(), key=lambda item: item[1]) if times else None


def rows(records: Records) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells: MoBA's step, the best dense one, each baseline with how many times longer it takes."""
    names = list(dict.fromkeys(name for r in records for name in (*r.get("dense_ms", {}), *r.get("dense_failed", {}))))
    titles = ["case", "MoBA µs", "µs a token", "MB read", "of copy rate", "best dense µs", "times longer", "MB",
              "of copy rate", "dense byte bound µs", *names]  # fmt: skip
    cells = []
    for record in records:
        if what := next((name for name in ("failed", "skipped") if name in record), None):
            cells.append([record["case"], f"{what}: {record[what]}", *[""] * (len(titles) - 2)])
            continue
        ms, best, bound = record["moba_ms"], best_dense(record), record["dense_bound_ms"]
        line = [record["case"], _us(ms) + (" (dense)" if record["is_dense"] else "")]
        line += [_us(ms / record["batch"] / record["queries"]), _mb(record["moba_bytes"])]
        line.append(f"{record['moba_bound_ms'] / ms:.0%}")
        line += [""] * 4 if best is None else [
            f"{_us(best[1])} ({best[0]})", f"{best[1] / ms:.3g}", _mb(record["dense_bytes"]), f"{bound / best[1]:.0%}"
        ]  # fmt: skip
        line.append(_us(bound))
        for name in names:
            time = record["dense_ms"].get(name)
            is_failed = name in record["dense_failed"]
            line.append("does not run" if is_failed else "" if time is None else f"{_us(time)} ({time / ms:.2g})")
        cells.append(line)
    return titles, cells


def panels(records: Records) -> tuple[str, Growth]:
    """Times of a step: a panel for each batch size."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for record in sorted((record for record in records if "moba_ms" in record), key=lambda record: record["batch"]):
        times = {f"MoBA {record['block_size']}/{record['topk']}": record["moba_ms"]}
        if best := best_dense(record):
            times["best dense"] = best[1]
        times["dense, byte bound"] = record["dense_bound_ms"]
        for label, ms in times.items():
            lines = found.setdefault(f"batch {record['batch']}", {})
            lines.setdefault(label, {})[record["tokens"]] = 1e3 * ms
    return "a step, µs", found


def _us(ms: float) -> str:
    return f"{1e3 * ms:.0f}" if ms >= 0.1 else f"{1e3 * ms:.3g}"


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f}" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.3g}"
