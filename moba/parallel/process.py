"""How a process of a torch.distributed group ends."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch.distributed as dist


def end_process(code: int = 0) -> NoReturn:
    """End this process with an exit code, after all processes of its group got here.

    gloo's threads outlive `destroy_process_group`, and one that lets go of a tensor while the interpreter shuts down
    aborts the process (pytorch issue 190489). So the interpreter does not shut down: what `atexit` would call is not
    called, only the standard streams are flushed.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
