"""`moba train` at toy size: what it learns, what it writes, how it goes on, and how it fails."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from helpers import assert_close
from tiny_folder import save_tiny_model
from tiny_models import tiny_model
from tiny_shards import save_shards

from moba import MoBAConfig, register_moba
from moba.hf import attention as hf_attention
from moba.hf import get_moba_config, set_moba_config
from moba_lab.data import tokenizer_hash
from moba_lab.lines import locked
from moba_lab.train.checkpoints import all_checkpoints
from moba_lab.train.loss import use_fused_loss
from moba_lab.train.recipe import read_recipe
from moba_lab.train.run import train
from moba_lab.train.trainer import read_before

SHAPE = "hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2"
RECIPE = f"""
out = "OUT"
[data]
folder = "DATA"
context = 64
[model]
architecture = "llama"
shape = {{{SHAPE}}}
[attention]
block_size = 16
topk = 2
[training]
tokens = 3072
rows_per_step = 2
learning_rate = 3e-3
precision = "fp32"
log_every = 1
save_every = 4
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return save_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture
def file(tmp_path, shards):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace("OUT", str(tmp_path / "out")).replace("DATA", str(shards)))
    return path


@pytest.fixture
def tiny(tmp_path):
    """A folder with a small model, and shards of its tokenizer."""
    save_tiny_model(tmp_path / "model", initializer_range=0.05)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    data = save_shards(tmp_path / "own", tokenizer_hash=tokenizer_hash(tokenizer))
    return [f"data.folder={data}", "model.architecture=", f"model.base={tmp_path / 'model'}"]


def log_of(out, *names):
    """What was logged: a list of lines, each the named values, with the seconds of the machine left out."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [[line[name] for name in names] for line in lines if all(name in line for name in names)]


def from_base(file, tiny, *changes):
    """The recipe with a base model instead of an architecture."""
    text = file.read_text().replace('architecture = "llama"\n', "").replace(f"shape = {{{SHAPE}}}\n", "")
    file.write_text(text)
    return read_recipe(file, [tiny[0], tiny[2], *changes])


def test_training_lowers_the_loss_and_leaves_a_model(moba, file, tmp_path):
    code, _, err = moba(
        "train", file, "-s", "attention.schedule=hybrid", "-s", "training.tokens=12800", "-s",
        "training.evaluate_every=50",
    )  # fmt: skip
    assert code == 0, err
    out = tmp_path / "out"
    losses = log_of(out, "loss")
    assert len(losses) == 100
    assert losses[-1][0] < 0.7 * losses[0][0]
    attention = [record["full_layers"] for _, record in log_of(out, "loss", "attention")]
    assert attention == [0] * 90 + [2] * 10, "logged after the step"
    assert [len(log_of(out, f"eval_source {i}_loss")) for i in range(2)] == [2, 2]
    assert [path.name for path in all_checkpoints(out)] == ["checkpoint-96", "checkpoint-100"]
    assert not (out / "unfinished").exists()
    assert list((out / "tensorboard").iterdir())
    register_moba(None)
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model", attn_implementation="moba")
    assert get_moba_config(model).full_layers == 2
    assert model.config.max_position_embeddings == 64
    assert "100/100" in err


KILLED = """
import os, signal, sys
from transformers import TrainerCallback
from moba_lab.train.recipe import read_recipe
from moba_lab.train.run import train

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 11:
            os.kill(os.getpid(), signal.SIGKILL)

train(read_recipe(sys.argv[1], sys.argv[2:]), callbacks=[Kill()])
"""


def test_killed_and_resumed_is_uninterrupted(moba, file, tmp_path):
    command = ("train", file, "-s", "attention.schedule=activation", "--out")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert moba(*command, whole)[0] == 0
    changes = ("attention.schedule=activation", f"out={json.dumps(str(killed))}")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killing = [sys.executable, "-c", KILLED, str(file), *changes]
    result = subprocess.run(killing, capture_output=True, text=True, env=environment)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not (killed / "model").exists(), "it was killed before the end"
    code, _, err = moba(*command, killed)
    assert code == 0, err
    assert "going on from" in err
    assert len(log_of(whole, "loss")) == 24
    names = ("step", "loss", "grad_norm", "learning_rate", "attention")
    assert log_of(killed, *names) == log_of(whole, *names), "bit for bit"
    weights = [(out / "model" / "model.safetensors").read_bytes() for out in (whole, killed)]
    assert weights[0] == weights[1]


def test_a_finished_run_is_not_repeated(moba, file, tmp_path):
    assert moba("train", file, "-s", "training.tokens=512")[0] == 0
    before = (tmp_path / "out" / "log.jsonl").read_bytes()
    code, _, err = moba("train", file, "-s", "training.tokens=512")
    assert code == 0, err
    assert (tmp_path / "out" / "log.jsonl").read_bytes() == before


def test_one_run_at_a_time_writes_a_folder(moba, file, tmp_path):
    with locked(tmp_path / "out"):
        # What the other run is about to write is not yet looked at.
        (tmp_path / "out" / "checkpoint-4").mkdir()
        code, _, err = moba("train", file)
        (tmp_path / "out" / "checkpoint-4").rmdir()
    assert code == 2
    assert err.splitlines()[-1] == f"moba: error: {tmp_path}/out is being written by another run"
    assert moba("train", file)[0] == 0
    assert not (tmp_path / "out" / "unfinished").exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks_can_be_trained_on(tmp_path, monkeypatch, number):
    def no_locks(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OSError, match="Input/output") if number == errno.EIO else nullcontext(), locked(tmp_path):
        pass


@pytest.mark.parametrize(
    "change",
    [
        "model.key_convolution=3",
        "attention.router=unrotated",
        'attention={schedule="mixed", every=4, block_size=16, topk=2}',
        "training.optimizer=muon",
    ],
)
def test_what_helps_is_trained_and_resumed(file, tmp_path, change):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for out in (whole, resumed):
        train(read_recipe(file, [change, f"out={out}"]), say=lambda text: None)
    # What a kill after step 20 leaves behind.
    shutil.rmtree(resumed / "model")
    for path in all_checkpoints(resumed):
        if path.name != "checkpoint-20":
            shutil.rmtree(path)
    said = []
    train(read_recipe(file, [change, f"out={resumed}"]), say=said.append)
    assert f"going on from {resumed / 'checkpoint-20'}" in said
    losses = log_of(whole, "loss")
    assert log_of(resumed, "loss") == losses
    assert losses[-1][0] < losses[0][0]
    state = torch.load(all_checkpoints(whole)[-1] / "optimizer.pt")["state"].values()
    assert any("momentum_buffer" in values for values in state) == ("muon" in change)
    if "convolution" in change:
        assert any("key_convolution" in name for name in safetensors.torch.load_file(whole / "model/model.safetensors"))


@pytest.mark.parametrize(
    "change",
    ["training.precision=bf16", "training.compile=true", "training.loss=logits", "training.rows_at_once=2"],
)
def test_ways_of_computing_a_step_agree(file, tmp_path, change):
    losses = []
    for name, changes in (("plain", ["training.checkpoint_activations=false"]), ("changed", [change])):
        recipe = read_recipe(file, ["training.tokens=512", f"out={tmp_path / name}", *changes])
        train(recipe, say=lambda text: None)
        losses.append([loss for (loss,) in log_of(tmp_path / name, "loss")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2 if "bf16" in change else 1e-5)


@pytest.fixture
def umask():
    """Files are for the user and the group."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_adapters(file, tiny, tmp_path, umask):
    recipe = from_base(file, tiny, "lora.rank=4", "training.tokens=6400", "training.learning_rate=1e-2")
    said = []
    train(recipe, say=said.append)
    losses = log_of(tmp_path / "out", "loss")
    assert losses[-1][0] < 0.95 * losses[0][0]
    out = tmp_path / "out"
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    merged = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(merged.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert not torch.equal(merged.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)
    transformers.AutoTokenizer.from_pretrained(out / "model")
    saved = torch.load(out / "checkpoint-50" / "optimizer.pt")["state"]
    assert sum(state["exp_avg"].numel() for state in saved.values()) < 0.5 * base.num_parameters()
    assert {oct(path.stat().st_mode)[-3:] for path in out.rglob("*") if path.is_file()} == {"640"}, "as the umask says"


def test_positions_are_stretched(file, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(
        from_base(
            file, tiny, "model.rope_theta=50000", "model.rope_factor=4", "data.context=512", "training.tokens=1024"
        ),
        say=lambda text: None,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model.config.max_position_embeddings == 512
    frequency = 50000 ** (-torch.arange(0, 8, 2) / 8) / 4
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, frequency)
    train(
        from_base(file, tiny, "model.rope_factor=4", "model.rope_scaling=yarn", "training.tokens=64", "out=yarn"),
        say=lambda text: None,
    )
    rope = transformers.AutoConfig.from_pretrained("yarn/model").rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("yarn", 4)


def test_short_rows_teach_far_positions(file, tiny, tmp_path):
    changes = ("data.span=4096", "model.rope_theta=50000", "training.tokens=1024", "training.save_every=4")
    read = []

    class Positions(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            model.register_forward_pre_hook(
                lambda _, args, kwargs: read.append(kwargs["position_ids"].max().item()), with_kwargs=True
            )

    train(from_base(file, tiny, *changes), say=lambda text: None, callbacks=[Positions()])
    assert len(read) == 16
    assert max(read) > 2048
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model.config.max_position_embeddings == 4096


@pytest.mark.parametrize("full_layers", [0, 1])
def test_a_tails_loss_and_gradients_are_those_of_whole_rows(full_layers):
    register_moba(None)
    model = tiny_model(num_hidden_layers=1, initializer_range=0.1).double().train()
    set_moba_config(model, MoBAConfig(16, 2, full_layers=full_layers))
    model.set_attn_implementation("moba")
    use_fused_loss(model)  # which keeps fp64
    tokens = torch.randint(3, 60, (2, 96), generator=torch.Generator().manual_seed(0))
    row = {"input_ids": tokens, "labels": torch.where(torch.arange(96) > 64, tokens, -100)}
    gradients = []
    for inputs in (row, read_before(model, row, 32)):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    names = ["loss", *(name for name, _ in model.named_parameters())]
    for name, whole, tail in zip(names, *gradients, strict=True):
        # Through the keys and values of the text before it, which a tail does without, these learn in whole rows.
        if any(part in name for part in ("k_proj", "v_proj", "input_layernorm", "embed_tokens")):
            assert not torch.allclose(tail, whole)
        else:
            assert_close(tail, whole, 1e-10)


def test_a_full_layer_sees_chunks_in_the_autocast_dtype(monkeypatch):
    attention = tiny_model(num_hidden_layers=2).model.layers[0].self_attn
    q, k, v = (torch.randn(1, heads, length, 16) for heads, length in ((4, 16), (2, 64), (2, 64)))
    dense, seen = hf_attention.scaled_dot_product_attention, []

    def spy(q, k, v, *args, **options):
        seen.extend(x.dtype for x in (q, k, v))
        return dense(q, k, v, *args, **options)

    # FlashAttention takes no fp32: in fp32 a GPU would make a mask of all queries and keys.
    monkeypatch.setattr(hf_attention, "scaled_dot_product_attention", spy)
    with torch.autocast("cpu", torch.bfloat16):
        config = MoBAConfig(16, 2, full_layers=2)
        hf_attention.moba_attention_forward(attention, q, k, v, None, default=config, backend=None)
    assert seen == [torch.bfloat16] * 3


def test_tails_of_long_rows_are_trained(moba, file, tmp_path):
    changes = (
        "data.whole_rows=true", "data.span=512", "training.tail=24", "training.evaluate_every=8",
        "attention.full_layers=1",
    )  # fmt: skip
    losses = []
    for precision, rows_at_once in (("fp32", 1), ("fp32", 2), ("bf16", 1)):
        out = tmp_path / f"{precision}{rows_at_once}"
        more = (f"training.precision={precision}", f"training.rows_at_once={rows_at_once}", f"out={out}")
        train(read_recipe(file, [*changes, *more]), say=lambda text: None)
        losses.append(torch.tensor(log_of(out, "loss")))
    assert losses[0][-4:].mean() < 0.9 * losses[0][:4].mean()
    assert_close(losses[1], losses[0], 1e-4)
    assert_close(losses[2], losses[0], 2e-2)
    code, printed, _ = moba("train", file, "--dry-run", *(part for change in changes for part in ("-s", change)))
    assert code == 0
    assert "24 steps of 2 × 64" in printed


def test_dry_run_writes_nothing(moba, file, tmp_path):
    code, out, _ = moba("train", file, "--dry-run")
    assert code == 0
    assert not (tmp_path / "out").exists()
    values = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert set(values) == {"model", "attention", "tokens", "memory", "disk"}
    assert values["attention"].startswith("MoBA: block size ")
    assert values["tokens"].startswith("3,072 in 24 steps of 2 × 64; the data has 605")
    changes = ("-s", "attention.schedule=activation", "-s", "attention.at=0.125", "-s", "attention.full_layers=[0]")
    _, out, _ = moba("train", file, "--dry-run", *changes)
    assert re.search(r"^attention +full attention; from 12\.5% of the steps MoBA: .*full layers \(0,\)$", out, re.M)


def test_a_recipes_data_is_made_by_the_command_that_its_error_names(moba, tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    for name in ("recipes", "docs", "README.md"):
        (tmp_path / name).symlink_to(root / name)
    monkeypatch.chdir(tmp_path)
    code, out, err = moba("train", "recipes/toy.toml")
    assert (code, out) == (2, "")
    command = re.fullmatch("moba: error: data.folder: there is no folder data/toy yet: `moba (.+)` makes it\n", err)[1]
    assert f"moba {command}\n" in (root / "docs" / "command-line.md").read_text()
    assert moba(*command.split())[0] == 0
    assert moba("train", "recipes/toy.toml", "--dry-run")[0] == 0
    assert "there is no folder elsewhere: make it with" in moba("train", "recipes/toy.toml", "--data", "elsewhere")[2]


def test_every_recipe_names_the_command_that_makes_its_data():
    for file in sorted((Path(__file__).parents[2] / "recipes").glob("*.toml")):
        data = read_recipe(file).data
        assert re.match(rf"(moba data|python recipes/(package_texts|long_rows)\.py) {data.folder} ", data.made_by)
