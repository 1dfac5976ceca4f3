"""`python -m moba_lab`, and where the `moba` command starts: says what to install where typer or rich is missing."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command line."""
    # While torch is imported, which takes seconds, a KeyboardInterrupt may be swallowed or abort the process, and at
    # best ends in a traceback; the signal's default ends the process at once. A shell's background jobs ignore it.
    ends_at_once = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ends_at_once:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from moba_lab.cli import main as run
    except ModuleNotFoundError as error:
        sys.stderr.write(f"moba: error: the command line needs {error.name}: pip install moba-lab\n")
        sys.exit(2)
    if ends_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
