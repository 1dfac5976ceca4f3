"""MoBAConfig: the one definition of block_size, topk and the choices around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, fields
from typing import Any

from torch import Tensor

Router = str | Callable[[Tensor, Tensor], Tensor]

ROUTERS = ("mean", "recent", "sink", "shared")
# Routers that only a model can serve: they need queries and keys that the attention functions never see. Those of the
# first kind are provided by `moba.hf.provide_route_by`.
PROVIDED_ROUTERS = ("unrotated",)
MODEL_ROUTERS = (*PROVIDED_ROUTERS, "indexer")
DECODE_MODES = ("full", "moba")
BACKENDS = ("auto", "reference", "pytorch", "triton")


def require_int(name: str, value: Any, minimum: int) -> int:
    """Return `value` if it is an int of at least `minimum`; raise a ValueError that names it otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}")
    return value


def require_one_of(name: str, value: Any, valid: Sequence[str]) -> None:
    """Raise a ValueError that names the argument and the valid values unless `value` is one of them."""
    if value not in valid:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, valid))}, got {value!r}")


def validate_selection(block_size: int, topk: int, keep_first: int, keep_recent: int, router: Router) -> None:
    """Check the arguments that decide which blocks a query attends to.

    Raises:
        ValueError: naming the argument, what it was, and what is valid.
    """
    require_int("block_size", block_size, 1)
    require_int("topk", topk, 1)
    require_int("keep_first", keep_first, 0)
    require_int("keep_recent", keep_recent, 0)
    if keep_first + keep_recent > topk - 1:
        raise ValueError(
            f"keep_first + keep_recent must be at most topk - 1 = {topk - 1} (the own block takes one place), "
            f"got keep_first={keep_first}, keep_recent={keep_recent}"
        )
    if not callable(router):
        _check_router(router)


def _check_router(router: Any) -> None:
    if router in MODEL_ROUTERS:
        needed = "moba.hf.indexer" if router == "indexer" else "moba.hf.provide_route_by"
        raise ValueError(f"router={router!r} needs queries and keys that a transformers model provides ({needed})")
    if named_top_p(router) is None:
        require_one_of("router", router, (*ROUTERS, "top_p=0.9"))


def named_top_p(router: Any) -> float | None:
    """The number in a router's name such as "top_p=0.9"; None for another name.

    Raises:
        ValueError: if it is not between 0 and 1.
    """
    if not isinstance(router, str) or not router.startswith("top_p="):
        return None
    try:
        p = float(router.removeprefix("top_p="))
    except ValueError:
        raise ValueError(f"router must hold a number behind 'top_p=', got {router!r}") from None
    return check_top_p(p)


def check_top_p(p: float) -> float:
    """Return p if it lies between 0 and 1; raise a ValueError otherwise."""
    if not 0.0 < p < 1.0:
        raise ValueError(f"top_p must lie between 0 and 1, both excluded, got {p!r}")
    return p


@dataclass(frozen=True)
class MoBAConfig:
    """How a model uses Mixture of Block Attention.

    Args:
        block_size: tokens in a block, >= 1.
        topk: blocks a query attends to, its own block included, >= 1.
        keep_first: number of first blocks of the sequence that are always selected (attention sink).
        keep_recent: number of past blocks nearest to the own block that are always selected.
            Kept blocks take places of topk: keep_first + keep_recent <= topk - 1.
        full_layers: layers that use full attention: an int n means the last n, a tuple lists layer indices.
        decode: attention of one-token steps after a prompt: "full" (the paper's choice) or "moba".
        router: "mean" (the paper), "recent" (sliding window), "sink" (first and recent blocks), "shared" (one choice
            for the query heads of a kv head), "top_p=0.9" (the fewest blocks that hold 0.9 of the mass, at most topk),
            "unrotated" (scores from before the rotary embedding; transformers models only, see
            `moba.hf.provide_route_by`), "indexer" (learned; transformers models only, see `moba.hf.indexer`), or a
            function (query rows [rows, H, D], block means [N, G, D]) -> scores
            [rows, H, N], larger is better (see `moba.routers`).
        backend: "auto", "reference", "pytorch" or "triton".

    Raises:
        ValueError: naming the argument, what it was, and what is valid.
    """

    block_size: int
    topk: int
    _: KW_ONLY
    keep_first: int = 0
    keep_recent: int = 0
    full_layers: int | tuple[int, ...] = 0
    decode: str = "full"
    router: Router = "mean"
    backend: str = "auto"

    def __post_init__(self) -> None:
        router = "mean" if self.router in MODEL_ROUTERS else self.router
        validate_selection(self.block_size, self.topk, self.keep_first, self.keep_recent, router)
        require_one_of("decode", self.decode, DECODE_MODES)
        require_one_of("backend", self.backend, BACKENDS)
        if isinstance(self.full_layers, (list, tuple)):
            layers = tuple(require_int("full_layers", i, 0) for i in self.full_layers)
            object.__setattr__(self, "full_layers", layers)
        else:
            require_int("full_layers", self.full_layers, 0)

    @property
    def selection(self) -> dict[str, Any]:
        """The arguments of `moba_attention` that choose blocks."""
        names = ("block_size", "topk", "keep_first", "keep_recent", "router")
        return {name: getattr(self, name) for name in names}

    def is_full_layer(self, layer: int, num_layers: int) -> bool:
        """Whether layer `layer` of `num_layers` uses full attention."""
        if isinstance(self.full_layers, tuple):
            return layer in self.full_layers
        return layer >= num_layers - self.full_layers

    def check_layers(self, num_layers: int) -> None:
        """Raise a ValueError if `full_layers` names layers that a model of `num_layers` does not have."""
        layers = self.full_layers
        if (max(layers, default=-1) >= num_layers) if isinstance(layers, tuple) else layers > num_layers:
            raise ValueError(f"full_layers must fit the model's {num_layers} layers, got {layers!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict, from which `from_dict` restores an equal config.

        Raises:
            ValueError: if the router is a function, which no file can hold.
        """
        if not isinstance(self.router, str):
            raise ValueError(f"router={self.router!r} is a function and cannot be saved; use one of {ROUTERS}")
        values = asdict(self)
        if isinstance(self.full_layers, tuple):
            values["full_layers"] = list(self.full_layers)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoBAConfig:
        """Restore a config from `to_dict`'s result.

        Raises:
            ValueError: if a key is unknown or a value is not valid.
        """
        if not isinstance(values, dict):
            raise ValueError(f"not a MoBAConfig: must be a dict as to_dict makes it, got {values!r}")
        unknown = sorted(set(values) - _FIELDS)
        missing = sorted({"block_size", "topk"} - set(values))
        if unknown or missing:
            raise ValueError(
                f"not a MoBAConfig: unknown keys {unknown}, missing keys {missing}; valid: {sorted(_FIELDS)}"
            )
        return cls(**values)


# Read once: torch.compile, which traces `from_dict` in a model's layers, cannot read a dataclass's fields.
_FIELDS = frozenset(f.name for f in fields(MoBAConfig))
