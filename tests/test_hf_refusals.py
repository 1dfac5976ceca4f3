"""What MoBA cannot honour in transformers' models raises and is named."""

from __future__ import annotations

import pytest
import torch
from tiny_models import logits, positions_of, random_tokens, tiny_config, tiny_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaPreTrainedModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StaticCache,
)
from transformers.masking_utils import create_causal_mask

from moba import MoBAConfig, register_moba
from moba.hf import get_moba_config, set_moba_config
from moba.hf.cache import MoBACache
from moba.hf.layout import PackedRows, layout_mask


@pytest.fixture(autouse=True)
def _registered():
    register_moba(MoBAConfig(8, 3, backend="pytorch"))


@pytest.fixture(scope="module")
def llama():
    return tiny_model()


@pytest.mark.parametrize("mask", [None, "all real", "padded"])
def test_refuses_bidirectional_attention_among_tokens(llama, mask):
    """As models for images and text ask for among an image's tokens."""
    tokens = random_tokens(2, 20)
    masks = {
        None: None,
        "all real": torch.ones_like(tokens),
        "padded": torch.ones_like(tokens).index_fill(1, torch.tensor([0]), 0),
    }
    llama.set_attn_implementation("moba")
    together = torch.full_like(tokens, -1)
    together[:, 5:9] = 0
    embeddings = llama.model.embed_tokens(tokens)
    # No cache; its name is another in newer versions.
    inputs = (llama.config, embeddings, masks[mask], None)
    for asked, said in (
        ({"block_sequence_ids": together}, r"is_causal|mask that this model adds"),
        ({"or_mask_function": lambda b, h, q, k: q < k}, "extra mask functions"),
    ):
        made = create_causal_mask(*inputs, **asked)
        with pytest.raises(ValueError, match=said), torch.no_grad():
            llama.model.layers[0](
                embeddings, made, position_embeddings=llama.model.rotary_emb(embeddings, torch.arange(20)[None])
            )


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(1, 20), r"attention_mask must be \[B, S\] with B = 2, got \(1, 20\)"),
        (torch.ones(2, 20, 20), "attention_mask must be"),
        (torch.ones(2, 19), "attention_mask must cover"),
        (torch.zeros(1, 1, 20, 20), "attention_mask"),
        (torch.ones(1, 1, 20, 20, dtype=torch.bool).tril(), "attention_mask"),
        (torch.ones(2, 20).index_fill(1, torch.tensor([7]), 0), "must mark each row's real tokens in one run"),
    ],
)
def test_masks_that_are_not_read(llama, mask, said):
    with pytest.raises(ValueError, match=said):
        logits(llama, random_tokens(2 if mask.ndim < 4 else 1, 20), attention_mask=mask)


@pytest.mark.parametrize("decode", ["full", "moba"])
@pytest.mark.parametrize("make", [StaticCache, MoBACache])
def test_a_static_cache_without_room(llama, make, decode):
    register_moba(MoBAConfig(8, 3, backend="pytorch", decode=decode))
    llama.set_attn_implementation("moba")
    tokens = random_tokens(2, 17)
    said = r"room for max_cache_len=16 tokens, so 1 cannot follow the 16 it holds: make it with a larger max_cache_len"
    cache = make(llama.config, max_cache_len=16)
    with torch.no_grad():
        llama(tokens[:, :16], past_key_values=cache)
    with torch.no_grad(), pytest.raises(ValueError, match=said):
        llama(tokens[:, 16:], past_key_values=cache)
    with pytest.raises(ValueError, match=said):
        llama.generate(tokens[:, :14], max_new_tokens=4, past_key_values=make(llama.config, max_cache_len=16))
    with torch.no_grad(), pytest.raises(ValueError, match="so 17 cannot follow the 0 it holds"):
        llama(tokens, past_key_values=make(llama.config, max_cache_len=16))


def test_a_static_cache_on_a_gpu_is_not_waited_for():
    """A tensor on the device "meta" has no value to wait for."""
    offset = torch.tensor(16, device="meta")
    layout = {"batch_size": 1, "kv_length": 16, "q_length": 1, "device": "meta"}
    assert layout_mask(**layout, q_offset=offset).shape == (1, 1, 3, 2)
    with pytest.raises(ValueError, match="so 1 cannot follow the 16 it holds"):
        layout_mask(**layout, q_offset=offset, attention_mask=torch.ones(1, 17, dtype=torch.bool))


def test_positions_that_jump(llama):
    tokens = random_tokens(2, 40)
    packed = torch.cat([positions_of([15, 25]), positions_of([40])])
    with pytest.raises(ValueError, match="position_ids must ascend"):
        logits(llama, tokens, position_ids=packed, attention_mask=torch.ones_like(tokens))
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    with pytest.raises(ValueError, match="position_ids must ascend"):
        logits(llama, tokens, position_ids=packed, attention_mask=mask)
    cu = torch.tensor([0, 15, 40], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        logits(llama, tokens, cu_seq_lens_q=cu, cu_seq_lens_k=cu)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        logits(llama, tokens, attention_mask=mask, cu_seq_lens_q=cu, cu_seq_lens_k=cu)
    with pytest.raises(ValueError, match="cu_seq_lens_k"):
        logits(llama, tokens[:1], cu_seq_lens_q=cu)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("output_attentions", {"output_attentions": True}),
        ("is_causal", {"is_causal": False}),
        ("position_bias", {"position_bias": torch.zeros(1, 4, 20, 20)}),
        ("sliding_window", {"sliding_window": 16}),
        ("block_table", {"block_table": torch.zeros(1, 4)}),
        ("anything_else", {"anything_else": 0}),
    ],
)
def test_refuses_what_it_cannot_honour(llama, name, inputs):
    with pytest.raises(ValueError, match=name):
        logits(llama, random_tokens(1, 20), **inputs)


def test_refuses_dropout_in_training_only():
    model, tokens = tiny_model(attention_dropout=0.1), random_tokens(1, 20)
    logits(model, tokens)
    model.train()
    with pytest.raises(ValueError, match=r"dropout=0\.1.*config\.attention_dropout=0\.0"):
        logits(model, tokens)


def test_dropout_is_called_as_the_model_calls_it():
    """GPT-2 has three of equal size."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).train()
    with pytest.raises(ValueError, match=r"set config\.attn_pdrop=0\.0"):
        logits(model, random_tokens(1, 20))
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0)).train()
    assert logits(model, random_tokens(1, 20)).isfinite().all()


@pytest.mark.parametrize("inputs", [{}, {"attention_mask": torch.tensor([[0] + [1] * 19])}], ids=["plain", "padded"])
def test_refuses_bidirectional_models(inputs):
    model = tiny_model()
    model.config.is_causal = False
    with pytest.raises(ValueError, match=r"is_causal|mask that this model adds"):
        logits(model, random_tokens(1, 20), **inputs)


def own_attention(attention):
    """A decoder such as somebody may write: masked by transformers, its attention by itself."""

    class Own(LlamaPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.embed_tokens = torch.nn.Embedding(config.vocab_size, config.hidden_size)
            self.post_init()

        def forward(self, input_ids, attention_mask=None):
            x = self.embed_tokens(input_ids)
            mask = create_causal_mask(self.config, x, attention_mask, None)
            scores = x @ x.transpose(1, 2)
            if mask is not None:
                scores = scores.masked_fill(~mask[:, 0], -1e9) if mask.dtype == torch.bool else scores + mask[:, 0]
            return scores.softmax(-1) @ x

    Own.__module__ = "__main__"  # without source, as in a notebook
    return Own(tiny_config(attn_implementation=attention))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("padded", [False, True])
def test_own_attention_that_nobody_notices_fails_on_the_mask(length, padded):
    tokens = random_tokens(2, length)
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, 0] = 0
    assert own_attention("eager")(tokens, mask).isfinite().all()
    with pytest.raises(RuntimeError, match="size"):
        own_attention("moba")(tokens, mask)


@pytest.mark.parametrize("lengths", [[1, 1], [1, 2], [1, 1, 1], [2, 2], [1, 1, 1, 1]])
def test_a_mask_of_packed_rows_fits_no_scores(lengths):
    """Whatever is computed with it, and however long the keys are: it fails, or it is not attention's output."""
    length = sum(lengths)
    scores, values = torch.zeros(1, 4, length, length), torch.zeros(1, 4, length, 8)
    starts = torch.tensor([[0, *torch.tensor(lengths).cumsum(0)]], dtype=torch.int32)
    with pytest.raises(RuntimeError):
        _ = (scores + PackedRows(starts).encode()) @ values


@pytest.mark.parametrize("name", ["moba", "moba_naive"])
def test_a_class_without_source_is_what_it_is_made_from(name):
    for base in (LlamaForCausalLM, BloomForCausalLM):
        cls = type("Mine", (base,), {"__module__": "__main__"})
        config = tiny_config() if base is LlamaForCausalLM else BloomConfig(vocab_size=64, hidden_size=32, n_head=4)
        model = cls(config)
        if base is LlamaForCausalLM:
            assert logits(model, random_tokens(1, 20), name).isfinite().all()
            continue
        with pytest.raises(ValueError, match=r"^Mine computes its attention itself"):
            model.set_attn_implementation(name)
        assert model.config._attn_implementation == "eager"
        with pytest.raises(ValueError, match=r"^Mine computes its attention itself"):
            cls._from_config(config, attn_implementation=name)


def test_an_image_encoder_is_refused_and_the_way_named():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    config = LlavaConfig(vision_config=vision, text_config=tiny_config(), image_token_index=5)
    model = LlavaForConditionalGeneration(config).eval()
    tokens = torch.tensor([[7, 5, 5, 5, 5, 8, 9, 10, 11]])
    image = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r'is_causal=False.*\{"text_config": "moba"\}'):
        logits(model, tokens, pixel_values=image)
    model.set_attn_implementation("sdpa")
    expected = logits(model, tokens, {"text_config": "moba"}, pixel_values=image)
    assert model.config.text_config._attn_implementation == "moba"
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert expected.isfinite().all()


def test_refuses_bad_configs(llama):
    with pytest.raises(ValueError, match="config"):
        register_moba({"block_size": 8, "topk": 3})
    with pytest.raises(ValueError, match="config"):
        set_moba_config(llama, {"block_size": 8, "topk": 3})
    with pytest.raises(ValueError, match="router"):
        set_moba_config(llama, MoBAConfig(8, 3, router=lambda q, means: q))
    for full_layers in (4, (0, 3)):
        with pytest.raises(ValueError, match="full_layers"):
            set_moba_config(llama, MoBAConfig(8, 3, full_layers=full_layers))
    with pytest.raises(ValueError, match="unknown keys"):
        logits(AutoModelForCausalLM.from_config(tiny_config(moba={"block_size": 8, "topk": 3, "windows": 1})),
               random_tokens(1, 20))  # fmt: skip
    assert get_moba_config(llama) is None
    llama.config.moba = MoBAConfig(8, 3)
    with pytest.raises(ValueError, match=r"config\.moba: not a MoBAConfig: must be a dict"):
        logits(llama, random_tokens(1, 20))
    set_moba_config(llama, None)


def test_a_named_backend_that_cannot_run_raises(llama):
    register_moba(MoBAConfig(8, 3, backend="triton"))
    with pytest.raises(ValueError, match="triton"):
        logits(llama, random_tokens(1, 20))
