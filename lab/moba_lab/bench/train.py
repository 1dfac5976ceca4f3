"""`moba bench train`: tokens a second of a training step of SmolLM2-135M's shape, MoBA beside dense attention."""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from typing import Annotated, Any

import torch
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel

from moba import MoBAConfig
from moba_lab.bench import machine, suite
from moba_lab.bench.cases import length_name
from moba_lab.bench.report import Records, earlier_records, require_writable, write

CONFIG = MoBAConfig(128, 16)
LENGTHS = (8192, 32768, 131072)
# SmolLM2-135M.
SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
# Name: attention, and the one kernel that torch may take for dense attention.
WAYS: dict[str, tuple[str, SDPBackend | None]] = {
    "MoBA": ("moba", None),
    "dense FlashAttention-2": ("sdpa", SDPBackend.FLASH_ATTENTION),
    "dense cuDNN": ("sdpa", SDPBackend.CUDNN_ATTENTION),
}
STEP_TOKENS = 32768
GATE_TOKENS = CONFIG.block_size * CONFIG.topk
# bf16 keeps 8 bits; the losses and gradients of two orders of summation differ by less over 30 layers.
GATE_TOLERANCE = 0.03


def train(
    lengths: Annotated[str, typer.Option(help="Tokens of a row, a list.")] = ",".join(map(str, LENGTHS)),
    seconds: Annotated[float, typer.Option(help="Of timed steps in a case: at least one step, at most ten.")] = 4.0,
    layers: Annotated[int, typer.Option(help="Of the model; 30 is SmolLM2-135M.", min=1)] = 30,
    fast: Annotated[
        bool, typer.Option("--fast", help="Compile the layers, and keep activations instead of computing them anew.")
    ] = False,
    device: suite.DeviceOption = "auto",
    out: suite.OutOption = None,
) -> None:
    """Time a training step of a whole model, and its peak memory, beside dense attention.

    Random weights and tokens; rows of each length, at least 32K tokens in a step; fp32 weights under bf16 autocast,
    activation checkpointing, the loss without logits, fused AdamW: what `moba train` does in a step. Dense attention is
    transformers' "sdpa" with each of torch's kernels alone. Before anything is timed, MoBA over blocks that cover the
    whole row must give the loss and the gradients of dense attention. A run that was stopped goes on from PREFIX.json.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from moba import register_moba
    from moba_lab.train.loss import use_fused_loss
    from moba_lab.train.model import checkpoint_activations, compile_layers

    where = machine.device_to_time(device)
    if out is not None:
        require_writable(out)
    register_moba(CONFIG)
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, max_position_embeddings=max(LENGTHS))
    with where:
        model: Any = LlamaForCausalLM(config)
    model.train()
    loss = use_fused_loss(model)
    if fast:
        compile_layers(model)
    else:
        checkpoint_activations(model)
    how = "layers compiled, activations kept" if fast else "activation checkpointing"
    header = machine.describe(where)
    header["setting"] = (
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters in fp32, bf16 autocast, {how}, "
        f"loss {loss}, AdamW; MoBA {CONFIG.block_size} × {CONFIG.topk} in every layer"
    )
    header["gate"] = check(model, where)
    records = [] if out is None else earlier_records(out, header, ("device", "versions", "commit", "setting"))
    for tokens in (int(part) for part in lengths.split(",")):
        num_rows = max(1, STEP_TOKENS // tokens) if where.type == "cuda" else 1
        case = f"{num_rows} × {length_name(tokens)}"
        record = next((record for record in records if record["case"] == case), None)
        if record is None:
            record = {"case": case, "tokens": tokens, "rows": num_rows}
            records.append(record)
        for name in (name for name in WAYS if name not in record):
            record[name] = measure(model, name, random_rows(num_rows, tokens, where), where, seconds)
            typer.echo(f"{case} {name}: {record[name]}", err=True)
            if out is not None:
                write(header, records, out, rows)
    suite.tell(header, records, rows)


def check(model: Any, device: torch.device) -> str:
    """Compare MoBA with dense attention where both are the same function.

    Raises:
        ValueError: if loss or gradients differ by more than bf16 explains: then nothing is measured.
    """
    results = []
    for name in ("MoBA", "dense FlashAttention-2"):
        model.set_attn_implementation(WAYS[name][0])
        model.zero_grad()
        loss = forward(model, random_rows(1, GATE_TOKENS, device), device)
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    model.zero_grad()
    (found, gradients), (expected, wanted) = results
    errors = abs(found / expected - 1), ((gradients - wanted).norm() / wanted.norm()).item()
    if not max(errors) < GATE_TOLERANCE:
        raise ValueError(f"MoBA over whole rows is not dense attention: relative errors of loss, gradients: {errors}")
    return f"at {GATE_TOKENS} tokens, relative error of the loss {errors[0]:.1e}, of the gradients {errors[1]:.1e}"


def measure(model: Any, name: str, batch: torch.Tensor, device: torch.device, seconds: float) -> dict[str, Any]:
    """Median time of a training step on `batch` [rows, tokens] and its peak memory, or why it cannot run."""
    attention, kernel = WAYS[name]
    torch.compiler.reset()  # a graph keeps the kernel that it was traced with
    model.set_attn_implementation(attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    try:
        # The setting is the process's, so backward and recomputation, in a thread of their own, keep to it too.
        with nullcontext() if kernel is None or device.type == "cpu" else sdpa_kernel(kernel):
            step(model, optimizer, batch, device)
            while not times or (len(times) < 10 and sum(times) < seconds):
                times.append(step(model, optimizer, batch, device))
    except RuntimeError as error:
        return {"failed": str(error).splitlines()[0]}
    finally:
        optimizer.zero_grad()
    result = {"step_s": statistics.median(times), "fastest_s": min(times), "slowest_s": max(times), "steps": len(times)}
    result["tokens_per_s"] = batch.numel() / result["step_s"]
    if device.type == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result


def step(model: Any, optimizer: torch.optim.Optimizer, batch: torch.Tensor, device: torch.device) -> float:
    """Seconds of one step."""
    _synchronize(device)
    start = time.perf_counter()
    forward(model, batch, device).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    _synchronize(device)
    return time.perf_counter() - start


def forward(model: Any, batch: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The loss under bf16 autocast."""
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss: torch.Tensor = model(batch, labels=batch, use_cache=False).loss
    return loss


def random_rows(num_rows: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Token ids [num_rows, tokens], the same at every call."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(SHAPE["vocab_size"], (num_rows, tokens), generator=generator).to(device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rows(records: Records) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells: tokens a second, time and memory of a step, and how many times longer dense takes."""
    titles = ["rows × tokens"]
    for name in WAYS:
        titles += [f"{name} tokens/s", "ms a step" + ("" if name == "MoBA" else " (×)"), "peak GiB"]
    cells = []
    for record in records:
        line = [record["case"]]
        for name in WAYS:
            result = record.get(name, {})
            if "step_s" not in result:
                line += [f"failed: {result['failed']}" if "failed" in result else "", "", ""]
                continue
            moba = record["MoBA"].get("step_s")
            times = f" ({result['step_s'] / moba:.2f})" if moba and name != "MoBA" else ""
            memory = f"{result['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in result else ""
            line += [f"{result['tokens_per_s']:,.0f}", f"{1e3 * result['step_s']:.0f}{times}", memory]
        cells.append(line)
    return titles, cells
