"""What a measurement was made on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" takes CUDA, then Apple MPS, then the CPU.

    Raises:
        ValueError: if there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={name!r} is not usable here: {str(error).splitlines()[0]}") from None
    return device


def device_to_time(name: str) -> torch.device:
    """The CPU or the CUDA device of a name; "auto" is CUDA where there is one.

    Raises:
        ValueError: if there is no such device here, or times and memory cannot be measured on it.
    """
    if name.partition(":")[0] not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    return choose_device("cpu" if name == "auto" and not torch.cuda.is_available() else name)


def describe(device: torch.device) -> dict[str, str]:
    """Machine, versions, commit, command and time, for the header of a result."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    program = Path(sys.argv[0]).name
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": str(torch.get_num_threads()),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "commit": commit(),
        "command": shlex.join(["moba" if program == "__main__.py" else program, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def cpu_name() -> str:
    """Model name, cores and the vector extensions that matter here."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    name = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", info, re.MULTILINE)
    known = flags.group(1).split() if flags else []
    extensions = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in known]
    return f"{name.group(1) if name else platform.machine()}, {os.cpu_count()} cores, {' '.join(extensions)}"


def commit() -> str:
    """The checkout's commit, marked where the work tree differs; "unknown" outside a checkout."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()
