"""Compile a setting's kernels before a call needs them."""

from __future__ import annotations

from typing import Any

import torch

from moba.config import MoBAConfig, require_int


def warmup(
    model: torch.nn.Module | None = None,
    *,
    config: MoBAConfig | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    value_dim: int | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    training: bool = True,
    max_tokens: int = 131072,
) -> int:
    """Compile what MoBA launches on a GPU, in parallel, or load it from Triton's cache on disk.

    A first call does that by itself, for the kernels that it launches. `warmup` does it for calls of any length, batch
    and padding, packed sequences, the backward, and steps of decoding, before a training starts or a server answers.

    Args:
        model: a transformers model whose config has a MoBA config (`set_moba_config`): everything else follows from it.
        config: block_size, topk, keep_first and keep_recent; of the model where it has its own.
        heads, kv_heads, head_dim: H, G and D; kv_heads is heads where None. value_dim: of the values; head_dim if None.
        softcap: as in `moba_attention`.
        dtype, device: of q, k and v; the model's where there is one.
        training: whether gradients will be asked for.
        max_tokens: the longest context that steps of decoding will have; calls of other kinds have no limit.

    Returns:
        How many kernels are ready; 0 where the triton backend does not run, as on a CPU: there is nothing to compile.

    Raises:
        ValueError: naming what is missing.
    """
    require_int("max_tokens", max_tokens, 1)
    if model is not None:
        parameter = next(model.parameters())
        dtype, device = parameter.dtype, parameter.device
        config, heads, kv_heads, head_dim, softcap = _of_model(model, config)
    if config is None or heads is None or head_dim is None:
        raise ValueError("warmup needs a model, or config, heads and head_dim")
    kv_heads = kv_heads or heads
    for name, value in (("heads", heads), ("kv_heads", kv_heads), ("head_dim", head_dim)):
        require_int(name, value, 1)
    if heads % kv_heads:
        raise ValueError(f"kv_heads must divide heads, got {kv_heads} and {heads}")
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available() or config.backend not in ("auto", "triton"):
        return 0
    from moba import backends

    probe = torch.empty(1, 1, heads, head_dim, dtype=dtype, device=device)
    if not backends.resolve(config.backend, probe, probe).__name__.endswith("triton"):
        return 0
    from moba.backends.triton.ahead import index_loss_plans, index_variants_of, variants_of
    from moba.backends.triton.tuning import arch_of
    from moba.backends.triton.variants import compiled

    variants = variants_of(
        arch_of(device), dtype, config.block_size, config.topk, config.keep_first + config.keep_recent,
        (heads, kv_heads, head_dim, value_dim or head_dim), softcap=softcap, training=training, max_tokens=max_tokens,
        is_shared=config.router in ("shared", "indexer"),
    )  # fmt: skip
    index = None if model is None else _indexer_of(model, config)
    if index is not None:
        setting = (arch_of(device), dtype)
        variants += index_variants_of(
            *setting, config.block_size, config.topk, config.keep_first + config.keep_recent, (kv_heads, index[0]),
            by_tokens=index[1],
        )  # fmt: skip
        if training:
            options: Any = {"num_heads": heads, "num_kv_heads": kv_heads, "softcap": softcap}
            (plan,) = index_loss_plans(*setting, head_dim, config.block_size, **options)
            variants += plan.variants()
    return len(compiled(list(dict.fromkeys(variants)), device))


def _of_model(model: Any, config: MoBAConfig | None) -> tuple[MoBAConfig | None, int, int, int, float | None]:
    """A transformers model's MoBA config, query and key/value heads, head dim and softcap."""
    text: Any = model.config.get_text_config(decoder=True) if hasattr(model, "config") else None
    heads: int | None = getattr(text, "num_attention_heads", None)
    if heads is None:
        raise ValueError(f"{type(model).__name__} has no config with num_attention_heads: give heads and head_dim")
    own = getattr(text, "moba", None)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    softcap = getattr(text, "attn_logit_softcapping", None)
    return (MoBAConfig.from_dict(own) if own else config), heads, kv_heads, head_dim, softcap


def _indexer_of(model: Any, config: MoBAConfig) -> tuple[int, bool] | None:
    """Head dim of a model's learned router and whether it scores tokens, not means; None if it is not in use."""
    said = getattr(model.config.get_text_config(decoder=True), "moba_indexer", None)
    return (said["head_dim"], said["pool"] == "max") if config.router == "indexer" and said else None
