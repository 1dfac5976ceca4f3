"""Record which blocks the layers of a transformers model choose while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from moba.routing import Routing


class RoutingRecord(dict[int, list[Routing]]):
    """Layer index -> the routing of each recorded forward pass, in order."""

    def joined(self) -> dict[int, Routing]:
        """Join the passes: layer index -> one routing [B, T, H, K], as if the prompt had been read at once."""
        return {
            layer: Routing(torch.cat([r.indices for r in parts], dim=1), parts[0].block_size)
            for layer, parts in sorted(self.items())
        }


@contextmanager
def record_routings(model: PreTrainedModel) -> Iterator[RoutingRecord]:
    """Record the routing of every MoBA layer of `model` in each forward pass inside this context.

        with record_routings(model) as record:
            model(input_ids)
        record.joined()[layer].indices

    Layers and steps of full attention choose nothing and are not recorded. The indices are kept on the CPU.

    Raises:
        ValueError: if the model's attention is not "moba" or "moba_naive".
    """
    name = require_moba(model)
    record = RoutingRecord()
    own_modules = set(model.modules())

    def observe(module: nn.Module, routing: Routing) -> None:
        if module in own_modules:
            layer = int(module.layer_idx)  # type: ignore[arg-type]
            record.setdefault(layer, []).append(Routing(routing.indices.cpu(), routing.block_size))

    # transformers looks the function up by its name in each layer and each pass, so replacing it reaches all layers.
    attention = AttentionInterface()[name]
    AttentionInterface.register(name, partial(attention, observe=observe))
    try:
        yield record
    finally:
        AttentionInterface.register(name, attention)


def require_moba(model: PreTrainedModel) -> str:
    """Return the name of a model's attention if it is MoBA's.

    Raises:
        ValueError: if it is not "moba" or "moba_naive".
    """
    name = model.config._attn_implementation
    if name not in ("moba", "moba_naive"):
        raise ValueError(f"the model's attention must be 'moba' or 'moba_naive' to record its routing, got {name!r}")
    return name
