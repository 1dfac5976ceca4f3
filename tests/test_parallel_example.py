"""examples/context_parallel.py as its first lines say, over gloo."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = str(Path(__file__).parent.parent / "examples" / "context_parallel.py")


def launched(*arguments):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, EXAMPLE, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tokens", "1000"], ["rank 0: tokens 0 to 383 of 1000", "rank 1: tokens 384 to 999 of 1000"]),
        (["--tokens", "100", "--transport", "heads"], ["rank 0: no tokens", "rank 1: tokens 0 to 99 of 100"]),
    ],
)
def test_two_processes_share_a_sequence(arguments, expected):
    result = launched(*arguments)
    assert result.returncode == 0, result.stderr
    assert sorted(re.findall(r"^rank \d: [^;\n]*", result.stdout, re.MULTILINE)) == expected


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "start it with torchrun: torchrun --nproc-per-node 2 examples/context_parallel.py"),
        (["--tokens", "0"], {"RANK": "0"}, "--tokens must be at least 1, got 0"),
    ],
)
def test_how_it_is_started_is_said(arguments, environment, message):
    environment = {**{name: value for name, value in os.environ.items() if name != "RANK"}, **environment}
    result = subprocess.run([sys.executable, EXAMPLE, *arguments], capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
