"""`moba bench attention`: MoBA beside dense attention, in one run."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moba import backends
from moba.attention import moba_attention
from moba.routing import Selection
from moba.sequences import Sequences
from moba_lab.bench import machine
from moba_lab.bench.cases import Case, cpu_suite, cuda_suite, fixed_blocks_suite
from moba_lab.bench.check import check
from moba_lab.bench.measure import Measurement, measure
from moba_lab.bench.options import (
    BackendOption,
    BlockSizeOption,
    DtypeOption,
    HeadDimOption,
    HeadsOption,
    KvHeadsOption,
    OutOption,
    RepeatsOption,
    TokensOption,
    TopkOption,
    dtype_of,
)
from moba_lab.bench.report import plot, require_writable, table, write

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]
# Operations of a forward that take seconds: from there on one run is measured, not the median of several.
LONG = {"cpu": 5e11, "cuda": 5e14}
# Operations of a dense forward from which its backward is left out.
TOO_LONG = 5e14


def attention(
    device: Annotated[str, typer.Option(help='"cpu", "cuda", or "auto".')] = "auto",
    backend: BackendOption = "auto",
    tokens: TokensOption = None,
    heads: HeadsOption = 16,
    kv_heads: KvHeadsOption = None,
    head_dim: HeadDimOption = 128,
    block_size: BlockSizeOption = 512,
    topk: TopkOption = 3,
    dtype: DtypeOption = "bf16",
    reference: Annotated[
        bool, typer.Option("--reference", help="Also the mask-based reference, for the one case.")
    ] = False,
    fixed_blocks: Annotated[
        bool, typer.Option("--fixed-blocks", help="The paper's Figure 2b: 64 blocks at every length, to 10M.")
    ] = False,
    flex: Annotated[
        bool, typer.Option("--flex", help="Also FlexAttention with the same routing, up to 32K tokens.")
    ] = False,
    repeats: RepeatsOption = 3,
    out: OutOption = None,
) -> None:
    """Time MoBA's forward, backward and routing, and its memory, beside dense attention.

    Each case first compares sampled rows of the tensors it times with an fp64 computation; one that fails is reported
    without times, and the command then exits with 1. The last line is the whole result as JSON.
    """
    case_dtype = dtype_of(dtype)
    where = machine.device_of(device)
    if out is not None:
        require_writable(out)
    if tokens is not None:
        suite = [Case(tokens, heads, kv_heads or heads, head_dim, block_size, topk, case_dtype, reference=reference)]
    elif fixed_blocks:
        suite = fixed_blocks_suite()
    else:
        suite = cuda_suite() if where.type == "cuda" else cpu_suite()

    console = Console(stderr=True)
    header = machine.describe(where)
    records: list[dict[str, Any]] = []
    measured: dict[tuple[Any, ...], dict[str, Any]] = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(suite))
        for case in suite:
            progress.update(task, description=case.name)
            records.append(run_case(case, where, backend, repeats, flex, measured))
            if where.type == "cuda":
                torch.cuda.empty_cache()
            progress.advance(task)
            if out is not None:  # after every case, so that a run cut short keeps what it measured
                write(header, records, out)

    for name, value in header.items():
        typer.echo(f"{name:>9}: {value}")
    Console(width=200).print(table(records))
    if out is not None:
        plot(header, records, out.with_suffix(".png"))
    typer.echo(json.dumps({"header": header, "records": records}))
    if any("failed" in record for record in records):
        raise typer.Exit(1)


def run_case(
    case: Case,
    device: torch.device,
    backend: str,
    repeats: int,
    flex: bool,
    measured: dict[tuple[Any, ...], dict[str, Any]],
) -> dict[str, Any]:
    """Measure one case: a record of times in ms and peaks in bytes, or of what failed the check.

    Dense attention does not know of blocks: `measured` keeps its results for the next case of the same shape.
    """
    torch.manual_seed(0)
    q, k, v, d_out = (
        torch.randn(1, case.tokens, heads, case.head_dim, device=device, dtype=case.dtype)
        for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    )
    record: dict[str, Any] = {
        "case": case.name, "tokens": case.tokens, "heads": case.heads, "kv_heads": case.kv_heads,
        "head_dim": case.head_dim, "block_size": case.block_size, "topk": case.topk,
        "dtype": str(case.dtype).removeprefix("torch."), "moba_flops": case.moba_flops, "dense_flops": case.dense_flops,
    }  # fmt: skip

    def moba(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return moba_attention(q, k, v, block_size=case.block_size, topk=case.topk, backend=backend, **options)

    if problem := _gate(case, q, k, v, d_out, moba):
        record["failed"] = problem
        return record

    runs = repeats if case.moba_flops < LONG[device.type] else 1
    record["moba"] = _measure(moba, q, k, v, d_out, runs, case.backward)
    is_dense = backend == "auto" and case.topk * case.block_size >= case.tokens
    if not is_dense:  # dense attention, where it is the same function, routes nothing
        record["moba"]["routing_ms"] = _routing_ms(case, backend, q, k, runs)
    if flex and case.tokens <= 32768 and device.type == "cuda":
        from moba_lab.bench.flex import flex_attention_of

        with torch.no_grad():
            routing = moba(q, k, v, return_routing=True)[1]
        record["flex"] = _measure(flex_attention_of(routing, q, k), q, k, v, d_out, runs, case.backward)
    if case.dense:
        if case.dense_shape not in measured:
            dense_runs = repeats if case.dense_flops < LONG[device.type] else 1
            with_backward = case.backward and case.dense_flops < TOO_LONG
            measured[case.dense_shape] = {
                name: _measure(dense, q, k, v, d_out, dense_runs, with_backward)
                for name, dense in dense_baselines(device).items()
            }
        record |= measured[case.dense_shape]
    if case.reference:
        record["reference"] = _measure_reference(case, q, k, v, d_out, backward=device.type == "cuda")
        if device.type == "cpu":
            record["masked_sdpa"] = _measure_masked_sdpa(q, k, v)
    return record


def _gate(case: Case, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, moba: Callable[..., Any]) -> str | None:
    with torch.no_grad():
        out, routing = moba(q, k, v, return_routing=True)
    d_q = None
    if case.backward:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        d_q = torch.autograd.grad(moba(*leaves), leaves, d_out)[0]
    return check(q, k, v, out, routing, case.topk, d_out, d_q)


def _routing_ms(case: Case, backend: str, q: Tensor, k: Tensor, repeats: int) -> float:
    """The time of choosing the blocks, alone."""
    route = backends.resolve(backend, q, k).route
    sequences = Sequences(1, case.tokens, case.tokens)
    selection = Selection.of(sequences.fitting_block_size(case.block_size), case.topk, 0, 0, "mean")
    with torch.no_grad():
        return measure(lambda: route(q, k, sequences, selection), q.device, warmups=1, repeats=repeats).ms


def _measure(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    repeats: int,
    backward: bool,
) -> dict[str, Any]:
    """forward_ms and train_ms (one forward and one backward) with their peaks, or "failed" where it does not run."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def forward() -> object:
        with torch.no_grad():
            return function(q, k, v)

    def train() -> object:
        return torch.autograd.grad(function(*leaves), leaves, d_out)

    warmups = 1 if q.device.type == "cpu" or repeats == 1 else 2
    try:
        result = _named("forward", measure(forward, q.device, warmups=warmups, repeats=repeats))
        if backward:
            result |= _named("train", measure(train, q.device, warmups=warmups, repeats=repeats))
    except (RuntimeError, torch.OutOfMemoryError) as error:
        return {"failed": str(error).splitlines()[0][:200]}
    return result


def _named(name: str, measurement: Measurement) -> dict[str, Any]:
    return {f"{name}_ms": measurement.ms, f"{name}_peak_bytes": measurement.peak_bytes}


def dense_baselines(device: torch.device) -> dict[str, Dense]:
    """What a user would pick instead, by name, on [B, T, H, D] tensors."""
    if device.type != "cuda":
        return {"dense": lambda q, k, v: _sdpa(q, k, v)}

    def through(backend: SDPBackend) -> Dense:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return _sdpa(q, k, v)

        return attend

    baselines = {"dense_fa2": through(SDPBackend.FLASH_ATTENTION), "dense_cudnn": through(SDPBackend.CUDNN_ATTENTION)}
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError:
        return baselines
    return baselines | {"dense_fa3": lambda q, k, v: flash_attn_func(q, k, v, causal=True)}


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def _measure_reference(case: Case, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, backward: bool) -> dict[str, Any]:
    def reference(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return moba_attention(q, k, v, block_size=case.block_size, topk=case.topk, backend="reference")

    return _measure(reference, q, k, v, d_out, 1, backward)


def _measure_masked_sdpa(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """Dense attention with a boolean mask as large as the reference's: what makes the ratio to the reference honest."""
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril_()
    with torch.no_grad():
        return _named("forward", measure(lambda: _sdpa(q, k, v, mask), q.device, warmups=1, repeats=1))
