"""Shards: tokenised documents in flat files of little-endian integers, described by one manifest.

    folder/
      manifest.json     tokenizer, vocabulary size, every shard's documents and checksum, every source's licence
      train-00000.bin   the tokens of some documents, one after another
      held_out-00000.bin

The manifest is a JSON object with

    tokenizer, tokenizer_hash, vocab_size, dtype ("uint16", or "uint32" for vocabularies above 65,536)
    shards     [{file, sha256, tokens, documents: [[offset, length, source, name], …]}, …] for training; a document
               of which only parts are learned has their spans behind its name: [[first, one past the last], …]
    held_out   the same for evaluation
    sources    [{name, licence, …}, …]

A document is one file, page or text, and ends with the tokenizer's end of text. Different ones never lie in one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moba.config import require_int, require_one_of
from moba.files import read_json

MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"
SPLITS = {"train": "shards", "held_out": "held_out"}

_PROBE = "Mixture of Block Attention:\n\tx = [1, 2.5]  # naïve café — 100 %"


class Document(NamedTuple):
    """Where a document lies.

    Attributes:
        shard: index of its shard.
        offset, length: in tokens.
        source: the name of the source it is from.
        name: of the document in its source.
        learned: spans (first, one past the last) of the tokens that training learns to predict; None: all of them.
    """

    shard: int
    offset: int
    length: int
    source: str
    name: str
    learned: list[tuple[int, int]] | None = None


class Shards:
    """The documents of one split, memory-mapped; `open_shards` makes it.

    Attributes:
        folder: where the shards lie.
        manifest: the manifest, as read.
        documents: metadata of each document, in order.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], split: str) -> None:
        self.folder, self.manifest, self.split = folder, manifest, split
        self._shards: list[dict[str, Any]] = manifest[SPLITS[split]]
        self._dtype = np.dtype(manifest.get("dtype", "uint16")).newbyteorder("<")
        self.documents = [Document(i, *entry) for i, shard in enumerate(self._shards) for entry in shard["documents"]]
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> np.ndarray:
        """The tokens of a document: [length], uint16 (uint32 for large vocabularies), read-only, not copied."""
        document = self.documents[index]
        tokens = self._map(document.shard)
        return tokens[document.offset : document.offset + document.length]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(document.length for document in self.documents)

    def verify(self) -> None:
        """Read every shard and compare it with its checksum and the vocabulary.

        Raises:
            ValueError: naming the shard that is not what was written.
        """
        for i, shard in enumerate(self._shards):
            tokens = self._map(i)
            if hashlib.sha256(tokens.data).hexdigest() != shard["sha256"]:
                raise ValueError(f"{self.folder / shard['file']} is corrupt: it does not have the manifest's checksum")
            if int(tokens.max()) >= self.manifest["vocab_size"]:
                raise ValueError(
                    f"{self.folder / shard['file']} holds token {int(tokens.max())}, "
                    f"but the vocabulary has {self.manifest['vocab_size']}"
                )

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.folder / self._shards[shard]["file"], dtype=self._dtype, mode="r")
        return self._maps[shard]

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes map the files themselves: pickling a map would copy it.
        return {**self.__dict__, "_maps": {}}


def open_shards(folder: str | Path, split: str = "train", *, tokenizer: Any = None) -> Shards:
    """Open the shards of a folder.

    Args:
        folder: that `moba data` wrote.
        split: "train" or "held_out".
        tokenizer: of the model that will read them; None does not check that it is the one they were made with.

    Returns:
        the documents of the split: `len(shards)` of them, `shards[i]` the tokens.

    Raises:
        ValueError: if there is no finished manifest, or it is damaged, the split holds no documents, a shard is
            missing, empty or of another size than written, or the tokenizer is another one.
    """
    folder = Path(folder)
    if split not in SPLITS:
        raise ValueError(f"split must be one of {sorted(SPLITS)}, got {split!r}")
    manifest = read_manifest(folder)
    if tokenizer is not None and tokenizer_hash(tokenizer) != manifest["tokenizer_hash"]:
        raise ValueError(
            f"{folder} was made with the tokenizer of {manifest['tokenizer']}, which is not the given model's: "
            "build the data with `moba data --tokenizer` of the model"
        )
    try:
        require_one_of("dtype", manifest.get("dtype", "uint16"), ("uint16", "uint32"))
        require_int("vocab_size", manifest["vocab_size"], 1)
        shards = Shards(folder, manifest, split)
        for shard in manifest[SPLITS[split]]:
            _check_entry(shard)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / MANIFEST} is no manifest that `moba data` wrote: {error}") from None
    for shard in manifest[SPLITS[split]]:
        _check_shard(folder, shard, shards._dtype.itemsize)
    if not len(shards):
        advice = "; `moba data --held-out SHARE` sets some apart" if split == "held_out" else ""
        raise ValueError(f"{folder} holds no documents for split={split!r}{advice}")
    return shards


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished build.

    Raises:
        ValueError: if there is none, or it is not one.
    """
    path = folder / MANIFEST
    if not folder.exists():
        raise ValueError(f"there is no folder {folder}: make it with `moba data {folder} …`")
    if not path.is_file():
        if (folder / UNFINISHED).is_file():
            raise ValueError(f"{folder} is an unfinished build: run the same `moba data` command again, it goes on")
        raise ValueError(f"{folder} holds no {MANIFEST}: it is not a folder that `moba data` wrote")
    return load_manifest(path)


def load_manifest(path: Path) -> dict[str, Any]:
    """A manifest, finished or not, from its file.

    Raises:
        ValueError: if it is not one.
    """
    manifest = read_json(path)
    needed = ("tokenizer", "tokenizer_hash", "vocab_size", "shards", "held_out", "sources")
    if missing := [key for key in needed if key not in manifest]:
        raise ValueError(f"{path} is no manifest that `moba data` wrote: it lacks {', '.join(missing)}")
    if not all(isinstance(source, dict) and "name" in source for source in manifest["sources"]):
        raise ValueError(f"{path} is no manifest that `moba data` wrote: its sources have no names")
    return manifest


def _check_entry(shard: dict[str, Any]) -> None:
    """Check what a manifest says of a shard.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: saying what is wrong.
    """
    name, num_tokens, _ = shard["file"], require_int("tokens", shard["tokens"], 1), shard["sha256"]
    if Path(name).name != name:
        raise ValueError(f"the file {name!r} lies outside its folder")
    for offset, length, source, document, *learned in shard["documents"]:
        require_int("a document's offset", offset, 0)
        require_int("a document's length", length, 1)
        if offset + length > num_tokens:
            raise ValueError(f"the document {document!r} lies outside {name}")
        if not isinstance(source, str) or not isinstance(document, str):
            raise TypeError(f"a document's source and name must be texts, got {source!r} and {document!r}")
        for first, stop in learned[0] if learned else ():
            require_int("a learned span's end", stop, require_int("a learned span's start", first, 0))


def _check_shard(folder: Path, shard: dict[str, Any], item_bytes: int) -> None:
    path = folder / shard["file"]
    if not path.is_file():
        raise ValueError(f"{path} is missing, but the manifest names it")
    size, expected = path.stat().st_size, shard["tokens"] * item_bytes
    if not size:
        raise ValueError(f"{path} is empty, the manifest says {shard['tokens']:,} tokens")
    if size != expected:
        raise ValueError(f"{path} is corrupt: {size:,} bytes, {expected:,} were written")


def tokenizer_hash(tokenizer: Any) -> str:
    """A digest of what a tokenizer does: its vocabulary and how it cuts a line of text.

    Two tokenizers of one digest give one text the same ids, also if one was loaded from GGUF and one from JSON.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    probe = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    return hashlib.sha256(json.dumps([vocabulary, probe]).encode()).hexdigest()


class ShardWriter:
    """Writes the documents of one source into new shards.

    Args:
        folder: of the shards.
        split: "train" or "held_out".
        start: number of the first file.
        dtype: numpy dtype of a token.
        max_tokens: a shard is closed once it holds this many.
    """

    def __init__(self, folder: Path, split: str, start: int, dtype: str, max_tokens: int = 1 << 26) -> None:
        self._folder, self._split, self._next = folder, split, start
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._max_tokens = max_tokens
        self._file: Any = None
        self.shards: list[dict[str, Any]] = []

    def add(
        self,
        tokens: np.ndarray | list[int],
        source: str,
        name: str,
        learned: list[tuple[int, int]] | None = None,
    ) -> None:
        """Append a document of at least one token, of which only the spans `learned` are learned if there are any."""
        if self._file is None:
            file = f"{self._split}-{self._next:05}.bin"
            self._next += 1
            self._file = (self._folder / file).open("wb")
            self._hash = hashlib.sha256()
            self.shards.append({"file": file, "sha256": "", "tokens": 0, "documents": []})
        data = np.asarray(tokens, dtype=self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        shard = self.shards[-1]
        entry = [shard["tokens"], len(tokens), source, name]
        shard["documents"].append(entry if learned is None else [*entry, learned])
        shard["tokens"] += len(tokens)
        if shard["tokens"] >= self._max_tokens:
            self.close()

    def abandon(self) -> None:
        """Remove the file of a shard that is not finished; no manifest names it."""
        if self._file is not None:
            with suppress(OSError):  # what is buffered may not fit the disk
                self._file.close()
            Path(self._file.name).unlink(missing_ok=True)
            self._file = None

    def close(self) -> list[dict[str, Any]]:
        """Bring everything to the disk; the manifest's entries of the shards written."""
        if self._file is not None:
            with self._file as file:
                file.flush()
                os.fsync(file.fileno())
            self.shards[-1]["sha256"] = self._hash.hexdigest()
            self._file = None
        return self.shards
