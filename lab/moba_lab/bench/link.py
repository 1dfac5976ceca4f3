"""The ranks of a process group: how fast bytes travel between them, and what they tell each other."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from moba_lab.bench.measure import measure_call

# What a rank waits for one that measures alone.
PATIENCE = timedelta(days=1)
# Message sizes: the smallest shows the latency, the largest the rate.
CUDA_BYTES = (1 << 12, 1 << 20, 1 << 26, 1 << 30)
CPU_BYTES = (1 << 12, 1 << 20, 1 << 24)


def measure_link(device: torch.device) -> dict[str, Any]:
    """Times of one message, all-gather and all-to-all, for several sizes; every rank calls it.

    Returns:
        "topology", as nvidia-smi tells it, and "ms": for each of "p2p" (first rank to second), "both ways" (the two to
        each other), "all-gather" and "all-to-all" a dict of milliseconds by bytes. The bytes are those that one rank
        sends to each other rank.
    """
    result: dict[str, Any] = {"topology": topology() if device.type == "cuda" else "processes of one machine", "ms": {}}
    if dist.get_world_size() < 2:
        return result
    for num_bytes in CUDA_BYTES if device.type == "cuda" else CPU_BYTES:
        for name, ms in _measure_size(num_bytes, device).items():
            result["ms"].setdefault(name, {})[str(num_bytes)] = ms
    return result


def _measure_size(num_bytes: int, device: torch.device) -> dict[str, float]:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    # torch 2.13 renamed it; the old name warns there.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    mine = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    every, other = (torch.zeros(num_ranks * num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    ways: dict[str, Callable[[], object]] = {
        "p2p": lambda: _pass_on(mine, other[:num_bytes], [dist.isend] if rank == 0 else [dist.irecv]),
        "both ways": lambda: _pass_on(mine, other[:num_bytes], [dist.isend, dist.irecv]),
        "all-gather": lambda: all_gather(every, mine),
        "all-to-all": lambda: dist.all_to_all_single(other, every),
    }
    return {name: _slowest(run, device) for name, run in ways.items()}


def rate(link: dict[str, Any], way: str) -> float:
    """Bytes a second that a rank sends to each other one, of the largest message; 0 with one rank."""
    times = link["ms"].get(way, {})
    num_bytes = max((int(size) for size in times), default=0)
    return num_bytes / times[str(num_bytes)] * 1e3 if num_bytes else 0.0


def topology() -> str:
    """What `nvidia-smi topo -m` says of the link between the first two GPUs, such as "NV18"; "unknown" without it."""
    try:
        said = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    rows = [line.split() for line in said.stdout.splitlines() if line.startswith("GPU0")]
    return rows[0][2] if rows and len(rows[0]) > 2 else "unknown"


def _pass_on(mine: torch.Tensor, other: torch.Tensor, ways: list[Callable[..., Any]]) -> None:
    """What the first two ranks do; the others nothing."""
    rank = dist.get_rank()
    if rank > 1:
        return
    tensors = {dist.isend: mine, dist.irecv: other}
    for work in dist.batch_isend_irecv([dist.P2POp(way, tensors[way], 1 - rank) for way in ways]):
        work.wait()


def _slowest(run: Callable[[], object], device: torch.device) -> float:
    ms = torch.tensor(measure_call(run, device, warmups=1, repeats=5).ms, device=device)
    dist.all_reduce(ms, dist.ReduceOp.MAX)
    return float(ms)


def on_first(run: Callable[[], Any]) -> Any:
    """What `run` returns on the first rank, on all of them, which wait for it as long as it takes."""
    group = _patient_group()
    result = [run() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(result, group=group)
    return result[0]


@cache
def _patient_group() -> dist.ProcessGroup:
    """All ranks again, over gloo, where those that wait for one see at once when its process ends."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=PATIENCE)
    return group


def gathered(mine: Any) -> list[Any]:
    """What every rank has, in their order, on all of them."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return every


def free(device: torch.device) -> None:
    """Wait for all ranks, and give back what the allocator keeps."""
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.empty_cache()
