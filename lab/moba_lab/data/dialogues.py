"""Documents that teach looking back: facts hidden in long texts, and questions for them.

A document is a conversation. Its first turn is a long text with a few facts in it, each a sentence of its own, and a
question; then answers and more questions follow. Some questions ask to go on with a passage of the text itself. Only
the answers, and one stretch of the text, are learned: among 32K tokens the answers would otherwise count for nothing.

What `moba eval needle` hides (the secret number of a city, the pass key) is not among the facts. It shares with some of
them that the value is a number of five digits and that the answer repeats the fact's sentence.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moba.config import require_int
from moba.files import read_json
from moba_lab.data.build import Tokens, Unit
from moba_lab.data.shards import Shards, open_shards

# Of a passage that is asked for: tokens that are quoted in the question, and that the answer goes on with.
QUOTED, CONTINUED = 24, 48
# At most one fact in so many tokens of a document, and in so many of a tail that holds its question and answer.
TOKENS_PER_FACT, TOKENS_PER_ANSWER = 256, 80

# Parts of sentences. `facts`: a fact, its question and its answer, where {thing} is what is asked about, {value} what
# is told of it; `before`: what may precede a question.
PARTS: dict[str, Any] = read_json(Path(__file__).with_suffix(".json"))
# Stands for a text that is filled in later: a character of private use, which no text has.
_MARK = "\ue000"


class Fact(NamedTuple):
    """A sentence to hide, and the question and the answer it serves."""

    sentence: str
    question: str
    answer: str


class Asked(NamedTuple):
    """A question and its answer; `is_whole`: it ends where it should, so that its end is learned, too."""

    question: str
    answer: str
    is_whole: bool


class Conversation(NamedTuple):
    """Tokens around the text: what precedes it; what follows it and each answer; the answers, and which are whole."""

    opening: np.ndarray
    between: list[np.ndarray]
    answers: list[np.ndarray]
    is_whole: list[bool]


@dataclass(frozen=True)
class DialoguePlan:
    """What is made.

    Attributes:
        lengths: of documents, in tokens with the end of text; each gets the same share of the tokens, and one that is
            named twice gets two.
        tokens: of all documents together; each length has at least one.
        held_out: share of each length's documents to hold out, at least one if there are several.
        facts: in a document, at most; how many is drawn, fewer more often.
        learned_text: tokens of the text that are learned as text, so that the language is kept.
        tail: all that is learned lies in the last so many tokens of a document; None: the learned text anywhere.
        seed: of everything that is drawn.

    Raises:
        ValueError: naming the argument, what it was, and what is valid.
    """

    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 32768)
    tokens: int = 6_000_000
    held_out: float = 0.01
    facts: int = 24
    learned_text: int = 128
    tail: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ValueError("lengths must name at least one length, got none")
        for length in self.lengths:
            require_int("lengths", length, 1)
        require_int("tokens", self.tokens, 1)
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be a share, 0 <= held_out < 1, got {self.held_out}")
        require_int("facts", self.facts, 1)
        require_int("learned_text", self.learned_text, 0)
        if self.tail is not None:
            require_int("tail", self.tail, self.learned_text + 1)


def retrieval_unit(folder: Path, tokenizer: Any, plan: DialoguePlan) -> Unit:
    """Documents made of the training documents of a folder, as a unit of a build.

    Args:
        folder: that `moba data` wrote with the same tokenizer; its held-out documents are not read.
        tokenizer: of transformers. With a chat template, conversations follow it.
        plan: what to make.

    Raises:
        ValueError: if the folder does not serve.
    """
    shards = open_shards(folder, tokenizer=tokenizer)
    shards.verify()
    licences = sorted({str(source.get("licence", "not stated")) for source in shards.manifest["sources"]})
    state = [[shard["sha256"] for shard in shards.manifest["shards"]], asdict(plan)]
    about = {
        "licence": f"texts: {'; '.join(licences)}",
        "state": hashlib.sha256(json.dumps(state).encode()).hexdigest(),
        "made_of": folder.name,
    }
    return Unit("retrieval", about, lambda work: ({}, documents(shards, tokenizer, plan)))


def documents(shards: Shards, tokenizer: Any, plan: DialoguePlan) -> Iterator[Tokens]:
    """The documents of a plan, whose texts are from the documents of `shards`.

    Raises:
        ValueError: if a length is too small for a question.
    """
    maker = Maker(shards, tokenizer, plan)
    counts = {length: plan.lengths.count(length) for length in sorted(set(plan.lengths))}
    for length, share in counts.items():
        count = max(1, round(plan.tokens * share / len(plan.lengths) / length))
        # The first ones, so that of few long documents one is held out, too; but not the only one.
        num_held_out = min(math.ceil(plan.held_out * count), count - 1)
        for number in range(count):
            name = f"{length}/{number}"
            made = maker.document(length, random.Random(f"{plan.seed} {name}"))
            yield Tokens(name, *made, held_out=number < num_held_out)


class Maker:
    """Makes documents out of texts.

    Args:
        shards: the texts, of the tokenizer's tokens.
        tokenizer: of transformers.
        plan: what of a document is learned.

    Raises:
        ValueError: if the texts are empty.
    """

    def __init__(self, shards: Shards, tokenizer: Any, plan: DialoguePlan) -> None:
        self._shards, self._tokenizer, self._plan = shards, tokenizer, plan
        # Without the end of text. Documents are drawn by length, so that every token is as likely as any other.
        self._lengths = [document.length - 1 for document in shards.documents]
        if not any(self._lengths):
            raise ValueError(f"{shards.folder} holds no text to hide facts in")
        words = [tokenizer.decode([token]) for token in range(len(tokenizer))]
        self._is_end = np.asarray([word.rstrip().endswith((".", "!", "?")) for word in words])
        self._is_space = np.asarray([word[:1].isspace() for word in words])
        self._break = self._encode("\n\n")

    def document(self, length: int, generator: random.Random) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """A document of `length` tokens, the end of text included, which is left out: [length - 1].

        Returns:
            the tokens, int64, and the spans (first, one past the last) that are learned.

        Raises:
            ValueError: if the length is too small for one question.
        """
        num_quotes = min(2, length // 2048)
        of_quotes = num_quotes * 3 * (QUOTED + CONTINUED)
        tail = length if self._plan.tail is None else min(self._plan.tail, length)
        room_to_ask = tail - self._plan.learned_text - of_quotes
        most = max(1, min(self._plan.facts, length // TOKENS_PER_FACT, room_to_ask // TOKENS_PER_ANSWER))
        facts = draw_facts(round(most ** generator.random()), generator)
        sentences = [self._encode(f" {fact.sentence}") for fact in facts]
        asked = [Asked(generator.choice(PARTS["before"]) + fact.question, fact.answer, True) for fact in facts]
        room = length - 1 - _size(self._conversation(asked)) - of_quotes - sum(map(len, sentences))
        if room < 1:
            raise ValueError(f"lengths: {length} tokens are too few for questions about a text")
        text = self._hidden(self._text(room, generator), sentences, generator)
        for _ in range(num_quotes):
            more = [*asked, self._passage(text, generator)]
            if len(text) + _size(self._conversation(more)) < length:
                asked = more
        generator.shuffle(asked)
        conversation = self._conversation(asked)
        missing = length - 1 - len(text) - _size(conversation)
        whole = np.concatenate([self._text(missing, generator), text])
        # Where the learned stretch may begin: in the tail, which the conversation shares.
        earliest = 0 if self._plan.tail is None else max(0, len(whole) + _size(conversation) - tail)
        latest = max(0, len(whole) - self._plan.learned_text)
        first = generator.randint(min(earliest, latest), latest)
        return _assemble(whole, conversation, (first, min(first + self._plan.learned_text, len(whole))))

    def _text(self, count: int, generator: random.Random) -> np.ndarray:
        """`count` tokens, of one document from any place on if it is long enough, else of several."""
        parts = [np.empty(0, dtype=np.int64)]
        missing = count
        while missing > 0:
            number = generator.choices(range(len(self._lengths)), weights=self._lengths)[0]
            start = generator.randrange(max(1, self._lengths[number] - missing + 1))
            part = self._shards[number][start : min(start + missing, self._lengths[number])].astype(np.int64)
            parts += [part, self._break]
            missing -= len(part) + len(self._break)
        return np.concatenate(parts)[:count]

    def _hidden(self, text: np.ndarray, sentences: list[np.ndarray], generator: random.Random) -> np.ndarray:
        """The text with the sentences in it, each behind the end of a sentence if there is one near."""
        places = sorted(self._sentence_end(text, generator.randrange(len(text) + 1)) for _ in sentences)
        parts, position = [], 0
        for place, sentence in zip(places, sentences, strict=True):
            parts += [text[position:place], sentence]
            position = place
        return np.concatenate([*parts, text[position:]])

    def _sentence_end(self, text: np.ndarray, place: int) -> int:
        """The last place up to 64 tokens before `place` where a sentence has ended; `place` itself if there is none."""
        first = max(0, place - 64)
        near = text[first : place + 1]
        ends = np.flatnonzero(self._is_end[near[:-1]] & self._is_space[near[1:]])
        return first + int(ends[-1]) + 1 if len(ends) else place

    def _passage(self, text: np.ndarray, generator: random.Random) -> Asked:
        """A question that quotes a passage of the text, and what follows there."""
        start = generator.randrange(max(1, len(text) - QUOTED - CONTINUED))
        quoted, answer = (
            self._tokenizer.decode(text[first : first + count].tolist()).replace(_MARK, "")
            for first, count in ((start, QUOTED), (start + QUOTED, CONTINUED))
        )
        return Asked(f"How does the text above go on after this passage?\n\n{quoted}", answer, False)

    def _conversation(self, asked: Sequence[Asked]) -> Conversation:
        """The questions and answers, around a text that is to come."""
        if self._tokenizer.chat_template:
            turns = []
            for i, (question, *_) in enumerate(asked):
                turns.append({"role": "user", "content": question if i else f"{_MARK}\n\n{question}"})
                turns.append({"role": "assistant", "content": _MARK})
            frame = self._tokenizer.apply_chat_template(turns, tokenize=False)
        else:
            frame = _MARK + "".join(f"\n\n{question}\n{_MARK}" for question, *_ in asked) + "\n\n"
        opening, *between = (self._encode(part, special=True) for part in frame.split(_MARK))
        answers = [self._encode(answer) for _, answer, _ in asked]
        return Conversation(opening, between, answers, [is_whole for *_, is_whole in asked])

    def _encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """Token ids [n]; `special`: special tokens written out are these tokens."""
        ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=not special, verbose=False)
        return np.asarray(ids["input_ids"], dtype=np.int64)


def draw_facts(count: int, generator: random.Random) -> list[Fact]:
    """Facts about different things, of different kinds and values."""
    things: dict[str, None] = {}
    while len(things) < count:
        things[_draw_thing(generator)] = None
    facts = []
    for thing in things:
        names = {"thing": thing, "Thing": thing[0].upper() + thing[1:], "value": _draw_value(generator)}
        facts.append(Fact(*(part.format(**names) for part in generator.choice(PARTS["facts"]))))
    return facts


def _draw_thing(generator: random.Random) -> str:
    owner = f"{generator.choice(PARTS['people'])}'s" if generator.random() < 0.5 else "the"
    return f"{owner} {generator.choice(PARTS['colours'])} {generator.choice(PARTS['nouns'])}"


def _draw_value(generator: random.Random) -> str:
    """A number of 4 to 7 digits, most often of 5; a code of letters and digits; or two words."""
    kind = generator.random()
    if kind < 0.7:
        digits = generator.choice((4, 5, 5, 5, 6, 7))
        return str(generator.randrange(10 ** (digits - 1), 10**digits))
    if kind < 0.85:
        letters = "".join(generator.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=3))
        return f"{letters}-{generator.randrange(100, 10000)}"
    return "-".join(generator.sample(PARTS["words"], 2))


def _size(conversation: Conversation) -> int:
    """Tokens without the text."""
    return len(conversation.opening) + sum(map(len, (*conversation.between, *conversation.answers)))


def _assemble(
    text: np.ndarray, conversation: Conversation, stretch: tuple[int, int]
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The whole document and what of it is learned: a stretch of the text, and each answer, with the token that ends it
    if it is whole.
    """
    parts = [conversation.opening, text, conversation.between[0]]
    first, stop = (len(conversation.opening) + place for place in stretch)
    spans = [(first, stop)] if first < stop else []
    position = sum(map(len, parts))
    turns = zip(conversation.answers, conversation.between[1:], conversation.is_whole, strict=True)
    for answer, behind, is_whole in turns:
        spans.append((position, position + len(answer) + is_whole))
        parts += [answer, behind]
        position += len(answer) + len(behind)
    return np.concatenate(parts), spans
