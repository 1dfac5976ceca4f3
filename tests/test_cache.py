"""MoBACache: generation, chunks, cropping, beams, copies, with the means always those of the cached keys."""

from __future__ import annotations

import copy
import random
import resource
import signal

import pytest
import torch
from helpers import assert_close
from test_hf_generate import CLOSE, PROMPT, SPARSE, generate, greedy_without_cache, use
from test_hf_generate import _registered as _registered
from tiny_models import random_tokens, tiny_model
from transformers import DynamicCache, LlamaConfig, StaticCache

from moba import MoBAConfig, register_moba
from moba.hf.cache import MoBACache
from moba.routing import mean_keys


@pytest.fixture(scope="module")
def model():
    """In fp64, as in test_hf_generate.py."""
    return tiny_model("Qwen3").double()


@pytest.fixture(scope="module")
def llama():
    return tiny_model().double()


@pytest.fixture(params=["dynamic", "static"])
def new_cache(request):
    length = None if request.param == "dynamic" else 96
    return lambda model: MoBACache(model.config, max_cache_len=length)


@pytest.fixture(params=["DynamicCache", "StaticCache", "MoBACache", "MoBACache static"])
def any_cache(request):
    """transformers' own caches, which know of no means, beside ours."""
    if request.param == "DynamicCache":
        return lambda model: DynamicCache(config=model.config)
    if request.param == "StaticCache":
        return lambda model: StaticCache(config=model.config, max_cache_len=96)
    return lambda model: MoBACache(model.config, max_cache_len=96 if "static" in request.param else None)


@torch.no_grad()
def read(model, tokens, cache, chunks=None, attention="moba", **inputs):
    """Logits of the tokens, read in chunks."""
    use(model, attention)
    parts = tokens.split(chunks or [tokens.shape[1]], dim=1)
    return torch.cat([model(part, past_key_values=cache, **inputs).logits for part in parts], dim=1)


def check_means(cache, block_size=8, starts=None):
    """In a cache of means, every finished block's has the bits that a prefill of the cached keys would compute."""
    for layer in cache.layers if isinstance(cache, MoBACache) else ():
        length = int(layer.get_seq_length())
        for row in range(layer.keys.shape[0]):
            start = 0 if starts is None else starts[row]
            keys = layer.keys[row, :, start:length].transpose(0, 1).contiguous()
            expected = mean_keys(keys, block_size).transpose(0, 1)
            assert torch.equal(layer.block_means.means[row, :, : expected.shape[1]], expected)


@pytest.mark.parametrize("chunk", [None, 16, 7, 1])
def test_generate_is_recomputing_every_step(model, any_cache, chunk):
    tokens = random_tokens(2, PROMPT)
    cache = any_cache(model)
    actual = generate(model, tokens, past_key_values=cache, prefill_chunk_size=chunk)
    assert torch.equal(actual, greedy_without_cache(model, tokens))
    check_means(cache)


@pytest.mark.parametrize("chunks", [[16, 16, 13], [20, 1, 24], [1] * 45])
@pytest.mark.parametrize("full_layers", [0, 2])
def test_chunks_of_a_prompt_are_the_prompt(model, any_cache, chunks, full_layers):
    register_moba(MoBAConfig(**SPARSE, full_layers=full_layers))
    tokens = random_tokens(2, PROMPT)
    cache = any_cache(model)
    actual = read(model, tokens, cache, chunks)
    with torch.no_grad():
        assert_close(actual, model(tokens, use_cache=False).logits, CLOSE)
    if full_layers and isinstance(cache, MoBACache):
        assert [layer.block_means.means is None for layer in cache.layers] == [False, True, True]
    elif not full_layers:
        check_means(cache)


def test_one_token_chunks_inside_reading_are_no_decoding(model, new_cache):
    register_moba(MoBAConfig(**{**SPARSE, "decode": "full"}))
    tokens = random_tokens(2, PROMPT)
    with torch.no_grad():
        expected = use(model)(tokens, use_cache=False).logits
    cache = new_cache(model)
    with cache.reading():
        assert_close(read(model, tokens, cache, [44, 1]), expected, CLOSE)
    plain = read(model, tokens, new_cache(model), [44, 1])
    assert (plain - expected)[:, -1].abs().max() > 0.01
    check_means(cache)


@pytest.mark.parametrize("decode", ["moba", "full"])
@pytest.mark.parametrize("full_layers", [0, 2])
def test_left_padded_rows_decode_like_the_rows_alone(model, any_cache, decode, full_layers):
    register_moba(MoBAConfig(**{**SPARSE, "decode": decode}, full_layers=full_layers))
    tokens = random_tokens(3, PROMPT)
    mask = torch.ones_like(tokens)
    pads = [0, 9, 30]
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    for chunk in (None, 16):
        cache = any_cache(model)
        together = generate(model, tokens, attention_mask=mask, past_key_values=cache, prefill_chunk_size=chunk)
        for row, pad in enumerate(pads):
            alone = generate(model, tokens[row : row + 1, pad:])
            assert torch.equal(together[row, PROMPT:], alone[0, PROMPT - pad :])
        if not full_layers:
            check_means(cache, starts=pads)


@pytest.mark.parametrize("decode", ["moba", "full"])
def test_beam_search_matches_the_reference(model, any_cache, decode):
    register_moba(MoBAConfig(**{**SPARSE, "decode": decode}))
    tokens = random_tokens(2, PROMPT)
    options = {"num_beams": 3, "num_return_sequences": 2}
    expected = generate(model, tokens, "moba_naive", **options)
    cache = any_cache(model)
    assert torch.equal(generate(model, tokens, past_key_values=cache, **options), expected)
    # The last step's reordering moved keys and means alike.
    check_means(cache)


@pytest.mark.parametrize("removed", [1, 5, 8, 21])
def test_crop_and_go_on(model, new_cache, removed):
    tokens = random_tokens(2, PROMPT)
    other = torch.cat([tokens[:, : PROMPT - removed], random_tokens(2, 60)[:, PROMPT:]], dim=1)
    cache = new_cache(model)
    read(model, tokens, cache)
    cache.crop(-removed)
    assert int(cache.get_seq_length()) == PROMPT - removed
    actual = read(model, other[:, PROMPT - removed :], cache, [2] + [1] * (other.shape[1] - PROMPT + removed - 2))
    with torch.no_grad():
        expected = model(other, use_cache=False).logits[:, PROMPT - removed :]
    assert_close(actual, expected, CLOSE)
    check_means(cache)
    cache.crop(0)
    assert int(cache.get_seq_length()) == other.shape[1]


ROWS = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("pads", [None, [0, 9, 30]], ids=["whole", "padded"])
def test_rows_may_be_reordered_repeated_and_selected(model, kind, pads):
    change, rows = ROWS[kind]
    tokens = random_tokens(3, PROMPT + 20)
    mask = torch.ones_like(tokens)
    for row, pad in enumerate(pads or [0, 0, 0]):
        mask[row, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def step(cache, rows, start, stop):
        return read(model, tokens[rows, start:stop], cache, attention_mask=mask[rows, :stop],
                    position_ids=positions[rows, start:stop])  # fmt: skip

    cache, expected = MoBACache(model.config), MoBACache(model.config)
    step(cache, [0, 1, 2], 0, PROMPT)
    change(cache)
    step(expected, rows, 0, PROMPT)
    for start in range(PROMPT, PROMPT + 20):
        assert_close(step(cache, rows, start, start + 1), step(expected, rows, start, start + 1), CLOSE)
    check_means(cache, starts=None if pads is None else [pads[row] for row in rows])


def test_reset_starts_anew(model, new_cache):
    cache = new_cache(model)
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :11] = 0
    read(model, random_tokens(2, PROMPT), cache, attention_mask=mask)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    tokens = random_tokens(2, 30)
    actual = read(model, tokens, cache, [17, 1, 1, 11])
    with torch.no_grad():
        assert_close(actual, model(tokens, use_cache=False).logits, CLOSE)
    check_means(cache)


@pytest.mark.parametrize("way", ["copy", "file"])
def test_a_prefix_is_reused(model, new_cache, way, tmp_path):
    """Two texts go on from one saved beginning, which stays as it was."""
    tokens = random_tokens(1, PROMPT)
    prefix = new_cache(model)
    read(model, tokens, prefix)
    prefix.save(tmp_path / "prefix.pt")
    for seed in (1, 2):
        more = torch.randint(2, 60, (1, 20), generator=torch.Generator().manual_seed(seed))
        length = None if prefix.layers[0].get_max_length() == -1 else 96
        if way == "copy":
            cache = copy.deepcopy(prefix)
        else:
            cache = MoBACache.load(tmp_path / "prefix.pt", model.config, max_cache_len=length)
        text = torch.cat([tokens, more], dim=1)
        assert torch.equal(generate(model, text, past_key_values=cache), greedy_without_cache(model, text))
        check_means(cache)
        assert int(prefix.get_seq_length()) == PROMPT


def test_keys_that_other_attention_read_get_means(model, new_cache):
    cache = new_cache(model)
    tokens = random_tokens(2, 60)
    register_moba(MoBAConfig(**SPARSE, full_layers=3))
    read(model, tokens[:, :9], cache)
    register_moba(MoBAConfig(**SPARSE))
    read(model, tokens[:, 9:20], cache)
    check_means(cache)
    read(model, tokens[:, 20:40], cache, [10, 10], attention="sdpa")
    read(model, tokens[:, 40:], cache, [19, 1])
    check_means(cache)
    register_moba(MoBAConfig(**{**SPARSE, "block_size": 5}))
    read(model, tokens[:, :3], cache)
    check_means(cache, 5)


def test_a_step_computes_no_mean_again(llama):
    cache = MoBACache(llama.config)
    tokens = random_tokens(1, PROMPT)
    read(llama, tokens[:, :30], cache)
    for layer in cache.layers:
        layer.block_means.means[:, :, 0] = 7.0
    read(llama, tokens[:, 30:], cache, [1] * 15)
    for layer in cache.layers:
        assert (layer.block_means.means[:, :, 0] == 7.0).all()


def test_padding_that_changes_is_noticed(llama):
    tokens = random_tokens(1, PROMPT)
    cache = MoBACache(llama.config)
    read(llama, tokens, cache)
    mask = torch.ones(1, PROMPT + 1, dtype=torch.long)
    mask[:, :3] = 0
    read(llama, tokens[:, :1], cache, attention_mask=mask, position_ids=torch.tensor([[PROMPT]]))
    check_means(cache, starts=[3])


def test_means_of_a_static_cache_may_be_written_in_a_cuda_graph(llama):
    """As transformers' static keys may: torch.compile takes no graph that writes to inputs at other addresses."""
    cache = MoBACache(llama.config, max_cache_len=64)
    read(llama, random_tokens(2, PROMPT), cache)
    layer = cache.layers[0]
    assert layer.block_means.means._dynamo_static_input_type == layer.keys._dynamo_static_input_type


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads 2 instead of 4"),
        ({"head_dim": 16}, "head_dim 8 instead of 16"),
        ({"dtype": "bfloat16"}, "dtype None instead of torch.bfloat16"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters {.*10000.*500000"),
        ({"hidden_size": 64, "head_dim": 16}, "hidden_size 32 instead of 64, head_dim 8 instead of 16"),
    ],
)
def test_a_file_of_another_model_is_refused(llama, tmp_path, change, said):
    cache = MoBACache(llama.config)
    read(llama, random_tokens(1, 9), cache)
    cache.save(tmp_path / "cache")
    other = LlamaConfig(**{**llama.config.to_dict(), **change})
    with pytest.raises(ValueError, match=f"cache holds a cache of another model: {said}"):
        MoBACache.load(tmp_path / "cache", other)


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory):
    """The bytes of a saved cache."""
    register_moba(MoBAConfig(**SPARSE))
    cache = MoBACache(llama.config)
    read(llama, random_tokens(1, 9), cache)
    path = tmp_path_factory.mktemp("saved") / "cache"
    cache.save(path)
    return path.read_bytes()


def test_damage_to_a_file_is_found(llama, saved, tmp_path):
    generator = random.Random(0)
    damaged = [saved[:length] for length in (0, 5, 12, 40, 44, 45, len(saved) // 2, len(saved) - 1)]
    damaged.append(saved + b"\0")
    for _ in range(400):
        place, bit = generator.randrange(len(saved)), 1 << generator.randrange(8)
        damaged.append(saved[:place] + bytes([saved[place] ^ bit]) + saved[place + 1 :])
    for data in damaged:
        (tmp_path / "cache").write_bytes(data)
        with pytest.raises(
            ValueError, match=r"cache is (corrupt: it does not have the checksum|not a saved MoBACache)"
        ):
            MoBACache.load(tmp_path / "cache", llama.config)


@pytest.fixture
def full_disk():
    """No file can grow beyond 4 KB, as if the disk were full then."""
    limits, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, action)


def test_a_full_disk_leaves_the_old_file(llama, saved, tmp_path, full_disk):
    cache = MoBACache(llama.config)
    read(llama, random_tokens(1, 40), cache)
    path = tmp_path / "cache"
    path.write_bytes(saved[:4000])
    with pytest.raises(OSError, match="cache"):
        cache.save(path)
    assert path.read_bytes() == saved[:4000]
    assert list(tmp_path.iterdir()) == [path]
