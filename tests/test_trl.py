"""TRL's SFTTrainer over packed documents: each is read alone. `make test-ecosystem` installs TRL."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from moba import MoBAConfig, register_moba

trl = pytest.importorskip("trl", reason="TRL is not installed: make test-ecosystem")
datasets = pytest.importorskip("datasets", reason="comes with TRL: make test-ecosystem")

LENGTHS = [17, 40, 5, 12, 33, 21]


@pytest.fixture
def documents():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 64, (length,), generator=generator).tolist() for length in LENGTHS]


def loss_of_documents(model, documents):
    """Mean over all tokens but the first of each document, every one read by itself."""
    losses = []
    for document in documents:
        tokens = torch.tensor([document])
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits[0, :-1]
        losses.append(F.cross_entropy(logits, tokens[0, 1:], reduction="none"))
    return torch.cat(losses).mean().item()


def tokenizer():
    words = {f"w{i}": i for i in range(64)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), pad_token="w0", eos_token="w2", unk_token="w1"
    )


@pytest.mark.parametrize("attention", ["moba", "moba_naive"])
@pytest.mark.parametrize(
    "options",
    [{"packing": True, "max_length": 128}, {"padding_free": True, "max_length": None}, {}],
    ids=["packing", "padding_free", "padded"],
)
def test_the_loss_is_that_of_the_documents_alone(tmp_path, documents, options, attention):
    register_moba(MoBAConfig(8, 2, backend="pytorch"))
    model = tiny_model().float()
    model.set_attn_implementation(attention)
    expected = loss_of_documents(model, documents)
    settings = trl.SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=len(documents), max_steps=1,
        learning_rate=0.0, report_to=[], use_cpu=True, bf16=False, logging_steps=1, save_strategy="no", **options,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model,
        args=settings,
        train_dataset=datasets.Dataset.from_dict({"input_ids": documents}),
        processing_class=tokenizer(),
    )
    seen = []
    hook = model.register_forward_pre_hook(lambda module, args, inputs: seen.append(inputs), with_kwargs=True)
    trainer.train()
    hook.remove()
    assert ("seq_idx" in seen[0]) == bool(options)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=2e-5)


def test_grpo_generates_and_scores(tmp_path, documents):
    """Prompts of different lengths are padded, answered, and scored again: as the reference would, and under MoBA."""
    results = {}
    tokens = tokenizer()
    prompts = [" ".join(f"w{i}" for i in document) for document in documents]
    for attention in ("moba", "moba_naive", "sdpa"):
        register_moba(MoBAConfig(8, 2, backend="pytorch", decode="moba"))
        model = tiny_model().float()
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        model.set_attn_implementation(attention)
        settings = trl.GRPOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=6, num_generations=2, max_completion_length=12,
            max_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True, bf16=False, logging_steps=1, seed=1,
            save_strategy="no", loss_type="grpo",
        )  # fmt: skip
        answers = []

        def reward(completions, answers=answers, **kwargs):
            answers.append(completions)
            return [sum(map(len, answer)) / 100 + answer.count("w7") for answer in completions]

        trainer = trl.GRPOTrainer(
            model, reward, args=settings, train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
            processing_class=tokens,
        )  # fmt: skip
        trainer.train()
        results[attention] = answers, torch.cat([p.detach().flatten() for p in model.parameters()])
        assert not torch.equal(results[attention][1], before)
    assert results["moba"][0] == results["moba_naive"][0] != results["sdpa"][0]
    torch.testing.assert_close(results["moba"][1], results["moba_naive"][1], atol=1e-4, rtol=1e-4)
