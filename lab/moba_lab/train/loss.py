"""The loss of a language model without its logits: 32K tokens × 49K words would take 6 GB, and as much again backward.

Letters: N tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from moba.config import require_one_of

LOSSES = ("auto", "liger", "chunked", "logits")
IGNORED = -100
CHUNK_TOKENS = 2048

# What a config may say of its logits beside hidden · weightᵀ, and the value that changes nothing.
_CHANGES_LOGITS = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
    """Sum over tokens of the cross entropy of softmax(hidden · weightᵀ), a chunk of tokens at a time.

    Args:
        hidden: [N, C]. weight: [V, C].
        labels: int64 [N], -100 where there is none.
        chunk_tokens: logits of this many tokens exist at once; backward computes them again.

    Returns:
        fp32 scalar (fp64 for fp64 inputs).

    Numerics: logits in the inputs' (or autocast's) dtype, log-softmax and all sums over chunks in fp32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    chunks = zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True)
    sums = [
        checkpoint(cross_entropy, rows, weight, words, dtype, use_reentrant=False, preserve_rng_state=False)
        for rows, words in chunks
    ]
    return torch.stack(sums).sum()


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """`linear_cross_entropy` in one piece, whose logits, in this dtype, are kept for the backward."""
    # Cast here: the cast that autocast keeps for all chunks would also sum their gradients in its dtype.
    logits = hidden.to(dtype) @ weight.to(dtype).mT
    wide = torch.promote_types(dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels, ignore_index=IGNORED, reduction="sum")


def use_fused_loss(model: PreTrainedModel, loss: str = "auto") -> str:
    """Let `model(input_ids, labels=…)` compute its loss without its logits, which the output then lacks.

    Without labels the model does what it did. The loss is transformers' own: the mean over the labels that are not
    -100, shifted by one (shift_labels are shifted already), or their sum over `num_items_in_batch`.

    Args:
        model: a causal language model; changed in place.
        loss: "liger" (liger-kernel's Triton kernel, CUDA only), "chunked" (plain torch, any device), "logits" (leave
            the model as it is), "auto": liger where it is installed and the model lies on CUDA, else chunked, and
            logits where the model does more to them than a matrix product.

    Returns:
        the loss that was taken.

    Raises:
        ValueError: if the loss is unknown or cannot serve this model, or liger-kernel is not installed.
    """
    require_one_of("loss", loss, LOSSES)
    head = model.get_output_embeddings()
    reason = _why_logits(model, head)
    if loss == "auto":
        is_liger = model.device.type == "cuda" and find_spec("liger_kernel") is not None
        loss = "logits" if reason else "liger" if is_liger else "chunked"
    if loss == "logits":
        return loss
    if reason:
        raise ValueError(f"loss={loss!r} cannot serve {type(model).__name__}: {reason}; use 'logits'")
    if loss == "liger" and find_spec("liger_kernel") is None:
        raise ValueError("loss='liger' needs the package liger-kernel: pip install moba-lab")
    cls: Any = type(model)
    model.__class__ = _with_loss(cls, loss)
    return loss


@functools.cache
def _with_loss(cls: type[PreTrainedModel], loss: str) -> type[PreTrainedModel]:
    """A class of models that differs from `cls` in the loss alone.

    A class, not a function put on one model in place of `forward`: copies of the model, wrappers (FSDP2, DDP, PEFT) and
    whoever reads the signature of `forward` see what they would see of the model itself.
    """
    summed = _liger if loss == "liger" else linear_cross_entropy

    @functools.wraps(cls.forward)
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return cls.forward(self, input_ids=input_ids, **kwargs)
        # Else transformers fills a cache of keys and values that nobody reads.
        hidden = self.base_model(input_ids=input_ids, **{"use_cache": False, **kwargs}).last_hidden_state
        shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:] if shift_labels is None else shift_labels
        targets = shifted.flatten()
        total = summed(hidden.flatten(0, 1), self.get_output_embeddings().weight, targets)
        count = (targets != IGNORED).sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=total / count)

    # Saved models and transformers' checks of a model's source name the class that it was made from.
    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def _liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORED, reduction="sum")


def _why_logits(model: PreTrainedModel, head: nn.Module | None) -> str | None:
    """What this model's logits are beside hidden · weightᵀ; None if nothing."""
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return "its output layer is not a plain matrix"
    config = model.config.get_text_config(decoder=True)
    for name, neutral in _CHANGES_LOGITS.items():
        if getattr(config, name, neutral) != neutral:
            return f"its config has {name}={getattr(config, name)!r}"
    return None
