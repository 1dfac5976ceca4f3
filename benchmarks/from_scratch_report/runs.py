"""Results of `measure` beside each other: which belong together, what is kept of them, how they differ.

A `Result` is what `from_scratch.measure_run` returns, or `from_scratch.read_stopped` of a run that did not end. It may
have a "note", which is told with the run; a rate of None is not told. Runs are told apart by their names, one of which
is "dense".
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Result = dict[str, Any]

# Name of an attention that routes nowhere.
FULL = "full"
# What of the attention mass is looked at, in the words of tables and pictures.
ROUTING_PARTS = {
    "covered": "in the chosen blocks",
    "best": "in the best possible choice",
    "recent": "in the first and the nearest",
}


class Family:
    """Runs that differ in their attention and seed only.

    Attributes:
        runs: seed -> name -> result of a run that ended.
        stopped: seed -> name -> result of a run that did not.

    Raises:
        ValueError: as `write_report`.
    """

    def __init__(self, results: Sequence[Result]) -> None:
        seeds = dict.fromkeys(result["recipe"]["training"]["seed"] for result in results)
        self.runs: dict[int, dict[str, Result]] = {seed: {} for seed in seeds}
        self.stopped: dict[int, dict[str, Result]] = {seed: {} for seed in seeds}
        for result in results:
            seed, name = result["recipe"]["training"]["seed"], result["name"]
            if name in self.runs[seed] or name in self.stopped[seed]:
                raise ValueError(f"two results are of the run {name!r}: give each once")
            (self.runs if "final" in result else self.stopped)[seed][name] = result
        for seed in seeds:
            if "dense" not in self.runs[seed]:
                others = ", ".join([*self.runs[seed], *self.stopped[seed]])
                raise ValueError(f"there is no dense run of seed {seed} that ended beside {others}")

    def of_first_seed(self) -> dict[str, Result]:
        """Name -> run, the dense one first."""
        runs = self.runs[min(self.runs)]
        return {"dense": runs["dense"], **runs}

    def stopped_of_first_seed(self) -> dict[str, Result]:
        """Name -> run that did not end."""
        return self.stopped[min(self.runs)]

    def size(self) -> int:
        """Parameters times tokens of the dense run."""
        dense = self.of_first_seed()["dense"]
        return int(dense["parameters"] * dense["checkpoints"][-1]["tokens"])


def families(results: Sequence[Result]) -> list[Family]:
    """Runs that have all but attention and seed in common, the largest trainings first."""
    parts: dict[str, list[Result]] = {}
    for result in results:
        recipe = result["recipe"]
        shape = {key: value for key, value in recipe["model"].items() if key != "key_convolution"}
        decides = ("tokens", "rows_per_step", "learning_rate", "learning_schedule", "warmup", "weight_decay", "beta2")
        training = {key: recipe["training"][key] for key in decides}
        parts.setdefault(json.dumps([shape, training, recipe["data"]["context"], result["data"]]), []).append(result)
    return sorted((Family(part) for part in parts.values()), key=lambda family: -family.size())


def compact(result: Result, is_large: bool) -> Result:
    """What tables and pictures need of the result of a run that ended; only the losses where the run is small.

    Of attentions that are not the run's own, the mean loss of each source is kept as that of one row.
    """
    final = {
        name: read
        if name == result["own"]
        else {
            "positions": {
                source: {"loss": rounded([statistics.mean(rows["loss"])])} for source, rows in read["positions"].items()
            }
        }
        for name, read in result["final"].items()
    }
    if not is_large:
        own = final[result["own"]]["positions"]
        final[result["own"]] = {
            "positions": {s: {key: rows[key] for key in ("loss", "last")} for s, rows in own.items()}
        }
    history = [
        {
            **point,
            "sources": {source: {"loss": rows["loss"]} for source, rows in point["sources"].items()},
            "routing": {name: _rounded_routing(values) for name, values in point["routing"].items()},
        }
        for point in result["checkpoints"]
    ]
    return {**result, "final": final, "checkpoints": history if is_large else history[-1:]}


def _rounded_routing(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: {layer: _rounded_routing(v) for layer, v in value.items()} if key == "layers" else round(value, 5)
        for key, value in values.items()
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean over rows and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def difference(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The mean of the rows' differences and its standard error."""
    return mean_and_error([a - b for a, b in zip(values, others, strict=True)])


def training_gaps(run: Result, dense: Result) -> list[tuple[int, int, float]]:
    """Step, tokens read, and the training loss minus that of the dense run, at the steps that both logged.

    All runs read the same rows at the same step.
    """
    theirs = {step: loss for step, _, loss, _ in dense["log"]["train"]}
    return [(step, tokens, loss - theirs[step]) for step, tokens, loss, _ in run["log"]["train"] if step in theirs]


def own_positions(result: Result) -> dict[str, Any]:
    """Source -> each row's losses at the end of the training, with the attention that the training ended with."""
    positions: dict[str, Any] = result["final"][result["own"]]["positions"]
    return positions


def routing_curves(runs: Mapping[str, Result]) -> dict[str, dict[int, dict[str, Any]]]:
    """Run and setting -> tokens -> covered, best, recent, and these of each layer."""
    curves: dict[str, dict[int, dict[str, Any]]] = {}
    for name, run in runs.items():
        for point in run["checkpoints"]:
            for setting, values in point["routing"].items():
                title = name if setting in name else f"{name}, {setting} would choose"
                curves.setdefault(title, {})[point["tokens"]] = values
    return curves


def rounded(values: Iterable[Any]) -> list[float]:
    """To the digits that a result keeps."""
    return [round(float(value), 5) for value in values]
