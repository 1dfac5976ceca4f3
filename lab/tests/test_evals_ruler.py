"""RULER-style tasks: what a prompt holds, how long it is, and how a reply is scored."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from tiny_folder import save_tiny_model
from transformers import LlamaConfig

from moba_lab.evals.reader import Reader
from moba_lab.evals.ruler import Ruler, answer
from moba_lab.evals.ruler_tasks import TASKS, choose_tasks, read_material, score
from moba_lab.models.load import load_tokenizer

TEXT = " ".join(f"This is sentence {i} of a long text." for i in range(5000))
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"The town of Place{i} has a mill. It lies on River{i}.",
                    "qas": [
                        {"question": f"Where does Place{i} lie?",
                         "answers": [{"text": f"on River{i}"}, {"text": f"River{i}"}, {"text": f"River{i}"}]},
                        {"question": "What nobody knows?", "answers": []},
                    ],
                }
                for i in range(800)
            ]
        }
    ]
}  # fmt: skip


@pytest.fixture(scope="module")
def squad(tmp_path_factory):
    path = tmp_path_factory.mktemp("squad") / "squad.json"
    path.write_text(json.dumps(SQUAD))
    return path


@pytest.fixture(scope="module")
def material(squad):
    return read_material(TEXT, squad)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def ruler(tokenizer, material):
    return Ruler(tokenizer, material)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [4096, 16384])
def test_prompts_fill_their_length_and_hold_the_answers(ruler, name, length):
    prompt = ruler.prompt(name, length=length)
    assert 0.85 * length < prompt.tokens.numel() <= length - prompt.task.num_new
    text = ruler.tokenizer.decode(prompt.tokens)
    assert text.startswith("<|im_start|>")
    assert text.endswith(f"<|im_end|>\n<|im_start|>assistant\n{prompt.reply}")
    assert all(part in text for part in prompt.answers)
    again = Ruler(ruler.tokenizer, ruler.material).prompt(name, length=length)
    assert torch.equal(again.tokens, prompt.tokens)
    assert again.answers == prompt.answers != ruler.prompt(name, length=length, seed=1).answers


def make(name, material, size=60, seed=0):
    return TASKS[name].make(random.Random(seed), size, material)


@pytest.mark.parametrize("name", TASKS)
def test_examples_of_all_sizes_ask_for_the_same(material, name):
    small, large = make(name, material, 20), make(name, material, 80)
    assert len(small.text) < len(large.text)
    assert (small.answers, small.reply) == (large.answers, large.reply)


@pytest.mark.parametrize(
    ("name", "hidden", "asked", "answers"),
    [
        ("niah_single", 1, 1, 1),
        ("niah_multikey", 4, 1, 1),
        ("niah_multikey_lines", 61, 1, 1),
        ("niah_multivalue", 4, 1, 4),
        ("niah_multiquery", 4, 4, 4),
    ],
)
def test_numbers_are_hidden_and_asked_for(material, name, hidden, asked, answers):
    example = make(name, material)
    needles = re.findall(r"One secret number of ([a-z]+-[a-z]+) is (\d{7})\.", example.text)
    assert len(needles) == hidden
    keys = re.findall(r"[a-z]+-[a-z]+", example.text.splitlines()[-1])
    assert len(keys) == asked
    assert len(example.answers) == answers
    assert sorted(value for key, value in needles if key in keys) == sorted(example.answers)
    assert all(key in example.reply for key in keys)


def test_variables_are_tracked_in_order(material):
    example = make("vt", material)
    assignments = re.findall(r"VAR ([A-Z]{5}) = (\w+)\.", example.text)
    assert len(assignments) == 3 + 5, "an example comes first"
    (value,) = re.findall(r"have the value (\d{5}), by", example.text)[1:]
    known = {value}
    for name, source in assignments[3:]:
        assert source in known
        known.add(name)
    assert known == {value, *example.answers}
    assert example.text.index("The 3 variables") < example.text.index(f"VAR {example.answers[0]}")


def test_common_words_are_the_most_frequent(material):
    text = make("cwe", material).text.rpartition("The list below")[2]
    counts = Counter(re.findall(r"\d+\. ([a-z]+)", text))
    assert sorted(counts.values()) == [3] * 60 + [30] * 10
    assert {word for word, count in counts.items() if count == 30} == set(make("cwe", material).answers)


def test_frequent_words_are_the_most_frequent_but_for_dots(material):
    example = make("fwe", material, 300)
    counts = Counter(example.text.split("\n\n")[1].split())
    assert [word for word, _ in counts.most_common(4)] == ["...", *example.answers]
    assert len({count for _, count in counts.most_common(5)}) == 5


def test_a_question_is_about_one_of_the_documents(material):
    example = make("qa", material)
    (place,) = re.findall(r"Where does (Place\d+) lie", example.text)
    assert example.answers == (f"on River{place[5:]}", f"River{place[5:]}")
    assert f"The town of {place} has" in example.text
    assert example.text.count("has a mill") == 61


def test_scores():
    assert score(TASKS["vt"], " ABCDE, fghij and more", ("ABCDE", "FGHIJ", "XXXXX", "YYYYY")) == 0.5
    assert score(TASKS["qa"], "in the north", ("River1", "North")) == 1
    assert score(TASKS["qa"], "no", ("River1",)) == 0


class Scripted(torch.nn.Module):
    """Says given tokens behind whatever it reads."""

    device = torch.device("cpu")
    config = LlamaConfig(num_hidden_layers=1)

    def __init__(self, said, end):
        super().__init__()
        self.said = [*said, end]
        self.generation_config = SimpleNamespace(eos_token_id=end)

    def forward(self, input_ids, past_key_values, use_cache, logits_to_keep=0):
        self.place = 0 if past_key_values.phase.is_prefill else self.place + 1
        logits = torch.zeros(1, 1, 49152)
        logits[..., self.said[self.place % len(self.said)]] = 30.0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("name", TASKS)
def test_right_replies_score_one_and_have_no_loss(ruler, tokenizer, name):
    prompt = ruler.prompt(name, length=4096)
    right = " " + ", ".join(prompt.answers if prompt.task.needs_all else prompt.answers[:1])
    model = Scripted(tokenizer(right)["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>"))
    record = answer(Reader(model), prompt, tokenizer)
    assert record["said"] == right
    assert record["score"] == 1
    assert record["loss"] < 1e-6
    wrong = answer(Reader(Scripted([20] * 300, 0)), prompt, tokenizer)
    assert wrong["score"] == 0
    assert wrong["loss"] > 1
    assert len(wrong["said"]) == prompt.task.num_new, "one letter a token"


def test_bad_input_is_refused(material, ruler, tmp_path):
    with pytest.raises(ValueError, match="length must be more for the task cwe"):
        ruler.prompt("cwe", length=1024)
    with pytest.raises(ValueError, match="sentences"):
        read_material("no end")
    (tmp_path / "x.json").write_text('{"data": 1}')
    with pytest.raises(ValueError, match="no file in the format of SQuAD"):
        read_material(TEXT, tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"tasks must be a list of niah_single, .* got 'niah'"):
        choose_tasks("vt,niah", material)
    with pytest.raises(ValueError, match="qa needs --squad"):
        choose_tasks("vt, qa", read_material(TEXT))
    assert choose_tasks(None, read_material(TEXT)) == [name for name in TASKS if name != "qa"]
    assert choose_tasks("qa,vt", material) == ["qa", "vt"]


def test_the_command_compares_attentions_and_goes_on(moba, tmp_path, squad):
    save_tiny_model(tmp_path / "model", max_position_embeddings=1024)
    (tmp_path / "text.txt").write_text(TEXT)
    args = (
        "eval", "ruler", "-m", tmp_path / "model", "--tasks", "niah_multivalue,fwe,qa", "--lengths", "256,600",
        "--examples", 2, "--text", tmp_path / "text.txt", "--squad", squad, "--block-size", 16, "--topk", 3,
        "--compare", "--out", tmp_path / "out",
    )  # fmt: skip
    code, out, err = moba(*args)
    assert code == 0, err
    _, *rows = [json.loads(line) for line in (tmp_path / "out" / "ruler.jsonl").read_text().splitlines()]
    assert Counter((row["attention"], row["task"], row["length"]) for row in rows) == {
        (attention, task, length): 2
        for attention in ("full", "16x3 first=1")
        for task in ("niah_multivalue", "fwe", "qa")
        for length in (256, 600)
    }
    assert rows[0]["loss"] != rows[12]["loss"], "the same prompt, with another attention"
    assert "full: score" in out
    assert (tmp_path / "out" / "ruler.png").is_file()
    assert "24 of 24 measured before" in moba(*args)[2]


def test_a_task_that_does_not_fit_is_named_before_anything_is_measured(moba, tmp_path):
    save_tiny_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    options = ("--text", tmp_path / "text.txt", "--out", tmp_path / "out", "--lengths", "240,80")
    code, _, err = moba("eval", "ruler", "-m", tmp_path / "model", "--tasks", "niah_single,cwe", *options)
    assert code == 2
    assert "length must be more for the task cwe: its shortest prompt does not fit, got 80" in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
