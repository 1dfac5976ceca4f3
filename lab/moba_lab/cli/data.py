"""`moba data`: tokenised training shards, from the user's own text or of questions about other shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moba_lab.checks import require_folder, require_packages
from moba_lab.cli.options import OUT

if TYPE_CHECKING:
    from moba_lab.data.build import Unit


TokenizerOption = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Model whose tokenizer is used; by default the embedded SmolLM2-135M's."),
]
EndOption = Annotated[
    str | None,
    typer.Option(metavar="TOKEN", help="Ends each document.", show_default="<|endoftext|>, or the tokenizer's"),
]


def _of_questions(what: str, metavar: str = "N") -> Any:
    return typer.Option(metavar=metavar, help=f"With --retrieval: {what}")


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
    tokenizer: TokenizerOption = None,
    end_of_text: EndOption = None,
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
        str, _of_questions("tokens of a document (K means 1024); each gets an equal share.", metavar="LIST")
    ] = "2K,4K,8K,16K,32K,32K",
    tokens: Annotated[int, _of_questions("tokens in all.")] = 6_000_000,
    facts: Annotated[int, _of_questions("facts in a document, at most; mostly there are fewer.")] = 24,
    learned_text: Annotated[int, _of_questions("tokens of the text that are learned, too.")] = 128,
    tail: Annotated[
        int | None, _of_questions("all that is learned lies in a document's last N tokens, for training.tail.")
    ] = None,
) -> None:
    """Build tokenised shards for `moba train`: long documents, none packed with a stranger.

    A build that was stopped goes on where it was when the command is given again; more sources can be added to a
    folder later. Examples:

        moba data data/mine --from texts/ --from more.jsonl --tokenizer path/to/model

        moba data data/needle --retrieval data/permissive --lengths 4K,32K
    """  # fmt: skip
    if out is not None and named is not None:
        raise ValueError(f"FOLDER and --out say the same: got {out} and {named}")
    out = out or named
    if out is None:
        raise ValueError("name the folder to write to, as in: moba data data/mine --from texts/")
    if retrieval is None and not texts:
        raise ValueError(
            "--from names your text, --retrieval a folder of `moba data`; recipes/package_texts.py has more"
        )
    if retrieval is None:
        units = _own_units(texts or [], text_key, held_out, licence)
        build_shards(out, lambda _: units, tokenizer, end_of_text)
        return
    if texts:
        raise ValueError("--retrieval takes its texts from a folder of `moba data`; leave out --from")
    if retrieval.resolve() == out.resolve():
        raise ValueError(f"--retrieval reads its texts from {retrieval}: choose another folder to write to")
    require_packages("transformers")
    from moba_lab.cli.eval_setup import parse_lengths
    from moba_lab.data import open_shards
    from moba_lab.data.dialogues import DialoguePlan, retrieval_unit

    open_shards(retrieval)
    plan = DialoguePlan(
        tuple(parse_lengths(lengths)), tokens=tokens, held_out=held_out, facts=facts, learned_text=learned_text,
        tail=tail,
    )  # fmt: skip
    build_shards(out, lambda loaded: [retrieval_unit(retrieval, loaded, plan)], tokenizer, end_of_text)


def _own_units(paths: list[Path], text_key: str, held_out: float, licence: str) -> list[Unit]:
    require_packages("transformers")
    from moba_lab.data.folder import folder_units

    return [
        unit
        for path in paths
        for unit in folder_units(path.expanduser(), text_key=text_key, held_out=held_out, licence=licence)
    ]


def build_shards(
    out: Path, make_units: Callable[[Any], list[Unit]], tokenizer: str | None, end_of_text: str | None
) -> None:
    """Build what `make_units` makes for the loaded tokenizer, and say how far it is.

    Raises:
        ModuleNotFoundError: without transformers.
        ValueError, OSError: as `moba_lab.data.build.build_shards`, or without such a tokenizer.
    """
    require_packages("transformers")
    require_folder("out", out)

    from moba_lab.cli.session import messages, quieten, say
    from moba_lab.data.build import build_shards
    from moba_lab.models.load import EMBEDDED, load_tokenizer

    quieten()
    name = tokenizer or EMBEDDED
    say(f"loading the tokenizer of {name} …")
    loaded = load_tokenizer(tokenizer)
    units = make_units(loaded)
    with messages.status("starting …") as status:
        manifest = build_shards(
            out, units, loaded, tokenizer_name=name, end_of_text=end_of_text,
            on_progress=lambda unit, tokens: status.update(f"{unit}: {tokens:,} tokens"),
            on_finished=lambda number, unit, tokens: say(f"{number} of {len(units)}: {unit}, {tokens:,} tokens"),
        )  # fmt: skip
    for split, key in (("training", "shards"), ("held out", "held_out")):
        num_documents = sum(len(shard["documents"]) for shard in manifest[key])
        num_tokens = sum(shard["tokens"] for shard in manifest[key])
        say(f"{split}: {num_tokens:,} tokens in {num_documents:,} documents")
    typer.echo(out)
