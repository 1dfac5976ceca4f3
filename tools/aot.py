"""Compile every kernel ahead of time, without a GPU: `python tools/aot.py [--full]`.

For every architecture, the variants of aot_cases.py are compiled to machine code; a table shows registers, spills and
shared memory. A kernel that needs more shared memory than the chip can give to one program is a failure.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from aot_cases import Case
from aot_cases import cases as all_cases
from triton.backends.compiler import GPUTarget

from moba.backends.triton.tuning import ARCHITECTURES
from moba.backends.triton.variants import Variant

# Shared memory that one program may opt in to, in bytes.
SHARED_LIMIT_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}


@dataclass(frozen=True)
class Report:
    """What the compiler said of one kernel. `registers` and `spill_bytes` are a thread's, None if unknown."""

    shared_bytes: int
    registers: int | None
    spill_bytes: int | None
    seconds: float


def cases(arch: int, full: bool) -> Iterator[Case]:
    """Every case for one architecture, or only the representative ones."""
    return (case for case in all_cases(arch) if full or case.representative)


def compile_variant(variant: Variant, arch: int, limit_bytes: int | None = None) -> Report:
    """Compile for one architecture.

    Args:
        limit_bytes: shared memory that a program may take; that of the chip by default.

    Raises:
        RuntimeError: if the kernel needs more.
    """
    limit_bytes = SHARED_LIMIT_BYTES[arch] if limit_bytes is None else limit_bytes
    start = time.perf_counter()
    kernel = variant.compile(GPUTarget("cuda", arch, 32))
    seconds = time.perf_counter() - start
    shared = kernel.metadata.shared
    if shared > limit_bytes:
        raise RuntimeError(f"needs {shared} bytes of shared memory, sm_{arch} has {limit_bytes}")
    registers, spill_bytes = _resources(kernel.asm["cubin"])
    return Report(shared, registers, spill_bytes, seconds)


def _first_cause(error: BaseException) -> BaseException:
    """What the compiler met inside the functions that it compiles one within another."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _resources(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers and spilled bytes of a thread, read off the machine code by the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    return int(registers[1]) if registers else None, int(stack[1]) if stack else None


def main(argv: list[str] | None = None) -> int:
    """Compile and print a table; 1 if any case fails."""
    parser = argparse.ArgumentParser(description="Compile every Triton kernel ahead of time and print what it uses.")
    parser.add_argument("--full", action="store_true", help="every dtype, head dim and configuration; over an hour")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="only these architectures")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    options = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("Triton's interpreter is on (TRITON_INTERPRET); it cannot compile")
    failures = count = 0
    print(f"{'kernel':<56} {'arch':>5} {'regs':>5} {'spill':>6} {'shared':>7} {'seconds':>8}")
    for arch in options.arch or ARCHITECTURES:
        for case in cases(arch, options.full):
            if options.only not in case.name:
                continue
            count += 1
            try:
                report = compile_variant(case.variant, arch)
            except Exception as error:
                failures += 1
                print(f"{case.name:<56} {arch:>5} failed: {_first_cause(error)}")
                continue
            print(
                f"{case.name:<56} {arch:>5} {report.registers!s:>5} {report.spill_bytes!s:>6} "
                f"{report.shared_bytes:>7} {report.seconds:>8.1f}",
                flush=True,
            )
    print(f"{count} compiled, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
