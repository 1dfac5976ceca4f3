"""transformers' models over sequences split between gloo processes, against one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close
from ranks import group_of
from tiny_models import positions_of, random_tokens, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moba import MoBAConfig, register_moba
from moba.hf import set_moba_config
from moba.parallel.models import cut_batch, parallelize, shard_batch

CONFIG = MoBAConfig(8, 2, full_layers=1)
DOCUMENTS = [7, 30, 1, 26]


@pytest.fixture
def ranks():
    """Two of them."""
    return group_of(2)


def batch_of(kind):
    """A batch as a data collator makes it; "packed" has documents, "uneven" a length that two ranks cannot halve."""
    tokens = random_tokens(1 if kind == "packed" else 2, 63 if kind == "uneven" else 64)
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    if kind != "packed":
        return batch
    ends = torch.tensor([0, *DOCUMENTS]).cumsum(0)
    batch["labels"][0, ends[:-1]] = -100
    batch["labels"][0, 40:44] = -100
    bounds = ends.to(torch.int32)
    return {**batch, "position_ids": positions_of(DOCUMENTS), "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}


def model_of(settings):
    register_moba(None)
    model = tiny_model(settings.get("family", "Llama")).double()  # as in test_hf_generate.py
    set_moba_config(model, CONFIG)
    model.set_attn_implementation("moba")
    return model.train()


def shard_parameters(model, mesh):
    """Over all ranks, those that share a row included."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh._flatten())
    fully_shard(model, mesh=mesh._flatten())


def assert_as_one_process(outcomes, model, batch):
    """Whether the ranks' losses and gradients are those of one process."""
    expected = model(**batch, use_cache=False).loss
    expected.backward()
    assert sum(loss for loss, _ in outcomes) / len(outcomes) == pytest.approx(expected.item(), rel=1e-5)
    for _, gradients in outcomes:
        for name, parameter in model.named_parameters():
            assert_close(torch.from_numpy(gradients[name]), parameter.grad, 1e-4)


def step(rank, kind, settings, prepare=None):
    """This rank's share of the loss, and the gradients that all ranks average."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "cp"))
    model = model_of(settings)
    if prepare is not None:
        prepare(model)
    parallelize(model, mesh["cp"], transport=settings.get("transport", "gather"))
    if settings.get("sharded"):
        shard_parameters(model, mesh)
    loss = model(**shard_batch(batch_of(kind), mesh["cp"]), use_cache=False).loss
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if settings.get("sharded"):
            gradient = gradient.full_tensor()
        else:
            dist.all_reduce(gradient)
            gradient /= 2
        gradients[name] = gradient.numpy()
    return loss.item(), gradients


SETTINGS = {
    "plain": {},
    "heads": {"transport": "heads"},
    "FSDP2": {"sharded": True},
    "Qwen3": {"family": "Qwen3"},
}


@pytest.mark.parametrize(
    ("settings", "kind"),
    [(name, kind) for name in SETTINGS for kind in ("plain", "packed")] + [("plain", "uneven")],
)
def test_loss_and_gradients_are_those_of_one_process(ranks, kind, settings):
    options = SETTINGS[settings]
    outcomes = ranks.run(step, kind, options)
    assert len(outcomes) == 2
    assert_as_one_process(outcomes, model_of({**options, "sharded": False}), batch_of(kind))


def step_of_two_groups(rank):
    """As `step`, of four ranks: two share each row of a batch, and all four the parameters."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    model = model_of({})
    parallelize(model, mesh["cp"])
    shard_parameters(model, mesh)
    row = {name: x[rank // 2 : rank // 2 + 1] for name, x in batch_of("plain").items()}
    loss = model(**shard_batch(row, mesh["cp"]), use_cache=False).loss
    loss.backward()
    return loss.item(), {name: parameter.grad.full_tensor().numpy() for name, parameter in model.named_parameters()}


def test_context_parallelism_and_fsdp2_share_one_mesh():
    outcomes = group_of(4).run(step_of_two_groups)
    assert len(outcomes) == 4
    assert_as_one_process(outcomes, model_of({}), batch_of("plain"))


def inside_torchs_own(rank, balanced):
    """The loss of a model inside torch's own context parallelism, which cuts the batch."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import _cp_options

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    model = model_of({})
    parallelize(model, mesh["cp"])
    tokens = random_tokens(1, 64)
    batch = {"input_ids": tokens, "position_ids": torch.arange(64)[None].clone()}
    batch["shift_labels"] = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cp_options, "enable_load_balance", balanced)
        with context_parallel(mesh["cp"], buffers=list(batch.values()), buffer_seq_dims=[1, 1, 1]):
            loss = model(**batch, labels=batch["shift_labels"], num_items_in_batch=63 / 2, use_cache=False).loss
    return loss.item()


def test_torchs_own_context_parallelism_cuts_batches_for_ours_where_its_balance_is_off(ranks):
    (first, message), (second, _) = ranks.outcomes(inside_torchs_own, True)
    assert (first, second) == (False, False)
    assert message.startswith("ValueError: position_ids do not ascend by one")
    tokens = random_tokens(1, 64)
    expected = model_of({})(tokens, labels=tokens, use_cache=False).loss.item()
    assert sum(ranks.run(inside_torchs_own, False)) / 2 == pytest.approx(expected, rel=1e-5)


def refused(rank, what, prepare=None):
    model = model_of({})
    if prepare is not None:
        prepare(model)
    batch = shard_batch(batch_of("packed" if what == "no bounds" else "plain"))
    if what == "no config":
        set_moba_config(model, None)
    parallelize(model)
    if what == "no bounds":
        del batch["cu_seq_lens_q"], batch["cu_seq_lens_k"]
    if what == "positions" and rank:
        batch["position_ids"] -= batch["position_ids"][:, :1]
    options = {"use_cache": False}
    if what == "padding" and rank:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, :3] = 0
    if what == "mask":
        batch = shard_batch({**batch_of("plain"), "attention_mask": torch.ones(2, 64)})
    model(**batch, **options)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no config", "call set_moba_config"),
        ("no bounds", "packed documents across ranks need cu_seq_lens_q"),
        ("positions", "position_ids must count in the whole sequence"),
        ("padding", "cannot have padding"),
        ("mask", "attention_mask cannot be cut into shards"),
    ],
)
def test_what_cannot_be_honoured_is_refused(ranks, what, message):
    outcomes = ranks.outcomes(refused, what)
    assert [is_right for is_right, _ in outcomes] == [False, False]
    assert message in outcomes[-1][1]


def test_cut_batches_predict_across_their_borders():
    batch = batch_of("packed")
    parts = [cut_batch(batch, rank, 3) for rank in range(3)]
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    assert torch.equal(torch.cat([part["shift_labels"] for part in parts], dim=1), shifted)
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1), batch[name])
    assert all(torch.equal(part["cu_seq_lens_q"], batch["cu_seq_lens_q"]) for part in parts)
    assert sum(part["num_items_in_batch"] for part in parts) == (shifted != -100).sum()
