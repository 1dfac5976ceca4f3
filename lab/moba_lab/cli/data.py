"""`moba data`: tokenised training shards, from packages or from the user's own text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moba_lab.checks import require_folder, require_packages
from moba_lab.cli.options import OUT

if TYPE_CHECKING:
    from moba_lab.data.build import Unit
    from moba_lab.data.dialogues import DialoguePlan


def data(
    out: Annotated[Path | None, typer.Argument(metavar="FOLDER", help="Where shards and manifest go.")] = None,
    named: Annotated[Path | None, typer.Option(*OUT, metavar="FOLDER", help="Another way to say FOLDER.")] = None,
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="PATH",
            help="Your own text: a folder or file of .txt, .md, .rst (a document each) or .jsonl (one a line). "
            "May be given more than once.",
        ),
    ] = None,
    sources: Annotated[
        str, typer.Option(metavar="NAMES", help="Packages to read without --from: all, manuals, prose, code, or names.")
    ] = "all",
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Model whose tokenizer is used; by default the embedded SmolLM2-135M's."),
    ] = None,
    end_of_text: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", help="Ends each document.", show_default="<|endoftext|>, or the tokenizer's"),
    ] = None,
    text_key: Annotated[str, typer.Option(metavar="KEY", help="Where a JSON line holds its text.")] = "text",
    held_out: Annotated[
        float, typer.Option(metavar="SHARE", help="Of your own documents, or of those with questions, held out.")
    ] = 0.01,
    licence: Annotated[str, typer.Option(metavar="TEXT", help="Of your own text, for the manifest.")] = "not stated",
    retrieval: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Make questions about facts hidden in the training documents of this folder of `moba data`.",
        ),
    ] = None,
    lengths: Annotated[
        str,
        typer.Option(
            metavar="LIST", help="With --retrieval: tokens of a document (K means 1024); each gets an equal share."
        ),
    ] = "2K,4K,8K,16K,32K,32K",
    tokens: Annotated[int, typer.Option(metavar="N", help="With --retrieval: tokens in all.")] = 6_000_000,
    facts: Annotated[
        int, typer.Option(metavar="N", help="With --retrieval: facts in a document, at most; mostly there are fewer.")
    ] = 24,
    learned_text: Annotated[
        int, typer.Option(metavar="N", help="With --retrieval: tokens of the text that are learned, too.")
    ] = 128,
    tail: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="With --retrieval: all that is learned lies in a document's last N tokens, for training.tail.",
        ),
    ] = None,
    list_sources: Annotated[
        bool, typer.Option("--list", help="List the packages and their licences, and stop.")
    ] = False,
) -> None:
    """Build tokenised shards for `moba train`: long documents, none packed with a stranger.

    A build that was stopped goes on where it was when the command is given again; more sources can be added to a
    folder later. Examples:

        moba data data/permissive --sources manuals,prose

        moba data data/mine --from texts/ --from more.jsonl --tokenizer path/to/model

        moba data data/needle --retrieval data/permissive --lengths 4K,32K
    """  # fmt: skip
    if list_sources:
        _list()
        return
    if out is not None and named is not None:
        raise ValueError(f"FOLDER and --out say the same: got {out} and {named}")
    out = out or named
    if out is None:
        raise ValueError("name the folder to write to, as in: moba data data/mine --from texts/")
    require_packages("transformers")
    require_folder("out", out)

    from moba_lab.cli.session import messages, quieten, say
    from moba_lab.data.build import build
    from moba_lab.data.dialogues import retrieval_unit
    from moba_lab.models.load import EMBEDDED, load_tokenizer

    if retrieval is not None and texts:
        raise ValueError("--retrieval takes its texts from a folder of `moba data`; leave out --from")
    if retrieval is not None and retrieval.resolve() == out.resolve():
        raise ValueError(f"--retrieval reads its texts from {retrieval}: choose another folder to write to")
    # What can be wrong without the tokenizer is said before it is loaded.
    if retrieval is not None:
        plan = _retrieval_plan(
            retrieval, lengths, tokens=tokens, held_out=held_out, facts=facts, learned_text=learned_text, tail=tail
        )
    else:
        units = _own_units(texts, text_key, held_out, licence) if texts else _package_units(sources)
    quieten()
    name = tokenizer or EMBEDDED
    say(f"loading the tokenizer of {name} …")
    loaded = load_tokenizer(tokenizer)
    if retrieval is not None:
        units = [retrieval_unit(retrieval, loaded, plan)]
    with messages.status("starting …") as status:
        manifest = build(
            out, units, loaded, tokenizer_name=name, end_of_text=end_of_text,
            on_progress=lambda unit, tokens: status.update(f"{unit}: {tokens:,} tokens"),
            on_finished=lambda number, unit, tokens: say(f"{number} of {len(units)}: {unit}, {tokens:,} tokens"),
        )  # fmt: skip
    for split, key in (("training", "shards"), ("held out", "held_out")):
        num_documents = sum(len(shard["documents"]) for shard in manifest[key])
        num_tokens = sum(shard["tokens"] for shard in manifest[key])
        say(f"{split}: {num_tokens:,} tokens in {num_documents:,} documents")
    typer.echo(out)


def _package_units(names: str) -> list[Unit]:
    from moba_lab.data.packages import package_unit
    from moba_lab.data.sources import choose_sources

    return [package_unit(source) for source in choose_sources(name.strip() for name in names.split(","))]


def _own_units(paths: list[Path], text_key: str, held_out: float, licence: str) -> list[Unit]:
    from moba_lab.data.folder import folder_units

    return [
        unit
        for path in paths
        for unit in folder_units(path.expanduser(), text_key=text_key, held_out=held_out, licence=licence)
    ]


def _retrieval_plan(folder: Path, lengths: str, **values: Any) -> DialoguePlan:
    from moba_lab.cli.eval_setup import parse_lengths
    from moba_lab.data import open_shards
    from moba_lab.data.dialogues import DialoguePlan

    open_shards(folder)
    return DialoguePlan(tuple(parse_lengths(lengths)), **values)


def _list() -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from moba_lab.data.sources import GROUPS

    table = Table("group", "name", "package", "licence", "", box=SIMPLE_HEAD)
    for group, members in GROUPS.items():
        for source in members:
            package = f"{source.registry}: {source.candidates[0]}"
            table.add_row(group, source.name, package, source.licence, "held out" if source.held_out else "")
    Console(highlight=False).print(table)
