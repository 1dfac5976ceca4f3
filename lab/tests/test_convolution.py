"""Key convolutions: the formula, and in transformers models every way in which keys can have neighbours."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import logits, positions_of, random_tokens, read_in_parts, tiny_model
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM, StaticCache

from moba import MoBAConfig, register_moba
from moba.hf.cache import MoBACache
from moba_lab.models.key_convolution import KeyConvolution, add_key_convolution, load_key_convolution

CONFIG = MoBAConfig(4, 3, decode="moba")


@pytest.fixture(autouse=True)
def registered():
    register_moba(CONFIG)


def convolved_model(family="Llama", width=3, seed=5, **changes):
    """A tiny model whose convolutions do something, in fp64 as in test_hf_generate.py."""
    model = tiny_model(family, **changes).double()
    add_key_convolution(model, width)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "key_convolution" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))
    model.set_attn_implementation("moba")
    return model


@pytest.mark.parametrize("width", [3, 5])
def test_the_formula(width):
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    module = KeyConvolution(6, width, dtype=torch.float64)
    torch.nn.init.normal_(module.weight)
    kernel = module.weight.flip(1)[:, None]  # torch's convolution counts from the oldest token
    expected = x + F.silu(F.conv1d(F.pad(x.mT, (width - 1, 0)), kernel, groups=6)).mT
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_parts_of_a_sequence_are_the_same_bits():
    x = torch.randn(2, 20, 6).bfloat16()
    module = KeyConvolution(6, 5, dtype=torch.bfloat16)
    torch.nn.init.normal_(module.weight)
    expected = module(x)
    for start, stop in ((0, 1), (1, 2), (3, 9), (4, 20)):
        assert torch.equal(module(x[:, start:stop], x[:, :start]), expected[:, start:stop])


def test_gradients_and_the_start():
    torch.manual_seed(0)
    module = KeyConvolution(4, 3, dtype=torch.float64)
    x = torch.randn(1, 7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(module(x), x)
    module(x).square().sum().backward()
    assert (module.weight.grad != 0).all()  # weights of zero learn
    torch.nn.init.normal_(module.weight)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    assert torch.autograd.gradcheck(lambda x, w: functional(module, w, x, positions), (x, module.weight))


def tiny_config_model(model):
    """A new model of the same config, without convolutions."""
    return LlamaForCausalLM(model.config)


def functional(module, weight, x, positions):
    return torch.func.functional_call(module, {"weight": weight}, (x, None, positions))


def test_a_new_convolution_changes_nothing():
    tokens = random_tokens(2, 30)
    model = tiny_model()
    before = logits(model, tokens)
    add_key_convolution(model, 3)
    assert torch.equal(logits(model, tokens), before)
    model.set_attn_implementation("sdpa")
    assert torch.isfinite(logits(model, tokens, "sdpa")).all()


@pytest.mark.parametrize(
    ("family", "width", "kind"),
    [
        *(("Llama", width, kind) for width in (3, 5) for kind in ("dynamic", "static", "MoBA", "MoBA static")),
        ("Llama", 3, "dynamic without config"),
        *((family, 3, "dynamic") for family in ("Qwen3", "Olmo2", "Gemma")),
    ],
)
def test_decoding_is_prefill(family, width, kind):
    model = convolved_model(family, width)
    tokens = random_tokens(2, 24)
    expected = logits(model, tokens)
    assert (expected - logits(tiny_model(family).double(), tokens)).abs().max() > 0.01  # it does something
    cache = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "dynamic without config": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=32),
        "MoBA": lambda: MoBACache(model.config),
        "MoBA static": lambda: MoBACache(model.config, max_cache_len=32),
    }[kind]()
    # A prompt of one token, a chunk shorter than the convolution, a longer one, then single tokens.
    actual = read_in_parts(model, tokens, [1, 2, 8, *[1] * 13], cache)
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_left_padding(kind):
    model = convolved_model(width=5)
    tokens, lengths = random_tokens(2, 24), (24, 17)
    mask = (torch.arange(24) >= 24 - torch.tensor(lengths)[:, None]).long()
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=32)
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    actual = read_in_parts(model, tokens, [9, 11, 1, 1, 1, 1], cache, **inputs)
    for row, length in enumerate(lengths):
        alone = logits(model, tokens[row : row + 1, 24 - length :])
        torch.testing.assert_close(actual[row : row + 1, 24 - length :], alone, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("told_by", ["positions", "cu_seq_lens"])
def test_packed_documents_do_not_see_each_other(told_by):
    model = convolved_model(width=5)
    tokens, lengths = random_tokens(1, 24), (9, 1, 14)
    options = {"position_ids": positions_of(lengths), "use_cache": False}
    if told_by == "cu_seq_lens":
        cu = torch.tensor([0, 9, 10, 24], dtype=torch.int32)
        options |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 14, "max_length_k": 14}
    expected = torch.cat([logits(model, part, use_cache=False) for part in tokens.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(logits(model, tokens, **options), expected, rtol=2e-4, atol=2e-4)


def test_right_padding_changes_no_real_token():
    model = convolved_model()
    tokens = random_tokens(1, 20)
    padded = F.pad(tokens, (0, 4))
    mask = (torch.arange(24) < 20).long()[None]
    actual = logits(model, padded, attention_mask=mask, use_cache=False)[:, :20]
    torch.testing.assert_close(actual, logits(model, tokens), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("cache", [DynamicCache, MoBACache])
def test_beam_search_moves_the_rows(cache):
    model = convolved_model()
    tokens = random_tokens(2, 13)
    options = GenerationConfig(max_new_tokens=8, num_beams=3, do_sample=False, pad_token_id=0)
    with_cache = model.generate(tokens, options, past_key_values=cache(config=model.config))
    assert torch.equal(with_cache, model.generate(tokens, options, use_cache=False))


def test_cropping_and_copying():
    model = convolved_model(width=5)
    tokens = random_tokens(1, 24)
    expected = logits(model, tokens)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_tokens(1, 20).flip(1), past_key_values=cache)
        cache.crop(-20)
        model(torch.cat([tokens[:, :12], tokens[:, :5]], dim=1), past_key_values=cache)
        cache.crop(-5)
        copied = copy.deepcopy(cache)
        for one in (cache, copied):
            actual = model(tokens[:, 12:], past_key_values=one).logits
            torch.testing.assert_close(actual, expected[:, 12:], rtol=2e-4, atol=2e-4)
        cache.crop(-17)
        with pytest.raises(ValueError, match="cropped by more than 16"):
            model(tokens[:, 7:], past_key_values=cache)


@pytest.mark.parametrize("options", [{}, {"max_cache_len": 32}], ids=["dynamic", "static"])
def test_a_cache_that_was_reset_begins_anew(options):
    model, tokens = convolved_model(width=5), random_tokens(1, 24)
    cache = MoBACache(model.config, **options)
    with torch.no_grad():
        model(tokens.flip(1), past_key_values=cache)
        cache.reset()
        actual = model(tokens, past_key_values=cache).logits
    torch.testing.assert_close(actual, logits(model, tokens), rtol=2e-4, atol=2e-4)


def test_a_cache_from_a_file_is_refused(tmp_path):
    model, tokens = convolved_model(), random_tokens(1, 24)
    cache = MoBACache(model.config)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="from a file"):
        logits(model, tokens, past_key_values=MoBACache.load(tmp_path / "cache", model.config))


def test_a_copied_model_has_its_own(tmp_path):
    model, tokens = convolved_model(), random_tokens(1, 20)
    other = copy.deepcopy(model)
    expected = logits(model, tokens)
    with torch.no_grad():
        for attention in (layer.self_attn for layer in model.model.layers):
            attention.key_convolution.weight.zero_()
    assert torch.equal(logits(other, tokens), expected)
    assert (logits(model, tokens) - expected).abs().max() > 0.01


@pytest.mark.parametrize("max_shard_size", ["5GB", "10KB"])
def test_save_and_load(tmp_path, max_shard_size):
    model, tokens = convolved_model(width=5), random_tokens(1, 20)
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="load_key_convolution"):
        logits(loaded, tokens)
    load_key_convolution(loaded, tmp_path)
    assert torch.equal(logits(loaded, tokens), expected)
    with pytest.raises(ValueError, match="already"):
        load_key_convolution(loaded, tmp_path)
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="safetensors"):
        load_key_convolution(tiny_config_model(model), tmp_path)


def test_training_reaches_the_weights():
    model, tokens = convolved_model(), random_tokens(1, 20)
    model.train()
    model.gradient_checkpointing_enable()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    for layer in model.model.layers:
        assert (layer.self_attn.key_convolution.weight.grad != 0).any()
        assert layer.self_attn.key_convolution.call is None


def test_compiled_training_step():
    model, tokens = convolved_model(num_hidden_layers=1), random_tokens(1, 20)
    expected = model(tokens, labels=tokens, use_cache=False).loss
    compiled = torch.compile(model, backend="aot_eager")
    actual = compiled(tokens, labels=tokens, use_cache=False).loss
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match="width must be one of 3, 5, got 4"):
        add_key_convolution(tiny_model(), 4)
    with pytest.raises(ValueError, match="k_proj"):
        add_key_convolution(tiny_model("Phi3"))
    with pytest.raises(ValueError, match="no moba_key_convolution"):
        load_key_convolution(tiny_model(), "nowhere")
    model, tokens = convolved_model(), random_tokens(2, 12)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    with pytest.raises(ValueError, match="attention_mask"):
        logits(model, tokens, "sdpa", attention_mask=mask)
    with pytest.raises(ValueError, match="eager"):
        logits(model, tokens, "eager")
    cache = DynamicCache(config=model.config)
    tiny = tiny_model()
    logits(tiny, tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values holds keys of 12 tokens"):
        logits(model, tokens, past_key_values=cache)
    model.model.layers[1].self_attn.k_proj = copy.deepcopy(tiny.model.layers[1].self_attn.k_proj)
    with pytest.raises(ValueError, match="replaced"):
        logits(model, tokens)
