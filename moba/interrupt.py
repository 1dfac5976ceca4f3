"""Ctrl-C before the command line has begun: imported before torch, whose own import takes seconds.

While torch is imported, a KeyboardInterrupt may be swallowed or abort the process, and at best ends in a traceback, as
no line of a command can run before its package is imported. Signals that end the process at once have no such ways.
"""

from __future__ import annotations

import os
import signal
import sys


def _is_command() -> bool:
    """Whether Python was started as `moba` or `python -m moba`; "-m" stands for a module that is yet to be found."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    return name == "moba" or (name == "-m" and "moba" in sys.orig_argv)


def restore() -> None:
    """Let Ctrl-C be a KeyboardInterrupt again."""
    if _ends_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# A shell's background jobs ignore the signal, and shall.
_ends_at_once = _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _ends_at_once:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
