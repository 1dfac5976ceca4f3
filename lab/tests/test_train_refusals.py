"""`moba train` at toy size: what it refuses, and what a failure leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from test_train import RECIPE, from_base, log_of
from test_train import file as file
from test_train import shards as shards
from test_train import tiny as tiny
from tiny_shards import save_shards

from moba.hf import get_moba_config
from moba_lab.train.checkpoints import all_checkpoints
from moba_lab.train.recipe import Recipe, read_recipe
from moba_lab.train.run import train


@pytest.mark.parametrize(("recipe", "first"), [("needle", "activation"), ("needle-lora", "lora")])
def test_a_base_that_another_recipe_makes(moba, tmp_path, monkeypatch, recipe, first):
    shutil.copytree(Path(__file__).parents[2] / "recipes", tmp_path / "recipes")
    (tmp_path / "recipes" / "another.toml").write_text("out = [")
    monkeypatch.chdir(tmp_path)
    for dry in (["--dry-run"], []):
        code, out, err = moba("train", f"recipes/{recipe}.toml", *dry)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"there is no runs/{first}/" in err
        assert err.endswith(f" yet: `moba train recipes/{first}.toml` makes it\n")
    base = read_recipe(f"recipes/{recipe}.toml").model.base
    Path(base).mkdir(parents=True)
    said = "there is no folder data/needle yet: `moba data data/needle --retrieval data/permissive` makes it"
    assert said in moba("train", f"recipes/{recipe}.toml", "--dry-run")[2]


def test_paths_may_hold_quotes(moba, file, tmp_path):
    out = tmp_path / 'my "run" \\ one'
    assert moba("train", file, "--out", out)[0] == 0
    assert (out / "model" / "config.json").is_file()


def test_a_folder_is_no_recipe(moba, tmp_path):
    code, _, err = moba("train", tmp_path)
    assert code == 2
    assert "a recipe is a .toml file, got the folder" in err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("training.tokens=0", "training.tokens must be an integer >= 1"),
        ("training.tokens=many", "training.tokens must be an integer >= 1"),
        ("training.learning_rate=-1", "training.learning_rate"),
        ("training.save_every=3\\ntraining.log_every=2", "training.save_every"),
        ("training.colour=red", "training.colour is not a setting"),
        ("colour=red", "colour is not a setting"),
        ("training", "key=value"),
        ("out.x=3", "out is no table"),
        ("data=3", "[data] must be a table"),
        ("data.folder=/nowhere", "/nowhere"),
        ("data.sources=['source 7']", "source 7"),
        ("data.min_length=1000", "no document of at least 1000"),
        ("attention.topk=0", "topk must be an integer >= 1"),
        ("attention.schedule=sometimes", "attention.schedule must be one of"),
        ("attention.at=0.5", "never switches"),
        ("attention.start=3", "attention.start"),
        ("attention.schedule=mixed", "attention.every"),
        ("attention.every=8", "attention.every"),
        ("training.optimizer=sgd", "training.optimizer must be one of"),
        ("attention.full_layers=3", "full_layers must fit the model's 2 layers"),
        ("model.base=x", "model: give either base"),
        ("model.shape.hiden_size=3", "'hiden_size'"),
        ("model.architecture=lama", "'lama'"),
        ("training.rows_at_once=3", "training.rows_per_step must be a multiple"),
        ("lora.rank=4", "model.base"),
        ("model.key_convolution=4", "width"),
        ("training.loss=best", "loss must be one of"),
        (f"out={__file__}", "is a file: name a folder"),
        ("attention.schedule=hybrid\\nattention.at=x", "attention.at must be a number from 0 to 1, got 'x'"),
        ("model.shape.hidden_size=abc", "model.architecture='llama', shape={'hidden_size': 'abc'"),
        ("model.shape.hidden_size=33", "model.architecture='llama', shape={'hidden_size': 33"),
        ("training.compile=flase", "training.compile must be true or false, got 'flase'"),
        ("data.whole_rows=1", "data.whole_rows must be true or false, got 1"),
        ("model.rope_scaling=longrope", "model.rope_scaling must be one of 'linear', 'yarn', got 'longrope'"),
        ("data.span=63", "data.span must be an integer >= 64, got 63"),
        ("data.span=true", "data.span must be an integer"),
        ("training.tail=8", "training.tail is the end of rows that one document fills: set data.whole_rows"),
        ("data.whole_rows=true\\ntraining.tail=64", "a tail below data.context = 64, got 64"),
        ("data.whole_rows=true\\ntraining.tail=8\\ntraining.compile=true", "cannot be combined with compile"),
        ("data.sources=python", "data.sources must be a list of names, got 'python'"),
        ("lora.targets=3", "lora.targets must be a name or a list of names, got 3"),
        ("data.folder=3", "data.folder must be text, got 3"),
        ("model.shape=3", "model.shape must be a table, got 3"),
    ],
)
def test_a_users_mistake_is_one_line(moba, file, tmp_path, change, said):
    changes = [part for line in change.split("\\n") for part in ("-s", line)]
    code, out, err = moba("train", file, *changes)
    assert (code, out) == (2, "")
    assert said in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not all_checkpoints(tmp_path / "out")


@pytest.mark.parametrize(("base", "num_layers"), [("tiny", 3), ("SmolLM2-135M-Instruct", 30)])
def test_layers_that_a_base_does_not_have_are_refused_before_it_is_loaded(file, tiny, monkeypatch, base, num_layers):
    monkeypatch.setattr("moba_lab.train.model.load_model", None)
    recipe = from_base(file, tiny, *([f"model.base={base}"] if base != "tiny" else []), "attention.full_layers=40")
    with pytest.raises(ValueError, match=f"full_layers must fit the model's {num_layers} layers, got 40"):
        train(recipe, say=lambda text: None)


def test_recipes_that_cannot_be_read(moba, file, tmp_path):
    assert "nowhere.toml" in moba("train", tmp_path / "nowhere.toml")[2]
    file.write_bytes(b"\xff")
    assert "is not UTF-8 text (byte 0)" in moba("train", file)[2]
    for text in ("out = [", "out = " + "[" * 100_000):
        file.write_text(text)
        assert "is not TOML" in moba("train", file)[2]
    file.write_text('out = "x"')
    assert "data is missing" in moba("train", file)[2]
    file.write_text('out = "x"\n[data]\nfolder = "x"')
    assert "data.context is missing" in moba("train", file)[2]


def test_damaged_or_foreign_data(moba, file, tiny, tmp_path, shards):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    (copy / "train-00000.bin").write_bytes(b"")
    code, _, err = moba("train", file, "--data", copy)
    assert code == 2
    assert "train-00000.bin is empty" in err
    for split in ("train", "held_out"):
        data = bytearray((shards / f"{split}-00000.bin").read_bytes())
        data[7] ^= 1
        shutil.copytree(shards, copy, dirs_exist_ok=True)
        (copy / f"{split}-00000.bin").write_bytes(data)
        code, _, err = moba("train", file, "--data", copy, "-s", "training.evaluate_every=4")
        assert (code, err.count("\n")) == (2, 1)
        assert f"{split}-00000.bin is corrupt: it does not have the manifest's checksum" in err
    beyond = save_shards(tmp_path / "beyond", vocab=70)
    manifest = beyond / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"vocab_size": 70', '"vocab_size": 64'))
    code, _, err = moba("train", file, "--data", beyond)
    assert (code, err.count("\n")) == (2, 1)
    assert "train-00000.bin holds token 69, but the vocabulary has 64" in err
    from_base(file, tiny)
    code, _, err = moba("train", file, "-s", tiny[2])
    assert code == 2
    assert "tokenizer mismatch" in err
    larger = save_shards(
        tmp_path / "larger",
        vocab=70,
        tokenizer_hash=json.loads((tmp_path / "own" / "manifest.json").read_text())["tokenizer_hash"],
    )
    code, _, err = moba("train", file, "-s", tiny[2], "--data", larger)
    assert code == 2
    assert "vocabulary of 70" in err


def test_a_run_of_another_recipe_or_data_is_not_gone_on_with(moba, file, tmp_path):
    assert moba("train", file, "-s", "training.tokens=512")[0] == 0
    code, _, err = moba("train", file, "-s", "training.tokens=512", "-s", "attention.topk=3")
    assert code == 2
    assert "attention.topk was 2 and is 3" in err
    other = save_shards(tmp_path / "other", lengths=(99, 98))
    code, _, err = moba("train", file, "-s", "training.tokens=512", "--data", other)
    assert code == 2
    assert "other data" in err
    saved = tmp_path / "out" / "recipe.json"
    before = saved.read_text()
    for text in ("{}", '{"recipe": 3, "data": ""}', "[]"):
        saved.write_text(text)
        assert "recipe.json: not " in moba("train", file, "-s", "training.tokens=512")[2]
    saved.write_text(before)
    config = tmp_path / "out" / "checkpoint-4" / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    code, _, err = moba("train", file, "-s", "training.tokens=512")
    assert code == 2
    assert "another architecture: hidden_size 64 instead of 32" in err


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, shards):
    """The folder of a run with a checkpoint to go on from."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "recipe.toml").write_text(RECIPE.replace("OUT", str(folder / "out")).replace("DATA", str(shards)))
    train(read_recipe(folder / "recipe.toml", ["training.tokens=1024"]), say=lambda text: None)
    shutil.rmtree(folder / "out" / "model")
    shutil.rmtree(folder / "out" / "checkpoint-8")
    return folder / "out"


DAMAGE = {"missing": Path.unlink, "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
          "garbage": lambda path: path.write_bytes(b"\xff{]")}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, "missing") for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json")),
        *(
            (name, damage)
            for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
                         "config.json", "../recipe.json", "../log.jsonl")
            for damage in ("cut", "garbage")
            if (name, damage) != ("../log.jsonl", "cut")  # a killed run leaves that behind
        ),
    ],
)  # fmt: skip
def test_a_damaged_run_is_not_gone_on_with(moba, file, tmp_path, stopped, name, damage):
    out = tmp_path / "out"
    shutil.copytree(stopped, out)
    path = out / "checkpoint-4" / name
    DAMAGE[damage](path)
    if name == "../log.jsonl":
        path.write_bytes(path.read_bytes() + b"\n")
    code, _, err = moba("train", file, "-s", "training.tokens=1024")
    assert code == 2, err
    assert Path(name).name in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (out / "model").exists()


def test_checkpoints_of_someone_else(moba, file, tmp_path):
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    code, _, err = moba("train", file)
    assert code == 2
    assert "did not write them" in err


@pytest.mark.parametrize("what", ["weights", "optimizer"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(moba, file, tmp_path, monkeypatch, what):
    out = tmp_path / "out"
    kind, name = {
        "weights": (transformers.LlamaForCausalLM, "save_pretrained"),
        "optimizer": (transformers.Trainer, "_save_optimizer_and_scheduler"),
    }[what]
    save = getattr(kind, name)

    def full(self, *args, **options):
        save(self, *args, **options)
        if (out / "checkpoint-8").exists():
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(kind, name, full)
    code, _, err = moba("train", file)
    assert code == 2
    last = err.splitlines()[-1]
    assert "checkpoint-12 could not be saved, " in last
    assert "GiB were free on the disk: [Errno 28] No space left on device; checkpoint-8 is whole" in last
    assert [path.name for path in all_checkpoints(out)] == ["checkpoint-4", "checkpoint-8"]
    assert not (out / "unfinished").exists(), "room is made"
    monkeypatch.undo()
    code, _, err = moba("train", file)
    assert code == 0, err
    assert "going on from" in err
    assert [step for (step, _) in log_of(out, "step", "loss")] == list(range(1, 25))


def test_too_little_gpu_memory(moba, file, monkeypatch):
    def out_of_memory(self, *args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(transformers.Trainer, "training_step", out_of_memory)
    code, _, err = moba("train", file)
    assert code == 2
    assert "not enough GPU memory for 1 rows of 64 tokens at once: lower training.rows_at_once" in err.splitlines()[-1]


def test_recipes_survive_json(file):
    recipe = read_recipe(
        file, ["lora.rank=3", "model.base=x", "attention.full_layers=[0, 1]", "data.sources=['a']"][2:]
    )
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize("file", sorted(Path(__file__).parents[2].glob("recipes/*.toml")), ids=lambda path: path.stem)
def test_published_recipes_are_valid(file):
    assert read_recipe(file).num_steps > 0


def test_the_pages_example_runs():
    page = Path(__file__).parents[2] / "docs" / "training.md"
    (block,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(block, names)
    assert get_moba_config(names["model"]).topk == 28


@pytest.mark.parametrize("file", ["activation", "needle", "lora", "from-scratch"])
def test_any_recipe_can_be_run_with_full_attention(file):
    recipe = read_recipe(Path(__file__).parents[2] / "recipes" / f"{file}.toml", ["attention.schedule=full"])
    assert recipe.schedule.stages == ((0.0, None),)
    annealed = ["attention.schedule=full", "attention.start=64", "attention.at=0.5"]
    recipe = read_recipe(Path(__file__).parents[2] / "recipes" / f"{file}.toml", annealed)
    assert recipe.schedule.stages == ((0.0, None),)
