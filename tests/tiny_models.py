"""Small random models of several families, built from configs: nothing is downloaded."""

from __future__ import annotations

import torch
import transformers

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    # Weights far larger than usual, so that attention is far from uniform and the tokens it reads decide the logits.
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

# What a family needs beside SHAPE; "Mistral" has a sliding window by default.
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": None},
    "SmolLM3": {},
    "Gemma": {},
    "Olmo2": {},
    "Phi3": {"sliding_window": None},
}


def tiny_config(family: str = "Llama", **changes):
    return getattr(transformers, f"{family}Config")(**{**SHAPE, **FAMILIES.get(family, {}), **changes})


def tiny_model(family: str = "Llama", **changes):
    torch.manual_seed(1)
    return getattr(transformers, f"{family}ForCausalLM")(tiny_config(family, **changes)).eval()


def random_tokens(batch: int, length: int):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(2, SHAPE["vocab_size"], (batch, length), generator=generator)


def logits(model, tokens, attention="moba", **inputs):
    """The model's logits under an attention, which it keeps."""
    model.set_attn_implementation(attention)
    with torch.no_grad():
        return model(tokens, **inputs).logits


def read_in_parts(model, tokens, lengths, cache, attention="moba", **by_token):
    """Logits of tokens that are read in parts of these lengths, behind those that the cache holds.

    `by_token`: attention_mask and position_ids of all tokens, the cached ones included.
    """
    parts, end = [], int(cache.get_seq_length())
    for part in tokens.split(lengths, dim=1):
        begin, end = end, end + part.shape[1]
        inputs = {name: x[:, 0 if name == "attention_mask" else begin : end] for name, x in by_token.items()}
        parts.append(logits(model, part, attention, past_key_values=cache, **inputs))
    return torch.cat(parts, dim=1)


def gradients_of(model, tokens, attention):
    """The gradients of the model's own loss under an attention, in one vector, the largest of which is 1."""
    model.set_attn_implementation(attention)
    model.zero_grad()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return found / found.abs().max()


def positions_of(lengths):
    """position_ids [1, sum] of sequences packed into one row."""
    return torch.cat([torch.arange(n) for n in lengths])[None]
