"""The model of a training: made or loaded, its positions stretched, its activations recomputed, its adapters."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only each layer's input for backward and compute the rest again, which takes a third more time."""
    # transformers 5.23 renamed the method; the old name warns there.
    enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
