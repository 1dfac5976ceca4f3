"""Does MoBA train as well as full attention? Runs of one recipe that differ in their attention, measured and compared.

    moba train recipes/from-scratch.toml --data data/proof --out runs/dense -s attention.schedule=full
    moba train recipes/from-scratch.toml --data data/proof --out runs/moba-128x8
    python benchmarks/from_scratch.py measure runs/dense --data data/proof --out dense.json
    python benchmarks/from_scratch.py measure runs/moba-128x8 --data data/proof --out moba-128x8.json
    python benchmarks/from_scratch.py report dense.json moba-128x8.json --out benchmarks/results/from-scratch-h200

`measure` reads the same held-out rows with every checkpoint of a run and keeps the loss of each row, so that `report`
can compare two runs row by row. `report` writes PREFIX.md, its pictures and PREFIX.json: all runs, as much of them as
tables and pictures need. PREFIX.json can be given to `report` again. Of a run that was stopped there is the training
loss to compare: `report … --stopped runs/NAME`.

Measuring is in this file, comparing in from_scratch_report/.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from from_scratch_report import write_report
from from_scratch_report.runs import FULL, Result, rounded
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from moba import MoBAConfig, register_moba
from moba.files import write_json
from moba.hf import get_moba_config
from moba.hf.schedule import throughout
from moba_lab.bench.machine import describe
from moba_lab.cli.session import quieten
from moba_lab.data import Shards, open_shards
from moba_lab.evals.language import append_copy, summarise_copy
from moba_lab.evals.routing import averages, routing_quality
from moba_lab.models.key_convolution import load_key_convolution
from moba_lab.models.unrotated import apply_config
from moba_lab.train.checkpoints import checkpoints, step_of
from moba_lab.train.packing import PackedDataset, by_source
from moba_lab.train.recipe import Recipe
from moba_lab.train.run import data_digest, training_rows

app = typer.Typer(add_completion=False, help=__doc__)

# Distances between a passage and its copy, as shares of the context; the passage is 1/32 of it.
COPY_DISTANCES = (1 / 8, 3 / 8, 3 / 4)
# Logits of so many tokens exist at once.
_LOGITS = 2048
# Queries of a row whose routing is looked at: so many that they stand everywhere in their blocks.
_QUERIES = 100


@app.command()
def measure(
    run: Annotated[Path, typer.Argument(help="OUT of a `moba train` that has ended.")],
    out: Annotated[Path, typer.Option(help="A .json file.")],
    data: Annotated[Path | None, typer.Option(help="Shards; by default where the recipe found them.")] = None,
    settings: Annotated[str, typer.Option(help="Block size x top-k: each model is read with these, too.")] = (
        "128x8,512x3"
    ),
    rows: Annotated[int, typer.Option(help="Held-out rows of each source.", min=2)] = 128,
    history_rows: Annotated[int, typer.Option(help="Of these, rows that every checkpoint reads.", min=2)] = 32,
    copy_rows: Annotated[int, typer.Option(help="Of these, rows that get a copied passage.", min=2)] = 32,
    routing_rows: Annotated[int, typer.Option(help="Of these, rows whose routing is looked at.", min=1)] = 4,
    rows_at_once: Annotated[int, typer.Option(help="Rows of one forward pass.", min=1)] = 16,
) -> None:
    """Measure a run's checkpoints on held-out rows."""
    quieten()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    configs = [MoBAConfig(*map(int, setting.split("x"))) for setting in settings.split(",")]
    result = measure_run(
        run, data=data, configs=configs, rows=rows, history_rows=history_rows, copy_rows=copy_rows,
        routing_rows=routing_rows, rows_at_once=rows_at_once, device=device,
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    print(f"{out}: {result['name']}, {result['seconds']:.0f} s", flush=True)


def measure_run(
    run: Path,
    *,
    configs: Sequence[MoBAConfig],
    device: torch.device,
    data: Path | None = None,
    rows: int = 128,
    history_rows: int = 32,
    copy_rows: int = 32,
    routing_rows: int = 4,
    rows_at_once: int = 16,
) -> Result:
    """Everything that `report` compares, of one run.

    Args:
        run: folder of a training that has ended.
        configs: settings that every model is read with, besides full attention and its own.
        device: to compute on; bf16 autocast over fp32 weights on CUDA where the training had it, else fp32.
        data: folder of the shards; None: the recipe's.
        rows: held-out rows of each source. history_rows, copy_rows, routing_rows: how many of them are read by every
            checkpoint, get a copied passage, and have their routing looked at, at every checkpoint.
        rows_at_once: rows of one forward pass.

    Raises:
        ValueError: if the run has no last checkpoint, or the shards are not those it was trained on.
    """
    begin = time.perf_counter()
    register_moba(None)
    saved = json.loads((run / "recipe.json").read_text())
    recipe = Recipe.from_dict(saved["recipe"])
    folder = data or Path(recipe.data.folder)
    shards = open_shards(folder)
    if data_digest(shards) != saved["data"]:
        raise ValueError(f"{folder} is not the data that {run} was trained on")
    found = checkpoints(run)
    if not found or step_of(found[-1]) != recipe.num_steps:
        raise ValueError(f"{run} has no checkpoint of its last step {recipe.num_steps}: the training has not ended")
    held_out = held_out_rows(open_shards(folder, "held_out"), recipe.data.context, rows)
    texts = {source: tokens for source, (tokens, _) in held_out.items()}
    is_bf16 = device.type == "cuda" and recipe.training.precision == "bf16"
    reader = _Reader(texts, rows_at_once, lambda: torch.autocast("cuda", torch.bfloat16) if is_bf16 else nullcontext())

    history = []
    for checkpoint in found:
        model = load_checkpoint(checkpoint, device)
        record = {"step": step_of(checkpoint), "attention": attention_name(model)}
        record["tokens"] = record["step"] * recipe.training.rows_per_step * recipe.data.context
        losses = reader.losses(model, history_rows)
        record["sources"] = {source: _of_rows(losses[source]) for source in texts}
        record["routing"] = {
            name: reader.routing(model, config, routing_rows)
            for name, config in _routings(model, recipe, configs).items()
        }
        history.append(record)
        print(f"{run.name}, step {record['step']}: {_told(record)} ({time.perf_counter() - begin:.0f} s)", flush=True)

    own, num_layers = get_moba_config(model), model.config.num_hidden_layers
    reads = {attention_name(model): own, FULL: throughout(None).at(1.0, num_layers)}
    reads |= {setting_name(config): config for config in configs if setting_name(config) not in reads}
    final = {}
    for name, config in reads.items():
        apply_config(model, config)
        losses = reader.losses(model, rows)
        positions: dict[str, dict[str, Any]] = {source: _of_rows(losses[source]) for source in texts}
        if name == attention_name_of(own, num_layers):
            for source in texts:
                positions[source]["bins"] = _of_positions(losses[source], recipe.data.context)
        final[name] = {"positions": positions, "copy": reader.copies(model, copy_rows)}
    return {
        "name": run_name(recipe),
        "header": describe(device),
        "precision": "bf16 autocast over fp32 weights" if is_bf16 else "fp32",
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": recipe.to_dict(),
        "data": saved["data"],
        "unique_tokens": training_rows(recipe, shards).num_tokens,
        "sources": {
            source: {"rows": len(tokens), "documents": num_documents}
            for source, (tokens, num_documents) in held_out.items()
        },
        "bins": position_bins(recipe.data.context),
        "log": read_log(run / "log.jsonl"),
        "checkpoints": history,
        "trained_with": attention_name(load_checkpoint(found[0], device)),
        "own": attention_name_of(own, num_layers),
        "final": final,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def held_out_rows(shards: Shards, context: int, count: int) -> dict[str, tuple[Tensor, int]]:
    """For each source, rows int64 [count or fewer, context] and the number of documents that they are from.

    A row is a part of one document. The first of every document come first, then the second, …
    """
    result = {}
    for source, rows in by_source(
        lambda shards, sources: PackedDataset(shards, context, seed=None, sources=sources, whole_rows=True), shards
    ).items():
        order = sorted(range(len(rows.rows)), key=lambda i: (rows.rows[i][0].start, rows.rows[i][0].document))[:count]
        documents = {rows.rows[i][0].document for i in order}
        result[source] = (torch.stack([rows[i]["input_ids"] for i in order]), len(documents))
    return result


class _Reader:
    """Reads the same rows with any model."""

    def __init__(
        self, texts: Mapping[str, Tensor], rows_at_once: int, precision: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self._texts, self._rows_at_once, self._precision = texts, rows_at_once, precision

    def losses(self, model: Any, count: int) -> dict[str, Tensor]:
        """Source -> fp32 [rows, context - 1], of the first rows."""
        return {source: self._read(model, rows[:count]) for source, rows in self._texts.items()}

    def copies(self, model: Any, count: int) -> dict[str, dict[str, dict[str, list[float]]]]:
        """Distance -> source -> loss of each row's passage, read first and read again."""
        result: dict[str, dict[str, dict[str, list[float]]]] = {}
        for share in COPY_DISTANCES:
            for source, rows in self._texts.items():
                context = rows.shape[1]
                copy = {"num_copied": context // 32, "distance": int(share * context)}
                texts = torch.stack([append_copy(row[: context - context // 32], **copy) for row in rows[:count]])
                records = [summarise_copy(losses, **copy) for losses in self._read(model, texts)]
                result.setdefault(str(copy["distance"]), {})[source] = {
                    which: rounded(math.log(record[f"perplexity_{which}"]) for record in records)
                    for which in ("first", "second")
                }
        return result

    def routing(self, model: Any, config: MoBAConfig | None, count: int) -> dict[str, Any]:
        """Attention mass covered, the best possible, and that of first and nearest blocks, averaged over rows.

        With `config`, of the blocks that it would choose where the model reads with full attention.
        """
        rows = [row for rows in self._texts.values() for row in rows[:count]]
        with self._precision():
            heads = [
                routing_quality(model, row, num_queries=_QUERIES, chunk_tokens=row.numel(), would_choose=config)
                for row in rows
            ]
        layers: dict[int, list[dict[str, Any]]] = {}
        for record in (record for row in heads for record in row):
            layers.setdefault(record["layer"], []).append(record)
        return {
            **averages([record for row in heads for record in row]),
            "layers": {layer: averages(records) for layer, records in layers.items()},
        }

    @torch.inference_mode()
    def _read(self, model: Any, rows: Tensor) -> Tensor:
        """The negative log-likelihood of every token after the first of rows int64 [R, T]: fp32 [R, T - 1]."""
        head, losses = model.get_output_embeddings(), []
        for part in rows.split(self._rows_at_once):
            tokens = part.to(model.device)
            with self._precision():
                hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
                chunks = zip(hidden.split(_LOGITS), tokens[:, 1:].flatten().split(_LOGITS), strict=True)
                row = [F.cross_entropy(head(states).float(), words, reduction="none") for states, words in chunks]
            losses.append(torch.cat(row).view(len(part), -1).cpu())
        return torch.cat(losses)


def _routings(model: Any, recipe: Recipe, configs: Sequence[MoBAConfig]) -> dict[str, MoBAConfig | None]:
    """Which routings are looked at: the model's own, or what MoBA would choose where it reads with full attention."""
    if attention_name(model) != FULL:
        return {attention_name(model): None}
    would = configs if recipe.attention.schedule == "full" else [recipe.attention.config()]
    return {setting_name(config): config for config in would}


def load_checkpoint(path: Path, device: torch.device) -> Any:
    """A checkpoint's model, in fp32, with the attention of its stage of the training."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="moba")
    if getattr(model.config, "moba_key_convolution", None) is not None:
        load_key_convolution(model, path)
    return model.to(device).eval()


def position_bins(context: int) -> list[int]:
    """Where ranges of positions start, and the context: by factors of two up to an eighth, then eighth by eighth."""
    eighth = context // 8
    return [0, eighth // 8, eighth // 4, eighth // 2, *range(eighth, context - eighth + 1, eighth), context]


def _of_rows(losses: Tensor) -> dict[str, list[float]]:
    """Each row's mean loss, and that of its last eighth."""
    last = (losses.shape[1] + 1) // 8
    return {"loss": rounded(losses.double().mean(dim=1)), "last": rounded(losses[:, -last:].double().mean(dim=1))}


def _of_positions(losses: Tensor, context: int) -> list[list[float]]:
    """For each range of positions, each row's mean loss over the tokens that stand there."""
    # The loss at index i is that of the token at position i + 1.
    parts = [losses[:, max(0, start - 1) : stop - 1] for start, stop in pairwise(position_bins(context))]
    return [rounded(part.double().mean(dim=1)) for part in parts]


def read_log(path: Path) -> dict[str, Any]:
    """A run's log: the training loss, held-out losses, and the rate, over the tokens read.

    Returns:
        train: [step, tokens, loss, gradient norm] of each logged step. held_out: [step, tokens, {source: loss}].
        tokens_per_s: the median over logged intervals but the first, in which kernels are compiled.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    train = [[line["step"], line["tokens"], line["loss"], line.get("grad_norm")] for line in lines if "loss" in line]
    held_out: dict[int, list[Any]] = {}
    for line in lines:
        of_sources = {
            key[5:-5]: value for key, value in line.items() if key.startswith("eval_") and key[-5:] == "_loss"
        }
        if of_sources:
            held_out.setdefault(line["step"], [line["step"], line["tokens"], {}])[2].update(of_sources)
    rates = [line["tokens_per_s"] for line in lines if "tokens_per_s" in line]
    return {
        "train": train,
        "held_out": list(held_out.values()),
        "tokens_per_s": statistics.median(rates[1:] or rates),
    }


def read_stopped(run: Path) -> Result:
    """What `report` compares of a run that did not end: its training loss. `run` is its folder."""
    saved = json.loads((run / "recipe.json").read_text())
    recipe = Recipe.from_dict(saved["recipe"])
    return {
        "name": run_name(recipe),
        "recipe": recipe.to_dict(),
        "data": saved["data"],
        "log": {"train": read_log(run / "log.jsonl")["train"]},
    }


def attention_name(model: Any) -> str:
    """Of the attention that a model carries."""
    return attention_name_of(get_moba_config(model), model.config.num_hidden_layers)


def attention_name_of(config: MoBAConfig | None, num_layers: int) -> str:
    """ "full", or block size / top-k and what else is set."""
    if config is None or all(config.is_full_layer(layer, num_layers) for layer in range(num_layers)):
        return FULL
    return setting_name(config)


def setting_name(config: MoBAConfig) -> str:
    """Block size / top-k, and what is not the default."""
    words = [f"{config.block_size}/{config.topk}"]
    words += [f"router {config.router}"] if config.router != "mean" else []
    words += [f"first {config.keep_first}"] if config.keep_first else []
    words += [f"recent {config.keep_recent}"] if config.keep_recent else []
    words += [f"full layers {config.full_layers}"] if config.full_layers else []
    return ", ".join(words)


def run_name(recipe: Recipe) -> str:
    """What tells a run of a recipe from another with other attention."""
    schedule = recipe.attention.schedule
    name = "dense" if schedule == "full" else f"MoBA {setting_name(recipe.attention.config())}"
    name += "" if schedule in ("full", "throughout") else f", {schedule.replace('_', ' ')}"
    width = recipe.model.key_convolution
    return name if width is None else f"{name}, key convolution {width}"


def _told(record: Result) -> str:
    parts = [f"{source} {statistics.mean(rows['loss']):.4f}" for source, rows in record["sources"].items()]
    return ", ".join([*parts, *(f"{name} covers {r['covered']:.1%}" for name, r in record["routing"].items())])


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="Files of `measure`, or a PREFIX.json of `report`.")],
    out: Annotated[Path, typer.Option(help="PREFIX.md, PREFIX.json and PREFIX-….png are written.")],
    stopped: Annotated[list[Path] | None, typer.Option(help="OUT of a `moba train` that did not end.")] = None,
) -> None:
    """Compare runs with the dense one of the same recipe and seed: tables and pictures."""
    read = [json.loads(path.read_text()) for path in results]
    measured = [result for part in read for result in (part if isinstance(part, list) else [part])]
    write_report([*measured, *map(read_stopped, stopped or [])], out)


if __name__ == "__main__":
    app()
