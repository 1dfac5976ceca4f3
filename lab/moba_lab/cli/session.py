"""A model for a command: checks before it is loaded, the prompt as tokens, silent libraries."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from moba.config import MoBAConfig
from moba_lab.bench.machine import DTYPES, choose_device
from moba_lab.cli.options import Attention, Choice, Dtype
from moba_lab.models.rope import can_stretch, stretch_config, stretch_positions

NAMES = {Attention.moba: "MoBA", Attention.moba_naive: "MoBA, mask-based", Attention.sdpa: "full attention"}

# Results go to standard output, everything said about them here.
messages = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print a line about the run, as it is: paths may look like markup."""
    messages.print(text, style="dim", markup=False)


@dataclass
class Session:
    """A model that is loaded when it is first used, its tokenizer, and the MoBA settings it runs with.

    Attributes:
        name: what `load_model` is told of the model.
        tokenizer: the model's.
        model_config: the decoder's config, its positions stretched.
        config: the MoBA settings.
        attention: what the model attends with; `use` changes it.
        dtype, device: of the weights.
        yarn: how often positions are stretched.
    """

    name: str | None
    tokenizer: Any
    model_config: Any
    config: MoBAConfig
    attention: Attention
    dtype: torch.dtype
    device: torch.device
    yarn: float | None = None

    @cached_property
    def model(self) -> Any:
        """The model.

        Raises:
            ValueError: if it is not a causal language model or does not fit the settings.
        """
        from moba.hf import register_moba
        from moba_lab.models.load import EMBEDDED, load_model
        from moba_lab.models.unrotated import apply_config

        say(f"loading {self.name or EMBEDDED} …")
        register_moba(None)
        loaded, _ = load_model(self.name, dtype=self.dtype)
        apply_config(loaded, self.config)
        stretch_positions(loaded, factor=self.yarn, scaling="yarn")
        loaded.to(self.device)
        loaded.set_attn_implementation(self.attention.value)
        return loaded

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.model_config.num_hidden_layers

    def use(self, attention: Attention) -> None:
        """Switch the model's attention."""
        self.model.set_attn_implementation(attention.value)

    def encode(self, text: str, *, chat: bool, max_new_tokens: int) -> Tensor:
        """The prompt as token ids [T], in the chat template if the model has one and `chat` asks for it.

        Raises:
            ValueError: if prompt and new tokens do not fit the model's context.
        """
        if chat and self.tokenizer.chat_template:
            turn = [{"role": "user", "content": text}]
            encoded = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)
        else:
            encoded = self.tokenizer(text)
        ids = torch.tensor(encoded["input_ids"], dtype=torch.long)
        asked = f"the prompt has {ids.numel():,} tokens and {max_new_tokens:,} new ones are asked for"
        self.require_context(ids.numel() + max_new_tokens, asked)
        return ids

    def require_context(self, length: int, asked: str) -> None:
        """Raise a ValueError, which begins with what was `asked`, if the model cannot read `length` tokens."""
        limit = getattr(self.model_config, "max_position_embeddings", None)
        if limit is None or length <= limit:
            return
        can = self.yarn is not None or can_stretch(self.model_config)
        advice = f"; --yarn {math.ceil(length / limit * (self.yarn or 1))} stretches it far enough" if can else ""
        raise ValueError(f"{asked}, but the model's context is {limit:,} tokens{advice}")


def open_session(
    model: str | None, choice: Choice, attention: Attention, dtype: Dtype, device: str, yarn: float | None = None
) -> Session:
    """A session with a model, its positions stretched `yarn` times; the weights are not loaded yet.

    Raises:
        ValueError: if there is no such model or it does not fit the settings.
        ModuleNotFoundError: if a package is missing.
        OSError: if files cannot be read.
    """
    where = choose_device(device)
    quieten()
    from moba_lab.models.load import EMBEDDED, load_config, load_tokenizer

    precision = DTYPES.get(dtype.value, torch.float32 if where.type == "cpu" else torch.bfloat16)
    name = model or EMBEDDED
    config = load_config(model).get_text_config(decoder=True)
    stretch_config(config, factor=yarn, scaling="yarn")
    session = Session(model, load_tokenizer(model), config, choice.config, attention, precision, where, yarn)
    stretched = f" · positions stretched {yarn:g} times" if yarn else ""
    dtype_name = str(precision).removeprefix("torch.")
    say(f"{name} · {dtype_name} on {where} · {describe(choice.config, attention)}{stretched}")
    if choice.kept_by_default and attention is not Attention.sdpa:
        say(
            "This model was not trained with MoBA, so its first block, where untrained attention rests, is always "
            "kept; --keep-first 0 is the paper's plain rule."
        )
    return session


def describe(config: MoBAConfig, attention: Attention) -> str:
    """The settings in words."""
    if attention is Attention.sdpa:
        return "full attention"
    parts = [f"MoBA: block size {config.block_size}, top-k {config.topk}"]
    parts += [f"keep first {config.keep_first}"] if config.keep_first else []
    parts += [f"keep recent {config.keep_recent}"] if config.keep_recent else []
    parts += [f"full layers {config.full_layers}"] if config.full_layers else []
    parts += [f"router {config.router}"] if config.router != "mean" else []
    parts += ["decode moba"] if config.decode == "moba" else []
    return ", ".join(parts) + (" (reference)" if attention is Attention.moba_naive else "")


def quieten() -> None:
    """Keep the libraries' own warnings and progress bars out of the output."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def reading_progress() -> Progress:
    """A progress bar for the prefill, counted in tokens, which disappears once it is done."""
    return Progress(
        TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeElapsedColumn(),
        console=messages, transient=True, disable=not messages.is_terminal,
    )  # fmt: skip
