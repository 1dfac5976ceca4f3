"""Does MoBA train as well as full attention? Runs of one recipe that differ in their attention, measured and compared.

    moba train recipes/from-scratch.toml --data data/proof --out runs/dense -s attention.schedule=full
    moba train recipes/from-scratch.toml --data data/proof --out runs/moba-128x8
    python benchmarks/from_scratch.py measure runs/dense --data data/proof --out dense.json
    python benchmarks/from_scratch.py measure runs/moba-128x8 --data data/proof --out moba-128x8.json
    python benchmarks/from_scratch.py report dense.json moba-128x8.json --out benchmarks/results/from-scratch-h200

`measure` reads the same held-out rows with every checkpoint of a run and keeps the loss of each row, so that `report`
can compare two runs row by row. `report` writes PREFIX.md, its pictures and PREFIX.json: all runs, as much of them as
tables and pictures need. PREFIX.json can be given to `report` again.
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
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from moba import MoBAConfig, register_moba
from moba.bench.machine import describe
from moba.bench.report import to_markdown
from moba.cli.session import quieten
from moba.data import Shards, open_shards
from moba.evals.language import append_copy, summarise_copy
from moba.evals.pictures import Panel, plot_panels
from moba.evals.routing import averages, routing_quality
from moba.hf import get_moba_config, load_key_convolution, set_moba_config
from moba.train.checkpoints import checkpoints
from moba.train.packing import PackedRows, by_source
from moba.train.recipe import Recipe
from moba.train.run import data_digest, training_rows
from moba.train.schedule import throughout

app = typer.Typer(add_completion=False, help=__doc__)
Result = dict[str, Any]

FULL = "full"
# Distances between a passage and its copy, as shares of the context; the passage is 1/32 of it.
COPY_DISTANCES = (1 / 8, 3 / 8, 3 / 4)
# Logits of so many tokens exist at once.
_LOGITS = 2048
# What of the attention mass is looked at, in the words of tables and pictures.
ROUTING_PARTS = {
    "covered": "in the chosen blocks",
    "best": "in the best possible choice",
    "recent": "in the first and the nearest",
}
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
    out.write_text(json.dumps(result) + "\n")
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
    if not found or _step(found[-1]) != recipe.num_steps:
        raise ValueError(f"{run} has no checkpoint of its last step {recipe.num_steps}: the training has not ended")
    held_out = held_out_rows(open_shards(folder, "held_out"), recipe.data.context, rows)
    texts = {source: tokens for source, (tokens, _) in held_out.items()}
    is_bf16 = device.type == "cuda" and recipe.training.precision == "bf16"
    reader = _Reader(texts, rows_at_once, lambda: torch.autocast("cuda", torch.bfloat16) if is_bf16 else nullcontext())

    history = []
    for checkpoint in found:
        model = load_checkpoint(checkpoint, device)
        record = {"step": _step(checkpoint), "attention": attention_name(model)}
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
        set_moba_config(model, config)
        losses = reader.losses(model, rows)
        positions = {source: _of_rows(losses[source]) for source in texts}
        if name == attention_name_of(own, num_layers):
            for source in texts:
                positions[source] |= {"bins": _of_positions(losses[source], recipe.data.context)}
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
        lambda shards, sources: PackedRows(shards, context, seed=None, sources=sources, whole_rows=True), shards
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
                    which: _rounded(math.log(record[f"perplexity_{which}"]) for record in records)
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
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="moba")
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
    return {"loss": _rounded(losses.double().mean(dim=1)), "last": _rounded(losses[:, -last:].double().mean(dim=1))}


def _of_positions(losses: Tensor, context: int) -> list[list[float]]:
    """For each range of positions, each row's mean loss over the tokens that stand there."""
    # The loss at index i is that of the token at position i + 1.
    parts = [losses[:, max(0, start - 1) : stop - 1] for start, stop in pairwise(position_bins(context))]
    return [_rounded(part.double().mean(dim=1)) for part in parts]


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


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 5) for value in values]


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="Files of `measure`, or a PREFIX.json of `report`.")],
    out: Annotated[Path, typer.Option(help="PREFIX.md, PREFIX.json and PREFIX-….png are written.")],
) -> None:
    """Compare runs with the dense one of the same recipe and seed: tables and pictures."""
    read = [json.loads(path.read_text()) for path in results]
    write_report([result for part in read for result in (part if isinstance(part, list) else [part])], out)


def write_report(results: Sequence[Result], out: Path) -> None:
    """Write PREFIX.md, PREFIX.json and the pictures of the largest runs.

    Raises:
        ValueError: if runs that are of one recipe and seed have the same name, or there is no dense one among them.
    """
    kept = [
        compact(result, is_large=not i)
        for i, family in enumerate(_families(results))
        for runs in family.runs.values()
        for result in runs.values()
    ]
    families = _families(kept)
    first = families[0].of_first_seed()
    lines = ["# MoBA beside full attention, from scratch", "", *_heading(families[0]), *_tables(first)]
    for family in families[1:]:
        lines += [*_heading(family), *_losses(family)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n")
    out.with_suffix(".json").write_text("[\n" + ",\n".join(json.dumps(result) for result in kept) + "\n]\n")
    for name, figure in pictures(first).items():
        figure.savefig(f"{out}-{name}.png")


def compact(result: Result, is_large: bool) -> Result:
    """What tables and pictures need of a result; only the losses where the run is small.

    Of attentions that are not the run's own, the mean loss of each source is kept as that of one row.
    """
    final = {
        name: read
        if name == result["own"]
        else {
            "positions": {
                source: {"loss": _rounded([statistics.mean(rows["loss"])])}
                for source, rows in read["positions"].items()
            }
        }
        for name, read in result["final"].items()
    }
    if not is_large:
        own = final[result["own"]]["positions"]
        final[result["own"]] = {
            "positions": {s: {key: rows[key] for key in ("loss", "last")} for s, rows in own.items()}
        }
    history = [
        {
            **point,
            "sources": {source: {"loss": rows["loss"]} for source, rows in point["sources"].items()},
            "routing": {name: _rounded_routing(values) for name, values in point["routing"].items()},
        }
        for point in result["checkpoints"]
    ]
    return {**result, "final": final, "checkpoints": history if is_large else history[-1:]}


def _rounded_routing(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: {layer: _rounded_routing(v) for layer, v in value.items()} if key == "layers" else round(value, 5)
        for key, value in values.items()
    }


class Family:
    """Runs that differ in their attention and seed only.

    Raises:
        ValueError: as `write_report`.
    """

    def __init__(self, results: Sequence[Result]) -> None:
        self.runs: dict[int, dict[str, Result]] = {}
        for result in results:
            of_seed = self.runs.setdefault(result["recipe"]["training"]["seed"], {})
            if result["name"] in of_seed:
                raise ValueError(f"two results are of the run {result['name']!r}: give each once")
            of_seed[result["name"]] = result
        for seed, of_seed in self.runs.items():
            if "dense" not in of_seed:
                raise ValueError(f"there is no dense run of seed {seed} beside {', '.join(of_seed)}")

    def of_first_seed(self) -> dict[str, Result]:
        """Name -> run, the dense one first."""
        runs = self.runs[min(self.runs)]
        return {"dense": runs["dense"], **runs}

    def size(self) -> int:
        """Parameters times tokens of the dense run."""
        dense = self.of_first_seed()["dense"]
        return int(dense["parameters"] * dense["checkpoints"][-1]["tokens"])


def _families(results: Sequence[Result]) -> list[Family]:
    """Runs that have all but attention and seed in common, the largest trainings first."""
    parts: dict[str, list[Result]] = {}
    for result in results:
        recipe = result["recipe"]
        shape = {key: value for key, value in recipe["model"].items() if key != "key_convolution"}
        decides = ("tokens", "rows_per_step", "learning_rate", "learning_schedule", "warmup", "weight_decay", "beta2")
        training = {key: recipe["training"][key] for key in decides}
        parts.setdefault(json.dumps([shape, training, recipe["data"]["context"], result["data"]]), []).append(result)
    return sorted((Family(part) for part in parts.values()), key=lambda family: -family.size())


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean over rows and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def difference(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The mean of the rows' differences and its standard error."""
    return mean_and_error([a - b for a, b in zip(values, others, strict=True)])


def own_positions(result: Result) -> dict[str, Any]:
    """Source -> each row's losses at the end of the training, with the attention that the training ended with."""
    positions: dict[str, Any] = result["final"][result["own"]]["positions"]
    return positions


def _heading(family: Family) -> list[str]:
    first = family.of_first_seed()
    dense = first["dense"]
    header, context = dense["header"], dense["recipe"]["data"]["context"]
    sources = "; ".join(
        f"{source} {about['rows']} out of {about['documents']} documents" for source, about in dense["sources"].items()
    )
    return [
        f"## {dense['parameters'] / 1e6:.1f}M parameters, {dense['checkpoints'][-1]['tokens'] / 1e6:.3g}M tokens, "
        f"{context:,} a row",
        "",
        f"- {dense['unique_tokens'] / 1e6:.3g}M different tokens are read, as often as it takes",
        *(f"- {name}: {header[name]}" for name in ("device", "versions", "commit", "date")),
        *(f"- {name}: `{run['header']['command']}`" for name, run in first.items()),
        f"- evaluated in {dense['precision']}, seeds {', '.join(map(str, family.runs))}",
        f"- held-out rows: {sources}",
        "- ±: standard error over rows; differences are taken row by row",
        "",
    ]


def _tables(runs: Mapping[str, Result]) -> list[str]:
    return [
        *_summary(runs),
        *_losses(Family(list(runs.values()))),
        *_split(runs),
        *_by_position(runs),
        *_copying(runs),
        *_routing_tables(runs),
        *_training(runs),
    ]


def _table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]], level: int = 3) -> list[str]:
    return [f"{'#' * level} {title}", to_markdown({}, [], lambda _: (list(columns), [list(line) for line in lines]))]


def _summary(runs: Mapping[str, Result]) -> list[str]:
    sources = list(runs["dense"]["sources"])
    lines = []
    for name, run in runs.items():
        line = [name]
        for what in ("loss", "last"):
            values = [mean_and_error(own_positions(run)[source][what]) for source in sources]
            line.append(
                f"{_mean_of_sources(values)[0]:.4f}"
                if name == "dense"
                else _with_error(*_gap_of_sources(run, runs["dense"], sources, what), sign="+")
            )
        ours, theirs = _last_tenth(run), _last_tenth(runs["dense"])
        line.append(
            f"{statistics.mean(ours):.4f}" if name == "dense" else _with_error(*difference(ours, theirs), sign="+")
        )
        lines.append([*line, f"{run['log']['tokens_per_s']:,.0f}"])
    columns = ["run", "held-out loss", "its last eighth of a row", "training loss, last tenth of the steps", "tokens/s"]
    return _table("Dense, and the others' difference (nats; held-out: the mean of the sources)", columns, lines)


def _gap_of_sources(run: Result, dense: Result, sources: Sequence[str], what: str) -> tuple[float, float]:
    ours, theirs = own_positions(run), own_positions(dense)
    return _mean_of_sources([difference(ours[source][what], theirs[source][what]) for source in sources])


def _losses(family: Family) -> list[str]:
    sources = list(family.of_first_seed()["dense"]["sources"])
    has_seeds = len(family.runs) > 1
    result = ["### Held-out loss at the end (nats)", ""]
    for part in ([sources] if len(sources) > 1 else []) + [[source] for source in sources]:
        lines = []
        for seed, runs in sorted(family.runs.items()):
            for name, run in {"dense": runs["dense"], **runs}.items():
                line = [name, *([str(seed)] if has_seeds else [])]
                for what in ("loss", "last"):
                    values = [mean_and_error(own_positions(run)[source][what]) for source in part]
                    gap = _gap_of_sources(run, runs["dense"], part, what)
                    line.append(_with_error(*_mean_of_sources(values)))
                    line.append("" if name == "dense" else _with_error(*gap, sign="+"))
                lines.append(line)
        columns = ["run", *(["seed"] if has_seeds else []), "loss", "− dense", "last eighth", "− dense"]
        result += _table(part[0] if len(part) == 1 else "Mean of the sources", columns, lines, level=4)
    return result


def _mean_of_sources(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of means and standard errors of independent rows, each source counted alike."""
    return statistics.mean(mean for mean, _ in parts), math.hypot(*(error for _, error in parts)) / len(parts)


def read_losses(run: Result, source: str) -> dict[str, float]:
    """Attention that the last model is read with -> mean held-out loss of a source."""
    return {name: statistics.mean(read["positions"][source]["loss"]) for name, read in run["final"].items()}


def _split(runs: Mapping[str, Result]) -> list[str]:
    """What each model loses by its weights and by its reading, and its losses with every attention."""
    sources = list(runs["dense"]["sources"])
    names = list(dict.fromkeys(name for run in runs.values() for name in run["final"]))
    parts, losses = [], []
    for source in sources:
        dense = read_losses(runs["dense"], source)[FULL]
        for title, run in runs.items():
            read = read_losses(run, source)
            own = read[run["own"]]
            losses.append([source, title, *(f"{read[name]:.4f}" if name in read else "" for name in names)])
            if title != "dense":
                parts.append([source, title, own - dense, read[FULL] - dense, own - read[FULL]])
    if len(sources) > 1:
        for title, run in reversed(runs.items()):
            read = [read_losses(run, source) for source in sources]
            cells = [f"{statistics.mean(r[name] for r in read):.4f}" if name in read[0] else "" for name in names]
            losses.insert(0, ["mean", title, *cells])
    means = [
        ["mean", title, *(statistics.mean(part[i] for part in parts if part[1] == title) for i in (2, 3, 4))]
        for title in runs
        if title != "dense"
    ]
    cells = [[*part[:2], *(f"{value:+.4f}" for value in part[2:])] for part in [*means, *parts]]
    columns = ["source", "run", "− dense", "of that with full attention", "of that by reading with its own"]
    return [
        *_table("The difference, split: what a reading with full attention leaves, and the rest", columns, cells),
        *_table("Each last model read with each attention: held-out loss", ["source", "run", *names], losses),
    ]  # fmt: skip


def _by_position(runs: Mapping[str, Result]) -> list[str]:
    bins = runs["dense"]["bins"]
    others = [name for name in runs if name != "dense"]
    result = ["### Loss by position: dense, and each run's difference", ""]
    for source in runs["dense"]["sources"]:
        theirs = own_positions(runs["dense"])[source]["bins"]
        lines = [
            [f"{start:,} … {stop - 1:,}", f"{statistics.mean(theirs[i]):.4f}"]
            + [_with_error(*difference(own_positions(runs[n])[source]["bins"][i], theirs[i]), sign="+") for n in others]
            for i, (start, stop) in enumerate(pairwise(bins))
        ]
        result += _table(source, ["position", "dense", *others], lines, level=4)
    return result


def _copying(runs: Mapping[str, Result]) -> list[str]:
    copies = {name: run["final"][run["own"]]["copy"] for name, run in runs.items()}
    distances = list(copies["dense"])
    lines = []
    for source in runs["dense"]["sources"]:
        for name, copy in copies.items():
            values = [copy[distance][source] for distance in distances]
            lines.append(
                [
                    source,
                    name,
                    *(f"{statistics.mean(v['second']):.3f} ({statistics.mean(v['first']):.3f})" for v in values),
                ]
            )
    return [
        *_table(
            "A passage that comes twice: its loss the second time (the first time)",
            ["source", "run", *(f"{int(distance):,} tokens later" for distance in distances)],
            lines,
        ),
        "A model that copies would lose almost nothing the second time. These hardly do: what the second time costs is",
        "decided by where the passage stands, at the end of the row and out of the text that led to it.",
        "",
    ]


def _routing_tables(runs: Mapping[str, Result]) -> list[str]:
    curves = routing_curves(runs)
    tokens = sorted({count for points in curves.values() for count in points})
    result = ["### Attention mass over the training", ""]
    for what, title in ROUTING_PARTS.items():
        lines = [
            [name, *(f"{points[count][what]:.1%}" if count in points else "" for count in tokens)]
            for name, points in curves.items()
        ]
        result += _table(
            title.capitalize(), ["million tokens read", *(f"{count / 1e6:.1f}" for count in tokens)], lines, 4
        )
    layers = [
        [name, f"{count / 1e6:.1f}", *(f"{values['covered']:.0%}" for values in points[count]["layers"].values())]
        for name, points in curves.items()
        for count in (min(points), max(points))
    ]
    width = max(map(len, layers))
    layers = [line + [""] * (width - len(line)) for line in layers]
    columns = ["run", "million tokens read", *map(str, range(width - 2))]
    return result + _table("In the chosen blocks, by layer that routes", columns, layers, 4)


def routing_curves(runs: Mapping[str, Result]) -> dict[str, dict[int, dict[str, Any]]]:
    """Run and setting -> tokens -> covered, best, recent, and these of each layer."""
    curves: dict[str, dict[int, dict[str, Any]]] = {}
    for name, run in runs.items():
        for point in run["checkpoints"]:
            for setting, values in point["routing"].items():
                title = name if setting in name else f"{name}, {setting} would choose"
                curves.setdefault(title, {})[point["tokens"]] = values
    return curves


def _training(runs: Mapping[str, Result]) -> list[str]:
    """All runs read the same rows at the same step."""
    dense = runs["dense"]
    steps = [0, *(point["step"] for point in dense["checkpoints"])]
    columns = [f"… {point['tokens'] / 1e6:.0f}M" for point in dense["checkpoints"]]
    lines = []
    for name, run in runs.items():
        values = [
            (a, loss, b)
            for (a, _, loss, _), (_, _, b, _) in zip(run["log"]["train"], dense["log"]["train"], strict=True)
        ]
        parts = [[v for v in values if start < v[0] <= stop] for start, stop in pairwise(steps)]
        if name == "dense":
            lines.append([name, *(f"{statistics.mean(b for _, _, b in part):.4f}" for part in parts)])
        else:
            lines.append([name, *(f"{statistics.mean(a - b for _, a, b in part):+.4f}" for part in parts)])
    return _table(
        "Training loss between checkpoints: dense, and each run's difference", ["tokens read", *columns], lines
    )


def _last_tenth(run: Result) -> list[float]:
    losses = [loss for _, _, loss, _ in run["log"]["train"]]
    return losses[-max(2, len(losses) // 10) :]


def _with_error(mean: float, error: float, sign: str = "") -> str:
    return f"{mean:{sign}.4f} ± {error:.4f}"


def training_gap(log: Sequence[Sequence[float]], dense: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Million tokens read, and the mean difference of five logged losses, of which it is the middle one's."""
    gaps = [a[2] - b[2] for a, b in zip(log, dense, strict=True)]
    middle = range(2, len(gaps) - 2)
    return [log[i][1] / 1e6 for i in middle], [statistics.mean(gaps[i - 2 : i + 3]) for i in middle]


def pictures(runs: Mapping[str, Result]) -> dict[str, Any]:
    """Name -> matplotlib figure: training loss, held-out loss, both over tokens; loss by position; routing."""
    dense = runs["dense"]
    sources = list(dense["sources"])
    million = 1e6
    others = {name: run for name, run in runs.items() if name != "dense"}

    def over_tokens(run: Result, value: Callable[[Result], Any]) -> tuple[list[float], list[Any]]:
        return [p["tokens"] / million for p in run["checkpoints"]], [value(p) for p in run["checkpoints"]]

    def gap_over_tokens(run: Result, source: str) -> list[list[float]]:
        pairs = zip(run["checkpoints"], dense["checkpoints"], strict=True)
        gaps = [difference(a["sources"][source]["loss"], b["sources"][source]["loss"]) for a, b in pairs]
        return [over_tokens(run, lambda p: None)[0], *map(list, zip(*gaps, strict=True))]

    x, losses = "million tokens read", "held-out loss (nats)"
    loss = [
        [
            Panel(
                {n: over_tokens(r, lambda p, s=s: statistics.mean(p["sources"][s]["loss"])) for n, r in runs.items()},
                x, losses, s,
            )
            for s in sources
        ],
        [
            Panel({"dense": ([], []), **{n: gap_over_tokens(r, s) for n, r in others.items()}}, x, "minus dense",
                  marks={"dense": 0.0})
            for s in sources
        ],
    ]  # fmt: skip

    bins = dense["bins"]
    middle = [(start + stop) / 2 for start, stop in pairwise(bins)]

    def gap_by_position(run: Result, source: str) -> list[list[float]]:
        pairs = zip(own_positions(run)[source]["bins"], own_positions(dense)[source]["bins"], strict=True)
        return [middle, *map(list, zip(*(difference(a, b) for a, b in pairs), strict=True))]

    position = [
        [
            Panel(
                {n: (middle, [statistics.mean(b) for b in own_positions(r)[s]["bins"]]) for n, r in runs.items()},
                "position", losses, s,
            )
            for s in sources
        ],
        [
            Panel({"dense": ([], []), **{n: gap_by_position(r, s) for n, r in others.items()}}, "position",
                  "minus dense", marks={"dense": 0.0})
            for s in sources
        ],
    ]  # fmt: skip
    curves = routing_curves(runs)
    panels = [
        Panel(
            {n: ([t / million for t in points], [v[what] for v in points.values()]) for n, points in curves.items()},
            x, "share of the attention mass", title,
        )
        for what, title in ROUTING_PARTS.items()
    ]  # fmt: skip
    logs = {n: r["log"]["train"] for n, r in runs.items()}
    training = [
        Panel(
            {n: ([t[1] / million for t in log], [t[2] for t in log]) for n, log in logs.items()}, x,
            "training loss (nats)",
        ),
        Panel(
            {"dense": ([], []), **{n: training_gap(logs[n], logs["dense"]) for n in others}}, x,
            "minus dense, mean of 5 logged", marks={"dense": 0.0},
        ),
    ]  # fmt: skip
    size = f"{dense['parameters'] / million:.0f}M parameters, rows of {dense['recipe']['data']['context']:,} tokens"
    return {
        "training": plot_panels([training], f"Training loss · {size}"),
        "loss": plot_panels(loss, f"Held-out loss over training · {size}"),
        "positions": plot_panels(position, f"Loss by position · {size}"),
        "routing": plot_panels([panels], f"What routing covers over training · {size}"),
    }


if __name__ == "__main__":
    app()
