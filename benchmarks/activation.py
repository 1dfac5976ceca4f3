"""SmolLM2-135M becomes a MoBA model at 32K tokens: loss and recall before, during and after, and prompts of up to 1M.

    moba train recipes/activation.toml --out runs/moba
    moba train recipes/activation.toml --out runs/dense -s attention.schedule=full
    python benchmarks/activation.py measure before=SmolLM2-135M-Instruct dense=runs/dense moba=runs/moba \
        --data data/permissive --out activation.jsonl
    python benchmarks/activation.py lengthen runs/needle/model runs/needle-1m --length 1048576
    python benchmarks/activation.py prompts runs/needle-1m --lengths 256K,1M --out prompts.jsonl
    python benchmarks/activation.py report activation.jsonl --prompts prompts.jsonl --log dense=runs/dense/log.jsonl \
        --needle dense=evals/dense/needle.jsonl --against "dense 256" --out benchmarks/results/activation-h200

`measure` reads the same held-out rows with every checkpoint: the loss of their last tokens, and of a passage that comes
a second time, with full attention and with MoBA. `prompts` hides a needle in long prompts and says what reading took.
Both go on where they were stopped. `report` reads these files (not the PREFIX.json of another report) and writes
PREFIX.json, PREFIX.md, PREFIX.png and, of what `moba eval needle` found, PREFIX-needle.png.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from moba import MoBAConfig, register_moba
from moba.files import write_json
from moba.hf import get_moba_config
from moba_lab.bench.cases import length_name
from moba_lab.bench.machine import describe
from moba_lab.bench.report import to_markdown
from moba_lab.cli.eval_setup import parse_lengths, parse_settings
from moba_lab.cli.options import Choice
from moba_lab.cli.session import quieten
from moba_lab.data import Shards, open_shards
from moba_lab.evals.language import append_copy, summarise, summarise_copy
from moba_lab.evals.needle import TASKS, Haystack, find, grid
from moba_lab.evals.reader import Reader
from moba_lab.evals.records import open_records, record_of
from moba_lab.evals.texts import haystack_text
from moba_lab.models.load import EMBEDDED, load_model
from moba_lab.models.rope import stretch_positions
from moba_lab.models.unrotated import apply_config
from moba_lab.pictures.evaluations import Panel, plot_needle, plot_panels
from moba_lab.train.checkpoints import checkpoints, step_of
from moba_lab.train.packing import PackedDataset

app = typer.Typer(add_completion=False, help=__doc__)
Record = dict[str, Any]
FULL = "full attention"
LAST = 1024
# What a record says of a row, in nats, and a table's title of it.
LOSSES = {"loss": "loss", "last": f"last {LAST:,} tokens", "first": "passage read first", "second": "read again"}

DeviceOption = Annotated[str, typer.Option(help="cuda, or cpu to try the script.")]
ConfigOption = Annotated[
    str, typer.Option(help="MoBA for models that carry no settings of their own, as in `moba eval --settings`.")
]


@app.command()
def measure(
    models: Annotated[list[str], typer.Argument(help="NAME=PATH: a model, a run (its checkpoints), or the base.")],
    data: Annotated[Path, typer.Option(help="Shards with held-out documents.")],
    out: Annotated[Path, typer.Option(help="A .jsonl file.")],
    config: ConfigOption = "128x16 full=3",
    length: Annotated[int, typer.Option(help="Tokens of a row, the copied passage included.")] = 32768,
    copied: Annotated[int, typer.Option(help="Of them, tokens of the passage that comes a second time.")] = 512,
    rows: Annotated[int, typer.Option(help="Held-out rows of each source.")] = 4,
    rope_theta: Annotated[float, typer.Option(help="Rotary base given to the base model.")] = 1e6,
    device: DeviceOption = "cuda",
) -> None:
    """Loss and recall of models on held-out rows."""
    quieten()
    register_moba(None)
    where = torch.device(device)
    settings = {"length": length, "copied": copied, "config": config, "rope_theta": rope_theta}
    texts = held_out_rows(open_shards(data, "held_out"), length, rows)
    with open_records(out, settings, describe(where)) as lines:
        for name, path in (checkpoint for model in models for checkpoint in find_models(model)):
            names = (FULL, "MoBA", *(["MoBA, first block kept"] if path == EMBEDDED else []))
            cells = [{"attention": how, "model": name, "source": s, "row": i} for how in names for s, i in texts]
            left = [cell for cell in cells if record_of(lines, cell) is None]
            if not left:
                continue
            model = load(path, length, rope_theta, where)
            moba = own_config(model, config)
            reads = dict(zip(names, (None, moba, replace(moba, keep_first=1)), strict=False))
            for how in dict.fromkeys(cell["attention"] for cell in left):
                reader = reader_with(model, reads[how])
                for cell in (cell for cell in left if cell["attention"] == how):
                    lines.add({**cell, **read_row(reader, texts[cell["source"], cell["row"]], copied)})
                print(f"{name}, {how}: {told(lines.rows[1:], name, how)}", flush=True)
            del model


def read_row(reader: Reader, tokens: Tensor, copied: int) -> Record:
    """Losses, in nats, of a row whose last `copied` tokens give way to a passage from 3/8 of its length before."""
    copy = {"num_copied": copied, "distance": 3 * tokens.numel() // 8}
    losses = reader.losses(append_copy(tokens[:-copied], **copy))
    text, of_copy = summarise(losses[:-copied], last=LAST), summarise_copy(losses, **copy)
    return {
        "loss": text["loss"],
        "last": math.log(text["perplexity_last"]),
        **{which: math.log(of_copy[f"perplexity_{which}"]) for which in ("first", "second")},
        "positions": [round(math.log(part["perplexity"]), 4) for part in text["positions"]],
    }


@app.command()
def lengthen(
    model: Annotated[Path, typer.Argument(help="Folder of a model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    length: Annotated[int, typer.Option(help="Tokens that it shall read.")],
    by: Annotated[str, typer.Option(help="base: a larger rotary base; interpolation: positions divided.")] = "base",
) -> None:
    """Copy a model with a rotary embedding for longer texts; its weights stay as they are."""
    config = json.loads((model / "config.json").read_text())
    rope, head_dim = config["rope_parameters"], config.get("head_dim") or config["hidden_size"] // config[
        "num_attention_heads"
    ]  # fmt: skip
    share = max(1.0, length / config["max_position_embeddings"])
    if by == "base":
        # The slowest frequency then turns as far over the new length as it did over the old ("NTK-aware").
        rope["rope_theta"] *= share ** (head_dim / (head_dim - 2))
    elif by == "interpolation":
        rope |= {"rope_type": "linear", "factor": share * rope.get("factor", 1.0)}
    else:
        raise ValueError(f"by must be 'base' or 'interpolation', got {by!r}")
    config["max_position_embeddings"] = max(length, config["max_position_embeddings"])
    shutil.copytree(model, out, dirs_exist_ok=True)
    write_json(out / "config.json", config, indent=1)
    print(f"{out}: {rope}, {config['max_position_embeddings']:,} tokens")


@app.command()
def prompts(
    model: Annotated[str, typer.Argument(help="Folder of a model.")],
    out: Annotated[Path, typer.Option(help="A .jsonl file.")],
    name: Annotated[str, typer.Option(help="Of the model in the results.")] = "",
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "128K,256K,512K,1M",
    depths: Annotated[int, typer.Option(help="Prompts of each length, by the needle's depth.")] = 3,
    attentions: Annotated[str, typer.Option(help="moba, full, in the order to measure.")] = "moba,full",
    config: ConfigOption = "128x16 full=3",
    yarn: Annotated[float | None, typer.Option(help="Stretch the model's positions so many times, by YaRN.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens read at once.")] = None,
    seconds: Annotated[float, typer.Option(help="No prompt is begun after so many seconds.")] = 1e9,
    device: DeviceOption = "cuda",
) -> None:
    """Whether the needle is found in long prompts, and the time and memory that reading them takes."""
    quieten()
    register_moba(None)
    begin, where = time.perf_counter(), torch.device(device)
    loaded, tokenizer = load_model(model, dtype=torch.bfloat16 if where.type == "cuda" else torch.float32)
    stretch_positions(loaded, factor=yarn, scaling="yarn")
    loaded.set_attn_implementation("moba")
    loaded.to(where)
    haystack = Haystack(tokenizer, haystack_text())
    reads = {"moba": own_config(loaded, config), "full": None}
    # The middle first: a run may be cut short.
    places = sorted(((i + 0.5) / depths for i in range(depths)), key=lambda depth: abs(depth - 0.5))
    cells = [
        {"attention": how, "model": name or Path(model).name, "length": length, "depth": depth}
        for length in parse_lengths(lengths)
        for how in attentions.split(",")
        for depth in places
    ]
    with open_records(out, {"config": config} | ({"yarn": yarn} if yarn else {}), describe(where)) as lines:
        warm = set() if where.type == "cuda" else set(reads)
        for cell in cells:
            if record_of(lines, cell) is None and time.perf_counter() - begin < seconds:
                how = cell["attention"]
                prompt = haystack.prompt(TASKS["needle"], length=cell["length"], depth=cell["depth"])
                if how not in warm:  # kernels are compiled at their first use
                    read_prompt(reader_with(loaded, reads[how], chunk), prompt, tokenizer)
                    warm.add(how)
                lines.add({**cell, **read_prompt(reader_with(loaded, reads[how], chunk), prompt, tokenizer)})
                print(json.dumps(lines.rows[-1]), flush=True)


def read_prompt(reader: Reader, prompt: Any, tokenizer: Any) -> Record:
    """What reading a prompt took, and what was found; or why it cannot be read."""
    device = reader.model.device
    try:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        reader.read(prompt.tokens)
        if device.type == "cuda":
            torch.cuda.synchronize()
        record = {"read_s": time.perf_counter() - start}
        record |= {key: value for key, value in find(reader, prompt).items() if key in ("found", "loss", "said")}
        record |= {"said": tokenizer.decode(record["said"]), "answer": tokenizer.decode(prompt.answer)}
    except torch.OutOfMemoryError as error:
        return {"failed": str(error).splitlines()[0]}
    return {**record, **({"peak_bytes": torch.cuda.max_memory_allocated()} if device.type == "cuda" else {})}


@app.command()
def report(
    measured: Annotated[list[Path], typer.Argument(help="What `measure` wrote.")],
    out: Annotated[Path, typer.Option(help="PREFIX.json, PREFIX.md and PREFIX.png are written.")],
    prompts: Annotated[list[Path] | None, typer.Option(help="What `prompts` wrote.")] = None,
    log: Annotated[
        list[str] | None, typer.Option(help="NAME=log.jsonl of a run; drawn beside a model of that NAME.")
    ] = None,
    needle: Annotated[
        list[str] | None, typer.Option(help="NAME=needle.jsonl of `moba eval needle`; a name may have several.")
    ] = None,
    against: Annotated[
        str, typer.Option(help="A measured model: how far the others are from it, read with full attention.")
    ] = "",
    note: Annotated[str, typer.Option(help="What a reader must know of how this was made.")] = "",
) -> None:
    """Tables and pictures of what was measured."""
    files = [read_measured(path) for path in measured]
    records = [record for file in files for record in file[1:]]
    parts = [read_measured(path) for path in prompts or []]
    of_prompts = [record for part in parts for record in part[1:]]
    logs = {name: read_lines(Path(path)) for name, path in map(named, log or [])}
    hidden = [(name, *read_measured(Path(path))) for name, path in map(named, needle or [])]
    made_on = heading(files) | ({"note": note} if note else {})
    text = to_markdown(made_on, records, table)
    if against:
        text += to_markdown({}, records, lambda records: distance_table(records, against))
    if parts:
        text += "\n" + to_markdown(heading(parts), of_prompts, prompts_table)
    if hidden:
        found = found_by_reader(hidden)
        text += "\n" + to_markdown(heading([file[1:] for file in hidden]), [], lambda _: needle_table(found))
        picture = plot_needle({reader: grid(answers) for reader, answers in found.items()}, "Needle in a haystack")
        picture.savefig(out.with_name(f"{out.name}-needle.png"), bbox_inches="tight")
    for name, steps in logs.items():
        rate = statistics.median([step["tokens_per_s"] for step in steps if "tokens_per_s" in step][1:] or [math.nan])
        text += f"\n- {name}: {steps[-1]['tokens']:,} tokens trained, {rate:,.0f} a second (median)\n"
    out.with_suffix(".md").write_text(text)
    values = {"made_on": made_on, "records": records, "prompts": of_prompts, "logs": logs, "needle": hidden}
    out.with_suffix(".json").write_text(json.dumps(values) + "\n")
    plot_panels([panels(records, logs)], "SmolLM2-135M becomes a MoBA model").savefig(out.with_suffix(".png"))
    print(text)


def find_models(entry: str) -> list[tuple[str, str]]:
    """Names and paths of NAME=PATH: of a run's every checkpoint, else of the one model.

    Raises:
        ValueError: if the entry is something else, or there is no such model.
    """
    name, path = named(entry)
    if path == EMBEDDED:
        return [(name, path)]
    if found := checkpoints(Path(path)):
        return [(f"{name} {step_of(checkpoint)}", str(checkpoint)) for checkpoint in found]
    if not Path(path).exists():
        raise ValueError(f"there is no {path}")
    return [(name, path)]


def load(path: str, length: int, rope_theta: float, device: torch.device) -> Any:
    """A model that reads `length` tokens, with MoBA's attention, in bf16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if path == EMBEDDED:
        model, _ = load_model(None, dtype=dtype)
        stretch_positions(model, length, theta=rope_theta)
    elif Path(path).is_dir():
        from transformers import AutoModelForCausalLM

        # A checkpoint has no tokenizer, and needs none.
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    else:
        model, _ = load_model(path, dtype=dtype)
    model.set_attn_implementation("moba")
    return model.to(device)


def reader_with(model: Any, config: MoBAConfig | None, chunk_tokens: int | None = None) -> Reader:
    """A reader of the model with a config, None for full attention."""
    num_layers = model.config.num_hidden_layers
    apply_config(model, config or MoBAConfig(1, 1, full_layers=num_layers))
    return Reader(model, chunk_tokens=chunk_tokens)


def own_config(model: Any, given: str) -> MoBAConfig:
    """The MoBA settings that a model was trained with; the given ones if it carries none or was trained dense."""
    own = get_moba_config(model)
    if own is not None and own.full_layers != model.config.num_hidden_layers:
        return own
    (config,) = parse_settings(given, Choice(MoBAConfig(1, 1), kept_by_default=False))
    if config is None:
        raise ValueError(f"config must be a setting of MoBA, got {given!r}")
    return config


def held_out_rows(shards: Shards, length: int, count: int) -> dict[tuple[str, int], Tensor]:
    """(source, number) -> int64 [length]: up to `count` rows of each source that one document fills, evenly spread."""
    rows = {}
    for source in sorted({document.source for document in shards.documents}):
        try:
            data = PackedDataset(shards, length, seed=None, sources=[source], whole_rows=True)
        except ValueError:  # no document of this source is long enough
            continue
        order = sorted(range(len(data.rows)), key=lambda i: data.rows[i][0])
        chosen = order[:: max(1, len(order) // count)][:count]
        rows |= {(source, i): data[row]["input_ids"] for i, row in enumerate(chosen)}
    if not rows:
        raise ValueError(f"{shards.folder} holds out no document of {length:,} tokens")
    return rows


def told(records: list[Record], model: str, attention: str) -> str:
    """The averages of a model read with an attention, in words."""
    part = [r for r in records if (r["model"], r["attention"]) == (model, attention)]
    return f"loss {_mean(part, 'loss'):.4f}, last {_mean(part, 'last'):.4f}, copy {_mean(part, 'second'):.4f}"


def heading(files: Sequence[Sequence[Record]]) -> dict[str, str]:
    """Of the first lines of files: what made each, and the settings in which all agree, but for tables of settings."""
    made_on, settings = [file[0]["made_on"] for file in files], [file[0]["settings"] for file in files]
    shared = {k: v for k, v in settings[0].items() if not isinstance(v, dict) and all(s.get(k) == v for s in settings)}
    several = {key: "; ".join(dict.fromkeys(about[key] for about in made_on)) for key in made_on[0]}
    return {**several, **{key: str(value) for key, value in shared.items()}}


def named(entry: str) -> tuple[str, str]:
    """Name and path of NAME=PATH.

    Raises:
        ValueError: if the entry is something else.
    """
    name, separator, path = entry.partition("=")
    if not separator:
        raise ValueError(f"a model or file must read NAME=PATH, got {entry!r}")
    return name, path


def found_by_reader(hidden: Sequence[Sequence[Any]]) -> dict[str, list[Record]]:
    """Model and how it reads -> its answers. `hidden`: for each file a name, the first line and the answers."""
    found: dict[str, list[Record]] = {}
    for name, _, *answers in hidden:
        for answer in answers:
            how = answer["attention"]
            moba = "MoBA, its answer too" if "decode=moba" in how else "MoBA"
            found.setdefault(f"{name}: {FULL if how == 'full' else moba}", []).append(answer)
    return found


def needle_table(found: Mapping[str, list[Record]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: how many needles each reader found, by length."""
    lengths = sorted({answer["length"] for answers in found.values() for answer in answers})
    cells = []
    for reader, answers in found.items():
        by_length = [[a["found"] for a in answers if a["length"] == length] for length in lengths]
        cells.append([reader, *(f"{sum(part)} of {len(part)}" if part else "" for part in by_length)])
    return ["needles found", *(length_name(length) for length in lengths)], cells


def table(records: list[Record]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: losses in nats, averaged over rows, the end's also by source."""
    sources = sorted({record["source"] for record in records})
    titles = ["model", "attention", LOSSES["loss"], LOSSES["last"], *(f"last, {source}" for source in sources)]
    titles += [LOSSES["first"], LOSSES["second"]]
    cells = []
    for model, attention in dict.fromkeys((record["model"], record["attention"]) for record in records):
        part = [r for r in records if (r["model"], r["attention"]) == (model, attention)]
        by_source = [[r for r in part if r["source"] == source] for source in sources]
        values = [_mean(part, "loss"), _mean(part, "last"), *(_mean(rows, "last") for rows in by_source)]
        values += [_mean(part, "first"), _mean(part, "second")]
        cells.append([model, attention, *(f"{value:.4f}" for value in values)])
    return titles, cells


def distance_table(records: list[Record], against: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: mean difference over the rows that both read, ± its standard error, and in percent.

    Raises:
        ValueError: if not all of the rows were read by that model with full attention.
    """
    readings: dict[tuple[str, str], dict[tuple[str, int], Record]] = {}
    for record in records:
        readings.setdefault((record["model"], record["attention"]), {})[record["source"], record["row"]] = record
    other = readings.pop((against, FULL), {})
    cells = []
    for (model, attention), rows in readings.items():
        if rows.keys() - other.keys():
            raise ValueError(f"against must be a model of which the same rows were measured, got {against!r}")
        cells.append([model, attention])
        for key in LOSSES:
            apart = [record[key] - other[row][key] for row, record in rows.items()]
            mean, base = statistics.mean(apart), statistics.mean(other[row][key] for row in rows)
            error = f" ± {statistics.stdev(apart) / math.sqrt(len(apart)):.4f}" if len(apart) > 1 else ""
            cells[-1].append(f"{mean:+.4f}{error} ({mean / base:+.1%})")
    return [f"above {against}", "attention", *LOSSES.values()], cells


def prompts_table(records: list[Record]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: of each model, attention and length."""
    cells = []
    for key in dict.fromkeys((r["model"], r["attention"], r["length"]) for r in records):
        part = [r for r in records if (r["model"], r["attention"], r["length"]) == key]
        read = [r for r in part if "failed" not in r]
        name, attention, length = key
        values = ["", "", "", next((r["failed"] for r in part if "failed" in r), "")]
        if read:
            peak = max(r.get("peak_bytes", 0) for r in read) / 2**30  # not measured on a CPU
            values = [f"{sum(r['found'] for r in read)} of {len(read)}", f"{_mean(read, 'loss'):.2f}",
                      f"{min(r['read_s'] for r in read):.1f}", f"{peak:.1f}" if peak else ""]  # fmt: skip
        cells.append([name, attention, length_name(length), *values])
    return ["model", "attention", "tokens", "found", "loss of the answer", "seconds to read", "peak GiB"], cells


def panels(records: list[Record], logs: dict[str, list[Record]]) -> list[Panel]:
    """Loss by position of the first and of each run's last model, read with either attention; the training's loss."""
    # "dense 256" is the run "dense" after 256 steps.
    last = {model.rpartition(" ")[0] or model: model for model in dict.fromkeys(r["model"] for r in records)}
    result = []
    for attention in (FULL, "MoBA"):
        curves = {}
        for model in last.values():
            part = [r["positions"] for r in records if (r["model"], r["attention"]) == (model, attention)]
            means = [statistics.mean(values) for values in zip(*part, strict=True)]
            curves[model] = ([LAST * (i + 0.5) for i in range(len(means))], means)
        result.append(Panel(curves, "position", "loss (nats)", f"held-out texts, {attention}"))
    if logs:
        # Colours go by place: a model without a log has an empty curve here, and keeps its colour. A log of no measured
        # model, such as a retrieval training's, is of other texts.
        training: dict[str, tuple[list[float], list[float]]] = {}
        for name in last:
            logged = [step for step in logs.get(name, []) if "loss" in step]
            training[name] = ([step["tokens"] / 1e6 for step in logged], [step["loss"] for step in logged])
        result.append(Panel(training, "million tokens trained", "loss (nats)", "training"))
    return result


def read_measured(path: Path) -> list[Record]:
    """A first line of settings, and the records below it.

    Raises:
        ValueError: if the file is another, such as what `report` wrote.
    """
    lines = read_lines(path)
    if not lines or not {"settings", "made_on"} <= lines[0].keys():
        raise ValueError(f"{path} must be JSON lines as measure, prompts or `moba eval needle` wrote them")
    return lines


def read_lines(path: Path) -> list[Record]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _mean(records: list[Record], key: str) -> float:
    return statistics.mean(record[key] for record in records) if records else math.nan


if __name__ == "__main__":
    app()
