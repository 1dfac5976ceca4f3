"""Documents with hidden facts: what they hold, what of them is learned, and that training reads them so."""

from __future__ import annotations

import itertools
import json
import random
import re

import numpy as np
import pytest
from tiny_folder import save_tiny_model, words

from moba.files import write_json
from moba_lab.data import ShardWriter, open_shards, tokenizer_hash
from moba_lab.data.build import build_shards
from moba_lab.data.dialogues import PARTS, DialoguePlan, Maker, documents, draw_facts
from moba_lab.data.folder import folder_units
from moba_lab.evals.needle import TASKS
from moba_lab.models.load import load_tokenizer
from moba_lab.train.packing import PackedDataset, collate

TEXT = "One sentence ends here. Another one, 1.5 times as long, ends there! Does it?\n\n"


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer()


@pytest.fixture(scope="module")
def texts(tmp_path_factory, smollm2):
    folder = tmp_path_factory.mktemp("texts")
    lines = [json.dumps({"text": f"Document {i}. " + TEXT * count}) for i, count in enumerate((3, 400, 40))]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    units = folder_units(folder / "texts.jsonl", text_key="text", held_out=0, licence="CC0")
    build_shards(folder / "data", units, smollm2, tokenizer_name="SmolLM2-135M-Instruct")
    return folder / "data"


@pytest.fixture(scope="module")
def maker(texts, smollm2):
    return Maker(open_shards(texts), smollm2, DialoguePlan())


@pytest.mark.parametrize("length", [400, 2048, 8192])
def test_a_document_is_a_conversation_of_its_length(maker, smollm2, length):
    tokens, learned = maker.document(length, random.Random(length))
    assert tokens.shape == (length - 1,)
    text = smollm2.decode(tokens)
    assert text.startswith("<|im_start|>system")
    assert text.endswith("<|im_end|>\n")
    answers = [smollm2.decode(tokens[slice(*span)]) for span in learned[1:]]
    turns = [turn.split("<|im_end|>\n<|im_start|>assistant\n") for turn in text.split("<|im_start|>user\n")[1:]]
    for (question, reply), answer in zip(turns, answers, strict=True):
        # A fact's answer is learned with its end; a passage stops anywhere.
        is_whole = "go on after this passage?" not in question
        assert answer == (reply.removesuffix("\n") if is_whole else reply.removesuffix("<|im_end|>\n"))
    hay = text.split("<|im_end|>")[1]
    for answer in answers:
        assert answer.removesuffix("<|im_end|>").strip() in " ".join([hay, hay.replace("\n", " ")])
    first, stop = learned[0]
    assert stop - first == min(DialoguePlan().learned_text, stop - first) > 0
    assert stop <= learned[1][0]
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(learned))


def test_facts_stand_behind_sentences(maker, smollm2):
    tokens, _ = maker.document(4096, random.Random(1))
    hay = smollm2.decode(tokens).split("<|im_end|>")[1]
    for answer in re.findall(r"The access code for [^.]*\.", hay):
        before = hay[: hay.index(answer)].rstrip()
        assert before.endswith((".", "!", "?")), "and not inside of 1.5"


def test_more_facts_all_learned_in_the_tail(texts, smollm2):
    plan = DialoguePlan(facts=90, learned_text=64, tail=4096)
    maker = Maker(open_shards(texts), smollm2, plan)
    counts, places = [], []
    for seed in range(12):
        tokens, learned = maker.document(32768, random.Random(seed))
        assert tokens.shape == (32767,)
        assert all(32768 - 4096 <= first < stop <= 32768 for first, stop in learned)
        assert learned[0][1] - learned[0][0] == 64
        counts.append(len(learned))
        places.append(learned[0][0])
    assert max(counts) > 30 > 10 > min(counts), "many, and few"
    assert max(places) - min(places) > 1000
    plain = Maker(open_shards(texts), smollm2, DialoguePlan(learned_text=0)).document(2048, random.Random(0))[1]
    assert all(first < stop for first, stop in plain)


def test_the_same_plan_gives_the_same_documents(texts, smollm2):
    plan = DialoguePlan((512, 1024, 1024), tokens=9000)
    shards = open_shards(texts)
    first, again = ([*documents(shards, smollm2, plan)] for _ in range(2))
    assert [made.name for made in first] == [*(f"512/{i}" for i in range(6)), *(f"1024/{i}" for i in range(6))]
    assert all(np.array_equal(a.tokens, b.tokens) and a.learned == b.learned for a, b in zip(first, again, strict=True))
    other = [*documents(shards, smollm2, DialoguePlan((512, 1024, 1024), tokens=9000, seed=1))]
    assert not np.array_equal(first[0].tokens, other[0].tokens)


def test_the_evaluations_facts_are_not_among_them():
    told = " ".join(" ".join(fact) for fact in PARTS["facts"]).lower()
    facts = [fact for seed in range(200) for fact in draw_facts(10, random.Random(seed))]
    told += " ".join(" ".join(fact) for fact in facts).lower()
    for task in TASKS.values():
        for words_of_it in ("secret number", "pass key", *filter(None, task.keys)):
            assert words_of_it.lower() not in told


@pytest.mark.parametrize("parts", PARTS["facts"])
def test_facts_say_what_they_are_asked_for(parts):
    assert ["{value}" in part for part in parts] == [True, False, True]
    assert all("{thing}" in part.lower() for part in parts)


def test_the_command_builds_rows_whose_answers_alone_are_learned(tmp_path, texts, smollm2, moba):
    out = tmp_path / "out"
    options = ["--lengths", "512,1K", "--tokens", 6000, "--held-out", 0.2]
    code, printed, said = moba("data", out, "--retrieval", texts, *options)
    assert (code, printed) == (0, f"{out}\n")
    shards = open_shards(out, tokenizer=smollm2)
    shards.verify()
    lengths = {split: [d.length for d in open_shards(out, split).documents] for split in ("train", "held_out")}
    assert lengths == {"train": [512] * 4 + [1024] * 2, "held_out": [512] * 2 + [1024]}
    assert shards.manifest["sources"][0]["licence"] == "texts: CC0"
    rows = PackedDataset(shards, 1024, seed=None)
    for i, pieces in enumerate(rows.rows):
        row = rows[i]
        learned = (row["labels"] != -100).nonzero().flatten().tolist()
        assert row["labels"][learned].tolist() == row["input_ids"][learned].tolist()
        expected, end = [], 0
        for document, _, length in pieces:
            spans = shards.documents[document].learned
            expected += sorted({end + t for span in spans for t in range(*span)})
            end += length
        assert learned == expected
        batch = collate([row])
        assert (batch["labels"] != -100).sum() == len([t for t in learned if t not in (0, 512)])
    assert moba("data", out, "--retrieval", texts, *options)[0] == 0, "a finished build is left as it is"
    code, _, said = moba("data", out, "--retrieval", texts, "--tokens", 7000)
    assert code != 0
    assert "retrieval has changed" in said


def test_documents_longer_than_a_row_keep_their_spans(tmp_path, texts, smollm2):
    shards = open_shards(texts)
    made = next(documents(shards, smollm2, DialoguePlan((900,), tokens=1)))
    writer = ShardWriter(tmp_path, "train", 0, "uint16")
    writer.add(made.tokens, "a", "b", made.learned)
    write_json(tmp_path / "manifest.json", {**shards.manifest, "shards": writer.close()})
    rows = PackedDataset(open_shards(tmp_path), 256, seed=None)
    wanted = {t for span in made.learned for t in range(*span)}
    found = set()
    for i, pieces in enumerate(rows.rows):
        labels = rows[i]["labels"]
        end = 0
        for _, start, length in pieces:
            found |= {start + t for t in range(length) if labels[end + t] != -100}
            end += length
    assert found == wanted


def test_a_tokenizer_without_a_chat_template_gets_plain_questions(tmp_path):
    save_tiny_model(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    writer = ShardWriter(tmp_path, "train", 0, "uint16")
    writer.add(tokenizer(words(900))["input_ids"], "a", "b")
    manifest = {"tokenizer": "tiny", "tokenizer_hash": tokenizer_hash(tokenizer), "vocab_size": 64, "dtype": "uint16"}
    sources = [{"name": "a", "licence": "CC0"}]
    write_json(tmp_path / "manifest.json", {**manifest, "shards": writer.close(), "held_out": [], "sources": sources})
    tokens, learned = Maker(open_shards(tmp_path), tokenizer, DialoguePlan()).document(300, random.Random(0))
    assert tokens.shape == (299,)
    assert len(learned) >= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": ()}, "lengths must name at least one"),
        ({"lengths": (0,)}, "lengths must be an integer >= 1, got 0"),
        ({"tokens": 0}, "tokens"),
        ({"held_out": 1}, "held_out"),
    ],
)
def test_plans_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DialoguePlan(**options)


def test_a_length_without_room_for_a_question_is_refused(maker):
    with pytest.raises(ValueError, match="64 tokens are too few"):
        maker.document(64, random.Random(0))


def test_texts_and_questions_are_not_mixed_in_one_call(moba, tmp_path, texts):
    code, _, said = moba("data", tmp_path / "out", "--retrieval", texts, "--from", texts)
    assert code != 0
    assert "leave out --from" in said
    before = (texts / "manifest.json").read_bytes()
    code, _, said = moba("data", texts, "--retrieval", texts, "--lengths", 256, "--tokens", 256)
    assert code == 2
    assert "choose another folder to write to" in said
    assert (texts / "manifest.json").read_bytes() == before
