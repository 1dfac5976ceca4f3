"""Needle in a haystack: a sentence that says a number, hidden in a long text, and a question for the number.

Of each cell (length of the prompt, depth of the needle) two things are measured: whether the model, choosing its
likeliest token at each step, gives the answer exactly, and the mean loss of the answer's tokens, which tells a model
that is nearly right from one that never saw the needle.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moba.config import require_int
from moba.files import check_text, read_json
from moba_lab.evals.reader import Reader

# fmt: off
_CITIES = (
    "Lisbon", "Nairobi", "Oslo", "Quito", "Hanoi", "Dublin", "Cairo", "Lima", "Athens", "Warsaw", "Prague", "Ankara",
    "Riga", "Sofia", "Dakar", "Tunis", "Seoul", "Havana", "Vienna", "Madrid", "Accra", "Zagreb", "Manila", "Brussels",
)
# fmt: on


@dataclass(frozen=True)
class Task:
    """What is hidden and how it is asked for.

    Attributes:
        needle: the sentence, with {key} and {value}.
        question: what follows the text, with {key}.
        answer: how the reply begins, up to the value.
        keys: what {key} may be; several needles have different ones.
        values: what {value} may be; empty: numbers of `num_digits` digits.
        num_digits: of a number.
    """

    needle: str
    question: str
    answer: str
    keys: tuple[str, ...] = ("",)
    values: tuple[str, ...] = ()
    num_digits: int = 5

    def draw_value(self, generator: random.Random) -> str:
        """A value."""
        if self.values:
            return generator.choice(self.values)
        return str(generator.randrange(10 ** (self.num_digits - 1), 10**self.num_digits))


TASKS = {
    "needle": Task(
        needle=" The secret number of {key} is {value}.",
        question="\n\nWhat is the secret number of {key} that the text above mentions?",
        answer="The secret number of {key} is",
        keys=_CITIES,
    ),
    "passkey": Task(
        needle=" The pass key is {value}. Remember it: {value} is the pass key.",
        question="\n\nWhat is the pass key that the text above mentions?",
        answer="The pass key is",
    ),
}  # fmt: skip


def read_task(name: str) -> Task:
    """A task by its name, or from a JSON file: an object with `needle`, `question`, `answer` and maybe `keys`, `values`
    or `num_digits`.

    Raises:
        ValueError: if it is neither, or the file's values do not serve.
    """
    if name in TASKS:
        return TASKS[name]
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"task must be one of {sorted(TASKS)} or a file, got {name!r}")
    try:
        values = read_json(path)
        check_text(str(path), json.dumps(values, ensure_ascii=False))
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        task = Task(**fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no task: {error}") from None
    if not task.keys or "{value}" not in task.needle:
        raise ValueError(f"{path} is no task: it needs keys, and a needle with {{value}}")
    return task


@dataclass(frozen=True)
class Prompt:
    """A haystack with its needles, as tokens.

    Attributes:
        tokens: int64 [T], up to where the answer begins.
        answer: int64 [A], the tokens of the right answer.
        needle: first and one past the last token of the needle that is asked for.
        num_question: tokens after the haystack.
    """

    tokens: Tensor
    answer: Tensor
    needle: tuple[int, int]
    num_question: int


@dataclass
class Haystack:
    """A text to hide needles in, tokenised once.

    Args:
        tokenizer: of transformers.
        text: long enough for the longest prompt.
        chat: wrap text and question in the tokenizer's chat template, if it has one.
    """

    tokenizer: Any
    text: str
    chat: bool = True
    _tokens: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._tokens = encode(self.tokenizer, self.text)

    def prompt(self, task: Task, *, length: int, depth: float, num_needles: int = 1, seed: int = 0) -> Prompt:
        """A prompt of exactly `length` tokens.

        Args:
            task: what is hidden.
            length: tokens of the prompt, the question and the beginning of the answer included.
            depth: where the needle that is asked for lies, as a share of the length: 0 the beginning of the text, 1 its
                end. It is put behind the last sentence that ends before.
            num_needles: how many are hidden, evenly spread from there on around the text, with different keys.
            seed: of where in the text the haystack begins, and with `depth * length` of keys and values. So prompts of
                one seed are alike up to their first needle, whatever their depths and lengths, and those with a needle
                in one place have the same one there: much of them need be read only once.

        Raises:
            ValueError: if the text is too short, the length too small, or there are too few keys.
        """
        require_int("num_needles", num_needles, 1)
        if not 0 <= depth <= 1:
            raise ValueError(f"depth must be in 0 … 1, got {depth}")
        if num_needles > len(task.keys):
            raise ValueError(f"num_needles must be at most the task's {len(task.keys)} keys, got {num_needles}")
        draws = random.Random(f"{seed} {round(depth * length)} {num_needles}")
        keys = draws.sample(task.keys, num_needles)
        values = [task.draw_value(draws) for _ in keys]
        opening, end = chat_frame(self.tokenizer, self.chat)
        question = encode(self.tokenizer, task.question.format(key=keys[0]) + end + task.answer.format(key=keys[0]))
        needles = [
            encode(self.tokenizer, task.needle.format(key=k, value=v)) for k, v in zip(keys, values, strict=True)
        ]
        hay = self._hay(length, sum(part.numel() for part in (opening, question, *needles)), seed)
        depths = [depth, *((depth + i / num_needles) % 1 for i in range(1, num_needles))]
        text, first = _hide(needles, hay, [self._place(hay, length, d) for d in depths])
        first += opening.numel()
        return Prompt(
            tokens=torch.cat([opening, text, question]),
            answer=self._answer(task, keys[0], values[0]),
            needle=(first, first + needles[0].numel()),
            num_question=question.numel(),
        )

    def _hay(self, length: int, taken: int, seed: int) -> Tensor:
        """So much of the text as a prompt of this length has room for; behind the text's end it begins again."""
        room = length - taken
        if room < 1:
            raise ValueError(f"length must exceed what needles and question take, {taken} tokens, got {length}")
        if room > self._tokens.numel():
            raise ValueError(f"the text has {self._tokens.numel():,} tokens, {room:,} are needed for length={length}")
        return self._tokens.roll(-random.Random(seed).randrange(self._tokens.numel()))[:room]

    def _answer(self, task: Task, key: str, value: str) -> Tensor:
        """The tokens of the value as they follow the answer's beginning."""
        beginning = task.answer.format(key=key)
        space = " " if beginning else ""
        whole = encode(self.tokenizer, f"{beginning}{space}{value}")
        return whole[encode(self.tokenizer, beginning).numel() :]

    def _place(self, hay: Tensor, length: int, depth: float) -> int:
        """The end of the last sentence before a depth, at most 64 tokens before; the depth itself if there is none."""
        place = min(round(depth * length), hay.numel())
        if place == hay.numel():
            return place
        for end in range(place, max(0, place - 64), -1):
            if self.tokenizer.decode(hay[end - 1 : end]).rstrip().endswith((".", "!", "?")):
                return end
        return place


def encode(tokenizer: Any, text: str) -> Tensor:
    """The tokens of a text, int64 [T], without what a tokenizer puts before a text."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)


def chat_frame(tokenizer: Any, chat: bool) -> tuple[Tensor, str]:
    """What stands before a user's text, as tokens, and behind it: the chat template's, or without `chat` or a template
    what the tokenizer itself puts before a text, and the end of the line.
    """
    if not (chat and tokenizer.chat_template):
        return torch.tensor(tokenizer("")["input_ids"], dtype=torch.long), "\n"
    mark = "TEXT-OF-THE-USER"
    turn = [{"role": "user", "content": mark}]
    start, end = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False).split(mark)
    return encode(tokenizer, start), end


def _hide(needles: list[Tensor], hay: Tensor, places: list[int]) -> tuple[Tensor, int]:
    """The hay with needles in their places, and where the first of the needles begins."""
    parts, position, first = [], 0, 0
    for i in sorted(range(len(needles)), key=lambda i: places[i]):
        parts.append(hay[position : places[i]])
        position = places[i]
        if i == 0:
            first = sum(part.numel() for part in parts)
        parts.append(needles[i])
    return torch.cat([*parts, hay[position:]]), first


def find(reader: Reader, prompt: Prompt) -> dict[str, Any]:
    """Whether a model finds the needle.

    The answer is decoded token by token, so a config's `decode` decides the attention of its tokens.

    Args:
        reader: of a causal language model of transformers.
        prompt: of `Haystack.prompt`.

    Returns:
        found: whether each token of the answer is the likeliest one after those before.
        loss: mean negative log-likelihood of the answer's tokens, in nats.
        said: int list, the likeliest token at each place.
        num_read: tokens that were read for it.
    """
    before = reader.num_read
    losses, said = score_answer(reader, prompt.tokens, prompt.answer)
    return {
        "found": said == prompt.answer.tolist(),
        "loss": sum(losses) / len(losses),
        "said": said,
        "num_read": reader.num_read - before,
    }


def score_answer(reader: Reader, prompt: Tensor, answer: Tensor) -> tuple[list[float], list[int]]:
    """The loss of each of an answer's tokens given those before, in nats, and the likeliest token in its place."""
    logits = reader.read(prompt)
    losses, said = [], []
    for i, token in enumerate(answer.tolist()):
        losses.append(F.cross_entropy(logits[None], torch.tensor([token], device=logits.device)).item())
        said.append(int(logits.argmax()))
        if i + 1 < answer.numel():
            logits = reader.step(token)
    return losses, said


def grid(records: Iterable[dict[str, Any]], value: str = "found", row: str = "depth") -> dict[tuple[int, Any], float]:
    """(length, depth, or what else is asked for as `row`) -> the mean of a value over the records of the cell."""
    cells: dict[tuple[int, Any], list[float]] = {}
    for record in records:
        cells.setdefault((record["length"], record[row]), []).append(float(record[value]))
    return {cell: sum(values) / len(values) for cell, values in cells.items()}
