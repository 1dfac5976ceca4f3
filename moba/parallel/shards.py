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

# Numbers that ranks compare.
MAX_NUMBERS = 32


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a sequence.

    Attributes:
        inside: all of them; or, where there is a `between`, those of this rank's node.
        between: the ranks of all nodes that stand where this one does in its own.
    """

    inside: ProcessGroup
    between: ProcessGroup | None = None

    @property
    def size(self) -> int:
        """How many they are."""
        return self.inside.size() * (1 if self.between is None else self.between.size())

    @property
    def rank(self) -> int:
        """This process's place among them, node by node."""
        nodes = 0 if self.between is None else self.between.rank()
        return nodes * self.inside.size() + self.inside.rank()


@dataclass(frozen=True)
class Shards:
    """Contiguous shards of a sequence, in the order of the ranks.

    Args:
        lengths: tokens on each rank of the group; any of them may be 0.
        rank: this process's rank in the group.
        group: the process group.
        between: the nodes' shards, where the group is that of one node.
    """

    lengths: tuple[int, ...]
    rank: int
    group: ProcessGroup
    between: Shards | None = None

    @property
    def start(self) -> int:
        """Position of this rank's first token."""
        return sum(self.lengths[: self.rank]) + (0 if self.between is None else self.between.start)

    @property
    def stop(self) -> int:
        """Position behind this rank's last token."""
        return self.start + self.lengths[self.rank]

    @property
    def num_tokens(self) -> int:
        """Length of the whole sequence."""
        return sum(self.lengths) if self.between is None else self.between.num_tokens

    def inside_a_block(self, block_size: int) -> int | None:
        """The first rank whose tokens begin inside a block, None if there is none."""
        starts = (sum(self.lengths[:rank]) for rank in range(len(self.lengths)))
        inside = (rank for rank, start in enumerate(starts) if start % block_size and self.lengths[rank])
        return next(inside, None)

    def require_whole_blocks(self, block_size: int) -> None:
        """Raise a ValueError, on all ranks alike, unless every shard begins where a block does."""
        rank = self.inside_a_block(block_size)
        if rank is not None:
            raise ValueError(
                f'transport="selective" needs shards that begin where a block of {block_size} does; rank {rank} '
                f"begins at position {sum(self.lengths[:rank])} (lengths {list(self.lengths)}). Give every rank but "
                'the last a multiple of block_size tokens, or take transport="gather"'
            )


def ranks_of(group: ProcessGroup | DeviceMesh | None) -> Ranks:
    """The ranks that are meant.

    Raises:
        ValueError: if there are none, or a mesh has more than two dimensions.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("context parallelism needs torch.distributed: call init_process_group first")
    if isinstance(group, DeviceMesh):
        if group.ndim > 2:
            raise ValueError(
                "group must be a mesh of one dimension, such as mesh['cp'], or of two, nodes and the ranks of each, "
                f"got {group.ndim} dimensions"
            )
        return Ranks(group.get_group()) if group.ndim == 1 else Ranks(group.get_group(1), group.get_group(0))
    inside = dist.group.WORLD if group is None else group
    if not isinstance(inside, ProcessGroup):
        raise ValueError("this process is not in the group: only its ranks may call this")
    return Ranks(inside)


def float_bits(value: float) -> int:
    """A number that differs where floats do."""
    bits: int = struct.unpack("q", struct.pack("d", value))[0]
    return bits


def fingerprint(x: Tensor) -> Tensor:
    """An int64 scalar on the tensor's device that differs, but for rare accidents, where whole numbers [n] differ."""
    mixed = (x.long() + 1) * (torch.arange(x.numel(), device=x.device) * 2654435761 + 97)
    return (mixed ^ (mixed >> 29)).sum()


def agree(q: Tensor, ranks: Ranks, settings: Callable[[], Mapping[str, int | Tensor]]) -> Shards:
    """Tell all ranks what this one has, and check that it fits what they have.

    Args:
        q: [B, T, ...], this rank's tokens; looked at after `settings` has checked them.
        ranks: that share the sequence.
        settings: checks what this rank was given, and returns what must be the same everywhere, as numbers. Every rank
            learns of what it raises, so that none waits for a rank that gave up.

    Returns:
        The shards. Reads the other ranks' lengths, so the device is waited for.

    Raises:
        ValueError: on all ranks, naming what differs and where.
    """
    if ranks.between is None:
        return _agree(q, ranks.inside, settings, lambda: q.shape[1])
    node: Shards | None = None
    problem: Exception | None = None
    try:
        node = _agree(q, ranks.inside, settings, lambda: q.shape[1])
    except Exception as error:
        problem = error

    def settings_of_node() -> Mapping[str, int | Tensor]:
        if problem is not None:
            raise problem
        return settings()

    nodes = _agree(q, ranks.between, settings_of_node, lambda: 0 if node is None else node.num_tokens)
    assert node is not None
    return Shards(node.lengths, node.rank, node.group, nodes)


def _agree(
    q: Tensor, group: ProcessGroup, settings: Callable[[], Mapping[str, int | Tensor]], num_tokens: Callable[[], int]
) -> Shards:
    """`agree` among the ranks of one group, each of which has so many tokens."""
    problem: Exception | None = None
    same: Mapping[str, int | Tensor] = {}
    row = torch.zeros(MAX_NUMBERS, dtype=torch.int64, device=_control_device(q, group))
    try:
        same = settings()
        row = _as_row([1, num_tokens(), *same.values()], row.device)
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
    """MAX_NUMBERS numbers, of which some are on the device already, where the host need not wait for them."""
    row = torch.zeros(MAX_NUMBERS, dtype=torch.int64)
    row[: len(numbers)] = torch.tensor([0 if isinstance(number, Tensor) else number for number in numbers])
    row = row.to(device)
    for place, number in enumerate(numbers):
        if isinstance(number, Tensor):
            row[place] = number
    return row


def _control_device(q: object, group: ProcessGroup) -> torch.device:
    """Where the ranks of a group exchange numbers, also with one that was given nothing sensible."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return q.device if isinstance(q, Tensor) else torch.device("cpu")
