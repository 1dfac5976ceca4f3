"""Building shards unit by unit: a killed build goes on with the first unit that it had not finished."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moba.files import write_json
from moba_lab.data.shards import MANIFEST, SPLITS, UNFINISHED, ShardWriter, load_manifest, tokenizer_hash
from moba_lab.lines import locked

# Characters given to the tokenizer at once: enough for all its threads.
_CHARS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Text:
    """One document.

    Attributes:
        name: of the document in its source.
        parts: its text in order, cut where it may be tokenised apart (between the files of a package).
        held_out: whether it is kept for evaluation.
    """

    name: str
    parts: list[str]
    held_out: bool = False


@dataclass(frozen=True)
class Tokens:
    """One document that is tokens already.

    Attributes:
        name: of the document in its source.
        tokens: int [n], without the end of text.
        learned: spans (first, one past the last) of the tokens that training learns to predict; None: all.
        held_out: whether it is kept for evaluation.
    """

    name: str
    tokens: np.ndarray
    learned: list[tuple[int, int]] | None = None
    held_out: bool = False


@dataclass(frozen=True)
class Unit:
    """What is built in one go: a source of the manifest.

    Attributes:
        name: of the source.
        about: what the manifest says of it, its licence at least.
        read: given an empty folder to work in, returns what else the manifest should say, and the documents.
    """

    name: str
    about: dict[str, Any]
    read: Callable[[Path], tuple[dict[str, Any], Iterable[Text | Tokens]]]


def build_shards(
    folder: Path,
    units: list[Unit],
    tokenizer: Any,
    *,
    tokenizer_name: str,
    end_of_text: str | None = None,
    on_progress: Callable[[str, int], None] = lambda name, num_tokens: None,
    on_finished: Callable[[int, str, int], None] = lambda number, name, num_tokens: None,
) -> dict[str, Any]:
    """Tokenise every unit that the folder does not hold yet.

    Args:
        folder: where shards and manifest go.
        units: what to build, in order; units of before that are not named now stay.
        tokenizer: of transformers. Special tokens written out in the text are text to it.
        tokenizer_name: for the manifest.
        end_of_text: token behind every document; by default `<|endoftext|>` if there is one, else the tokenizer's own.
        on_progress: called with a unit's name and the number of its tokens so far.
        on_finished: called with the number of units done, the unit's name and its tokens.

    Returns:
        the manifest.

    Raises:
        ValueError: if the folder was built with another tokenizer or end of text, a unit has changed since it was
            built, two units have one name, or units failed (the others are built, and are not built again).
        OSError: if files cannot be written; the units finished before stay.
    """
    with locked(folder):
        manifest = _start(folder, tokenizer, tokenizer_name, end_of_text)
        done = {source["name"]: source for source in manifest["sources"]}
        for number, unit in enumerate(units):
            if unit.name in (other.name for other in units[:number]):
                raise ValueError(f"two sources are called {unit.name}: rename one, or put both into one folder")
            if unit.name in done and any(done[unit.name].get(key) != value for key, value in unit.about.items()):
                raise ValueError(f"{unit.name} has changed since it was built into {folder}: choose another folder")
        left = [unit for unit in units if unit.name not in done]
        failures = []
        for unit in left:
            try:
                _add(folder, unit, tokenizer, manifest, on_progress)
            except ValueError as error:
                failures.append(str(error))
                continue
            except OSError as error:
                what = (
                    f"{error.strerror or error}; finished sources stay, and the same command goes on with {unit.name}"
                )
                raise OSError(error.errno, what, error.filename or str(folder)) from error
            write_json(folder / UNFINISHED, manifest)
            num_done = len(units) - len(left) + left.index(unit) + 1
            on_finished(num_done, unit.name, manifest["sources"][-1]["tokens"])
        if failures:
            raise ValueError(f"{len(failures)} of {len(left)} not built: {'; '.join(failures)}")
        write_json(folder / MANIFEST, manifest)
        (folder / UNFINISHED).unlink(missing_ok=True)
    return manifest


def _start(folder: Path, tokenizer: Any, tokenizer_name: str, end_of_text: str | None) -> dict[str, Any]:
    """The manifest to go on from, a new one in an empty folder."""
    vocab_size = len(tokenizer)
    fresh = {
        "tokenizer": tokenizer_name,
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "vocab_size": vocab_size,
        "dtype": "uint16" if vocab_size <= 1 << 16 else "uint32",
        "end_of_text": end_token(tokenizer, end_of_text),
        "shards": [],
        "held_out": [],
        "sources": [],
    }
    path = next((path for path in (folder / UNFINISHED, folder / MANIFEST) if path.is_file()), None)
    if path is None:
        return fresh
    manifest = load_manifest(path)
    for key, what in (("tokenizer_hash", "tokenizer"), ("end_of_text", "end of text")):
        if manifest.get(key) != fresh[key]:
            raise ValueError(f"{folder} holds data built with another {what}: choose another folder")
    return manifest


def _add(
    folder: Path,
    unit: Unit,
    tokenizer: Any,
    manifest: dict[str, Any],
    on_progress: Callable[[str, int], None],
) -> None:
    """Build one unit and enter it into the manifest."""
    writers = {
        split: ShardWriter(folder, split, len(manifest[key]), manifest["dtype"]) for split, key in SPLITS.items()
    }
    num_tokens = num_documents = 0
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        found, texts = unit.read(work)
        for text in _tokenised(texts, tokenizer):
            tokens = np.append(text.tokens, manifest["end_of_text"])
            writers["held_out" if text.held_out else "train"].add(tokens, unit.name, text.name, text.learned)
            num_tokens += len(tokens)
            num_documents += 1
            on_progress(unit.name, num_tokens)
        shards = {split: writer.close() for split, writer in writers.items()}
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for writer in writers.values():
            writer.abandon()
    if not num_documents:
        raise ValueError(f"{unit.name} holds no text")
    for split, key in SPLITS.items():
        manifest[key] += shards[split]
    manifest["sources"].append(
        {"name": unit.name, **unit.about, **found, "documents": num_documents, "tokens": num_tokens}
    )


def _tokenised(texts: Iterable[Text | Tokens], tokenizer: Any) -> Iterator[Tokens]:
    """Each document as tokens, many tokenised at once."""
    waiting: list[Text] = []
    size = 0
    for text in texts:
        if isinstance(text, Tokens):
            yield text
            continue
        waiting.append(text)
        size += sum(map(len, text.parts))
        if size >= _CHARS_AT_ONCE:
            yield from _tokenise(waiting, tokenizer)
            waiting, size = [], 0
    yield from _tokenise(waiting, tokenizer)


def _tokenise(texts: list[Text], tokenizer: Any) -> Iterator[Tokens]:
    if not texts:
        return
    parts = [part for text in texts for part in text.parts]
    pieces = iter(
        tokenizer(
            parts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False,
            return_token_type_ids=False, verbose=False,
        )["input_ids"]
    )  # fmt: skip
    for text in texts:
        # Of the smallest dtype that serves every vocabulary: a document may have millions of tokens.
        ids = [np.asarray(next(pieces), dtype=np.uint32) for _ in text.parts]
        yield Tokens(text.name, np.concatenate(ids), held_out=text.held_out)


def end_token(tokenizer: Any, name: str | None = None) -> int:
    """The token that ends a document. A chat model's own end of text often is that of a turn.

    Raises:
        ValueError: if there is none, or none of that name.
    """
    vocabulary = tokenizer.get_vocab()
    name = name or ("<|endoftext|>" if "<|endoftext|>" in vocabulary else tokenizer.eos_token)
    if name is None or name not in vocabulary:
        raise ValueError(f"end_of_text must be a token of the tokenizer, got {name!r}")
    return vocabulary[name]
