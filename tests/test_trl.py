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
    words = {f"w{i}": i for i in range(64)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), pad_token="w0", eos_token="w2", unk_token="w1"
    )
    settings = trl.SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=len(documents), max_steps=1,
        learning_rate=0.0, report_to=[], use_cpu=True, bf16=False, logging_steps=1, save_strategy="no", **options,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model,
        args=settings,
        train_dataset=datasets.Dataset.from_dict({"input_ids": documents}),
        processing_class=tokenizer,
    )
    seen = []
    hook = model.register_forward_pre_hook(lambda module, args, inputs: seen.append(inputs), with_kwargs=True)
    trainer.train()
    hook.remove()
    assert ("seq_idx" in seen[0]) == bool(options)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=2e-5)
