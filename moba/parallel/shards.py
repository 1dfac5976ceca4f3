"""Which tokens of a sequence lie on which rank, and whether the ranks agree on what they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

# Numbers that ranks compare.
MAX_NUMBERS = 32
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Shards:
    """Contiguous shards of a sequence, in the order of the ranks.

    Args:
        lengths: tokens on each rank; any of them may be 0.
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
        """Position behind this rank's last token."""
        return self.start + self.lengths[self.rank]

    @property
    def num_tokens(self) -> int:
        """Length of the whole sequence."""
        return sum(self.lengths)

    def require_whole_blocks(self, block_size: int) -> None:
        """Raise a ValueError, on all ranks alike, unless every shard begins where a block does."""
        start = 0
        for rank, length in enumerate(self.lengths):
            if length and start % block_size:
                raise ValueError(
                    f'transport="selective" needs shards that begin where a block of {block_size} does; rank {rank} '
                    f"begins at position {start} (lengths {list(self.lengths)}). Give every rank but the last a "
                    'multiple of block_size tokens, or take transport="gather"'
                )
            start += length


def process_group(group: ProcessGroup | DeviceMesh | None) -> ProcessGroup:
    """The process group that is meant.

    Raises:
        ValueError: if there is none, or a mesh has several dimensions.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("context parallelism needs torch.distributed: call init_process_group first")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group must be a mesh of one dimension, such as mesh['cp'], got {group.ndim} dimensions")
        return group.get_group()
    default = dist.group.WORLD if group is None else group
    if not isinstance(default, ProcessGroup):
        raise ValueError("this process is not in the group")
    return default


def agree(q: Tensor, device: torch.device, group: ProcessGroup, settings: Callable[[], dict[str, int]]) -> Shards:
    """Tell all ranks what this one has, and check that it fits what they have.

    Args:
        q: [B, T, ...], this rank's tokens; looked at after `settings` has checked them.
        device: where the group's ranks exchange numbers.
        settings: checks what this rank was given, and returns what must be the same everywhere, as numbers. Every rank
            learns of its ValueError, so that none waits for a rank that gave up.

    Returns:
        The shards. Reads the other ranks' lengths, so the device is waited for.

    Raises:
        ValueError: on all ranks, naming what differs and where.
    """
    problem: ValueError | None = None
    try:
        same = settings()
        mine = [1, q.shape[1], *same.values()]
    except ValueError as error:
        problem, same, mine = error, {}, [0]
    row = torch.zeros(MAX_NUMBERS, dtype=torch.int64)
    row[: len(mine)] = torch.tensor(mine)
    row = row.to(device)
    rows = [torch.empty_like(row) for _ in range(group.size())]
    dist.all_gather(rows, row, group=group)
    table = torch.stack(rows).tolist()
    if problem is not None:
        raise problem
    if invalid := [rank for rank, numbers in enumerate(table) if not numbers[0]]:
        raise ValueError(f"ranks {invalid} were given something that is not valid; their own message says what")
    for column, name in enumerate(same, start=2):
        values = [numbers[column] for numbers in table]
        if len(set(values)) > 1:
            shown = [str(DTYPES[value]) for value in values] if name == "dtype" else values
            raise ValueError(f"the ranks disagree on {name}: {shown} on ranks 0 to {group.size() - 1}")
    return Shards(tuple(numbers[1] for numbers in table), group.rank(), group)
