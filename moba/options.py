"""The options of the public functions: as type checkers read them, and as one value that is handed on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, TypedDict

from torch import Tensor

from moba.config import Router
from moba.routing import Routing

if TYPE_CHECKING:
    from typing_extensions import Required

Yes: TypeAlias = Literal[True]
No: TypeAlias = Literal[False]


class CommonOptions(TypedDict, total=False):
    """Options of all public functions but return_lse and return_routing, which decide on what is returned."""

    block_size: Required[int]
    topk: int | None
    scale: float | None
    softcap: float | None
    sinks: Tensor | None
    keep_first: int
    keep_recent: int
    router: Router
    block_indices: Tensor | None
    own_block: bool
    backend: str


class Options(CommonOptions, total=False):
    """Those of `moba_attention`."""

    routing: Routing | None
    key_start: Tensor | None
    key_end: Tensor | None
    block_means: Tensor | None
    route_by: tuple[Tensor, Tensor] | None


class PackedOptions(CommonOptions, total=False):
    """Those of `moba_attention_varlen`."""

    cu_seqlens: Required[Tensor]
    cu_seqlens_k: Tensor | None
    routing: Routing | None
    route_by: tuple[Tensor, Tensor] | None


class PagedOptions(CommonOptions, total=False):
    """Those of `moba_attention_paged`."""

    page_table: Required[Tensor]
    key_end: Required[Tensor]
    block_means: Tensor | None


class Call(NamedTuple):
    """What a call says beside its tensors: the arguments of `moba_attention`."""

    block_size: int
    topk: int | None
    scale: float | None
    softcap: float | None
    sinks: Tensor | None
    keep_first: int
    keep_recent: int
    router: Router
    own_block: bool
    backend: str
    return_lse: bool
    return_routing: bool
