"""Text out of a user's own files: plain text, one document a file, and JSON lines, one document a line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moba.files import check_text, parse_json
from moba_lab.data.build import Text, Unit

TEXT_ENDINGS = (".txt", ".md", ".rst", ".text")
JSON_ENDINGS = (".jsonl", ".ndjson")
_BYTES_PER_UNIT = 1 << 26


def folder_units(path: Path, *, text_key: str, held_out: float, licence: str) -> list[Unit]:
    """Cut a folder's files into units of about 64 MB, each done in one go, `folder/0`, `folder/1`, …; a file is one.

    Args:
        path: a folder, read with all below it, or one file.
        text_key: where a JSON line holds its text.
        held_out: share of the documents to hold out; which ones depends on their names only.
        licence: of the texts.

    Raises:
        ValueError: if there is no file of a known kind, or `held_out` is no share.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be a share, 0 <= held_out < 1, got {held_out}")
    endings = TEXT_ENDINGS + JSON_ENDINGS
    if not path.exists():
        raise ValueError(f"there is no {path}")
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    files = [file for file in found if file.suffix.lower() in endings]
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"{path} holds no text: files must end in {', '.join(endings)}, and not be empty")
    if path.is_file():
        return [_unit(path.name, files, path.parent, text_key, held_out, licence)]
    groups: list[list[Path]] = [[]]
    size = 0
    for file in files:
        if size >= _BYTES_PER_UNIT:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += file.stat().st_size
    name = path.resolve().name
    return [_unit(f"{name}/{i}", group, path, text_key, held_out, licence) for i, group in enumerate(groups)]


def _unit(unit: str, files: list[Path], root: Path, text_key: str, held_out: float, licence: str) -> Unit:
    names = [file.relative_to(root).as_posix() for file in files]
    state = [[name, file.stat().st_size, file.stat().st_mtime_ns] for name, file in zip(names, files, strict=True)]
    digest = hashlib.sha256(json.dumps(state).encode()).hexdigest()

    def read(work: Path) -> tuple[dict[str, Any], Iterator[Text]]:
        return {"files": len(files)}, _texts(files, names, text_key, held_out)

    return Unit(unit, {"licence": licence, "state": digest}, read)


def _texts(files: list[Path], names: list[str], text_key: str, held_out: float) -> Iterator[Text]:
    for file, name in zip(files, names, strict=True):
        if file.suffix.lower() in JSON_ENDINGS:
            yield from _json_texts(file, name, text_key, held_out)
        else:
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}: not UTF-8 (byte {error.start})") from None
            if text.strip():
                yield Text(name, [text], is_held_out(name, held_out))


def _json_texts(file: Path, name: str, text_key: str, held_out: float) -> Iterator[Text]:
    with file.open("rb") as lines:
        for number, data in enumerate(lines, start=1):
            if not data.strip():
                continue
            where = f"{file}, line {number}"
            value = parse_json(data, where)
            text = value.get(text_key) if isinstance(value, dict) else None
            if not isinstance(text, str):
                raise ValueError(f"{where}: must be a JSON object with a text {text_key!r}")
            check_text(where, text)
            if text.strip():
                yield Text(f"{name}:{number}", [text], is_held_out(f"{name}:{number}", held_out))


def is_held_out(name: str, share: float) -> bool:
    """Whether a document of this name is among the share that is held out."""
    # A file's name need not be UTF-8.
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:6], "big") < share * 2**48
