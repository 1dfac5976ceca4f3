"""Loading models, and MoBA in a real one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from helpers import assert_close
from real_model import smollm2 as smollm2
from tiny_folder import save_tiny_model
from tiny_models import tiny_model

from moba import MoBAConfig, register_moba
from moba_lab.models.load import load_config, load_model, load_tokenizer

TEXT = (Path(__file__).parents[2] / "LICENSE").read_text()


def test_embedded_model_is_ready_to_use(smollm2):
    model, tokenizer = smollm2
    assert (type(model).__name__, model.config.num_hidden_layers) == ("LlamaForCausalLM", 30)
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id == tokenizer.eos_token_id
    batch = tokenizer(["one two three", "one"], padding=True)
    assert batch["attention_mask"][1] == [0, 0, 1]
    assert tokenizer.decode(tokenizer("ΔE = mc², naïve")["input_ids"]) == "ΔE = mc², naïve"


def test_enough_blocks_are_dense_attention(smollm2):
    model, tokenizer = smollm2
    inputs = tokenizer(TEXT, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    assert length > 200
    # By name: "auto" would take dense attention itself.
    register_moba(MoBAConfig(block_size=32, topk=-(-length // 32), backend="pytorch"))
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        dense = model(**inputs).logits
        model.set_attn_implementation("moba")
        sparse = model(**inputs).logits
    # fp32 through 30 layers, on logits of up to about 30.
    assert_close(sparse, dense, 1e-3)
    register_moba(MoBAConfig(block_size=32, topk=2, backend="pytorch"))
    with torch.no_grad():
        assert (model(**inputs).logits - dense).abs().max() > 1


def test_left_padded_generation_is_generation_alone(smollm2):
    model, tokenizer = smollm2
    register_moba(MoBAConfig(block_size=8, topk=3, keep_first=1, backend="pytorch", decode="moba"))
    model.set_attn_implementation("moba")
    texts = ["The capital of France is the city of", TEXT[:300]]
    options = {"max_new_tokens": 6, "do_sample": False}
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    together = model.generate(**batch, **options)[:, -6:]
    for row, text in enumerate(texts):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), **options)[0, -6:]
        assert tokenizer.decode(together[row]) == tokenizer.decode(alone)


def test_embedded_model_can_be_saved(smollm2, tmp_path):
    model, tokenizer = smollm2
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = load_model(str(tmp_path), dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded_tokenizer.eos_token == "<|im_end|>"
    weight = model.model.layers[7].self_attn.q_proj.weight
    assert torch.equal(loaded.model.layers[7].self_attn.q_proj.weight, weight.bfloat16())


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./no-such-folder", "~/no-such-folder", "no/such/folder", "no-such-file.gguf"]
)
def test_a_path_that_does_not_exist(name):
    with pytest.raises(ValueError, match=f"there is no '{name}'"):
        load_model(name)


@pytest.mark.parametrize("load", [load_model, load_tokenizer, load_config])
def test_a_name_without_a_network_is_refused_at_once(load, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(
        ValueError, match=r"there is no folder 'some/name', and http://127\.0\.0\.1:9 cannot be reached"
    ):
        load("some/name")
    assert not waits, "it is not tried again"


def test_a_cached_name_is_read_without_a_network(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_tiny_model(snapshot)
    (tmp_path / "models--some--name" / "refs").mkdir()
    (tmp_path / "models--some--name" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert len(load_tokenizer("some/name")) == 64


def test_a_file_of_another_kind(tmp_path):
    file = tmp_path / "weights.bin"
    file.write_bytes(b"0")
    with pytest.raises(ValueError, match="model must be a folder"):
        load_model(str(file))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model" * 100])
def test_a_broken_gguf_file(tmp_path, content):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.gguf' cannot be loaded as a causal language model: .+"):
        load_model(str(file))


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=r"holds no model: it has no config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"holds no model: it has no config\.json"):
        load_config(str(tmp_path))


def test_the_folder_of_a_training(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"is the folder of a training; its model is {tmp_path}/model"):
        load_model(str(tmp_path))


def small_bert(folder):
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"]))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


def test_a_model_that_is_not_a_causal_decoder(tmp_path):
    small_bert(tmp_path)
    with pytest.raises(ValueError, match="is not a causal decoder"):
        load_model(str(tmp_path))


def test_truncated_weights(smollm2, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    smollm2[1].save_pretrained(tmp_path)
    load_model(str(tmp_path))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be loaded as a causal language model"):
        load_model(str(tmp_path))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="pip install gguf"):
        load_model(str(tmp_path / "model.gguf"))
