"""Checks when a model is switched to MoBA: transformers' version, and whether the model's layers can use MoBA.

transformers accepts a registered attention for every model, even if its layers never call it. Such a model would run as
before, or without any mask. transformers has no hook to refuse a model, so the two methods that set a model's attention
are wrapped here; for other attentions they behave as before. Layers are not told where a prompt ends either, so
assisted generation is wrapped to note it.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from functools import cache, wraps
from typing import Any

import transformers
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from moba.hf.indexed import count_from_first_token
from moba.hf.layout import SWITCH_PART

logger = logging.getLogger("moba")

# The oldest and the newest tested version. pip may install newer ones.
OLDEST, NEWEST = (5, 17), (5, 24)

# Config fields of models that select keys themselves, from masks that MoBA does not make.
SELECTIONS = ("index_topk", "indexer_budget", "keep_window_size")

# Config field that holds the prompt's length while an assisted generation runs.
PROMPT_FIELD = "moba_num_prompt"

_refusing: set[str] = set()
_has_warned = False


def warn_if_untested() -> None:
    """Warn once if the installed transformers is outside the tested versions."""
    global _has_warned
    version = tuple(map(int, re.findall(r"\d+", transformers.__version__)[:2]))
    if not OLDEST <= version <= NEWEST and not _has_warned:
        _has_warned = True
        tested = " to ".join(".".join(map(str, ends)) for ends in (OLDEST, NEWEST))
        logger.warning(
            "transformers %s is not among those that moba was tested with, %s", transformers.__version__, tested
        )


def refuse_other_models(*names: str) -> None:
    """Refuse the attentions `names` for models whose attention does not go through AttentionInterface."""
    if not _refusing:
        _wrap()
    _refusing.update(names)


def require_interface(model: PreTrainedModel) -> None:
    """Raise a ValueError that names the model if none of its layers can have MoBA: it has no attention, computes it
    itself instead of through transformers' AttentionInterface, selects keys itself, or reads windows in every layer.
    """
    model_class: Any = type(model)
    name = model_class.__name__
    if _has_no_attention(model_class):
        raise ValueError(
            f"{name} has no attention layers, so MoBA would change nothing; leave its attn_implementation as it is"
        )
    if _has_own_attention(model_class):
        raise ValueError(
            f"{name} computes its attention itself, not through transformers' AttentionInterface, and cannot have "
            f"MoBA; {SWITCH_PART}"
        )
    for field in SELECTIONS:
        if getattr(model.config, field, None) is not None:
            raise ValueError(f"{name} chooses by itself which keys a query reads (config.{field}) and cannot have MoBA")
    count_from_first_token(model)
    config = model.config.get_text_config(decoder=True)
    if local_by := _local_everywhere(config):
        raise ValueError(
            f"{name} reads a window or chunk in every layer with attention (config.{local_by}="
            f"{getattr(config, local_by)!r}), so MoBA would change nothing; if its layers may read everything, set "
            "config.sliding_window=None, or layer_types with full_attention"
        )


def _local_everywhere(config: Any) -> str | None:
    """The field by which a model's config has sliding windows or chunks in all layers that have attention, if so."""
    kinds = getattr(config, "layer_types", None)
    if getattr(config, "use_sliding_window", None) is False:
        return None
    if kinds is None:
        # As transformers' own `create_masks_for_generate` reads a config.
        return next((name for name in ("sliding_window", "attention_chunk_size") if getattr(config, name, None)), None)
    attends = {kind for kind in kinds if "attention" in kind and kind != "linear_attention"}
    return "layer_types" if attends and attends <= {"sliding_attention", "chunked_attention"} else None


@cache
def _has_no_attention(model_class: type) -> bool:
    """Whether a class is, or is made from, one of transformers' models whose source has no attention."""
    if getattr(model_class, "_supports_attention_backend", False):
        return False
    modules = {cls.__module__ for cls in model_class.__mro__ if cls.__module__.startswith("transformers.models.")}
    sources = [inspect.getsource(sys.modules[module]) for module in modules]
    return bool(sources) and not any(
        re.search(r"^class \w*Attention|get_interface\(", source, re.MULTILINE) for source in sources
    )


@cache
def _has_own_attention(model_class: type) -> bool:
    """Whether the class's source file defines attention layers, none of which calls the interface.

    For a class without source, such as one typed into a notebook, its base classes decide.
    """
    for cls in model_class.__mro__:
        if cls is PreTrainedModel:
            break
        try:
            source = inspect.getsource(sys.modules[cls.__module__])
        except (OSError, TypeError, KeyError):
            continue
        has_attention = re.search(r"^class \w*Attention\w*\(nn\.Module", source, re.MULTILINE) is not None
        if has_attention and "ALL_ATTENTION_FUNCTIONS.get_interface(" not in source:
            return True
        # Layers that are looked up by the attention's name exist for transformers' names only.
        if re.search(r"_CLASSES\[(self\.)?config\._attn_implementation\]", source):
            return True
    return False


def _wrap() -> None:
    owner: Any = PreTrainedModel
    check, switch = owner.get_correct_attn_implementation, owner.set_attn_implementation

    @wraps(check)
    def get_correct_attn_implementation(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        if requested_attention in _refusing:
            require_interface(self)
        return check(self, requested_attention, *args, **kwargs)

    @wraps(switch)
    def set_attn_implementation(self: Any, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        # transformers only logs a line if it cannot switch a model, and leaves the model unchanged.
        is_of_parts = isinstance(attn_implementation, dict)
        asked = attn_implementation.values() if isinstance(attn_implementation, dict) else [attn_implementation]
        if any(isinstance(name, str) and name in _refusing for name in asked):
            text_config = self.config.get_text_config(decoder=True)
            for part in self.modules():
                if isinstance(part, PreTrainedModel) and (
                    part.config is text_config or (part is self and not is_of_parts)
                ):
                    require_interface(part)
        switch(self, attn_implementation, *args, **kwargs)

    assist: Any = GenerationMixin._assisted_decoding

    @wraps(assist)
    def _assisted_decoding(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Its steps read several tokens at once, the first one with the prompt. Only here the prompt's end is known.
        config = self.config.get_text_config(decoder=True)
        setattr(config, PROMPT_FIELD, input_ids.shape[1])
        try:
            return assist(self, input_ids, *args, **kwargs)
        finally:
            delattr(config, PROMPT_FIELD)

    mixin: Any = GenerationMixin
    mixin._assisted_decoding = _assisted_decoding
    owner.get_correct_attn_implementation = get_correct_attn_implementation
    owner.set_attn_implementation = set_attn_implementation
