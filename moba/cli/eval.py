"""`moba eval`: evaluations of a model. Each writes its records and a picture; a stopped one goes on where it was."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moba.cli import options
from moba.cli.options import Attention, Choice, Dtype

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moba.cli.session import Session
    from moba.evals.records import Records

app = typer.Typer(help="Evaluate a model with MoBA, and with --compare with full attention too.", no_args_is_help=True)

_TEXT = "Text"
_OUTPUT = "Output"
LengthOption = Annotated[int, typer.Option(metavar="N", help="Tokens of each document.", rich_help_panel=_TEXT)]
DocumentsOption = Annotated[int, typer.Option(metavar="N", help="How many documents.", rich_help_panel=_TEXT)]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="FOLDER", rich_help_panel=_TEXT,
        help="Held-out documents of `moba data`, instead of State of the Union addresses.",
    ),
]  # fmt: skip
TextOption = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="Your own text instead.", rich_help_panel=_TEXT)
]


@dataclass(frozen=True)
class Setup:
    """What every evaluation is told: the model, how it attends, and where results go."""

    model: str | None
    choice: Choice
    dtype: Dtype
    device: str
    out: Path | None
    attentions: tuple[Attention, ...]
    chunk_tokens: int

    def open(self) -> Session:
        """Load the model."""
        from moba.cli.session import open_session

        return open_session(self.model, self.choice, Attention.moba, self.dtype, self.device)

    def settings(self, session: Session, **own: Any) -> dict[str, Any]:
        """What changes the records: what differs only by rounding may change between the runs of one evaluation."""
        return {
            "model": self.model,
            "dtype": str(session.model.dtype),
            "config": {**self.choice.config.to_dict(), "backend": None},
            **{name: str(value) if isinstance(value, Path) else value for name, value in own.items()},
        }


def _setup(
    compare: Annotated[
        bool, typer.Option("--compare", help="Measure full attention too.", rich_help_panel=_OUTPUT)
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Folder to write into.",
            show_default="moba-eval/NAME",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    model: options.ModelOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = "auto",
    backend: options.BackendOption = options.Backend.auto,
    prefill_chunk: Annotated[
        int, typer.Option(metavar="N", help="Tokens read at once.", rich_help_panel="Model")
    ] = 1024,
    block_size: options.BlockSizeOption = None,
    topk: options.TopkOption = None,
    keep_first: options.KeepFirstOption = None,
    keep_recent: options.KeepRecentOption = None,
    full_layers: options.FullLayersOption = None,
    router: options.RouterOption = None,
    decode: options.DecodeOption = None,
) -> Setup:
    """The options that every evaluation has."""
    choice = options.choose_config(
        model, backend, full_layers, block_size=block_size, topk=topk, keep_first=keep_first, keep_recent=keep_recent,
        router=router, decode=decode,
    )  # fmt: skip
    attentions = (Attention.sdpa, Attention.moba) if compare else (Attention.moba,)
    return Setup(model, choice, dtype, device, out, attentions, prefill_chunk)


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


@evaluation
def needle(
    setup: Setup,
    task: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            rich_help_panel=_TEXT,
            help="What is hidden: needle, passkey, or a JSON file with needle, question and answer of your own.",
        ),
    ] = "needle",
    lengths: Annotated[
        str, typer.Option(metavar="LIST", help="Tokens of the prompts; K means 1024.", rich_help_panel=_TEXT)
    ] = "1K,2K,4K,8K",
    depths: Annotated[
        int, typer.Option(metavar="N", help="Depths from 0 to 100 %, evenly spread.", rich_help_panel=_TEXT)
    ] = 5,
    needles: Annotated[
        int, typer.Option(metavar="N", help="Hidden at once; one is asked for.", rich_help_panel=_TEXT)
    ] = 1,
    trials: Annotated[int, typer.Option(metavar="N", help="Prompts of each cell.", rich_help_panel=_TEXT)] = 1,
    chat: options.ChatOption = True,
    text: TextOption = None,
) -> None:
    """Hide a sentence in a long text and ask for it: the heat map over lengths and depths.

    moba eval needle --lengths 8K,32K,128K --depths 11 --compare -m path/to/model
    """
    from moba.evals.needle import Haystack, find, grid, read_task
    from moba.evals.pictures import plot_needle
    from moba.evals.texts import haystack_text

    sizes, hidden = parse_lengths(lengths), read_task(task)
    shares = [i / (depths - 1) for i in range(depths)] if depths > 1 else [0.5]
    session = setup.open()
    require_context(session, max(sizes))
    haystack = Haystack(session.tokenizer, haystack_text(text), chat)
    settings = setup.settings(session, evaluation="needle", task=asdict(hidden), needles=needles, chat=chat, text=text)
    cells = [
        {"attention": attention.value, "length": length, "depth": depth, "trial": trial}
        for length in sizes
        for attention in setup.attentions
        for trial in range(trials)
        for depth in shares
    ]

    def measure(attention: str, length: int, depth: float, trial: int) -> dict[str, Any]:
        prompt = haystack.prompt(hidden, length=length, depth=depth, num_needles=needles, seed=trial)
        record = find(session.model, prompt, chunk_tokens=setup.chunk_tokens)
        said = {"said": session.tokenizer.decode(record["said"]), "answer": session.tokenizer.decode(prompt.answer)}
        return {**record, **said}

    rows = run_cells(setup, session, "needle", settings, cells, measure, lambda r: f"{r['said']!r} of {r['answer']!r}")
    grids = {name: grid(part) for name, part in by_attention(setup, rows).items()}
    write_picture(
        setup, "needle", plot_needle(grids, f"{Path(task).stem.capitalize()} in a haystack · {_model(setup)}")
    )
    for name, cell in grids.items():
        table = {str(length): {f"{depth:.0%}": f"{cell[length, depth]:.0%}" for depth in shares} for length in sizes}
        print_table(f"{name}: found", table)


@evaluation
def loss(
    setup: Setup,
    length: LengthOption = 8192,
    documents: DocumentsOption = 4,
    last: Annotated[
        int, typer.Option(metavar="N", help="Tokens of the end, and of each range of positions.", rich_help_panel=_TEXT)
    ] = 1024,
    data: DataOption = None,
    text: TextOption = None,
) -> None:
    """The loss by position, and at the end of long texts (the trailing loss of the paper).

    moba eval loss --length 32768 --data data/permissive --compare -m path/to/model
    """
    from math import exp, log

    from moba.evals.language import perplexity
    from moba.evals.pictures import plot_curves
    from moba.evals.texts import long_documents

    session = setup.open()
    require_context(session, length)
    tokens = dict(long_documents(session.tokenizer, length, documents, data=data, file=text))
    settings = setup.settings(session, evaluation="loss", length=length, last=last, data=data, text=text)
    cells = [{"attention": a.value, "document": name} for name in tokens for a in setup.attentions]

    def measure(attention: str, document: str) -> dict[str, Any]:
        return perplexity(session.model, tokens[document], last=last, chunk_tokens=setup.chunk_tokens)

    rows = run_cells(setup, session, "loss", settings, cells, measure, lambda r: f"perplexity {r['perplexity']:.2f}")
    curves, table = {}, {}
    for name, part in by_attention(setup, rows).items():
        starts = [position["start"] for position in part[0]["positions"]]
        losses = [sum(log(r["positions"][i]["perplexity"]) for r in part) / len(part) for i in range(len(starts))]
        curves[name] = ([start + last / 2 for start in starts], losses)
        total, end = (sum(r["loss"] for r in part), sum(log(r["perplexity_last"]) for r in part))
        values = {"loss": total / len(part), f"last {last:,}": end / len(part)}
        table[name] = {key: f"{value:.4f}" for key, value in values.items()}
        table[name] |= {"perplexity": f"{exp(values['loss']):.2f}", "documents": str(len(part))}
    figure = plot_curves(curves, f"Loss by position · {_model(setup)}", x_label="position", y_label="loss (nats)")
    write_picture(setup, "loss", figure)
    print_table("", table)


@evaluation
def sparsity(
    setup: Setup,
    settings: Annotated[
        str, typer.Option(metavar="LIST", help="Block size x top-k.", rich_help_panel=_TEXT)
    ] = "128x4,128x6,128x8,128x16,512x3,512x8",
    length: LengthOption = 8192,
    documents: DocumentsOption = 2,
    data: DataOption = None,
    text: TextOption = None,
) -> None:
    """Perplexity, and recall of a repeated passage, against the share of keys that is read.

    The last sixteenth of each text repeats a passage from three eighths of its length before.

        moba eval sparsity --settings 128x4,128x8,512x3 --length 8192
    """
    from math import exp, log

    from moba.evals.language import append_copy, summarise, summarise_copy, token_losses
    from moba.evals.pictures import plot_curves
    from moba.evals.texts import long_documents
    from moba.generation import num_keys_read
    from moba.hf import set_moba_config

    pairs = parse_settings(settings)
    configs = {f"{size}x{topk}": setup.choice.with_blocks(size, topk) for size, topk in pairs}
    session = setup.open()
    require_context(session, length)
    copied = length // 16
    tokens = dict(long_documents(session.tokenizer, length - copied, documents, data=data, file=text))
    shared = setup.settings(session, evaluation="sparsity", length=length, data=data, text=text)
    shared["config"] = {**shared["config"], "block_size": None, "topk": None, "keep_first": None}
    cells = [
        {"attention": Attention.sdpa.value if setting == "full" else Attention.moba.value, "setting": setting,
         "keep_first": configs[setting].keep_first if setting in configs else None, "document": name}
        for setting in ("full", *configs)
        for name in tokens
    ]  # fmt: skip

    def measure(attention: str, setting: str, document: str, keep_first: int | None) -> dict[str, Any]:
        config = configs.get(setting)
        if config is not None:
            set_moba_config(session.model, config)
        copy = {"num_copied": copied, "distance": 3 * length // 8}
        whole = append_copy(tokens[document], **copy)
        losses = token_losses(session.model, whole, chunk_tokens=setup.chunk_tokens)
        read, dense = num_keys_read(config, session.num_layers, whole.numel())
        plain = summarise(losses[: tokens[document].numel() - 1])
        return {**plain, **summarise_copy(losses, **copy), "keys_read": read / dense}

    def told(row: dict[str, Any]) -> str:
        return f"perplexity {row['perplexity']:.2f}, copy {row['perplexity_second']:.2f}"

    rows = run_cells(setup, session, "sparsity", shared, cells, measure, told)
    averages: dict[str, dict[str, float]] = {}
    for setting in ("full", *configs):
        part = [r for r in rows if r["setting"] == setting]
        means = {key: exp(sum(log(r[key]) for r in part) / len(part)) for key in ("perplexity", "perplexity_second")}
        averages[setting] = {"keys_read": part[0]["keys_read"], **means}
    full = averages["full"]
    points = sorted((values for name, values in averages.items() if name != "full"), key=lambda v: v["keys_read"])
    share = [100 * values["keys_read"] for values in points]
    figure = plot_curves(
        {"text": (share, [v["perplexity"] for v in points]),
         "second copy of a passage": (share, [v["perplexity_second"] for v in points])},
        f"Perplexity against keys read · {_model(setup)}", x_label="% of the keys that full attention reads",
        y_label="perplexity", is_log=True,
        marks={"full attention, text": full["perplexity"], "full attention, copy": full["perplexity_second"]},
    )  # fmt: skip
    write_picture(setup, "sparsity", figure)
    table = {
        name: {
            "keys read": f"{v['keys_read']:.1%}",
            "perplexity": f"{v['perplexity']:.2f}",
            "above full": f"{v['perplexity'] / full['perplexity'] - 1:+.1%}",
            "copy": f"{v['perplexity_second']:.2f}",
        }
        for name, v in averages.items()
    }
    print_table("", table)


@evaluation
def copy(
    setup: Setup,
    length: LengthOption = 8192,
    distances: Annotated[
        str, typer.Option(metavar="LIST", help="Tokens from a passage to its copy.", rich_help_panel=_TEXT)
    ] = "1K,2K,4K",
    copied: Annotated[int, typer.Option(metavar="N", help="Tokens of the passage.", rich_help_panel=_TEXT)] = 256,
    documents: DocumentsOption = 2,
    data: DataOption = None,
    text: TextOption = None,
) -> None:
    """Perplexity of a passage that is read a second time: low only if its first copy is found.

    moba eval copy --length 32768 --distances 4K,16K --compare
    """
    from math import exp, log

    from moba.evals.language import copy_recall
    from moba.evals.pictures import plot_curves
    from moba.evals.texts import long_documents

    gaps = parse_lengths(distances)
    session = setup.open()
    require_context(session, length)
    tokens = dict(long_documents(session.tokenizer, length - copied, documents, data=data, file=text))
    settings = setup.settings(session, evaluation="copy", length=length, copied=copied, data=data, text=text)
    cells = [
        {"attention": a.value, "document": name, "distance": distance}
        for a in setup.attentions
        for name in tokens
        for distance in gaps
    ]

    def measure(attention: str, document: str, distance: int) -> dict[str, Any]:
        return copy_recall(
            session.model, tokens[document], num_copied=copied, distance=distance, chunk_tokens=setup.chunk_tokens
        )

    rows = run_cells(setup, session, "copy", settings, cells, measure, lambda r: f"copy {r['perplexity_second']:.2f}")

    def mean(part: list[dict[str, Any]], key: str) -> list[float]:
        at = [[log(r[key]) for r in part if r["distance"] == distance] for distance in gaps]
        return [exp(sum(values) / len(values)) for values in at]

    parts = by_attention(setup, rows)
    curves = {name: (gaps, mean(part, "perplexity_second")) for name, part in parts.items()}
    figure = plot_curves(
        curves, f"A passage read twice · {_model(setup)}", x_label="tokens between the copies",
        y_label="perplexity of the second copy", is_log=True,
    )  # fmt: skip
    write_picture(setup, "copy", figure)
    for name, part in parts.items():
        first, second = mean(part, "perplexity_first"), mean(part, "perplexity_second")
        table = {
            str(gap): {"first copy": f"{a:.2f}", "second copy": f"{b:.2f}"}
            for gap, a, b in zip(gaps, first, second, strict=True)
        }
        print_table(name, table)


@evaluation
def routing(
    setup: Setup,
    length: LengthOption = 4096,
    prompts: Annotated[int, typer.Option(metavar="N", help="Prompts with a needle.", rich_help_panel=_TEXT)] = 3,
    queries: Annotated[
        int, typer.Option(metavar="N", help="Queries of each prompt to look at.", rich_help_panel=_TEXT)
    ] = 64,
    chat: options.ChatOption = True,
    text: TextOption = None,
) -> None:
    """How much attention mass the chosen blocks cover beside the best choice, and whether the needle's block is chosen.

    moba eval routing --length 8192 --block-size 128 --topk 8
    """
    from moba.evals.needle import TASKS, Haystack
    from moba.evals.pictures import plot_routing_quality
    from moba.evals.routing import averages, routing_quality
    from moba.evals.texts import haystack_text

    session = setup.open()
    require_context(session, length)
    haystack = Haystack(session.tokenizer, haystack_text(text), chat)
    settings = setup.settings(session, evaluation="routing", length=length, queries=queries, chat=chat, text=text)
    cells = [{"attention": Attention.moba.value, "prompt": i} for i in range(prompts)]

    def measure(attention: str, prompt: int) -> dict[str, Any]:
        made = haystack.prompt(TASKS["needle"], length=length, depth=(prompt + 0.5) / prompts, seed=prompt)
        heads = routing_quality(
            session.model, made.tokens, needle=made.needle, num_question=made.num_question, num_queries=queries,
            chunk_tokens=setup.chunk_tokens,
        )  # fmt: skip
        return {**averages(heads), "heads": heads}

    rows = run_cells(setup, session, "routing", settings, cells, measure, lambda r: f"{r['covered']:.1%} covered")
    heads = [_mean(group) for group in zip(*(row["heads"] for row in rows), strict=True)]
    write_picture(setup, "routing", plot_routing_quality(heads, f"What the router chooses · {_model(setup)}"))
    names = {
        "covered": "attention mass of the chosen blocks",
        "best": "of the best possible choice",
        "recent": "of the first and the nearest blocks",
        "needle_chosen": "needle's block chosen by the question",
        "needle_mass": "attention mass of the needle's block",
    }
    means = averages(heads)
    print_table("", {title: {"mean": f"{means[key]:.1%}"} for key, title in names.items()})


@app.command(
    name="lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def lm_eval(
    context: typer.Context,
    block_size: options.BlockSizeOption = None,
    topk: options.TopkOption = None,
    keep_first: options.KeepFirstOption = None,
    keep_recent: options.KeepRecentOption = None,
) -> None:
    """Run lm-eval with MoBA known to transformers; everything behind -- is lm-eval's own.

    moba eval lm-eval --block-size 128 --topk 6 -- --model hf --tasks hellaswag --model_args pretrained=path/to/model,attn_implementation=moba
    """  # noqa: E501
    choice = options.choose_config(
        None, options.Backend.auto, None, block_size=block_size, topk=topk, keep_first=keep_first,
        keep_recent=keep_recent,
    )  # fmt: skip

    from moba.evals.lm_eval import run_lm_eval

    run_lm_eval(choice.config, context.args)


def run_cells(
    setup: Setup,
    session: Session,
    name: str,
    settings: dict[str, Any],
    cells: list[dict[str, Any]],
    measure: Callable[..., dict[str, Any]],
    told: Callable[[dict[str, Any]], str],
) -> list[dict[str, Any]]:
    """Measure every cell that the file of records does not hold yet; the records of the cells, in their order."""
    from moba.cli.session import say
    from moba.evals.records import open_records

    with open_records(folder(setup, name) / f"{name}.jsonl", settings) as records:
        num_done = sum(records.holds(**cell) for cell in cells)
        if num_done:
            say(f"{num_done} of {len(cells)} measured before")
        for cell in cells:
            if not records.holds(**cell):
                num_done += 1
                _measure(session, records, cell, measure)
                what = ", ".join(f"{value:.2g}" if isinstance(value, float) else f"{value}" for value in cell.values())
                row = records.rows[-1]
                say(f"{num_done} of {len(cells)}: {what}: {told(row)} ({row['seconds']} s)")
        return [next(r for r in records.rows if cell.items() <= r.items()) for cell in cells]


def _measure(session: Session, records: Records, cell: dict[str, Any], measure: Callable[..., dict[str, Any]]) -> None:
    import time

    session.use(Attention(cell["attention"]))
    start = time.perf_counter()
    values = measure(**cell)
    records.add({**cell, **values, "seconds": round(time.perf_counter() - start, 2)})


def by_attention(setup: Setup, rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The records of each attention, by its name in words."""
    from moba.cli.session import describe

    names = {attention.value: describe(setup.choice.config, attention) for attention in setup.attentions}
    return {name: [row for row in rows if row["attention"] == key] for key, name in names.items()}


def folder(setup: Setup, name: str) -> Path:
    """Where an evaluation writes."""
    return setup.out or Path("moba-eval") / name


def write_picture(setup: Setup, name: str, figure: Figure) -> None:
    """Write the picture, and say where picture and records are."""
    from moba.cli.session import say

    path = folder(setup, name) / f"{name}.png"
    figure.savefig(path)
    say(f"{path}, records in {path.with_suffix('.jsonl')}")


def print_table(title: str, rows: dict[str, dict[str, str]]) -> None:
    """Print name -> column -> value."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    columns = list(next(iter(rows.values())))
    table = Table(title, *columns, box=SIMPLE_HEAD)
    for name, values in rows.items():
        table.add_row(name, *values.values())
    Console(file=sys.stdout, highlight=False).print(table)


def parse_lengths(text: str) -> list[int]:
    """[1024, 8192, 100] from "1K,8K,100".

    Raises:
        ValueError: for anything else.
    """
    try:
        lengths = [
            int(part[:-1]) * 1024 if part[-1:] in "kK" else int(part) for part in text.replace(" ", "").split(",")
        ]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1:
        raise ValueError(f"a list of lengths such as 1K,8K,100000 is needed, got {text!r}")
    return lengths


def parse_settings(text: str) -> list[tuple[int, int]]:
    """[(128, 4), (512, 3)] from "128x4,512x3".

    Raises:
        ValueError: for anything else.
    """
    try:
        pairs = [tuple(int(number) for number in part.split("x")) for part in text.replace(" ", "").split(",")]
        return [(size, topk) for size, topk in pairs]
    except ValueError:
        raise ValueError(f"settings must be a list such as 128x4,512x3, got {text!r}") from None


def require_context(session: Session, length: int) -> None:
    """Refuse prompts that the model's context cannot hold.

    Raises:
        ValueError: saying how long it is.
    """
    limit = session.context_length
    if limit is not None and length > limit:
        raise ValueError(f"prompts of {length:,} tokens are asked for, but the model's context is {limit:,} tokens")


def _model(setup: Setup) -> str:
    return Path(setup.model).name if setup.model else "SmolLM2-135M-Instruct"


def _mean(records: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    means = {key: sum(record[key] for record in records) / len(records) for key in records[0]}
    return {**means, "layer": records[0]["layer"], "head": records[0]["head"]}
