"""transformers: MoBA as an attention implementation, and the config that a model carries.

    register_moba(MoBAConfig(block_size=512, topk=3))
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="moba")

With `decode="moba"`, pass a cache that keeps the block means (`moba.hf.cache`); other caches work, but slower:

    model.generate(**inputs, past_key_values=MoBACache(model.config))
"""

from __future__ import annotations

from functools import partial

from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from moba.config import PROVIDED_ROUTERS, MoBAConfig
from moba.hf.attention import moba_attention_forward, read_config
from moba.hf.extensions import provide_route_by, require_route_by
from moba.hf.indexer import require_indexer
from moba.hf.layout import layout_mask
from moba.hf.paged import enable_paged
from moba.hf.switch import refuse_other_models, warn_if_untested

__all__ = [
    "enable_paged",
    "get_moba_config",
    "provide_route_by",
    "register_moba",
    "set_moba_config",
]


def register_moba(config: MoBAConfig | None = None) -> None:
    """Make `attn_implementation="moba"` and `"moba_naive"` known to transformers.

    "moba" runs the config's backend, "moba_naive" the mask-based reference. Both work with `from_pretrained` and with
    `model.set_attn_implementation`, which raise a ValueError for a model whose attention does not go through
    transformers' AttentionInterface. A later call replaces the config for models loaded before, too.

    Args:
        config: used by every model that does not carry its own (see `set_moba_config`). None: each model must.

    Raises:
        ValueError: if config is neither a MoBAConfig nor None.
    """
    if config is not None and not isinstance(config, MoBAConfig):
        raise ValueError(f"config must be a MoBAConfig, got {config!r}")
    warn_if_untested()
    refuse_other_models("moba", "moba_naive")
    for name, backend in (("moba", None), ("moba_naive", "reference")):
        AttentionInterface.register(name, partial(moba_attention_forward, default=config, backend=backend))
        AttentionMaskInterface.register(name, layout_mask)


def set_moba_config(model: PreTrainedModel, config: MoBAConfig | None) -> None:
    """Write the config into `model.config.moba`, which `save_pretrained` saves and which overrides `register_moba`'s.

    Args:
        config: None takes the model's own config away again.

    Raises:
        ValueError: if the config cannot be saved (its router is a function), names a layer that the model does not
            have, or needs queries and keys that nothing provides (see `provide_route_by`, `moba.hf.indexer`).
    """
    model_config = _text_config(model)
    if config is None:
        if hasattr(model_config, "moba"):
            del model_config.moba
        return
    if not isinstance(config, MoBAConfig):
        raise ValueError(f"config must be a MoBAConfig or None, got {config!r}")
    config.check_layers(model_config.num_hidden_layers)
    if config.router in PROVIDED_ROUTERS:
        require_route_by(model, config.router)
    elif config.router == "indexer":
        require_indexer(model)
    model_config.moba = config.to_dict()


def get_moba_config(model: PreTrainedModel) -> MoBAConfig | None:
    """The config that the model carries, or None.

    Raises:
        ValueError: if `model.config.moba` is not a valid MoBAConfig.
    """
    return read_config(_text_config(model))


def _text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config of the language model: a part of the model's config if it has several modalities."""
    return model.config.get_text_config(decoder=True)
