"""Prompts from a file of JSON lines, answers into another, one finished line at a time: a killed run loses none."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from moba.files import check_text, parse_json
from moba_lab.cli.options import Attention, Choice, Drawing, Dtype
from moba_lab.lines import NOT_OURS, Lines, open_lines

KEYS = ("id", "max_new_tokens", "prompt")
ADVICE = "choose another --batch-output, or remove it to start anew"


class Prompt(NamedTuple):
    """One line of a batch file: its number, from 1; its prompt; the user's name for it; its own limit, or None."""

    line: int
    text: str
    id: Any
    max_new_tokens: int | None


def run_batch(
    batch_file: Path,
    output: Path | None,
    model: str | None,
    choice: Choice,
    attention: Attention,
    dtype: Dtype,
    device: str,
    yarn: float | None,
    chat: bool,
    drawing: Drawing,
) -> None:
    """Answer every prompt of a batch file that has no answer yet.

    Raises:
        ValueError: naming the line that cannot be answered, before anything is generated; or an output file that holds
            something else than answers to these prompts with these settings.
        OSError: if files cannot be read or written.
    """
    from moba_lab.cli.session import open_session, say
    from moba_lab.models.generation import end_tokens, generate_tokens

    prompts = read_batch(batch_file)
    settings = {
        "model": model,
        **({} if yarn is None else {"yarn": yarn}),
        "attention": attention.value,
        "dtype": dtype.value,
        "chat": chat,
        # What changes answers by rounding only may differ between the runs of a batch.
        "config": choice.config.to_dict() | {"backend": None},
        "drawing": asdict(drawing) | {"chunk_tokens": None},
    }
    output = output or batch_file.with_suffix(f".out{batch_file.suffix or '.jsonl'}")
    if output.exists() and output.samefile(batch_file):
        raise ValueError(f"--batch-output {output} is the --batch-file itself; choose another")
    digest = _digest(json.dumps(settings, sort_keys=True))
    with open_lines(output, begins=("line",), advice=ADVICE) as answers:
        done = _finished(answers, prompts, digest)
        left = [prompt for prompt in prompts if prompt.line not in done]
        say(f"{len(done)} of {len(prompts)} prompts answered in {answers.path}")
        if not left:
            return
        session = open_session(model, choice, attention, dtype, device, yarn)
        encoded = []
        for prompt in left:
            limit = prompt.max_new_tokens or drawing.max_new_tokens
            try:
                encoded.append(session.encode(prompt.text, chat=chat, max_new_tokens=limit))
            except ValueError as error:
                raise ValueError(f"{batch_file}, line {prompt.line}: {error}") from None
        for num_done, (prompt, ids) in enumerate(zip(left, encoded, strict=True), start=len(done) + 1):
            # Draws depend on the line and not on where a stopped run went on.
            how = asdict(replace(drawing, seed=(drawing.seed + prompt.line) % 2**32))
            how["max_new_tokens"] = prompt.max_new_tokens or drawing.max_new_tokens
            start = time.perf_counter()
            tokens = list(generate_tokens(session.model, ids, **how))
            answers.add({
                "line": prompt.line, "id": prompt.id,
                "text": session.tokenizer.decode(tokens, skip_special_tokens=True),
                "prompt_tokens": ids.numel(), "new_tokens": len(tokens),
                "has_ended": tokens[-1] in end_tokens(session.model),
                "seconds": round(time.perf_counter() - start, 3),
                "prompt": _digest(prompt.text), "settings": digest,
            })  # fmt: skip
            say(
                f"{num_done} of {len(prompts)}: line {prompt.line}, {ids.numel():,} tokens read, {len(tokens):,} made "
                f"in {answers.rows[-1]['seconds']:.1f} s"
            )


def read_batch(path: Path) -> list[Prompt]:
    """All prompts of a batch file; blank lines are skipped.

    Raises:
        ValueError: naming the line that is not a JSON object with a prompt.
        OSError: if the file cannot be read.
    """
    prompts = []
    for number, data in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not data.strip():
            continue
        where = f"{path}, line {number}"
        values = parse_json(data, where)
        text = values.get("prompt") if isinstance(values, dict) else None
        if not isinstance(text, str) or not text.strip():
            said = json.dumps(values, ensure_ascii=False)[:80]
            raise ValueError(f'{where}: must be a JSON object with a text "prompt", got {said}')
        if unknown := sorted(set(values) - set(KEYS)):
            raise ValueError(f"{where}: unknown keys {unknown}; valid: {list(KEYS)}")
        check_text(where, json.dumps(values, ensure_ascii=False))
        limit = values.get("max_new_tokens")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise ValueError(f"{where}: max_new_tokens must be an integer >= 1, got {json.dumps(limit)[:80]}")
        prompts.append(Prompt(number, text, values.get("id"), limit))
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def _finished(answers: Lines, prompts: list[Prompt], settings: str) -> set[int]:
    """The numbers of the prompts' lines that have an answer, made with the settings of this digest."""
    texts = {prompt.line: _digest(prompt.text) for prompt in prompts}
    for number, record in enumerate(answers.rows, start=1):
        if not {"line", "prompt", "settings"} <= record.keys():
            raise answers.error(number, NOT_OURS)
        line = record["line"]
        if not isinstance(line, int) or record["prompt"] != texts.get(line):
            raise answers.error(number, f"the answer to another prompt than line {line} of the batch file")
        if record["settings"] != settings:
            raise answers.error(number, "made with other settings")
    return {record["line"] for record in answers.rows}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
