"""A recipe: everything that decides a training, read from a TOML file."""

from __future__ import annotations

import json
import sys
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from moba.hf.schedule import Schedule
from moba_lab.train.recipe_parts import PARTS, AttentionPart, DataPart, IndexerPart, LoraPart, ModelPart, TrainingPart

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What a file's value must be, by its field's annotation, where the parts below do not say more.
_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "str": (str, "text"),
    "str | None": (str, "text"),
    "bool": (bool, "true or false"),
    "dict[str, Any]": (dict, "a table"),
    "tuple[str, ...]": (list, "a list of names"),
    "str | tuple[str, ...]": ((str, list), "a name or a list of names"),
}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training; `read_recipe` makes it from a file."""

    out: str
    data: DataPart
    model: ModelPart
    training: TrainingPart
    attention: AttentionPart = field(default_factory=AttentionPart)
    lora: LoraPart | None = None
    indexer: IndexerPart | None = None

    def __post_init__(self) -> None:
        if self.lora is not None and self.model.base is None:
            raise ValueError("lora adapts a model that exists: give model.base")
        if self.lora is not None and self.model.key_convolution is not None:
            raise ValueError("model.key_convolution adds weights that adapters do not train: use it without [lora]")
        if self.data.context % self.training.context_parallel:
            raise ValueError(
                f"training.context_parallel must divide data.context = {self.data.context}, "
                f"got {self.training.context_parallel}"
            )
        self._check_indexer()
        tail = self.training.tail
        if tail is not None and not (self.data.whole_rows and tail < self.data.context):
            raise ValueError(
                "training.tail is the end of rows that one document fills: set data.whole_rows, and a tail below "
                f"data.context = {self.data.context}, got {tail}"
            )

    def _check_indexer(self) -> None:
        router, training = self.attention.router, self.training
        if (self.indexer is not None) != (router == "indexer"):
            raise ValueError(f'[indexer] belongs to attention.router = "indexer", got {router!r}: give both or neither')
        if self.indexer is None:
            return
        if self.lora is not None or training.tail is not None or training.compile or training.context_parallel > 1:
            raise ValueError(
                "indexer: its loss needs whole rows and all weights: use it without [lora] and training.tail, compile "
                "and context_parallel"
            )
        if self.indexer.warmup_steps >= self.num_steps:
            raise ValueError(
                f"indexer.warmup_steps must be below the training's {self.num_steps} steps, "
                f"got {self.indexer.warmup_steps}"
            )

    @property
    def schedule(self) -> Schedule:
        """Which attention holds when."""
        schedule = self.attention.make_schedule(num_steps=self.num_steps, context=self.data.context)
        if self.indexer is None or self.indexer.warmup_steps == 0:
            return schedule
        end = self.indexer.warmup_steps / self.num_steps
        later = [stage for stage in schedule.stages if stage[0] > end]
        first = [config for start, config in schedule.stages if start <= end][-1]
        return Schedule(((0.0, None), (end, first), *later))

    @property
    def num_steps(self) -> int:
        """Steps of the optimizer."""
        return -(-self.training.tokens // (self.training.rows_per_step * self.data.context))

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it; `from_dict` restores an equal recipe."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """A recipe from the tables of a file.

        Raises:
            ValueError: naming the key that is unknown, missing, or of an invalid value.
        """
        parts: dict[str, Any] = dict(values)
        for name, kind in PARTS.items():
            if parts.get(name) is None:
                parts.pop(name, None)
            elif not isinstance(parts[name], dict):
                raise ValueError(f"[{name}] must be a table, got {parts[name]!r}")
            else:
                parts[name] = _make(kind, parts[name], f"{name}.")
        return _make(cls, parts, "")


def read_recipe(path: str | Path, changes: list[str] | tuple[str, ...] = ()) -> Recipe:
    """A recipe from a TOML file.

    Args:
        path: of the file.
        changes: "training.tokens=1000000": values that replace or extend the file's, each as in TOML; words need no
            quotes.

    Raises:
        ValueError: naming what is wrong with the file or a change.
        OSError: if it cannot be read.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise ValueError(f"a recipe is a .toml file, got the folder {path}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"a recipe is a .toml file, but {path} is not UTF-8 text (byte {error.start})") from None
    values = _parse(text, str(path))
    for change in changes:
        key, separator, text = change.partition("=")
        if not separator:
            raise ValueError(f"a change must read key=value, such as training.tokens=1000000, got {change!r}")
        table = values
        *tables, last = key.strip().split(".")
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise ValueError(f"{change!r}: {name} is no table")
        table[last] = _parse_value(text.strip())
    return Recipe.from_dict(values)


def same_run(recipe: Recipe, saved: dict[str, Any]) -> None:
    """Check that a run which `saved` (a recipe's dict) began can be gone on with by `recipe`.

    What decides the weights must be equal; where and how often results are written, and how a step is computed, may
    differ.

    Raises:
        ValueError: naming what differs.
    """
    free = {
        "rows_at_once", "checkpoint_activations", "compile", "context_parallel", "transport", "log_every",
        "evaluate_every", "save_every", "keep",
    }  # fmt: skip
    now, then = recipe.to_dict(), Recipe.from_dict(saved).to_dict()
    differences = []
    for part in PARTS:
        new, old = now[part] or {}, then[part] or {}
        for key in sorted({*new, *old} - free - {"held_out_rows", "folder", "made_by"}):
            if new.get(key) != old.get(key):
                differences.append(f"{part}.{key} was {old.get(key)!r} and is {new.get(key)!r}")
    if differences:
        raise ValueError(f"{recipe.out} holds a run of another recipe: {'; '.join(differences)}; choose another out")


def _make(kind: type, values: dict[str, Any], prefix: str) -> Any:
    known = [f.name for f in fields(kind)]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{prefix}{unknown[0]} is not a setting of a recipe; valid: {', '.join(known)}")
    needed = (f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING)
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"{prefix}{missing[0]} is missing: a recipe must say it")
    for f in fields(kind):
        wanted, what = _TYPES.get(str(f.type), (object, ""))
        value = values.get(f.name)
        if f.name in values and not isinstance(value, wanted) and not (value is None and "None" in str(f.type)):
            raise ValueError(f"{prefix}{f.name} must be {what}, got {value!r}")
    return kind(**values)


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{source} is not TOML: {error}") from None


def _parse_value(text: str) -> Any:
    try:
        return _parse(f"value = {text}", text)["value"]
    except ValueError:
        return text
