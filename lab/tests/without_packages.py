"""`python without_packages.py HIDDEN`: the moba command where packages are missing.

HIDDEN: names by commas, "all" for none, or "bare" for all but what torch, typer and rich bring. Each line of standard
input is [arguments, packages hidden for them, too] in JSON, and is answered by [exit code, output, errors].
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from tempfile import TemporaryFile


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


def answer(arguments, hidden):
    """Run the command in a copy of this process; its exit code, standard output and standard error."""
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        if (child := os.fork()) == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            Hiding.hidden |= set(hidden)
            sys.argv = ["moba", *arguments]
            try:
                main()
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        err.seek(0)
        return code, out.read(), err.read()


if __name__ == "__main__":
    if sys.argv[1] == "bare":
        Hiding.hidden = frozenset(all_but(brought("torch", "typer", "rich", "moba") | {"moba-lab"}))
    elif sys.argv[1] != "all":
        Hiding.hidden = frozenset(sys.argv[1].split(","))
    sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
    from moba_lab.__main__ import main

    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line))), flush=True)
