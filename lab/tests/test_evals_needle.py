"""Needle in a haystack: where the needle lies, what counts as found, and records that survive a kill."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_folder import save_tiny_model, words
from tiny_models import random_tokens

from moba import MoBAConfig, register_moba
from moba.hf import set_moba_config
from moba_lab.evals.needle import TASKS, Haystack, Prompt, Task, find, grid
from moba_lab.evals.reader import Reader, reading_order
from moba_lab.evals.records import open_records, record_of
from moba_lab.models.load import load_model, load_tokenizer

TASK = Task(needle="w50 {key} {value}", question="w51 {key}", answer="w52", keys=("w1", "w2", "w3"), values=("w9",))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    register_moba(None)
    model, tokenizer = load_model(str(folder))
    set_moba_config(model, MoBAConfig(8, 3))
    return model.double(), tokenizer


@pytest.fixture(scope="module")
def haystack(loaded):
    return Haystack(loaded[1], words(300))


@pytest.mark.parametrize(("depth", "place"), [(0, 0), (0.25, 25), (0.5, 50), (1, 94)])
def test_the_needle_lies_at_its_depth(haystack, depth, place):
    prompt = haystack.prompt(TASK, length=100, depth=depth)
    text = haystack.tokenizer.decode(prompt.tokens).split()
    assert len(text) == prompt.tokens.numel() == 100
    start, stop = prompt.needle
    assert (start, stop) == (place, place + 3)
    key = text[start + 1]
    assert text[start:stop] == ["w50", key, "w9"]
    assert text[97:] == ["w51", key, "w52"]
    assert prompt.num_question == 3
    hay = text[:start] + text[stop:97]
    assert " ".join(hay) in words(300) + " " + words(300)
    assert haystack.tokenizer.decode(prompt.answer) == "w9"


def test_several_needles_have_different_keys_and_one_is_asked_for(haystack):
    prompt = haystack.prompt(TASK, length=120, depth=0.75, num_needles=3)
    text = haystack.tokenizer.decode(prompt.tokens).split()
    places = [i for i, word in enumerate(text) if word == "w50" and text[i + 2] == "w9"]
    assert len(places) == 3
    assert len({text[i + 1] for i in places}) == 3
    assert text[prompt.needle[0] + 1] == text[118]
    # The one asked for lies at 3/4, the others a third and two thirds further, around the end.
    assert places == [round(120 * (0.75 + 1 / 3 - 1)), round(120 * (0.75 + 2 / 3 - 1)) + 3, round(120 * 0.75) + 6]
    assert prompt.needle[0] == places[2]


def test_prompts_differ_by_seed_only(haystack):
    first, again, other = (haystack.prompt(TASK, length=60, depth=0.5, seed=seed).tokens for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def shared(one, other):
    return next(i for i, (a, b) in enumerate(zip(one.tolist(), other.tolist(), strict=False)) if a != b)


def test_prompts_of_a_seed_share_what_lies_before_the_needle(haystack):
    def prompt(length, depth):
        return haystack.prompt(TASK, length=length, depth=depth, seed=4)

    assert shared(prompt(100, 0.5).tokens, prompt(100, 0.75).tokens) == 50
    assert shared(prompt(100, 0.5).tokens, prompt(80, 0.25).tokens) == 20
    short, long = prompt(60, 0.5), prompt(120, 0.25)
    assert short.needle == long.needle == (30, 33)
    assert short.answer.equal(long.answer)
    assert shared(short.tokens, long.tokens) == 57, "all but the question"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 6, "depth": 0.5}, "length must exceed .* 6 tokens, got 6"),
        ({"length": 1000, "depth": 0.5}, "the text has 300 tokens, 994 are needed"),
        ({"length": 50, "depth": 1.5}, "depth"),
        ({"length": 50, "depth": 0.5, "num_needles": 4}, "3 keys, got 4"),
        ({"length": 50, "depth": 0.5, "num_needles": 0}, "num_needles"),
    ],
)
def test_impossible_prompts_are_refused(haystack, options, message):
    with pytest.raises(ValueError, match=message):
        haystack.prompt(TASK, **options)


def test_needles_follow_sentences_and_the_chat_template(tmp_path):
    smollm2 = load_tokenizer()
    haystack = Haystack(smollm2, "One two three four five. " * 60)
    prompt = haystack.prompt(TASKS["passkey"], length=256, depth=0.5)
    text = smollm2.decode(prompt.tokens)
    value = smollm2.decode(prompt.answer).strip()
    assert len(value) == 5
    assert f"four five. The pass key is {value}. Remember it: {value} is the pass key. One two" in text
    assert text.startswith("<|im_start|>")
    assert text.endswith("mentions?<|im_end|>\n<|im_start|>assistant\nThe pass key is")
    assert smollm2.decode(torch.cat([prompt.tokens, prompt.answer])).endswith(f"The pass key is {value}")
    needle = smollm2.decode(prompt.tokens[slice(*prompt.needle)])
    assert needle == f" The pass key is {value}. Remember it: {value} is the pass key."
    plain = Haystack(smollm2, haystack.text, chat=False).prompt(TASKS["passkey"], length=256, depth=0.5)
    assert "<|im_start|>" not in smollm2.decode(plain.tokens)


@pytest.mark.parametrize("chunk_tokens", [16, 1024])
def test_the_answer_is_scored_as_one_forward_pass_scores_it(loaded, chunk_tokens):
    model = loaded[0]
    model.set_attn_implementation("sdpa")
    tokens = random_tokens(1, 64)
    prompt = Prompt(tokens[0, :60], tokens[0, 60:], (0, 1), 1)
    with torch.no_grad():
        logits = model(tokens).logits[0, 59:63]
    record = find(Reader(model, chunk_tokens=chunk_tokens), prompt)
    assert record["loss"] == pytest.approx(F.cross_entropy(logits, prompt.answer).item(), abs=1e-3)
    assert record["said"] == logits.argmax(dim=-1).tolist()
    assert not record["found"]
    right = [logits[0].argmax()]
    for _ in range(3):
        with torch.no_grad():
            right.append(model(torch.cat([prompt.tokens, torch.stack(right)])[None]).logits[0, -1].argmax())
    assert find(Reader(model), Prompt(prompt.tokens, torch.stack(right), (0, 1), 1))["found"]


def test_a_grid_read_with_one_cache_is_the_grid_read_anew(loaded, haystack):
    model = loaded[0]
    model.set_attn_implementation("moba")
    prompts = [
        haystack.prompt(TASK, length=length, depth=depth / 4, seed=1) for length in (60, 120) for depth in range(5)
    ]
    reader, alone = Reader(model), 0
    for i in reading_order([prompt.tokens for prompt in prompts]):
        fresh = Reader(model)
        together, anew = find(reader, prompts[i]), find(fresh, prompts[i])
        alone += fresh.num_read
        assert together["said"] == anew["said"]
        assert together["loss"] == pytest.approx(anew["loss"], abs=1e-3)
    assert reader.num_read < alone / 1.7


def test_moba_decides_what_is_found(loaded):
    model = loaded[0]
    prompt = Prompt(random_tokens(1, 64)[0], torch.tensor([5, 6]), (0, 1), 1)
    losses = {}
    for attention in ("sdpa", "moba"):
        model.set_attn_implementation(attention)
        losses[attention] = find(Reader(model), prompt)["loss"]
    assert abs(losses["sdpa"] - losses["moba"]) > 0.1


def test_the_grid_averages_trials():
    rows = [{"length": 8, "depth": 0.5, "found": found} for found in (True, False, True, True)]
    assert grid([*rows, {"length": 8, "depth": 1, "found": False}]) == {(8, 0.5): 0.75, (8, 1): 0.0}


def test_records_survive_a_kill(tmp_path):
    path = tmp_path / "new" / "x.jsonl"
    row = {"attention": "full", "length": 8, "found": True}
    with open_records(path, {"a": 1}, {"device": "x"}) as records:
        records.add(row)
        with pytest.raises(ValueError, match="another run"), open_records(path, {"a": 1}, {}):
            pass
    path.write_bytes(path.read_bytes() + b'{"attention": "full", "le')
    with open_records(path, {"a": 1}, {"device": "y"}) as records:
        assert record_of(records, {"length": 8}) == row
        assert record_of(records, {"length": 16}) is None
        records.add({**row, "length": 16})
    with open_records(path, {"a": 1}, {}) as records:
        assert records.rows == [{"settings": {"a": 1}, "made_on": {"device": "x"}}, row, {**row, "length": 16}]
    with pytest.raises(ValueError, match="line 1: made with another a, b"), open_records(path, {"a": 2, "b": 1}, {}):
        pass


@pytest.mark.parametrize("text", ["no\n", "no", '{"a": 1}', '{"a": 1}\n', "[1]\n", '{"settings": 1}\n', '{"set'])
def test_only_files_of_records_are_gone_on_from(tmp_path, text):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    if text == '{"set':
        with open_records(path, {}, {}) as records:
            assert [row.keys() for row in records.rows] == [{"settings", "made_on"}]
        return
    with (
        pytest.raises(ValueError, match="line 1: not a line that this command wrote; choose another --out"),
        open_records(path, {}, {}),
    ):
        pass
    assert path.read_text() == text
