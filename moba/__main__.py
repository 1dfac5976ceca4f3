"""`python -m moba`, and where the `moba` command starts: says what to install where typer or rich is missing."""

from __future__ import annotations

import sys

from moba import interrupt


def main() -> None:
    """Run the command line."""
    try:
        from moba.cli import main as run
    except ModuleNotFoundError as error:
        sys.stderr.write(f"moba: error: the command line needs {error.name}: pip install 'moba[cli]'\n")
        sys.exit(2)
    interrupt.restore()
    run()


if __name__ == "__main__":
    main()
