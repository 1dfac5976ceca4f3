"""Rotary embeddings for texts longer than a model was trained on."""

from __future__ import annotations

from typing import Any

import torch

from moba.config import require_one_of

# How positions can be stretched: all frequencies alike, or the slow ones alone.
SCALINGS = ("linear", "yarn")


def stretch_positions(
    model: torch.nn.Module,
    length: int | None = None,
    *,
    theta: float | None = None,
    factor: float | None = None,
    scaling: str = "linear",
) -> None:
    """Prepare a transformers model's rotary embedding for sequences longer than it was trained on.

    Args:
        model: changed in place; its config, which is saved with it, says so.
        length: tokens that it shall read; becomes the config's longest sequence if that was shorter. None: with YaRN
            `factor` times as many as before, else as many as before.
        theta: new base. A larger one turns more slowly, so that far positions look like those that were trained.
        factor: how many times longer texts become, at least 1.
        scaling: what the factor does. "linear" divides positions by it (position interpolation). "yarn" so divides only
            in the channels that did not complete a turn over the trained length, leaves those alone that turned often,
            and sharpens attention a little (Peng et al., arXiv 2309.00071): it serves without training, too.

    Raises:
        ValueError: if the model has no rotary embedding of the plain or interpolated kind, or a value does not serve.
    """
    stretch_config(_config(model), length, theta=theta, factor=factor, scaling=scaling)
    if theta is not None or factor is not None:
        renew_rotary(model)


def stretch_config(
    config: Any,
    length: int | None = None,
    *,
    theta: float | None = None,
    factor: float | None = None,
    scaling: str = "linear",
) -> None:
    """Change a decoder's config as `stretch_positions` does; arguments and errors are the same."""
    require_one_of("scaling", scaling, SCALINGS)
    if factor is not None and not 1 <= factor < float("inf"):
        raise ValueError(f"factor must be a finite number >= 1, got {factor!r}")
    rope: Any = getattr(config, "rope_parameters", None)
    trained = getattr(config, "max_position_embeddings", None)
    if theta is not None or factor is not None:
        if not can_stretch(config):
            raise ValueError(f"{config.model_type} has no plain rotary embedding to stretch, but {rope!r}")
        changed = dict(rope) if theta is None else {**rope, "rope_theta": float(theta)}
        if factor is not None and scaling == "linear":
            changed |= {"rope_type": "linear", "factor": float(factor)}
        elif factor is not None:
            if trained is None or rope.get("rope_type") == "linear":
                raise ValueError(
                    f"YaRN needs a plain rotary embedding and max_position_embeddings, got {rope!r}, {trained}"
                )
            changed |= {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": trained}
            length = length or int(factor * trained)
        config.rope_parameters = changed
    if length is not None and trained is not None and length > trained:
        config.max_position_embeddings = length


def can_stretch(config: Any) -> bool:
    """Whether a decoder's config has a rotary embedding of the plain or interpolated kind."""
    rope = getattr(config, "rope_parameters", None)
    return isinstance(rope, dict) and rope.get("rope_type", "default") in ("default", "linear")


def renew_rotary(model: torch.nn.Module) -> None:
    """Make a model's rotary embeddings anew after its config has changed."""
    config = _config(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "inv_freq"):
                make: Any = type(child)
                setattr(parent, name, make(config=config).to(child.inv_freq.device))


def _config(model: torch.nn.Module) -> Any:
    whole: Any = model.config
    return whole.get_text_config(decoder=True)
