"""A tiny random model of every causal decoder class in the installed transformers, and what becomes of it under MoBA.

docs/models.md is the table of it, which tools/models_page.py writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AttentionInterface, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moba import MoBAConfig, register_moba

LAYERS = 2
VOCABULARY = 64

_TWO = (
    "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok moe_k moe_topk num_experts_per_token"
)
# The names that configs have for a size, and the size; names that a config lacks are left out.
SIZES: list[tuple[str, float]] = [
    ("vocab_size audio_vocab_size text_vocab_size vocab_size_per_layer_input unpadded_vocab_size", VOCABULARY),
    ("hidden_size n_embd d_model dim emb_dim embedding_size word_embed_proj_dim decoder_hidden_size hidden_dim", 32),
    ("embedding_dim n_embed hidden_size_global hidden_size_per_layer_input backbone_hidden_size text_hidden_size", 32),
    ("input_embedding_size projection_hidden_dim out_hidden_size encoder_hidden_size nemo_conv_channels", 32),
    ("ext_pw_out_channel depthwise_separable_out_channel", 32),
    ("intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner d_ff moe_intermediate_size dff", 48),
    ("shared_expert_intermediate_size expert_ffn_hidden_size dim_ff moe_shared_expert_intermediate_size", 48),
    ("block_ff_dim intermediate_size_mlp mlp_dim", 48),
    ("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers", LAYERS),
    ("num_decoder_layers num_blocks depth", LAYERS),
    ("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads", 4),
    ("num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads", 4),
    ("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
    ("qk_rope_head_dim qk_nope_head_dim rotary_dim", 4),
    (_TWO, 2),
    ("head_dim d_head attention_head_dim dim_head swa_head_dim global_head_dim", 8),
    # Other than the keys, where values have a head dim of their own.
    ("v_head_dim swa_v_head_dim", 12),
    ("q_lora_rank kv_lora_rank", 16),
    ("max_position_embeddings n_positions n_ctx max_sequence_length max_seq_len max_target_positions", 256),
    ("n_group topk_group n_shared_experts bos_token_id", 1),
    ("sliding_window attention_chunk_size", 16),
    ("eos_token_id", 2),
    ("pad_token_id num_kv_shared_layers", 0),
    # Weights far larger than usual, so that what attention reads decides the logits.
    ("initializer_range", 0.3),
]
SMALL = {name: size for names, size in SIZES for name in names.split()}
# Given even where the default config says None.
NEEDED = {"head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "n_shared_experts"}

# What a config needs beside SMALL to be one of a model.
OWN: dict[str, dict[str, Any]] = {
    "BailingHybridConfig": {"n_group": 1, "topk_group": 1},
    "BambaConfig": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [0]},
    "BltConfig": {"encoder_hash_byte_group_vocab": 64},
    "CohereCompassTextConfig": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    },
    "CsmDepthDecoderConfig": {"num_codebooks": 64},
    "DbrxConfig": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}, "ffn_config": {"ffn_hidden_size": 48},
    },
    "FalconH1Config": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1},
    "GPTNeoConfig": {"attention_types": [[["global"], 2]], "attention_layers": ["global", "global"]},
    "GraniteMoeHybridConfig": {
        "mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["full_attention", "linear_attention"],
    },
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2MoeConfig": {"layer_types": ["full_attention", "conv"]},
    "LongcatFlashConfig": {"head_dim": 4},
    "Mamba2Config": {"num_heads": 8},
    "MusicgenDecoderConfig": {"num_codebooks": 1},
    "MusicgenMelodyDecoderConfig": {"num_codebooks": 1},
    "NemotronHConfig": {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "RecurrentGemmaConfig": {"block_types": ["recurrent", "attention"]},
    "ReformerConfig": {"axial_pos_embds": False},
    "RoCBertConfig": {"shape_vocab_size": 64, "pronunciation_vocab_size": 64},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {"layers_block_type": ["hybrid", "hybrid"]},
    "ZayaConfig": {"num_experts_per_tok": 1},
}  # fmt: skip


# Classes that no config of their own alone makes run, and why.
NOT_BUILT = {
    "Gemma3nForConditionalGeneration": "its vision tower is in the package timm",
    "Gemma4AssistantForCausalLM": "drafts for another model, whose keys it reads",
    "Gemma4UnifiedAssistantForCausalLM": "drafts for another model, whose keys it reads",
}

# Where an older transformers names another config in the class.
CONFIGS = {"CsmDepthDecoderForCausalLM": transformers.CsmDepthDecoderConfig}


def decoder_classes() -> list[str]:
    """The names of all classes that `AutoModelForCausalLM` makes, or that are called like it."""
    found = {name for name in dir(transformers) if name.endswith(("ForCausalLM", "LMHeadModel"))}
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        found.update([names] if isinstance(names, str) else names)
    return sorted(name for name in found if hasattr(transformers, name) and not name.startswith("Auto"))


def small_config(config_class: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """The config of a model with full attention in its layers, wherever the family lets them have it."""
    default = config_class()
    values = default.to_dict()
    own = {**OWN.get(config_class.__name__, {}), **changes}
    small: dict[str, Any] = {}
    for name, value in values.items():
        if name in SMALL and not isinstance(value, (bool, str, list, dict)):
            is_asked = value is not None or name in NEEDED or name.endswith("_token_id")
            # With latent keys (MLA) the head dim is that of the rotated part.
            if is_asked and not (name == "head_dim" and "qk_rope_head_dim" in values):
                small[name] = SMALL[name]
        elif isinstance(value, (list, tuple)) and len(value) == getattr(default, "num_hidden_layers", None):
            small[name] = _of_layers(name, list(value))
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig) and name not in own:
            small[name] = small_config(type(part))
    if "qk_rope_head_dim" in values and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    return config_class(**{**small, **own})


def tiny_decoder(name: str, attention: str | None = None, **changes: Any) -> Any:
    """A model of the class with random weights, in fp32 and eval mode.

    Args:
        name: of the class. attention: its `attn_implementation`, given before the model is made.
        changes: of its config.
    """
    model_class = getattr(transformers, name)
    config = small_config(CONFIGS.get(name, model_class.config_class), **changes)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    if attention is not None:
        config._attn_implementation = attention
    # Experts one by one: torch's grouped product has no fp64.
    config.get_text_config()._experts_implementation = "eager"
    torch.manual_seed(1)
    return model_class(config).eval()


def verdict(name: str) -> str:
    """What becomes of a class under MoBA, as docs/models.md has it.

    Raises:
        AssertionError: if it runs and is wrong: another function than the model's own attention with every block, than
            the reference with few, than a row alone with left padding, than the whole text in steps; or not causal.
    """
    if name in NOT_BUILT:
        return f"not tried: {NOT_BUILT[name]}"
    try:
        return _check(name, {})
    except ValueError as error:
        reason = str(error)
    if "reads a window or chunk in every layer" in reason:
        is_by_layer = "config.layer_types" in reason
        changes = {"layer_types": ["full_attention"] * LAYERS} if is_by_layer else {"sliding_window": None}
        try:
            _check(name, changes)
        except (AttributeError, ValueError, StrictDataclassError):  # the config cannot be so
            pass
        else:
            return f"works with {'full_attention in layer_types' if is_by_layer else 'sliding_window=None'}"
    return "refused: " + re.split(";|, got tensor", reason.removeprefix(f"{name} "))[0]


def _check(name: str, changes: dict[str, Any]) -> str:
    tokens = torch.randint(3, VOCABULARY, (1, 56), generator=torch.Generator().manual_seed(2))
    register_moba(MoBAConfig(8, 2, backend="pytorch", decode="moba"))
    model = tiny_decoder(name, "moba", **changes)
    with _counted() as calls:
        sparse = _logits(model, tokens)
    naive = _logits(tiny_decoder(name, "moba_naive", **changes), tokens)
    register_moba(MoBAConfig(8, 7, backend="pytorch"))
    full = _logits(model, tokens)
    own = tiny_decoder(name, "eager", **changes)
    expected = _logits(own, tokens)
    noise = _distance(_logits(own.double(), tokens), expected)
    own.float()
    register_moba(MoBAConfig(8, 2, backend="pytorch", decode="moba"))
    allowed = 30 * noise
    assert _distance(full, expected) < allowed, "not the model's own attention with every block"
    assert _distance(sparse, naive) < allowed, "not what the reference gives"
    assert _distance(sparse, expected) > 10 * allowed, "nothing is sparse"
    changed = tokens.clone()
    changed[0, -1] = 3 + (tokens[0, -1] + 17) % (VOCABULARY - 3)
    moved = (_logits(model, changed) - sparse).abs()
    assert moved[:, :-1].max() < allowed, "logits moved before the token that was changed"
    assert moved[:, -1].max() > allowed, "the last token's logits did not move with it"
    for what in (_padding_error, _steps_error):
        try:
            is_held = what(own, tokens) < allowed
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            continue
        assert not is_held or what(model, tokens) < allowed, f"{what.__name__}: right with the model's own attention"
    return "works" if len(calls) >= own.config.get_text_config().num_hidden_layers else "works in the full layers"


def _logits(model: Any, tokens: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **{"use_cache": False, **inputs}).logits


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def _padding_error(model: Any, tokens: torch.Tensor) -> float:
    """How far a row that is padded on the left lies from the same row alone."""
    other = torch.randint(3, VOCABULARY, (1, 65), generator=torch.Generator().manual_seed(3))
    rows = torch.cat([torch.nn.functional.pad(tokens, (9, 0)), other])
    mask = torch.ones_like(rows)
    mask[0, :9] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    try:
        out = _logits(model, rows, **inputs)
    except TypeError:  # has no position_ids
        out = _logits(model, rows, attention_mask=mask)
    return _distance(out[:1, 9:], _logits(model, tokens))


def _steps_error(model: Any, tokens: torch.Tensor) -> float:
    """How far a text that is read in steps, with the model's cache, lies from the same read at once."""
    parts, cache = [], None
    for part in tokens.split([40] + [1] * 16, dim=1):
        with torch.no_grad():
            out = model(part, past_key_values=cache, use_cache=True)
        parts.append(out.logits)
        cache = out.past_key_values
    return _distance(torch.cat(parts, dim=1), _logits(model, tokens))


@contextmanager
def _counted() -> Iterator[list[Any]]:
    """The modules that MoBA serves, one for each call."""
    served: list[Any] = []
    attention = AttentionInterface()["moba"]
    AttentionInterface.register("moba", partial(attention, observe=lambda module, routing: served.append(module)))
    try:
        yield served
    finally:
        AttentionInterface.register("moba", attention)


def _of_layers(name: str, kinds: list[Any]) -> list[Any]:
    """A list of LAYERS entries out of one for each layer, full attention first where there is a choice."""
    if name in ("layer_types", "layers_block_type"):
        kinds = sorted(dict.fromkeys(kinds), key=lambda kind: kind not in ("full_attention", "attention", "hybrid"))
    return (kinds * LAYERS)[:LAYERS]
