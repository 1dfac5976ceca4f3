"""Which layers of a model to keep full."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

# Layers that are tried beside chosen ones: those which alone help most.
NUM_CANDIDATES = 8


class ChosenLayers(NamedTuple):
    """Layers that were chosen one after another.

    Attributes:
        layers: ascending.
        values: what is lowered, with the first of them, the first two, …
        alone: layer -> the value with it alone, of all layers, the best first.
    """

    layers: tuple[int, ...]
    values: list[float]
    alone: dict[int, float]


def choose_layers(
    measure: Callable[[Sequence[tuple[int, ...]]], Sequence[float]], num_layers: int, count: int
) -> ChosenLayers:
    """Choose layers one after another, each time the one that lowers a value most.

    After the first, only layers that alone were among the best are tried.

    Args:
        measure: sets of full layers, each ascending -> the value with each.
        num_layers: of the model. count: how many to choose, 1 … num_layers.
    """
    singles = measure([(layer,) for layer in range(num_layers)])
    ranked = sorted(range(num_layers), key=lambda layer: singles[layer])
    alone = {layer: singles[layer] for layer in ranked}
    candidates = sorted(ranked[: max(NUM_CANDIDATES, count)])
    layers, values = tuple(ranked[:1]), [alone[ranked[0]]]
    while len(layers) < count:
        tried = [tuple(sorted((*layers, layer))) for layer in candidates if layer not in layers]
        measured = measure(tried)
        values.append(min(measured))
        layers = tried[measured.index(values[-1])]
    return ChosenLayers(layers, values, alone)
