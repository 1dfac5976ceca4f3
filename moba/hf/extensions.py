"""What other code adds to a model's attention modules: queries and keys to route by, and parts that a config asks for.

To choose a layer's blocks by other queries and keys than it attends with:

    provide_route_by(attention, "unrotated", function)

`MoBAConfig(router="unrotated")` then routes that layer as "mean" does, by what function(attention, q, k) returns.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from moba.config import PROVIDED_ROUTERS, Router, require_one_of

RouteBy = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]

# Modules of an attention layer that a config asks for (`config.moba_<name>`) and `from_pretrained` does not make.
PARTS = ("key_convolution",)


def provide_route_by(attention: nn.Module, router: str, provider: RouteBy) -> None:
    """Route an attention module by other queries and keys than its own, where its config has this router.

    Args:
        attention: the module that transformers' attention interface is given.
        router: a router that only a model can serve: "unrotated".
        provider: called with the module and the q [B, T, H, D] and k [B, S, G, D] of each call that is MoBA. Returns
            the queries and keys to route by, of the same shapes except the head dim. Keep what it needs on the
            module: copies of a model share the function.

    Raises:
        ValueError: for any other router.
    """
    require_one_of("router", router, PROVIDED_ROUTERS)
    module: Any = attention
    module.moba_route_by = {**getattr(module, "moba_route_by", {}), router: provider}


def require_route_by(model: PreTrainedModel, router: Router) -> None:
    """Raise a ValueError unless some layer of the model is provided with what the router needs."""
    if not any(router in getattr(module, "moba_route_by", {}) for module in model.modules()):
        raise ValueError(_not_provided(router, model))


def route_by(attention: nn.Module, router: Router, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The queries and keys to route a call by.

    Raises:
        ValueError: if nothing provides them.
    """
    providers: dict[Router, RouteBy] = getattr(attention, "moba_route_by", {})
    if router not in providers:
        raise ValueError(_not_provided(router, attention))
    return providers[router](attention, q, k)


def wanted_parts(config: Any) -> list[str]:
    """The names of the parts that a model's config asks for."""
    return [part for part in PARTS if getattr(config, f"moba_{part}", None) is not None]


def require_parts(attention: nn.Module) -> None:
    """Raise a ValueError if the model was trained with a part that this attention module lacks."""
    config = getattr(attention, "config", None)
    for part in PARTS:
        asked = getattr(config, f"moba_{part}", None)
        if asked is not None and not hasattr(attention, part):
            raise ValueError(
                f"config.moba_{part}={asked}, but the model's layers have no {part}: call "
                f"moba_lab.models.{part}.load_{part}(model, path) after from_pretrained"
            )


def read_weights(path: str | Path, model: nn.Module, part: str) -> dict[str, Tensor]:
    """Read the weights of a model's modules called `part`, which `from_pretrained` does not read.

    Args:
        path: the folder, or the name that `from_pretrained` took. model: with these modules.

    Raises:
        ValueError: if some are not there.
    """
    wanted = {name for name in model.state_dict() if f".{part}." in name}
    files = {"model.safetensors"}
    index = cached_file(str(path), "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is not None:
        places = json.loads(Path(index).read_text())["weight_map"]
        files = {places[name] for name in wanted if name in places}
    weights: dict[str, Tensor] = {}
    for file in sorted(files):
        found = cached_file(str(path), file, _raise_exceptions_for_missing_entries=False)
        if found is None:
            raise ValueError(f"{path} has no {file} to read the weights of {part} from")
        with safe_open(found, framework="pt") as tensors:
            weights.update({name: tensors.get_tensor(name) for name in wanted.intersection(tensors.keys())})
    if missing := sorted(wanted - set(weights)):
        raise ValueError(f"{path} lacks weights of {part}: {missing[0]} and {len(missing) - 1} more")
    return weights


def _not_provided(router: Router, what: nn.Module) -> str:
    return (
        f"router={router!r} needs queries and keys that nothing provides to {type(what).__name__}: after loading the "
        "model call moba_lab.models.unrotated.watch_projections(model), or moba.hf.provide_route_by for each layer"
    )
