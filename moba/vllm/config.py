"""Which MoBA a model is served with, and what is refused before anything is loaded."""

from __future__ import annotations

import logging
import math
import re
from functools import wraps
from typing import Any

from moba.config import MODEL_ROUTERS, MoBAConfig
from moba.validate import MAX_HEAD_DIM

# A child of vLLM's logger, so that its messages are shown among vLLM's.
logger = logging.getLogger("vllm.moba")

# Minor versions of vLLM that were tested: 0.32 on a CPU, 0.26 on a GPU.
TESTED = ((0, 26), (0, 32))
# Tokens of a page are a multiple of this, which the engine's own kernels ask for.
PAGE_STEP = {"cpu": 32, "cuda": 16}
# Pages are no smaller if their size is ours to choose.
USUAL_PAGE_SIZE = 128
PLAIN_KV_DTYPES = ("auto", "float16", "bfloat16", "float32")


def read_config(vllm_config: Any) -> MoBAConfig | None:
    """The MoBA config that the model carries or was given by `--hf-overrides`; None without one.

    Raises:
        ValueError: if it is not a valid one.
    """
    model = vllm_config.model_config
    if model is None:
        return None
    for config in (model.hf_text_config, model.hf_config):
        if values := getattr(config, "moba", None):
            return values if isinstance(values, MoBAConfig) else MoBAConfig.from_dict(values)
    return None


def check_at_start(vllm_config_class: Any) -> None:
    """Have each vLLM config prepared for MoBA once its model is known. A second call changes nothing."""
    original = vllm_config_class.try_verify_and_update_config
    if hasattr(original, "prepares_moba"):
        return

    @wraps(original)
    def try_verify_and_update_config(self: Any) -> None:
        original(self)
        prepare(self)

    try_verify_and_update_config.prepares_moba = True  # type: ignore[attr-defined]
    vllm_config_class.try_verify_and_update_config = try_verify_and_update_config


def prepare(vllm_config: Any) -> None:
    """Choose the page size and the attention backend for a model with a MoBA config, or refuse it.

    Raises:
        ValueError: naming what cannot be served, what it was, and what is valid.
    """
    config = read_config(vllm_config)
    if config is None:
        return
    _check_version()
    _check_config(config, vllm_config)
    _check_model(vllm_config.model_config)
    _check_engine(vllm_config)
    _choose_page_size(config, vllm_config.cache_config)
    _choose_backend(vllm_config.attention_config)
    num_layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    num_full = sum(config.is_full_layer(layer, num_layers) for layer in range(num_layers))
    logger.info(
        "MoBA: %d of %d layers attend to %d blocks of %d tokens (decode=%r), in pages of %d tokens",
        num_layers - num_full, num_layers, config.topk, config.block_size, config.decode,
        vllm_config.cache_config.block_size,
    )  # fmt: skip
    if config.decode == "full":
        logger.warning(
            'MoBA: decode="full" reads all keys for each new token, and its tokens can differ after a preemption, or '
            'where a prompt repeats an earlier answer: both are then read as prompts. "moba" is the mode for serving'
        )


def check_layer(impl: Any, attn_type: str, kv_sharing_target_layer_name: str | None) -> None:
    """Refuse an attention layer that MoBA cannot honour.

    Args:
        impl: the engine's own implementation of the layer, made.
        attn_type, kv_sharing_target_layer_name: what it was made with.

    Raises:
        ValueError: naming what the layer has.
    """
    window = impl.sliding_window
    has = {
        f"attention of the kind {attn_type!r}": attn_type != "decoder",
        f"a sliding window, {window}": window not in (None, -1, (-1, -1)),
        "ALiBi slopes": impl.alibi_slopes is not None,
        f"a soft cap of its logits, {impl.logits_soft_cap}": bool(impl.logits_soft_cap),
        "attention sinks": impl.sinks is not None,
        f"the keys and values of another layer, {kv_sharing_target_layer_name}": (
            kv_sharing_target_layer_name is not None
        ),
        f"quantised keys and values, {impl.kv_cache_dtype}": impl.kv_cache_dtype not in PLAIN_KV_DTYPES,
        f"a head dim of {impl.head_size}, above {MAX_HEAD_DIM}": impl.head_size > MAX_HEAD_DIM,
    }
    _refuse(has, "a layer of this model has {}, which MoBA in vLLM does not serve")


def check_page_size(page_size: int, config: MoBAConfig) -> None:
    """Refuse pages that do not hold whole blocks."""
    if page_size % config.block_size:
        fitting = math.ceil(page_size / config.block_size) * config.block_size
        raise ValueError(
            f"--block-size (tokens of a page) must be a multiple of the MoBA block_size {config.block_size}, got "
            f"{page_size}: leave it out, or try {fitting}"
        )


def _check_version() -> None:
    import vllm

    version = tuple(map(int, re.findall(r"\d+", vllm.__version__)[:2]))
    if version not in TESTED:
        tested = ", ".join(".".join(map(str, one)) for one in TESTED)
        raise ValueError(f"MoBA was not tested with vLLM {vllm.__version__}, but with {tested}: install one of these")


def _check_config(config: MoBAConfig, vllm_config: Any) -> None:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    config.check_layers(model.hf_text_config.num_hidden_layers)
    if callable(config.router) or config.router in MODEL_ROUTERS:
        raise ValueError(
            f"router={config.router!r} is not served by vLLM: it needs what the engine's pages do not hold, or a "
            "function in each of its processes"
        )
    num_ranks, num_kv_heads = parallel.tensor_parallel_size, model.get_total_num_kv_heads()
    if config.router == "shared" and num_ranks > num_kv_heads:
        raise ValueError(
            f"router='shared' needs the query heads of a kv head on one rank: --tensor-parallel-size must be at most "
            f"the {num_kv_heads} kv heads, got {num_ranks}"
        )


def _check_model(model: Any) -> None:
    text = model.hf_text_config
    kinds = sorted(set(getattr(text, "layer_types", None) or ["full_attention"]))
    has = {
        "multi-head latent attention (MLA)": model.use_mla,
        "an encoder and cross-attention": model.is_encoder_decoder,
        "layers that are not attention": model.is_hybrid,
        f"layers of the kinds {kinds}": kinds != ["full_attention"],
        f"a sliding window of {model.get_sliding_window()} tokens": model.get_sliding_window() is not None,
        "attention in chunks": model.attention_chunk_size is not None,
        "attention in both directions to parts of a prompt": model.is_mm_prefix_lm,
        "a convolution of keys (moba_key_convolution)": getattr(text, "moba_key_convolution", None) is not None,
    }
    _refuse(has, "the model has {}, which MoBA in vLLM does not serve")


def _check_engine(vllm_config: Any) -> None:
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    asked = {
        f"--kv-cache-dtype {cache.cache_dtype}": cache.cache_dtype not in PLAIN_KV_DTYPES,
        "--kv-transfer-config (a KV connector)": vllm_config.kv_transfer_config is not None,
        "--kv-offloading-size": cache.kv_offloading_size is not None,
        "--kv-sharing-fast-prefill": cache.kv_sharing_fast_prefill,
        "--speculative-config": vllm_config.speculative_config is not None,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
    }
    _refuse(asked, "MoBA in vLLM does not serve with {}: leave it out")


def _choose_page_size(config: MoBAConfig, cache: Any) -> None:
    if cache.user_specified_block_size:
        return check_page_size(cache.block_size, config)
    step = math.lcm(config.block_size, PAGE_STEP[_platform()])
    cache.block_size = math.ceil(USUAL_PAGE_SIZE / step) * step
    cache.user_specified_block_size = True
    return None


def _choose_backend(attention: Any) -> None:
    if _platform() == "cpu":
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if attention.backend not in (None, AttentionBackendEnum.CUSTOM) or attention.backend_per_kind:
        raise ValueError(
            f"--attention-backend must be left out for MoBA, which is CUSTOM, got {attention.backend} and, for kinds "
            f"of layers, {attention.backend_per_kind}"
        )
    attention.backend = AttentionBackendEnum.CUSTOM


def _platform() -> str:
    """ "cpu" or "cuda"."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return "cpu"
    if current_platform.is_cuda():
        return "cuda"
    raise ValueError(f"MoBA in vLLM runs on NVIDIA GPUs and on CPUs, got {current_platform.device_name!r}")


def _refuse(found: dict[str, Any], sentence: str) -> None:
    """Raise a ValueError for the first of these things that is there."""
    for what, is_there in found.items():
        if is_there:
            raise ValueError(sentence.format(what))
