"""What the evaluations of `moba eval` share: options, the attentions they measure, their records and results."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moba.config import MoBAConfig
from moba_lab.checks import require_folder, require_packages
from moba_lab.cli import options
from moba_lab.cli.options import Attention, Choice, Dtype

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moba_lab.cli.session import Session
    from moba_lab.evals.reader import Reader
    from moba_lab.lines import Lines

app = typer.Typer(
    help="Evaluate a model with MoBA, and with --compare with full attention too.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


# Where evaluations write, each into a folder of its own, unless --out names one.
FOLDER = Path("moba-eval")


def parse_lengths(text: str) -> list[int]:
    """[1024, 8192, 100] from "1K,8K,100".

    Raises:
        ValueError: for anything else.
    """
    return [parse_length(part) for part in text.split(",")]


def parse_length(text: str | int) -> int:
    """8192 from "8K" or "8192"; 1M is 1024K.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"(\d+)([kKmM]?)", str(text).strip())
    length = int(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2].lower()] if match else 0
    if length < 1:
        raise ValueError(f"a length must be a number of tokens such as 8K or 100000, got {text!r}")
    return length


TEXT = "Text"
_OUTPUT = "Output"
LengthOption = Annotated[
    int,
    typer.Option(
        metavar="N", parser=parse_length, help="Tokens of each document or prompt; K means 1024.", rich_help_panel=TEXT
    ),
]


def _check_texts(texts: list[str] | None) -> list[str] | None:
    """Refuse what cannot be read before a model is loaded."""
    from moba_lab.evals.texts import read_text

    for text in texts or []:
        read_text(text)
    return texts


DocumentsOption = Annotated[int, typer.Option(metavar="N", min=1, help="How many documents.", rich_help_panel=TEXT)]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="FOLDER", rich_help_panel=TEXT,
        help="Held-out documents of `moba data`, instead of State of the Union addresses.",
    ),
]  # fmt: skip
TextOption = Annotated[
    list[str] | None,
    typer.Option(
        "--text", metavar="FILE|ADDRESS", rich_help_panel=TEXT, callback=_check_texts,
        help="Your own text instead, or the name of an address such as 1848-Polk-1. May be given more than once.",
    ),
]  # fmt: skip

FULL = "full"
# What a setting may say beside its blocks, by the field of MoBAConfig.
_WORDS = {
    "first": "keep_first",
    "recent": "keep_recent",
    "full": "full_layers",
    "router": "router",
    "decode": "decode",
}
Table = Mapping[str, Mapping[str, str]]  # row -> column -> cell


@dataclass(frozen=True)
class Setup:
    """What every evaluation is told: the model, how it attends, and where results go."""

    model: str | None
    choice: Choice
    dtype: Dtype
    device: str
    yarn: float | None
    out: Path | None
    compare: bool
    listed: str | None
    has_blocks: bool
    chunk_tokens: int | None

    def open(self, length: int) -> Session:
        """The session with the model, for texts of `length` tokens.

        Raises:
            ValueError: if its context cannot hold them.
        """
        from moba_lab.cli.session import open_session

        session = open_session(self.model, self.choice, Attention.moba, self.dtype, self.device, self.yarn)
        session.require_context(length, f"prompts of {length:,} tokens are asked for")
        return session

    def attentions(self, default: str | None = None) -> dict[str, MoBAConfig | None]:
        """What is measured, by name: --settings; else the setting of the other options, or where these do not say its
        blocks, `default`. None stands for full attention.

        Raises:
            ValueError: if the settings cannot be, or their blocks are given twice.
        """
        if self.listed and self.has_blocks:
            raise ValueError(f"settings={self.listed!r} says the blocks: leave out --block-size and --topk")
        listed = self.listed or (None if self.has_blocks else default)
        configs = parse_settings(listed, self.choice) if listed else [self.choice.config]
        return {setting_name(config): config for config in ([None] if self.compare else []) + configs}

    def settings(self, session: Session, **own: Any) -> dict[str, Any]:
        """What changes all records: what differs only by rounding may change between the runs of one evaluation."""
        given = {name: str(value) if isinstance(value, Path) else value for name, value in own.items()}
        stretched = {} if self.yarn is None else {"yarn": self.yarn}
        return {"model": self.model, **stretched, "dtype": str(session.dtype), **given}

    @property
    def model_name(self) -> str:
        """The model's name for titles: a trained run's folder is called `model` or `checkpoint-…`, so its run's too."""
        if self.model is None:
            return "SmolLM2-135M-Instruct"
        path = Path(self.model).resolve() if Path(self.model).exists() else Path(self.model)
        is_of_run = path.name == "model" or path.name.startswith("checkpoint-")
        return f"{path.parent.name}/{path.name}" if is_of_run else path.name


def _setup(
    compare: Annotated[
        bool, typer.Option("--compare", help="Measure full attention too.", rich_help_panel=_OUTPUT)
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            *options.OUT,
            metavar="DIR",
            help="Folder to write into.",
            show_default="moba-eval/NAME",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    model: options.ModelOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = "auto",
    yarn: options.YarnOption = None,
    backend: options.BackendOption = options.Backend.auto,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Tokens read at once.", show_default="1024, GPU: 8192", rich_help_panel="Model"
        ),
    ] = None,
    block_size: options.BlockSizeOption = None,
    topk: options.TopkOption = None,
    keep_first: options.KeepFirstOption = None,
    keep_recent: options.KeepRecentOption = None,
    full_layers: options.FullLayersOption = None,
    router: options.RouterOption = None,
    decode: options.DecodeOption = None,
    settings: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Several settings instead of one, by commas, such as '128x6, 512x3 first=0, 128x8 router=shared, "
            "full': block size x top-k, and where they differ from the options above first=, recent=, full=, router= "
            "and decode=.",
            rich_help_panel="Which blocks a query attends to",
        ),
    ] = None,
) -> Setup:
    """The options that every evaluation has."""
    require_packages("transformers", "matplotlib")
    require_folder("out", out or FOLDER)
    choice = options.choose_config(
        model, backend, full_layers, block_size=block_size, topk=topk, keep_first=keep_first, keep_recent=keep_recent,
        router=router, decode=decode,
    )  # fmt: skip
    has_blocks = block_size is not None or topk is not None
    return Setup(model, choice, dtype, device, yarn, out, compare, settings, has_blocks, prefill_chunk)


def evaluation(function: Callable[..., None]) -> Callable[..., None]:
    """Make `function(setup, own options)` a command that has the options of `_setup` beside its own."""
    shared = inspect.signature(_setup, eval_str=True).parameters
    own = dict(inspect.signature(function, eval_str=True).parameters)
    del own["setup"]

    def run(**given: Any) -> None:
        setup = _setup(**{name: given.pop(name) for name in shared})
        function(setup, **given)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own.values(), *shared.values())]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command()(run)
    return run


def setting_name(config: MoBAConfig | None) -> str:
    """A setting in the words of --settings: "128x6 first=1". The backend, a matter of rounding, is left out."""
    if config is None:
        return FULL
    usual = MoBAConfig(config.block_size, config.topk)
    words = [f"{config.block_size}x{config.topk}"]
    for word, field in _WORDS.items():
        value = getattr(config, field)
        if value != getattr(usual, field):
            # "7+" is layer 7, "7" the last seven.
            listed = "+".join(map(str, value)) + "+" * (len(value) == 1) if isinstance(value, tuple) else value
            words.append(f"{word}={listed}")
    return " ".join(words)


def parse_settings(text: str, choice: Choice) -> list[MoBAConfig | None]:
    """Settings from a list such as "128x4, 512x3 first=0 router=shared, full".

    Args:
        text: the list.
        choice: what holds where a setting does not say.

    Raises:
        ValueError: naming what cannot be.
    """
    return [_parse_setting(part.strip(), choice) for part in text.split(",")]


def _parse_setting(text: str, choice: Choice) -> MoBAConfig | None:
    if text == FULL:
        return None
    blocks, *words = text.split() or [""]
    try:
        size, topk = (int(number) for number in blocks.split("x"))
        given = dict(word.split("=", 1) for word in words)
        values: dict[str, Any] = {_WORDS[word]: value for word, value in given.items()}
        values |= {name: int(value) for name, value in values.items() if name in ("keep_first", "keep_recent")}
    except (ValueError, KeyError):
        raise ValueError(
            f"settings must be a list such as '128x4, 512x3 first=0 router=shared, full', got {text!r}; "
            f"valid words: {', '.join(_WORDS)}"
        ) from None
    if "full_layers" in values:
        layers = values["full_layers"]
        values["full_layers"] = options.parse_layers(layers.replace("+", ",") if "+" in layers else layers)
    if choice.kept_by_default and values.get("router") in ("recent", "sink"):
        values.setdefault("keep_first", 0)
    return choice.with_blocks(size, topk, **values)


@dataclass(frozen=True)
class Results:
    """Records, in the order of the cells, and what the first of them was made on."""

    rows: list[dict[str, Any]]
    made_on: Mapping[str, str]

    def by_attention(self) -> dict[str, list[dict[str, Any]]]:
        """The records of each attention, by its name."""
        names = dict.fromkeys(row["attention"] for row in self.rows)
        return {name: [row for row in self.rows if row["attention"] == name] for name in names}


def run_cells(
    setup: Setup,
    session: Session,
    name: str,
    settings: Mapping[str, Any],
    attentions: Mapping[str, MoBAConfig | None],
    cells: Sequence[Mapping[str, Any]],
    measure: Callable[..., dict[str, Any]],
    told: Callable[[dict[str, Any]], str],
) -> Results:
    """Measure every cell with every attention, but for what the file of records holds already.

    Args:
        settings: what changes all records.
        cells: what a record is of, in the order in which one `Reader` reads the least.
        measure: a reader and a cell's values -> its record.
        told: a record -> what is said of it.
    """
    from moba_lab.bench.machine import describe
    from moba_lab.cli.session import say
    from moba_lab.evals.records import open_records, record_of

    wanted = [{"attention": attention, **cell} for attention in attentions for cell in cells]
    made_on = {**describe(session.device), "dtype": str(session.dtype)}
    with open_records(folder(setup, name) / f"{name}.jsonl", settings, made_on) as lines:
        num_done = sum(record_of(lines, cell) is not None for cell in wanted)
        if num_done:
            say(f"{num_done} of {len(wanted)} measured before")
        reader, attention = None, None
        for cell in wanted:
            if record_of(lines, cell) is not None:
                continue
            if reader is None or cell["attention"] != attention:
                attention = cell["attention"]
                reader = _reader(setup, session, attentions[attention])
            num_done += 1
            row = _measure(reader, lines, cell, measure)
            what = ", ".join(f"{value:.2g}" if isinstance(value, float) else f"{value}" for value in cell.values())
            say(f"{num_done} of {len(wanted)}: {what}: {told(row)} ({row['seconds']} s)")
        rows = [record_of(lines, cell) for cell in wanted]
        return Results([row for row in rows if row is not None], lines.rows[0]["made_on"])


def _reader(setup: Setup, session: Session, config: MoBAConfig | None) -> Reader:
    """A reader of the model with an attention."""
    from moba_lab.evals.reader import Reader
    from moba_lab.models.unrotated import apply_config

    # Full attention by MoBA's own layers needs no mask of chunk × text, and so takes the fused kernels.
    apply_config(session.model, config or replace(setup.choice.config, full_layers=session.num_layers))
    return Reader(session.model, chunk_tokens=setup.chunk_tokens)


def _measure(
    reader: Reader, lines: Lines, cell: dict[str, Any], measure: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    import time

    start = time.perf_counter()
    values = measure(reader, **{key: value for key, value in cell.items() if key != "attention"})
    lines.add({**cell, **values, "seconds": round(time.perf_counter() - start, 2)})
    return lines.rows[-1]


def folder(setup: Setup, name: str) -> Path:
    """Where an evaluation writes."""
    return setup.out or FOLDER / name


def write_results(
    setup: Setup,
    name: str,
    title: str,
    figure: Figure,
    tables: Mapping[str, Table],
    results: Results,
    notes: Sequence[str] = (),
) -> None:
    """Write the picture, and the notes and the tables, by their titles; print the tables, and say where all that is."""
    from moba_lab.cli.session import say

    path = folder(setup, name) / f"{name}.png"
    figure.savefig(path)
    parts = [f"# {title}", *notes, *(_markdown(table_title, table) for table_title, table in tables.items())]
    parts.append("\n".join(f"- {key}: {value}" for key, value in results.made_on.items()))
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    say(f"{path}, tables in {path.with_suffix('.md')}, records in {path.with_suffix('.jsonl')}")
    for table_title, table in tables.items():
        _print(table_title, table)


def _markdown(title: str, table: Table) -> str:
    columns = list(next(iter(table.values())))
    lines = [f"| {title} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {name} | {' | '.join(cells.values())} |" for name, cells in table.items()]
    return "\n".join(lines)


def _print(title: str, table: Table) -> None:
    from rich import box, console
    from rich import table as rich_table

    columns = list(next(iter(table.values())))
    shown = rich_table.Table(title, *columns, box=box.SIMPLE_HEAD)
    for name, cells in table.items():
        shown.add_row(name, *cells.values())
    console.Console(file=sys.stdout, highlight=False).print(shown)
