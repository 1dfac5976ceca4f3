"""`python -m moba`, and where the `moba` command starts: says what to install where typer or rich is missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from moba.cli import main as run
    except ModuleNotFoundError as error:
        print(f"moba: error: the command line needs {error.name}: pip install 'moba[cli]'", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
