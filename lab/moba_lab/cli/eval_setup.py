"""What the evaluations of `moba eval` share: options, the attentions they measure, their records and results."""

from __future__ import annotations

import inspect
import re
import sys
import time
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
    from torch import Tensor

    from moba_lab.cli.session import Session
    from moba_lab.evals.reader import Reader

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


_OUTPUT = "Output"


def of_text(what: str, *, metavar: str = "N", **more: Any) -> Any:
    """An option that says what is read."""
    return typer.Option(metavar=metavar, help=what, rich_help_panel="Text", **more)


def _check_texts(texts: list[str] | None) -> list[str] | None:
    """Refuse what cannot be read before a model is loaded."""
    from moba_lab.evals.texts import read_text

    for text in texts or []:
        read_text(text)
    return texts


LengthOption = Annotated[int, of_text("Tokens of each document or prompt; K means 1024.", parser=parse_length)]
DocumentsOption = Annotated[int, of_text("How many documents.", min=1)]
DataOption = Annotated[
    Path | None,
    of_text("Held-out documents of `moba data`, instead of State of the Union addresses.", metavar="FOLDER"),
]
TextOption = Annotated[
    list[str] | None,
    of_text(
        "Your own text instead, or the name of an address such as 1848-Polk-1. May be given more than once.",
        metavar="FILE|ADDRESS",
        callback=_check_texts,
    ),
]

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
Record = dict[str, Any]


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

    def begin(self, name: str, length: int, /, **settings: Any) -> Run:
        """Open the model for texts of `length` tokens. `settings`: what else changes all records.

        Raises:
            ValueError: if its context cannot hold them.
        """
        from moba_lab.cli.session import open_session

        session = open_session(self.model, self.choice, Attention.moba, self.dtype, self.device, self.yarn)
        session.require_context(length, f"prompts of {length:,} tokens are asked for")
        given = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
        stretched = {} if self.yarn is None else {"yarn": self.yarn}
        about = {"model": self.model, **stretched, "dtype": str(session.dtype), "evaluation": name, **given}
        return Run(self, name, session, about)

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
        options.of_model("Tokens read at once.", metavar="N", min=1, show_default="1024, GPU: 8192"),
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
        options.of_selection(
            "Several settings instead of one, by commas, such as '128x6, 512x3 first=0, 128x8 router=shared, "
            "full': block size x top-k, and where they differ from the options above first=, recent=, full=, router= "
            "and decode=.",
            metavar="LIST",
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


@dataclass
class Run:
    """An evaluation that has begun.

    Attributes:
        setup: what it was told. name: of the evaluation.
        session: with the model.
        settings: what changes all records.
        made_on: what the first record was made on, once there is one.
    """

    setup: Setup
    name: str
    session: Session
    settings: Mapping[str, Any]
    made_on: Mapping[str, str] | None = None

    @property
    def path(self) -> Path:
        """What is written, but for the endings."""
        return (self.setup.out or FOLDER / self.name) / self.name

    def documents(self, length: int, count: int, data: Path | None, texts: list[str] | None) -> dict[str, Tensor]:
        """The first `length` tokens of documents, by name: see `long_documents`."""
        from moba_lab.evals.texts import long_documents

        return dict(long_documents(self.session.tokenizer, length, count, data=data, texts=texts))

    def measure(
        self,
        attentions: Mapping[str, MoBAConfig | None],
        cells: Sequence[Mapping[str, Any]],
        measure: Callable[..., Record],
        told: Callable[[Record], str],
    ) -> dict[str, list[Record]]:
        """Measure every cell with every attention, but for what the file of records holds already.

        Args:
            attentions: settings by name; None is full attention.
            cells: what a record is of, in the order in which one `Reader` reads the least.
            measure: a reader and a cell's values -> its record.
            told: a record -> what is said of it.

        Returns:
            the records of each attention, in the order of the cells.
        """
        from moba_lab.bench.machine import describe
        from moba_lab.cli.session import say
        from moba_lab.evals.records import open_records, record_of

        made_on = {**describe(self.session.device), "dtype": str(self.session.dtype)}
        total = len(attentions) * len(cells)
        records: dict[str, list[Record]] = {}
        with open_records(self.path.with_suffix(".jsonl"), self.settings, made_on) as lines:
            wanted = [{"attention": attention, **cell} for attention in attentions for cell in cells]
            num_done = sum(record_of(lines, cell) is not None for cell in wanted)
            if num_done:
                say(f"{num_done} of {total} measured before")
            for attention, config in attentions.items():
                reader = None
                for cell in cells:
                    of = {"attention": attention, **cell}
                    record = record_of(lines, of)
                    if record is None:
                        reader = reader or self._reader(config)
                        start = time.perf_counter()
                        values = measure(reader, **cell)
                        record = {**of, **values, "seconds": round(time.perf_counter() - start, 2)}
                        lines.add(record)
                        num_done += 1
                        what = ", ".join(f"{v:.2g}" if isinstance(v, float) else f"{v}" for v in of.values())
                        say(f"{num_done} of {total}: {what}: {told(record)} ({record['seconds']} s)")
                    records.setdefault(attention, []).append(record)
            self.made_on = lines.rows[0]["made_on"]
        return records

    def _reader(self, config: MoBAConfig | None) -> Reader:
        """A reader of the model with an attention."""
        from moba_lab.evals.reader import Reader
        from moba_lab.models.unrotated import apply_config

        # Full attention by MoBA's own layers needs no mask of chunk × text, and so takes the fused kernels.
        full = replace(self.setup.choice.config, full_layers=self.session.num_layers)
        apply_config(self.session.model, config or full)
        return Reader(self.session.model, chunk_tokens=self.setup.chunk_tokens)

    def write(self, title: str, figure: Figure, tables: Mapping[str, Table], notes: Sequence[str] = ()) -> None:
        """Write the picture, the notes, and the tables by their titles; print the tables; say where all that is."""
        from rich import box, console
        from rich import table as rich_table

        from moba_lab.cli.session import say

        picture, page = self.path.with_suffix(".png"), self.path.with_suffix(".md")
        figure.savefig(picture)
        parts = [f"# {title}", *notes, *(_markdown(name, table) for name, table in tables.items())]
        parts.append("\n".join(f"- {key}: {value}" for key, value in (self.made_on or {}).items()))
        page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        say(f"{picture}, tables in {page}, records in {self.path.with_suffix('.jsonl')}")
        for name, table in tables.items():
            shown = rich_table.Table(name, *next(iter(table.values())), box=box.SIMPLE_HEAD)
            for row, cells in table.items():
                shown.add_row(row, *cells.values())
            console.Console(file=sys.stdout, highlight=False).print(shown)


def _markdown(title: str, table: Table) -> str:
    columns = list(next(iter(table.values())))
    lines = [f"| {title} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {name} | {' | '.join(cells.values())} |" for name, cells in table.items()]
    return "\n".join(lines)
