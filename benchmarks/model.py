"""A whole model on a GPU: the first token and the steps of Llama 3.1 8B's shape, MoBA beside full attention.

    python benchmarks/model.py

Random weights, bf16, one row. Every prompt is read twice at once, the first time with whatever that call compiles, then
tokens are written one after another. Writes benchmarks/results/model-gpu.json and .md after every length.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from moba import MoBAConfig, register_moba
from moba.hf import set_moba_config
from moba.hf.cache import MoBACache
from moba.hf.graph import DecodeGraph, cache_name
from moba_lab.bench.machine import describe
from moba_lab.bench.measure import seconds
from moba_lab.bench.report import Records, write

K = 1024
RESULTS = Path(__file__).parent / "results"
SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 1 << 20, "rope_theta": 500000.0,
}  # fmt: skip
WARM_UPS = 4


class Arm(NamedTuple):
    """How prompts are read and tokens are written."""

    name: str
    attention: str
    decode: str = "full"
    backend: SDPBackend | None = None
    is_compiled: bool = False


# Steps of `moba generate` are recorded as a CUDA graph, those of `model.generate` over a static cache are compiled.
# Recorded steps of full attention do not repeat the keys of a group of heads, which sdpa in transformers does: the
# fastest dense steps that we know.
ARMS = [
    Arm("MoBA", "moba", "moba"),
    Arm("MoBA, compiled steps", "moba", "moba", is_compiled=True),
    Arm("full attention, the fastest", "sdpa", "full", SDPBackend.CUDNN_ATTENTION),
    Arm("sdpa, compiled steps", "sdpa", is_compiled=True),
]


def main(
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts, with commas.")] = "1024,8192,32768,131072",
    arms: Annotated[str, typer.Option(help="Numbers of the ways to measure, from 0, with commas.")] = "0,1,2,3",
    layers: Annotated[int, typer.Option(help="Layers of the model.", min=1)] = 32,
    block_size: Annotated[int, typer.Option(min=1)] = 512,
    topk: Annotated[int, typer.Option(min=1)] = 8,
    steps: Annotated[int, typer.Option(help="Steps that are timed.", min=1)] = 32,
    out: Annotated[Path, typer.Option(help="PREFIX.json and PREFIX.md are written.")] = RESULTS / "model-gpu",
) -> None:
    """Measure every length in every way."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("a whole model of this size needs a GPU")
    register_moba(MoBAConfig(block_size, topk))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=layers, **SHAPE)).eval()
    header = describe(torch.device("cuda"))
    header["model"] = (
        f"Llama 3.1 8B's shape, {layers} layers, random weights, bf16; MoBA {block_size} × {topk}; one row"
    )
    records: Records = []
    for arm in (ARMS[int(i)] for i in arms.split(",")):
        set_moba_config(model, MoBAConfig(block_size, topk, decode=arm.decode))
        for record in measure(model, arm, [int(n) for n in lengths.split(",")], steps):
            records.append(record)
            print(record, flush=True)
            write(header, records, out, rows)


def measure(model: Any, arm: Arm, lengths: list[int], steps: int) -> Iterator[dict[str, Any]]:
    """One record a length."""
    num_new = steps + WARM_UPS + 1
    # A static cache of MoBA costs what is in it, so one serves all lengths; one of sdpa costs what it could hold.
    static = MoBACache(model.config, max_cache_len=max(lengths) + num_new) if arm.attention == "moba" else None
    for length in lengths:
        if static is None:
            # What was compiled for the last length holds its cache.
            torch.compiler.reset()
        step = torch.compile(forward, mode="reduce-overhead", fullgraph=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        record = measure_length(model, arm, step, static, length, steps)
        yield {"tokens": length, "attention": arm.name, **record}


@torch.no_grad()
def measure_length(
    model: Any, arm: Arm, step: Callable[..., Tensor], static: MoBACache | None, length: int, steps: int
) -> dict[str, Any]:
    """Seconds of the first token, ms of a step, and peak memory."""
    tokens = torch.randint(SHAPE["vocab_size"], (1, length), device="cuda")
    record: dict[str, Any] = {}
    for name in ("first call: first token, s", "first token, s"):
        cache = None
        cache = emptied(static) if static else new_cache(model, arm, length + steps + WARM_UPS + 1)
        record[name] = round(read(model, arm, cache, tokens), 3)
    record["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    token = tokens[:, :1].clone()
    timed = (
        compiled_steps(step, model, cache, token, length) if arm.is_compiled else recorded_steps(model, cache, token)
    )
    first, *later = [next(timed) for _ in range(1 + steps)]
    record |= {"first step, s": round(first, 2), "step, ms": round(1e3 * statistics.median(later), 2)}
    record["tokens a second"] = round(1 / statistics.median(later), 1)
    return record


def emptied(cache: MoBACache) -> MoBACache:
    """The cache without what the last prompt left in it."""
    cache.reset()
    return cache


def new_cache(model: Any, arm: Arm, room: int) -> Any:
    """An empty cache for full attention."""
    return StaticCache(model.config, max_cache_len=room) if arm.is_compiled else MoBACache(model.config)


def read(model: Any, arm: Arm, cache: Any, tokens: Tensor) -> float:
    """Seconds of reading a prompt at once."""
    model.set_attn_implementation(arm.attention)
    with nullcontext() if arm.backend is None else sdpa_kernel(arm.backend):
        return seconds(lambda: forward(model, cache, tokens, positions(0, tokens.shape[1])))


def recorded_steps(model: Any, cache: Any, token: Tensor) -> Iterator[float]:
    """Seconds of steps as a CUDA graph, the first with its recording."""
    model.set_attn_implementation("moba")
    graph = DecodeGraph(model, cache, 1024)
    while True:
        yield seconds(lambda: graph(token))


def compiled_steps(step: Callable[..., Tensor], model: Any, cache: Any, token: Tensor, length: int) -> Iterator[float]:
    """Seconds of compiled steps that write the same token again and again, the first ones together."""
    place = positions(length, 1)

    def one() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        step(model, cache, token, place)

    yield sum(seconds(one) for _ in range(WARM_UPS))
    while True:
        yield seconds(one)


def forward(model: Any, cache: Any, tokens: Tensor, place: Tensor) -> Tensor:
    """The logits that follow the last token."""
    options = {cache_name(model): cache, "use_cache": True, "logits_to_keep": 1}
    logits: Tensor = model(tokens, position_ids=place, **options).logits
    return logits


def positions(start: int, number: int) -> Tensor:
    """[1, number], from start on."""
    return torch.arange(start, start + number, device="cuda")[None]


def rows(records: Records) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells, length by length."""
    by_length = sorted(records, key=lambda record: record["tokens"])
    return list(by_length[0]), [[f"{x:,}" if isinstance(x, int) else str(x) for x in r.values()] for r in by_length]


if __name__ == "__main__":
    typer.run(main)
