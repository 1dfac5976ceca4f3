"""`moba bench attention`: MoBA beside dense attention, in one run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from moba import backends
from moba.attention import moba_attention, moba_attention_varlen
from moba.config import require_one_of
from moba.routing import Routing, Selection
from moba.sequences import Sequences
from moba_lab.bench import machine, suite
from moba_lab.bench.cases import Case, attention_suite, fixed_blocks_suite
from moba_lab.bench.check import find_error
from moba_lab.bench.dense import Dense, dense_baselines, flex_attention_of, masked_sdpa, packed_baselines
from moba_lab.bench.inputs import ROUTINGS, make_inputs
from moba_lab.bench.measure import Measurement, measure_call
from moba_lab.bench.report import Growth, Records, require_writable

# Operations of a forward that take seconds: from there on one run is measured, not the median of several.
LONG = {"cpu": 5e11, "cuda": 5e14}
# Operations of a dense forward from which its backward is left out.
TOO_LONG = 5e14

BASELINES = {"dense": "dense", "dense_fa2": "dense FA2", "dense_cudnn": "dense cuDNN", "dense_fa3": "dense FA3",
             "dense_varlen": "packed FA2", "flex": "FlexAttention", "masked_sdpa": "dense, boolean mask",
             "reference": "reference"}  # fmt: skip


def attention(
    device: suite.DeviceOption = "auto",
    backend: suite.BackendOption = "auto",
    tokens: suite.TokensOption = None,
    heads: suite.HeadsOption = 16,
    kv_heads: suite.KvHeadsOption = None,
    head_dim: suite.HeadDimOption = 128,
    block_size: suite.BlockSizeOption = 512,
    topk: suite.TopkOption = 3,
    dtype: suite.DtypeOption = "bf16",
    router: Annotated[str, typer.Option(help="mean or shared, for the one case.")] = "mean",
    routing: Annotated[
        str,
        typer.Option(help="Where q and k come from, for the one case: random, clustered, or model (a trained one)."),
    ] = "random",
    documents: Annotated[int, typer.Option(help="Packed documents that share the one case's tokens.", min=1)] = 1,
    reference: Annotated[
        bool, typer.Option("--reference", help="Also the mask-based reference, for the one case.")
    ] = False,
    fixed_blocks: Annotated[
        bool, typer.Option("--fixed-blocks", help="The paper's Figure 2b: 64 blocks at every length, to 10M.")
    ] = False,
    flex: Annotated[
        bool, typer.Option("--flex", help="Also FlexAttention with the same routing, up to 32K tokens.")
    ] = False,
    repeats: suite.RepeatsOption = 3,
    out: suite.OutOption = None,
) -> None:
    """Time MoBA's forward, backward and routing, and its memory, beside dense attention.

    Each case first compares sampled rows of the tensors it times with an fp64 computation; one that fails is reported
    without times, and the command then exits with 1. The last line is the whole result as JSON.
    """
    case_dtype = suite.dtype_of(dtype)
    require_one_of("router", router, ("mean", "shared"))
    require_one_of("routing", routing, ROUTINGS)
    where = machine.device_to_time(device)
    if out is not None:
        require_writable(out)
    if tokens is not None:
        shape = (tokens, heads, kv_heads or heads, head_dim, block_size, topk, case_dtype)
        if tokens % documents:
            raise typer.BadParameter(f"--tokens must be a multiple of --documents {documents}, got {tokens}")
        if reference and documents > 1:
            raise typer.BadParameter("--reference reads one document: it cannot be combined with --documents")
        cases = [Case(*shape, reference=reference, router=router, routing=routing, documents=documents)]
    else:
        cases = fixed_blocks_suite() if fixed_blocks else attention_suite(where)
    measured: dict[tuple[Any, ...], dict[str, Any]] = {}
    run = partial(run_case, device=where, backend=backend, repeats=repeats, flex=flex, measured=measured)
    suite.run_suite(cases, where, machine.describe(where), out, run, rows, panels)


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
    record = {**case.to_dict(), "moba_flops": case.moba_flops, "dense_flops": case.dense_flops}
    try:
        q, k, v, d_out = make_inputs(case, device)
    except ValueError as error:  # there is no model, or not one that fits: other cases go on
        return {**record, "failed": str(error)}
    length = case.tokens // case.documents
    cu_seqlens = torch.arange(0, case.tokens + 1, length, device=device, dtype=torch.int32)
    chosen: Any = {"block_size": case.block_size, "topk": case.topk, "router": case.router}

    def moba(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        if case.documents == 1:
            return moba_attention(q, k, v, **chosen, backend=backend, **options)
        options |= {"cu_seqlens": cu_seqlens, "backend": backend}
        result = moba_attention_varlen(q[0], k[0], v[0], **chosen, **options)
        return result if isinstance(result, tuple) else result[None]

    if problem := _gate(case, q, k, v, d_out, moba):
        record["failed"] = problem
        return record

    runs = repeats if case.moba_flops < LONG[device.type] else 1
    record["moba"] = _measure(moba, q, k, v, d_out, runs, case.backward)
    is_dense = backend == "auto" and case.topk * case.block_size >= length
    if not is_dense:  # dense attention, where it is the same function, routes nothing
        record["moba"]["routing_ms"] = _routing_ms(case, backend, q, k, cu_seqlens, runs)
    if flex and case.tokens <= 32768 and case.documents == 1 and device.type == "cuda":
        with torch.no_grad():
            routing = moba(q, k, v, return_routing=True)[1]
        record["flex"] = _measure(flex_attention_of(routing, q, k), q, k, v, d_out, runs, case.backward)
    if case.dense:
        if case.dense_shape not in measured:
            dense_runs = repeats if case.dense_flops < LONG[device.type] else 1
            with_backward = case.backward and case.dense_flops < TOO_LONG
            baselines = packed_baselines(device, case.documents) if case.documents > 1 else dense_baselines(device)
            measured[case.dense_shape] = {
                name: _measure(dense, q, k, v, d_out, dense_runs, with_backward) for name, dense in baselines.items()
            }
        record |= measured[case.dense_shape]
    if case.reference:
        reference = partial(moba_attention, **chosen, backend="reference")
        record["reference"] = _measure(reference, q, k, v, d_out, 1, device.type == "cuda")
        if device.type == "cpu":
            # With a mask as large as the reference's: what makes the ratio to the reference honest.
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril_()
            record["masked_sdpa"] = _measure(partial(masked_sdpa, mask=mask), q, k, v, d_out, 1, False)
    return record


def _gate(case: Case, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, moba: Callable[..., Any]) -> str | None:
    with torch.no_grad():
        out, routing = moba(q, k, v, return_routing=True)
    d_q = None
    if case.backward:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        d_q = torch.autograd.grad(moba(*leaves), leaves, d_out)[0]
    if case.documents > 1:  # one row for each
        out = out[None]
        routing = Routing(routing.indices.unflatten(0, (case.documents, -1)), routing.block_size)
        q, k, v, out, d_out = (x[0].unflatten(0, (case.documents, -1)) for x in (q, k, v, out, d_out))
        d_q = None if d_q is None else d_q[0].unflatten(0, (case.documents, -1))
    return find_error(q, k, v, out, routing, case.topk, d_out, d_q, router=case.router)


def _routing_ms(case: Case, backend: str, q: Tensor, k: Tensor, cu_seqlens: Tensor, repeats: int) -> float:
    """The time of choosing the blocks, alone."""
    route = backends.resolve(backend, q, k).route
    packed = {"cu_q": cu_seqlens, "cu_k": cu_seqlens} if case.documents > 1 else {}
    sequences = Sequences(1, case.tokens, case.tokens, **packed)
    selection = Selection.of(sequences.fitting_block_size(case.block_size), case.topk, 0, 0, case.router)
    with torch.no_grad():
        return measure_call(lambda: route(q, k, sequences, selection), q.device, warmups=1, repeats=repeats).ms


def _measure(
    function: Dense,
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
        result = _named("forward", measure_call(forward, q.device, warmups=warmups, repeats=repeats))
        if backward:
            result |= _named("train", measure_call(train, q.device, warmups=warmups, repeats=repeats))
    except (RuntimeError, TypeError, torch.OutOfMemoryError) as error:  # TypeError: an older torch
        return {"failed": str(error).splitlines()[0][:200]}
    return result


def _named(name: str, measurement: Measurement) -> dict[str, Any]:
    return {f"{name}_ms": measurement.ms, f"{name}_peak_bytes": measurement.peak_bytes}


def rows(records: Records) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells: MoBA's times, then each baseline's with how many times longer it takes."""
    present = [name for name in BASELINES if any(name in record for record in records)]
    titles = ["case", "MoBA fwd ms", "routing alone ms", "fwd+bwd ms", "TFLOP/s", "peak MiB"]
    titles += [f"{BASELINES[name]} {what}" for name in present for what in ("fwd ms (×)", "fwd+bwd ms (×)")]
    cells = []
    for record in records:
        if problem := record.get("failed") or record["moba"].get("failed"):
            cells.append([record["case"], f"failed: {problem}", *[""] * (len(titles) - 2)])
            continue
        moba = record["moba"]
        peak = moba["forward_peak_bytes"]
        line = [record["case"], *(_ms(moba.get(name)) for name in ("forward_ms", "routing_ms", "train_ms"))]
        line += [f"{record['moba_flops'] / moba['forward_ms'] / 1e9:.3g}", f"{peak / 2**20:.0f}" if peak else ""]
        for name in present:
            line += [_beside(record.get(name, {}), moba, what) for what in ("forward_ms", "train_ms")]
        cells.append(line)
    return titles, cells


def panels(records: Records) -> tuple[str, Growth]:
    """Forward times of one document: a panel for each kind of heads, a line for each way.

    Of several routings at one length, random ones are shown; others where they are all that was measured.
    """
    done = [record for record in records if "failed" not in record and record["documents"] == 1]
    done.sort(key=lambda record: record["routing"] == "random")
    fixed = all(record["tokens"] == 64 * record["block_size"] for record in done)
    found: dict[str, dict[str, dict[int, float]]] = {}
    for record in done:
        heads = f"{record['heads']} query, {record['kv_heads']} key/value heads, {record['dtype']}"
        ways = {f"MoBA {'64 blocks' if fixed else record['block_size']}/{record['topk']}": record["moba"]}
        ways |= {title: record[name] for name, title in BASELINES.items() if name in record}
        for title, times in ways.items():
            if "forward_ms" in times:
                found.setdefault(heads, {}).setdefault(title, {})[record["tokens"]] = times["forward_ms"]
    return "forward, ms", found


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _beside(baseline: dict[str, Any], moba: dict[str, Any], what: str) -> str:
    if "failed" in baseline:
        return "failed"
    if baseline.get(what) is None:
        return ""
    return f"{_ms(baseline[what])} ({baseline[what] / moba[what]:.2g})" if moba.get(what) else _ms(baseline[what])
