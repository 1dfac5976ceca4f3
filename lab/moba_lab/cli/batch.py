"""Prompts from a file of JSON lines, answers into another, one finished line at a time: a killed run loses none."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moba.files import check_text, parse_json
from moba_lab.cli.options import Attention, Choice, Drawing, Dtype
from moba_lab.lines import NOT_OURS, Lines, open_lines

if TYPE_CHECKING:
    from torch import Tensor

    from moba_lab.cli.session import Session

KEYS = ("id", "max_new_tokens", "prompt")
ADVICE = "choose another --batch-output, or remove it to start anew"


@dataclass(frozen=True)
class BatchPrompt:
    """One line of a batch file.

    Attributes:
        where: file and line, for messages.
        line: number of the line, from 1.
        text: the prompt.
        id: whatever the user wants to find beside the answer.
        max_new_tokens: the line's own limit, or None.
    """

    where: str
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
        ValueError: naming the line that cannot be answered, before anything is generated; or what `finished` refuses.
        OSError: if files cannot be read or written.
    """
    from moba_lab.cli.session import open_session, say

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
    output = output or default_output(batch_file)
    if output.exists() and output.samefile(batch_file):
        raise ValueError(f"--batch-output {output} is the --batch-file itself; choose another")
    digest = _digest(json.dumps(settings, sort_keys=True))
    with open_lines(output, begins=("line",), advice=ADVICE) as answers:
        done = finished(answers, prompts, digest)
        left = [prompt for prompt in prompts if prompt.line not in done]
        say(f"{len(done)} of {len(prompts)} prompts answered in {answers.path}")
        if not left:
            return
        session = open_session(model, choice, attention, dtype, device, yarn)
        encoded = [_encode(session, prompt, chat, drawing) for prompt in left]
        for num_done, (prompt, ids) in enumerate(zip(left, encoded, strict=True), start=len(done) + 1):
            record = _answer(session, prompt, ids, drawing)
            about = {"prompt": _digest(prompt.text), "settings": digest}
            answers.add({"line": prompt.line, "id": prompt.id, **record, **about})
            say(
                f"{num_done} of {len(prompts)}: line {prompt.line}, {record['prompt_tokens']:,} tokens read, "
                f"{record['new_tokens']:,} made in {record['seconds']:.1f} s"
            )


def _encode(session: Session, prompt: BatchPrompt, chat: bool, drawing: Drawing) -> Tensor:
    try:
        return session.encode(prompt.text, chat=chat, max_new_tokens=prompt.max_new_tokens or drawing.max_new_tokens)
    except ValueError as error:
        raise ValueError(f"{prompt.where}: {error}") from None


def _answer(session: Session, prompt: BatchPrompt, ids: Tensor, drawing: Drawing) -> dict[str, Any]:
    from moba_lab.models.generation import end_tokens, generate_tokens

    # Draws depend on the line and not on where a stopped run went on.
    drawing = replace(drawing, seed=(drawing.seed + prompt.line) % 2**32)
    if prompt.max_new_tokens is not None:
        drawing = replace(drawing, max_new_tokens=prompt.max_new_tokens)
    start = time.perf_counter()
    tokens = list(generate_tokens(session.model, ids, **asdict(drawing)))
    return {
        "text": session.tokenizer.decode(tokens, skip_special_tokens=True),
        "prompt_tokens": ids.numel(),
        "new_tokens": len(tokens),
        "has_ended": tokens[-1] in end_tokens(session.model),
        "seconds": round(time.perf_counter() - start, 3),
    }


def default_output(batch_file: Path) -> Path:
    """prompts.jsonl -> prompts.out.jsonl."""
    return batch_file.with_suffix(".out" + (batch_file.suffix or ".jsonl"))


def read_batch(path: Path) -> list[BatchPrompt]:
    """All prompts of a batch file; blank lines are skipped.

    Raises:
        ValueError: naming the line that is not a JSON object with a prompt.
        OSError: if the file cannot be read.
    """
    prompts = []
    for number, data in enumerate(path.read_bytes().split(b"\n"), start=1):
        if data.strip():
            prompts.append(_parse(data, number, f"{path}, line {number}"))
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def _parse(data: bytes, line: int, where: str) -> BatchPrompt:
    values = parse_json(data, where)
    text = values.get("prompt") if isinstance(values, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{where}: must be a JSON object with a text "prompt", got {_short(values)}')
    if unknown := sorted(set(values) - set(KEYS)):
        raise ValueError(f"{where}: unknown keys {unknown}; valid: {list(KEYS)}")
    check_text(where, json.dumps(values, ensure_ascii=False))
    limit = values.get("max_new_tokens")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"{where}: max_new_tokens must be an integer >= 1, got {_short(limit)}")
    return BatchPrompt(where, line, text, values.get("id"), limit)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"


def finished(lines: Lines, prompts: list[BatchPrompt], settings: str) -> set[int]:
    """The numbers of the prompts' lines that have an answer.

    Args:
        lines: the output file. settings: a digest of everything that changes the answers.

    Raises:
        ValueError: if the file does not belong to these prompts and settings.
    """
    by_line = {prompt.line: prompt for prompt in prompts}
    done = set()
    for number, record in enumerate(lines.rows, start=1):
        if not {"line", "prompt", "settings"} <= record.keys():
            raise lines.error(number, NOT_OURS)
        line = record["line"]
        prompt = by_line.get(line) if isinstance(line, int) else None
        if prompt is None or record["prompt"] != _digest(prompt.text):
            raise lines.error(number, f"the answer to another prompt than line {line} of the batch file")
        if record["settings"] != settings:
            raise lines.error(number, "made with other settings")
        done.add(line)
    return done


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
