"""Kernels touch no byte outside their tensors. On a GPU, or in the interpreter; in processes that may die of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the triton backend needs Triton")
if not (triton.knobs.runtime.interpret or torch.cuda.is_available()):
    pytest.skip("Triton kernels need a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from guard import guarded  # noqa: E402

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"


def run(what, *arguments):
    """Run a line of this file in a process of its own."""
    code = f"import sys; sys.path[:0] = sys.argv[1:2]; import guard_cases; guard_cases.{what}(*sys.argv[2:])"
    command = [sys.executable, "-X", "faulthandler", "-c", code, str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=1200)


@pytest.mark.parametrize("at_end", [True, False])
def test_guards_work(at_end):
    x = torch.randn(3, 5, device=DEVICE).t()
    copy = guarded(x, at_end)
    assert torch.equal(copy, x)
    assert copy.stride() == x.stride()
    result = run("touch_outside", DEVICE, str(at_end))
    assert result.returncode != 0
    assert "was read" not in result.stdout


@pytest.mark.parametrize("side", ["end", "begin"])
@pytest.mark.parametrize("what", ["attention", "decoding"])
def test_nothing_is_touched_outside_the_tensors(what, side):
    result = run(what, DEVICE, side)
    assert result.returncode == 0, f"died in {result.stdout.splitlines()[-1:]}\n{result.stderr[-3000:]}"
    assert result.stdout.splitlines()[-1] == "all done"
