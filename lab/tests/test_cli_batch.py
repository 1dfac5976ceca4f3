"""`moba generate --batch-file`: answers line by line, through errors, kills and second runs; `--prefill-chunk`."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest
from test_cli import folder as folder
from tiny_folder import words

OPTIONS = ("--block-size", "8", "--topk", "3", "--decode", "moba", "--max-new-tokens", "5")


def write_lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompts(count, **more):
    return [{"prompt": words(20 + 3 * i), "id": f"p{i}", **more} for i in range(count)]


def without_times(records):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def test_answers_are_those_of_single_runs(moba, folder, tmp_path):
    file = write_lines(tmp_path / "in.jsonl", prompts(3))
    with file.open("a") as more:
        more.write("\n" + json.dumps({"prompt": words(30), "max_new_tokens": 9}) + "\n\n")
    code, out, err = moba("generate", "-m", folder, "--batch-file", file, *OPTIONS)
    assert (code, out) == (0, "")
    records = read_lines(tmp_path / "in.out.jsonl")
    assert [(r["line"], r["id"], r["new_tokens"]) for r in records] == [
        (1, "p0", 5), (2, "p1", 5), (3, "p2", 5), (5, None, 9)]  # fmt: skip
    for record, length in zip(records, (20, 23, 26), strict=False):
        assert record["prompt_tokens"] == length
        assert record["has_ended"] is False
        _, alone, _ = moba("generate", "-m", folder, "-p", words(length), *OPTIONS)
        assert record["text"] == alone.removesuffix("\n")
    assert "4 of 4: line 5, 30 tokens read, 9 made" in err


KILLED = """
import os, signal, sys
from moba_lab.cli import main
from moba_lab.lines import Lines

add = Lines.add

def add_three(lines, row):
    if len(lines.rows) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    add(lines, row)

Lines.add = add_three
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_and_loses_nothing(moba, folder, tmp_path):
    values = prompts(8, max_new_tokens=40)
    file, whole = write_lines(tmp_path / "in.jsonl", values), write_lines(tmp_path / "whole.jsonl", values)
    output = tmp_path / "answers.jsonl"
    command = ["generate", "-m", folder, *OPTIONS, "--temperature", "1", "--batch-file"]
    to_output = [*command, file, "--batch-output", output]
    killed = subprocess.run([sys.executable, "-c", KILLED, *to_output], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = output.read_bytes()
    assert finished.endswith(b"\n")
    assert finished.count(b"\n") == 3
    # What a kill in the midst of a write leaves.
    output.write_bytes(finished + b'{"line": 4, "id": "p')
    code, _, err = moba(*to_output)
    assert code == 0, err
    assert "3 of 8 prompts answered" in err
    assert err.count("tokens read") == 5
    assert output.read_bytes().startswith(finished)
    assert moba(*command, whole)[0] == 0
    assert without_times(read_lines(output)) == without_times(read_lines(tmp_path / "whole.out.jsonl"))


def test_a_finished_batch_loads_no_model(moba, folder, tmp_path):
    file = write_lines(tmp_path / "in.jsonl", prompts(1))
    args = ("generate", "-m", folder, "--batch-file", file, *OPTIONS)
    assert moba(*args)[0] == 0
    before = (tmp_path / "in.out.jsonl").read_bytes()
    code, _, err = moba(*args)
    assert code == 0
    assert "1 of 1 prompts answered" in err
    assert "loading" not in err
    assert (tmp_path / "in.out.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "in.jsonl, line 3: not JSON: Expecting property name"),
        ('"w1"', 'line 3: must be a JSON object with a text "prompt", got "w1"'),
        ('{"text": "w1"}', "line 3: must be a JSON object with a text"),
        ('{"prompt": " "}', "line 3: must be a JSON object with a text"),
        ('{"prompt": "w1", "topk": 3, "n": 1}', "line 3: unknown keys ['n', 'topk']"),
        ('{"prompt": "w1", "max_new_tokens": true}', "line 3: max_new_tokens must be an integer >= 1, got true"),
        ('{"prompt": "w1 \\ud800"}', r"line 3: not text: half of a surrogate pair, '\ud800'"),
        ('{"prompt": "w1", "id": "\\udc00"}', r"line 3: not text: half of a surrogate pair, '\udc00'"),
        ('{"prompt": "w1", "id": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 3: nested too deeply"),
    ],
)
def test_a_bad_line_is_named_before_anything_runs(moba, folder, tmp_path, line, message):
    file = write_lines(tmp_path / "in.jsonl", prompts(2))
    with file.open("a") as more:
        more.write(line + "\n")
    code, _, err = moba("generate", "-m", folder, "--batch-file", file, *OPTIONS)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "in.out.jsonl").exists()


def test_bytes_that_are_no_text_are_named(moba, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "w1"}\n{"prompt": "\xff"}\n')
    code, _, err = moba("generate", "--batch-file", tmp_path / "in.jsonl")
    assert code == 2
    assert "line 2: not UTF-8 (byte 12)" in err


def test_a_prompt_that_is_too_long_is_named_before_anything_is_generated(moba, folder, tmp_path):
    file = write_lines(tmp_path / "in.jsonl", [*prompts(2), {"prompt": words(300)}])
    code, _, err = moba("generate", "-m", folder, "--batch-file", file, *OPTIONS)
    assert code == 2
    assert "in.jsonl, line 3: the prompt has 300 tokens and 5 new ones are asked for" in err
    assert (tmp_path / "in.out.jsonl").read_bytes() == b""
    # Mended, the batch goes through.
    write_lines(file, prompts(3))
    assert moba("generate", "-m", folder, "--batch-file", file, *OPTIONS)[0] == 0
    assert len(read_lines(tmp_path / "in.out.jsonl")) == 3


def test_answers_to_other_prompts_or_settings_are_refused_and_kept(moba, folder, tmp_path):
    file = write_lines(tmp_path / "in.jsonl", prompts(2))
    output = tmp_path / "in.out.jsonl"
    args = ("generate", "-m", folder, "--batch-file", file, *OPTIONS)
    assert moba(*args)[0] == 0
    before = output.read_bytes()
    code, _, err = moba(*args, "--topk", "2")
    assert (code, output.read_bytes()) == (2, before)
    assert "in.out.jsonl, line 1: made with other settings; choose another --batch-output" in err
    write_lines(file, [{"prompt": "w1"}, *prompts(2)[1:]])
    code, _, err = moba(*args)
    assert (code, output.read_bytes()) == (2, before)
    assert "line 1: the answer to another prompt than line 1 of the batch file" in err
    output.write_text("something else\n")
    code, _, err = moba(*args)
    assert (code, output.read_text()) == (2, "something else\n")
    assert "line 1: not a line that this command wrote" in err


@pytest.mark.parametrize("content", ["notes of mine", "notes of mine\n", '{"prompt": "w1"}', '{"line": 1}\n{"prompt'])
def test_a_file_that_holds_something_else_is_refused_and_kept(moba, folder, tmp_path, content):
    file, output = write_lines(tmp_path / "in.jsonl", prompts(2)), tmp_path / "other.txt"
    output.write_text(content)
    code, _, err = moba("generate", "-m", folder, "--batch-file", file, "--batch-output", output, *OPTIONS)
    assert code == 2
    assert "not a line that this command wrote" in err
    assert output.read_text() == content


@pytest.mark.parametrize("device", ["/dev/full", "/dev/null", "/dev/zero", "pipe"])
def test_what_is_no_regular_file_is_refused_at_once(moba, folder, tmp_path, device):
    file = write_lines(tmp_path / "in.jsonl", prompts(1))
    if device == "pipe":
        os.mkfifo(device := tmp_path / "pipe")
    code, _, err = moba("generate", "-m", folder, "--batch-file", file, "--batch-output", device, *OPTIONS)
    assert (code, err) == (2, f"moba: error: {device} is no regular file: choose another\n")


@pytest.mark.parametrize("end", ["", "\n"])
def test_the_prompts_are_not_written_over(moba, folder, tmp_path, end):
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "w1"}' + end)
    code, _, err = moba("generate", "-m", folder, "--batch-file", file, "--batch-output", file, *OPTIONS)
    assert code == 2
    assert "is the --batch-file itself" in err
    assert file.read_text() == '{"prompt": "w1"}' + end


@pytest.mark.parametrize("rest", ['{"l', '{"line": 2, "id"', "\0" * 40, '{"line": 2, "\0\0'])
def test_what_a_stopped_write_leaves_is_removed(moba, folder, tmp_path, rest):
    file, output = write_lines(tmp_path / "in.jsonl", prompts(2)), tmp_path / "in.out.jsonl"
    args = ("generate", "-m", folder, "--batch-file", file, *OPTIONS)
    assert moba(*args)[0] == 0
    whole = read_lines(output)
    output.write_text(json.dumps(whole[0]) + "\n" + rest)
    assert moba(*args)[0] == 0
    assert without_times(read_lines(output)) == without_times(whole)


def test_two_runs_do_not_write_one_file(moba, folder, tmp_path):
    file = write_lines(tmp_path / "in.jsonl", prompts(1))
    with (tmp_path / "in.out.jsonl").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        code, _, err = moba("generate", "-m", folder, "--batch-file", file, *OPTIONS)
    assert code == 2
    assert "is being written by another run" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--batch-file", "none.jsonl"), "none.jsonl"),
        (("--batch-output", "x"), "--batch-output needs --batch-file"),
        (("--batch-file", "x", "--prompt", "w1"), "leave out --prompt"),
        (("--batch-file", "x", "--compare"), "leave out --prompt, --prompt-file, --compare and --demo"),
        (("-p", "w1", "--prefill-chunk", "0"), "prefill_chunk must be an integer >= 1, got 0"),
    ],
)
def test_options_that_cannot_be_are_named(moba, folder, args, message):
    code, _, err = moba("generate", "-m", folder, *args)
    assert code == 2
    assert message in err


def test_an_empty_batch_is_named(moba, tmp_path):
    (tmp_path / "in.jsonl").write_text("\n\n")
    code, _, err = moba("generate", "--batch-file", tmp_path / "in.jsonl")
    assert code == 2
    assert "holds no prompts" in err


def test_the_prefills_chunks_change_nothing(moba, folder):
    for decode in ("full", "moba"):
        args = ("generate", "-m", folder, "-p", words(41), "--block-size", 8, "--topk", 3, "-n", 9, "--decode", decode)
        assert len({moba(*args, *chunk)[1] for chunk in ((), ("--prefill-chunk", 8), ("--prefill-chunk", 1))}) == 1
