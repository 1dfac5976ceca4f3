"""lm-eval with MoBA: its command, in a process in which transformers knows "moba"."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from moba.config import MoBAConfig
from moba.hf import register_moba


def run_lm_eval(config: MoBAConfig, arguments: Sequence[str]) -> None:
    """Run lm-eval's command line.

    Args:
        config: of every model that does not carry its own.
        arguments: lm-eval's; `--model hf --model_args pretrained=…,attn_implementation=moba` chooses MoBA.

    Raises:
        ModuleNotFoundError: if lm-eval is not installed.
    """
    from lm_eval.__main__ import cli_evaluate

    register_moba(config)
    before = sys.argv
    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
