"""What vLLM with the plugin chooses and refuses when its config is made, before anything is loaded."""

from __future__ import annotations

import pytest
from tiny_models import tiny_config

vllm = pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from vllm.engine.arg_utils import EngineArgs  # noqa: E402

from moba.vllm import config as plugin  # noqa: E402

MOBA = {"block_size": 64, "topk": 4, "decode": "moba"}


@pytest.fixture
def start(tmp_path):
    """Make the engine's config for a tiny model."""

    def start(moba=MOBA, family="Llama", model=None, **options):
        tiny_config(family, max_position_embeddings=512, **(model or {})).save_pretrained(tmp_path)
        if moba is not None:
            options["hf_overrides"] = {"moba": moba, **options.get("hf_overrides", {})}
        args = EngineArgs(str(tmp_path), skip_tokenizer_init=True, dtype="float32", **options)
        return args.create_engine_config()

    return start


@pytest.mark.parametrize(("block_size", "page_size"), [(1, 128), (32, 128), (64, 128), (100, 800), (256, 256)])
def test_pages_hold_whole_blocks(start, block_size, page_size):
    assert start({**MOBA, "block_size": block_size}).cache_config.block_size == page_size


def test_a_page_size_that_fits_is_kept(start):
    assert start(block_size=192).cache_config.block_size == 192


def test_a_model_without_moba_is_left_alone(start):
    engine = start(None, block_size=96)
    assert engine.cache_config.block_size == 96
    assert plugin.read_config(engine) is None


def test_a_model_carries_its_config(start):
    assert plugin.read_config(start(None, model={"moba": MOBA})).topk == 4


def test_full_attention_of_new_tokens_is_warned_of(start, caplog):
    start({**MOBA, "decode": "full"})
    assert sum('decode="full"' in record.message for record in caplog.records) == 1
    caplog.clear()
    start()
    assert "attend to 4 blocks of 64 tokens (decode='moba'), in pages of 128 tokens" in caplog.text
    assert 'decode="full"' not in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moba": {**MOBA, "topk": 0}}, "topk"),
        ({"moba": {**MOBA, "size": 3}}, "unknown keys"),
        ({"moba": {**MOBA, "full_layers": [7]}}, "full_layers"),
        ({"moba": {**MOBA, "router": "unrotated"}}, "router='unrotated'"),
        ({"moba": {**MOBA, "router": lambda q, means: None}}, "function"),
        ({"family": "Mistral", "model": {"sliding_window": 64}}, "sliding window of 64"),
        ({"family": "Gemma2"}, "layers of the kinds"),
        ({"model": {"moba_key_convolution": 3}}, "convolution of keys"),
        ({"block_size": 96}, r"--block-size .* multiple of the MoBA block_size 64, got 96: .* try 128"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "KV connector"),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "--speculative-config"),
        ({"decode_context_parallel_size": 2, "tensor_parallel_size": 2}, "--decode-context-parallel-size"),
        ({"moba": {**MOBA, "router": "shared"}, "tensor_parallel_size": 4}, "at most the 2 kv heads, got 4"),
    ],
)
def test_what_cannot_be_served(start, options, message):
    with pytest.raises(ValueError, match=message):
        start(**options)


def test_versions_that_were_not_tested(start, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    with pytest.raises(ValueError, match=r"vLLM 0\.99\.1, but with 0\.26, 0\.32"):
        start()
    start(None)
