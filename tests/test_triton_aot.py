"""Kernels compile ahead of time for every architecture, within its shared memory. Needs no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="the triton backend needs Triton")

from moba.backends.triton import aot
from moba.backends.triton.case import Case
from moba.backends.triton.tuning import ARCHITECTURES, TABLE, Row, lookup


def compile_all(*arguments):
    """The command's output, in a process whose kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "moba.backends.triton.aot", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_representative_kernels_compile():
    result = compile_all()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 failed" in result.stdout
    for arch in ARCHITECTURES:
        assert re.search(rf"select bfloat16 D=128 topk=8 plain +{arch} ", result.stdout)


def test_a_kernel_that_needs_too_much_shared_memory_fails(monkeypatch, capsys):
    monkeypatch.setattr(aot, "cases", lambda arch, full: iter([Case("too large", None, {})]))

    def compile_case(case, arch):
        raise RuntimeError("too large needs 2 bytes")

    monkeypatch.setattr(aot, "compile_case", compile_case)
    monkeypatch.setattr(aot.triton.knobs.runtime, "interpret", False)
    assert aot.main(["--arch", "90"]) == 1
    assert "failed: too large needs 2 bytes" in capsys.readouterr().out


def test_arguments_are_specialised_as_a_launch_does():
    assert aot._argument_type(torch.empty(0, dtype=torch.bfloat16, device="meta"), True) == ("*bf16", True)
    assert aot._argument_type(48, True) == ("i32", True)
    assert aot._argument_type(48, False) == ("i32", False)
    assert aot._argument_type(7, True) == ("i32", False)
    assert aot._argument_type(2**40, True) == ("i64", True)
    assert aot._argument_type(1, True) == ("constexpr", False)
    assert aot._argument_type(None, True) == ("constexpr", False)
    assert aot._argument_type(0.5, True) == ("fp32", False)


@pytest.mark.parametrize("kernel", TABLE)
def test_every_launch_has_a_configuration(kernel):
    for arch in ARCHITECTURES:
        for head_dim in (16, 64, 256):
            for block_size in (1, 128, 4096):
                for element_bytes in (2, 4):
                    options = {"head_dim": head_dim, "block_size": block_size, "element_bytes": element_bytes}
                    assert lookup(kernel, arch, **options)


def test_the_first_row_that_fits_is_taken():
    row = Row({}, arch=(90,), max_head_dim=64, max_block_size=128, element_bytes=2)
    assert row.fits(90, 64, 128, 2)
    assert not row.fits(80, 64, 128, 2)
    assert not row.fits(90, 128, 128, 2)
    assert not row.fits(90, 64, 256, 2)
    assert not row.fits(90, 64, 128, 4)
