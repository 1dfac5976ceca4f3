"""`python without_packages.py HIDDEN ARGUMENTS…`: the moba command where packages are missing.

HIDDEN: names by commas, or "bare" for all but what torch, typer and rich bring.
"""

from __future__ import annotations

import re
import sys
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires


def brought(*names):
    """These distributions and all that they need."""
    found, left = set(), list(names)
    while left:
        name = re.sub("[-_.]+", "-", left.pop()).lower()
        if name not in found:
            try:
                needed = requires(name) or []
            except PackageNotFoundError:
                continue
            found.add(name)
            left += [re.match("[A-Za-z0-9._-]+", need)[0] for need in needed if "extra ==" not in need]
    return found


def all_but(kept):
    """The top-level modules of every other distribution."""
    modules = packages_distributions().items()
    return {name for name, owners in modules if not {re.sub("[-_.]+", "-", o).lower() for o in owners} & kept}


class Hiding(PathFinder):
    """Finds no hidden package."""

    hidden: frozenset[str] = frozenset()

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] in cls.hidden else super().find_spec(fullname, path, target)


if __name__ == "__main__":
    given = sys.argv[1]
    is_bare = given == "bare"
    Hiding.hidden = frozenset(
        all_but(brought("torch", "typer", "rich", "moba") | {"moba-lab"}) if is_bare else given.split(",")
    )
    sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
    from moba_lab.__main__ import main

    sys.argv[:2] = ["moba"]
    main()
