"""Which tokens of a sequence lie on which rank, and whether the ranks agree on what they compute."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from moba.validate import DTYPES

# Room for the numbers that ranks compare.
MAX_NUMBERS = 32


@dataclass(frozen=True)
class Shards:
    """Contiguous shards of a sequence, in the order of the ranks.

    Args:
        lengths: tokens on each rank of the group; any of them may be 0.
        rank: this process's rank in the group.
        group: the process group.
    """

    lengths: tuple[int, ...]
    rank: int
    group: ProcessGroup

    @property
    def start(self) -> int:
        """Position of this rank's first token."""
        return sum(self.lengths[: self.rank])

    @property
    def stop(self) -> int:
        """Position after this rank's last token."""
        return self.start + self.lengths[self.rank]

    @property
    def num_tokens(self) -> int:
        """Length of the whole sequence."""
        return sum(self.lengths)

    def starts_inside_a_block(self, block_size: int) -> bool:
        """Whether some rank's tokens begin inside a block."""
        starts = (sum(self.lengths[:rank]) for rank in range(len(self.lengths)))
        return any(start % block_size and length for start, length in zip(starts, self.lengths, strict=True))


def process_group(group: ProcessGroup | DeviceMesh | None) -> ProcessGroup:
    """The process group of a group or a mesh of one dimension; None means all ranks.

    Raises:
        ValueError: if there is none, or a mesh has more than one dimension.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("context parallelism needs torch.distributed: call init_process_group first")
    if isinstance(group, DeviceMesh):
        if group.ndim > 1:
            raise ValueError(
                f"group must be a mesh of one dimension, such as mesh['cp'], got one of {group.ndim} dimensions"
            )
        group = group.get_group()
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, ProcessGroup):
        raise ValueError("this process is not in the group: only its ranks may call this")
    return group


def float_bits(value: float) -> int:
    """The bits of a float as an int, so that ranks can compare it exactly."""
    bits: int = struct.unpack("q", struct.pack("d", value))[0]
    return bits


def fingerprint(x: Tensor) -> Tensor:
    """An int64 hash of whole numbers [n], on their device; different numbers rarely have the same hash."""
    mixed = (x.long() + 1) * (torch.arange(x.numel(), device=x.device) * 2654435761 + 97)
    return (mixed ^ (mixed >> 29)).sum()


def agree(q: Tensor, group: ProcessGroup, settings: Callable[[], Mapping[str, int | Tensor]]) -> Shards:
    """Exchange lengths and settings with all ranks, and check that the settings agree.

    Args:
        q: [B, T, ...], this rank's tokens; read only after `settings` has checked them.
        group: the ranks that share the sequence.
        settings: checks this rank's input and returns, as numbers, what must be equal on every rank. If it raises,
            every rank learns of it, so that none waits for a rank that failed.

    Returns:
        The shards. Reading the other ranks' lengths waits for the device.

    Raises:
        ValueError: on all ranks, naming what differs and where.
    """
    problem: Exception | None = None
    same: Mapping[str, int | Tensor] = {}
    row = torch.zeros(MAX_NUMBERS, dtype=torch.int64, device=_control_device(q, group))
    try:
        same = settings()
        row = _as_row([1, q.shape[1], *same.values()], row.device)
    except Exception as error:  # whatever it is, the others must not wait for this rank
        problem = error
    rows = [torch.empty_like(row) for _ in range(group.size())]
    dist.all_gather(rows, row, group=group)
    table = torch.stack(rows).tolist()
    if problem is not None:
        raise problem
    if invalid := [rank for rank, numbers in enumerate(table) if not numbers[0]]:
        raise ValueError(f"ranks {invalid} were given something that is not valid; their own message says what")
    for column, name in enumerate(same, start=2):
        values = [numbers[column] for numbers in table]
        if len(set(values)) > 1 and name == "cu_seqlens":
            raise ValueError(f"the ranks disagree on cu_seqlens: give ranks 0 to {group.size() - 1} the same bounds")
        if len(set(values)) > 1:
            shown = [str(DTYPES[value]) for value in values] if name == "dtype" else values
            raise ValueError(f"the ranks disagree on {name}: {shown} on ranks 0 to {group.size() - 1}")
    return Shards(tuple(numbers[1] for numbers in table), group.rank(), group)


def _as_row(numbers: Sequence[int | Tensor], device: torch.device) -> Tensor:
    """A row of MAX_NUMBERS numbers. Those on the device are copied there, so that the host does not wait for them."""
    row = torch.zeros(MAX_NUMBERS, dtype=torch.int64)
    row[: len(numbers)] = torch.tensor([0 if isinstance(number, Tensor) else number for number in numbers])
    row = row.to(device)
    for place, number in enumerate(numbers):
        if isinstance(number, Tensor):
            row[place] = number
    return row


def _control_device(q: object, group: ProcessGroup) -> torch.device:
    """The device on which ranks exchange numbers, even if this rank's q is not a tensor."""
    # Not `get_backend`: accelerate's FSDP makes groups of "cuda:nccl,cpu:gloo", for which it says neither.
    if "cuda:nccl" in dist.get_backend_config(group):
        return torch.device("cuda", torch.cuda.current_device())
    return q.device if isinstance(q, Tensor) else torch.device("cpu")
