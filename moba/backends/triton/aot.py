"""Compile every kernel ahead of time, without a GPU: `python -m moba.backends.triton.aot [--full]`.

Each kernel file offers `aot_cases(arch)`, which yields `Case`s: a kernel with the arguments one launch would give it,
tensors on the "meta" device. For every architecture this compiles them to machine code, prints registers, spills and
shared memory, and fails if a kernel needs more shared memory than the chip can give to one program.

To add a kernel: build its launch arguments in one function that the launcher and `aot_cases` share, yield
`Case(name, kernel, arguments)`, with `representative=True` for the few that CI compiles, and name the file in MODULES.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from moba.backends.triton.case import Case
from moba.backends.triton.tuning import ARCHITECTURES

MODULES = ("means", "route", "by_block", "attend_cases", "decode_cases")

# Shared memory that one program may opt in to, in bytes.
SHARED_LIMIT_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}

LAUNCH_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
POINTER_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Report:
    """What the compiler said of one kernel. `registers` and `spill_bytes` are a thread's, None if unknown."""

    shared_bytes: int
    registers: int | None
    spill_bytes: int | None
    seconds: float


def cases(arch: int, full: bool) -> Iterator[Case]:
    """Every case of every kernel file for one architecture, or only the representative ones."""
    for module in MODULES:
        for case in importlib.import_module(f"moba.backends.triton.{module}").aot_cases(arch):
            if full or case.representative:
                yield case


def source(case: Case) -> tuple[ASTSource, dict[str, int]]:
    """The case as Triton's compiler takes it, specialised as a launch would (divisible by 16, equal to 1, None).

    Returns:
        The source and the launch options.
    """
    arguments = dict(case.arguments)
    options = {name: arguments.pop(name) for name in LAUNCH_OPTIONS if name in arguments}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for parameter in case.kernel.params:
        value = arguments.pop(parameter.name)
        kind, is_divisible = _argument_type(value, specialize=not parameter.do_not_specialize)
        if parameter.is_constexpr or kind == "constexpr":
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = kind
        if is_divisible:
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    assert not arguments, f"{case.name} has no parameters {sorted(arguments)}"
    return ASTSource(case.kernel, signature, constants, attributes), options


def _argument_type(value: Any, specialize: bool) -> tuple[str, bool]:
    """Triton's name for an argument's type, and whether the compiler may take it to be divisible by 16."""
    if isinstance(value, torch.Tensor):
        return POINTER_TYPES[value.dtype], True
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{POINTER_TYPES[value.base.dtype][1:]}{list(value.block_shape)}>", False
    if isinstance(value, bool):
        return "u1", False
    if isinstance(value, int):
        if value == 1 and specialize:
            return "constexpr", False
        return "i32" if -(2**31) <= value < 2**31 else "i64", specialize and value % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    return "constexpr", False


def compile_case(case: Case, arch: int) -> Report:
    """Compile one case for one architecture.

    Raises:
        RuntimeError: if it needs more shared memory than the chip can give to one program.
    """
    ast, options = source(case)
    start = time.perf_counter()
    compiled = triton.compile(ast, target=GPUTarget("cuda", arch, 32), options=options)
    seconds = time.perf_counter() - start
    shared = compiled.metadata.shared
    if shared > SHARED_LIMIT_BYTES[arch]:
        raise RuntimeError(
            f"{case.name} needs {shared} bytes of shared memory, sm_{arch} has {SHARED_LIMIT_BYTES[arch]}"
        )
    registers, spill_bytes = _resources(compiled.asm["cubin"])
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
    parser.add_argument("--full", action="store_true", help="every dtype, head dim and configuration; minutes")
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
                report = compile_case(case, arch)
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
