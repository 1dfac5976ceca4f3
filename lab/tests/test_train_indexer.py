"""`moba train` with [indexer]: a dense warm-up, the indexers' loss in the log, a model that has them."""

from __future__ import annotations

import shutil

import pytest
import safetensors.torch
import torch
from test_train import file, from_base, log_of, shards, tiny  # noqa: F401

from moba import register_moba
from moba.hf import get_moba_config
from moba_lab.models.load import load_model
from moba_lab.train.checkpoints import all_checkpoints
from moba_lab.train.recipe import read_recipe
from moba_lab.train.run import train

INDEXER = ("attention.router=indexer", "indexer.head_dim=8", "indexer.warmup_steps=8")
# Weights so large that attention is far from uniform.
LARGE = ("attention.block_size=8", "model.shape.initializer_range=0.3")


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_trained_saved_and_resumed(moba, file, tmp_path, pool):  # noqa: F811
    changes = [f"--set={change}" for change in (*INDEXER, f"indexer.pool={pool}", *LARGE)]
    code, _, err = moba("train", file, *changes)
    assert code == 0, err
    out = tmp_path / "out"
    lines = log_of(out, "attention", "loss", "indexer_loss")
    assert [attention["full_layers"] for attention, _, _ in lines] == [2] * 8 + [0] * 16
    weights = (out / "model" / "model.safetensors").read_bytes()
    # What a kill after step 20 leaves behind.
    for path in (out / "model", *all_checkpoints(out)):
        if path.name != "checkpoint-20":
            shutil.rmtree(path)
    assert moba("train", file, *changes)[0] == 0
    assert (out / "model" / "model.safetensors").read_bytes() == weights


def test_what_is_trained_can_be_loaded_and_trained_on(file, tiny, tmp_path):  # noqa: F811
    trained = train(from_base(file, tiny, *INDEXER, "training.tokens=1536"), say=lambda text: None)
    register_moba(None)
    model, _ = load_model(str(trained), attn_implementation="moba")
    assert get_moba_config(model).router == "indexer"
    saved = safetensors.torch.load_file(trained / "model.safetensors")
    loaded = {name: weight for name, weight in model.state_dict().items() if "moba_indexer" in name}
    assert len(loaded) == 6
    assert all(torch.equal(weight, saved[name]) for name, weight in loaded.items())
    again = [tiny[0], f"model.base={trained}", *INDEXER, "training.tokens=1536", f"out={tmp_path / 'again'}"]
    with pytest.raises(ValueError, match=r"indexer: the base model's are .*'head_dim': 8.* the recipe says .*: 16"):
        train(read_recipe(file, [*again, "indexer.head_dim=16"]), say=lambda text: None)
    train(read_recipe(file, again), say=lambda text: None)


def test_the_weight_is_the_loss_s(file, tmp_path):  # noqa: F811
    found = []
    for weight in (0, 1):
        changes = [*INDEXER, *LARGE, f"indexer.weight={weight}", f"out={tmp_path / str(weight)}"]
        train(read_recipe(file, changes), say=lambda text: None)
        found.append(log_of(tmp_path / str(weight), "loss", "indexer_loss"))
    (without, kl), (with_it, same_kl) = found[0][0], found[1][0]
    assert kl == same_kl
    assert with_it == pytest.approx(without + kl, rel=1e-5)
    assert found[1][7][1] < 0.9 * found[0][7][1]


def test_micro_batches_make_the_same_step(file, tmp_path):  # noqa: F811
    losses = []
    for rows in (1, 2):
        changes = [*INDEXER, f"training.rows_at_once={rows}", f"out={tmp_path / str(rows)}", "training.tokens=1536"]
        train(read_recipe(file, [*changes, *LARGE, "indexer.weight=5"]), say=lambda text: None)
        losses.append(log_of(tmp_path / str(rows), "loss")[0][0])
    # The mean over queries is taken in each micro-batch, and documents differ in their number.
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["attention.router=indexer"], r"\[indexer\] belongs to attention.router"),
        (["indexer.weight=1"], r"\[indexer\] belongs to attention.router"),
        ([*INDEXER, "indexer.pool=sum"], "indexer.pool must be one of 'max', 'mean', got 'sum'"),
        ([*INDEXER, "indexer.warmup_steps=24"], "indexer.warmup_steps must be below the training's 24 steps, got 24"),
        ([*INDEXER, "training.compile=true"], "indexer: its loss needs whole rows and all weights"),
        ([*INDEXER, "data.whole_rows=true", "training.tail=8"], "indexer: its loss needs whole rows"),
    ],
)
def test_refusals(file, changes, said):  # noqa: F811
    with pytest.raises(ValueError, match=said):
        read_recipe(file, changes)
