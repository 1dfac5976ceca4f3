"""The model of a training: made or loaded, its positions stretched, its activations recomputed, its adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moba.hf import register_moba
from moba.hf.indexer import add_indexer
from moba_lab.models import adapters
from moba_lab.models.key_convolution import add_key_convolution
from moba_lab.models.load import EMBEDDED, load_model, load_tokenizer, num_layers_of
from moba_lab.models.rope import stretch_positions
from moba_lab.models.unrotated import apply_config
from moba_lab.train.recipe import Recipe
from moba_lab.train.recipe_parts import LoraPart, ModelPart


def build_model(recipe: Recipe, manifest: dict[str, Any]) -> tuple[Any, Any]:
    """The model of a recipe, in fp32, with MoBA's attention; and its tokenizer, or None if it cannot be had here.

    Args:
        recipe: of the training.
        manifest: of the shards, for the vocabulary.

    Raises:
        ValueError: naming what the recipe asks for that cannot be.
    """
    register_moba(None)
    part = recipe.model
    if part.base is None:
        model, tokenizer = _from_scratch(part, manifest, recipe.data.context, recipe.training.seed)
    else:
        if (known := num_layers_of(_source(part.base))) is not None:
            for _, config in recipe.schedule.stages:
                if config is not None:
                    config.check_layers(known)
        model, tokenizer = load_model(_source(part.base))
        if part.base == EMBEDDED or part.base.endswith(".gguf") or adapters.adapter_file(part.base) is not None:
            model = _plain(model)
    length = recipe.data.span or recipe.data.context
    stretch_positions(model, length, theta=part.rope_theta, factor=part.rope_factor, scaling=part.rope_scaling)
    model.set_attn_implementation("moba")
    if part.key_convolution is not None:
        add_key_convolution(model, part.key_convolution)
    text_config = model.config.get_text_config(decoder=True)
    if recipe.indexer is not None:
        asked: dict[str, Any] = {"head_dim": recipe.indexer.head_dim, "pool": recipe.indexer.pool}
        if getattr(text_config, "moba_indexer", None) is None:
            add_indexer(model, **asked)
        elif text_config.moba_indexer != asked:
            raise ValueError(f"indexer: the base model's are {text_config.moba_indexer}, the recipe says {asked}")
    num_layers = text_config.num_hidden_layers
    for _, config in recipe.schedule.stages:
        apply_config(model, config)
    apply_config(model, recipe.schedule.at(0, num_layers))
    return model.train(), tokenizer


def add_adapters(model: PreTrainedModel, part: LoraPart) -> Any:
    """The model with low-rank adapters, which alone are trained.

    Raises:
        ValueError: if the model has no such layers.
        ModuleNotFoundError: without the package peft.
    """
    from peft import LoraConfig, get_peft_model

    targets = part.targets if isinstance(part.targets, str) else list(part.targets)
    also = list(part.train_also)
    config = LoraConfig(
        r=part.rank, lora_alpha=part.alpha, target_modules=targets, modules_to_save=also or None, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only each layer's input for backward and compute the rest again, which takes a third more time."""
    # transformers 5.23 renamed the method; the old name warns there.
    name = "activation_checkpointing_enable"
    enable: Any = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable({"use_reentrant": False})


def compile_layers(model: PreTrainedModel, backend: Any = "inductor") -> None:
    """Let torch.compile compile a model's layers in place, one graph for all layers that attend alike.

    A graph of the whole model would take as many times longer to compile as there are layers.

    Args:
        model: its layers are compiled when they are first called.
        backend: torch.compile's.
    """
    # Else a layer's number, which says whether its attention is full, makes a graph of its own for every layer.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    for layers in model.modules():
        if isinstance(layers, nn.ModuleList) and len(layers) == num_layers:
            for layer in layers:
                layer.compile(backend=backend)


def tokenizer_of(name: str) -> Any:
    """The tokenizer that a manifest names, or None if it cannot be loaded here."""
    is_hub_name = name.count("/") == 1
    is_ours = name in (EMBEDDED, adapters.ACTIVATED)
    if not is_ours and not Path(name).expanduser().exists() and not is_hub_name:
        return None
    try:
        return load_tokenizer(_source(name))
    except ValueError:
        return None


def _source(name: str) -> str | None:
    return None if name == EMBEDDED else name


def _from_scratch(part: ModelPart, manifest: dict[str, Any], context: int, seed: int) -> tuple[Any, Any]:
    assert part.architecture is not None
    try:
        defaults = AutoConfig.for_model(part.architecture)
    except ValueError:
        raise ValueError(f"model.architecture: transformers knows no {part.architecture!r}") from None
    # transformers keeps whatever it is given, so a misspelt name would go unnoticed.
    if unknown := sorted(key for key in part.shape if not hasattr(defaults, key)):
        raise ValueError(f"model.shape: the config of {part.architecture!r} has no {unknown[0]!r}")
    tokenizer = tokenizer_of(manifest["tokenizer"])
    # A default such as 2 for the end of text means something only in the default's own vocabulary.
    tokens = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = {"vocab_size": manifest["vocab_size"], "max_position_embeddings": context, **tokens, **part.shape}
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(part.architecture, **shape))
    except Exception as error:  # transformers' checks of a config have classes of their own
        said = " ".join(str(error).split())
        raise ValueError(f"model.architecture={part.architecture!r}, shape={part.shape}: {said}") from error
    return model, tokenizer


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model read from GGUF, which transformers does not save, that it does."""
    values = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    plain: Any = type(model)(type(model.config).from_dict(values))
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def num_parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters, and those that are trained."""
    all_parameters = list(model.parameters())
    return sum(p.numel() for p in all_parameters), sum(p.numel() for p in all_parameters if p.requires_grad)
