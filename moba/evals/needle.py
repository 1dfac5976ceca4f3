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
from moba.generation import prefill

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
        values = json.loads(path.read_text(encoding="utf-8"))
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
        self._tokens = self._encode(self.text)

    def prompt(self, task: Task, *, length: int, depth: float, num_needles: int = 1, seed: int = 0) -> Prompt:
        """A prompt of exactly `length` tokens.

        Args:
            task: what is hidden.
            length: tokens of the prompt, the question and the beginning of the answer included.
            depth: where the needle that is asked for lies: 0 the beginning of the text, 1 its end. It is put behind the
                last sentence that ends before.
            num_needles: how many are hidden, evenly spread from there on around the text, with different keys.
            seed: of the keys, the values and where in the text the haystack begins.

        Raises:
            ValueError: if the text is too short, the length too small, or there are too few keys.
        """
        require_int("num_needles", num_needles, 1)
        if not 0 <= depth <= 1:
            raise ValueError(f"depth must be in 0 … 1, got {depth}")
        if num_needles > len(task.keys):
            raise ValueError(f"num_needles must be at most the task's {len(task.keys)} keys, got {num_needles}")
        generator = random.Random(f"{seed} {length} {depth} {num_needles}")
        keys = generator.sample(task.keys, num_needles)
        values = [task.draw_value(generator) for _ in keys]
        start, end = self._frame()
        question = self._encode(task.question.format(key=keys[0]) + end + task.answer.format(key=keys[0]))
        sentences = [self._encode(task.needle.format(key=k, value=v)) for k, v in zip(keys, values, strict=True)]
        # Without a template, what the tokenizer itself puts before a text.
        opening = self._encode(start) if start else torch.tensor(self.tokenizer("")["input_ids"], dtype=torch.long)
        room = length - sum(part.numel() for part in (opening, question, *sentences))
        if room < 1:
            raise ValueError(f"length must exceed what needles and question take, {length - room} tokens, got {length}")
        if room > self._tokens.numel():
            raise ValueError(f"the text has {self._tokens.numel():,} tokens, {room:,} are needed for length={length}")
        first = generator.randrange(self._tokens.numel() - room + 1)
        hay = self._tokens[first : first + room]
        places = [self._sentence_end(hay, (depth + i / num_needles) % 1 if i else depth) for i in range(num_needles)]
        parts, needle, position = [opening], (0, 0), 0
        for i in sorted(range(num_needles), key=lambda i: places[i]):
            parts += [hay[position : places[i]], sentences[i]]
            position = places[i]
            if i == 0:
                stop = sum(part.numel() for part in parts)
                needle = (stop - sentences[0].numel(), stop)
        parts += [hay[position:], question]
        return Prompt(torch.cat(parts), self._answer(task, keys[0], values[0]), needle, question.numel())

    def _answer(self, task: Task, key: str, value: str) -> Tensor:
        """The tokens of the value as they follow the answer's beginning."""
        beginning = task.answer.format(key=key)
        space = " " if beginning else ""
        whole = self._encode(f"{beginning}{space}{value}")
        return whole[self._encode(beginning).numel() :]

    def _frame(self) -> tuple[str, str]:
        """What the chat template puts before and behind the user's text."""
        if not (self.chat and self.tokenizer.chat_template):
            return "", "\n"
        mark = "TEXT-OF-THE-USER"
        turn = [{"role": "user", "content": mark}]
        text = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        start, end = text.split(mark)
        return start, end

    def _sentence_end(self, hay: Tensor, depth: float) -> int:
        """The end of the last sentence before a depth, at most 64 tokens before; the depth itself if there is none."""
        place = round(depth * hay.numel())
        if place == hay.numel():
            return place
        for end in range(place, max(0, place - 64), -1):
            if self.tokenizer.decode(hay[end - 1 : end]).rstrip().endswith((".", "!", "?")):
                return end
        return place

    def _encode(self, text: str) -> Tensor:
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.long)


@torch.inference_mode()
def find(model: Any, prompt: Prompt, *, chunk_tokens: int = 1024) -> dict[str, Any]:
    """Whether a model finds the needle.

    The answer is decoded token by token, so a config's `decode` decides the attention of its tokens.

    Args:
        model: a causal language model of transformers.
        prompt: of `Haystack.prompt`.
        chunk_tokens: tokens read in one forward pass.

    Returns:
        found: whether each token of the answer is the likeliest one after those before.
        loss: mean negative log-likelihood of the answer's tokens, in nats.
        said: int list, the likeliest token at each place.
    """
    logits, cache = prefill(model, prompt.tokens, chunk_tokens=chunk_tokens)
    losses, said = [], []
    for i, token in enumerate(prompt.answer.tolist()):
        losses.append(F.cross_entropy(logits[None], torch.tensor([token], device=logits.device)).item())
        said.append(int(logits.argmax()))
        if i + 1 < prompt.answer.numel():
            step = torch.tensor([[token]], device=model.device)
            logits = model(input_ids=step, past_key_values=cache, use_cache=True).logits[0, -1].float()
    return {"found": said == prompt.answer.tolist(), "loss": sum(losses) / len(losses), "said": said}


def grid(records: Iterable[dict[str, Any]], value: str = "found") -> dict[tuple[int, float], float]:
    """(length, depth) -> the mean of a value over the records of the cell."""
    cells: dict[tuple[int, float], list[float]] = {}
    for record in records:
        cells.setdefault((record["length"], record["depth"]), []).append(float(record[value]))
    return {cell: sum(values) / len(values) for cell, values in cells.items()}
