"""`moba inspect`: draw which blocks the queries of a prompt choose."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moba_lab.checks import require_folder, require_packages
from moba_lab.cli import options
from moba_lab.cli.options import Attention


def inspect(
    prompt: options.PromptOption = None,
    prompt_file: options.PromptFileOption = None,
    chat: options.ChatOption = True,
    model: options.ModelOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = "auto",
    yarn: options.YarnOption = None,
    backend: options.BackendOption = options.Backend.auto,
    block_size: options.BlockSizeOption = None,
    topk: options.TopkOption = None,
    keep_first: options.KeepFirstOption = None,
    keep_recent: options.KeepRecentOption = None,
    full_layers: options.FullLayersOption = None,
    router: options.RouterOption = None,
    out: Annotated[
        Path, typer.Option(*options.OUT, metavar="DIR", help="Folder to write into.", rich_help_panel="Output")
    ] = Path("moba-inspect"),
) -> None:
    """Read a prompt with MoBA and draw, for every layer and head, which blocks each query attends to.

    Writes routing.png, routing.html (one file, opens in any browser: pick a layer and head, point at a token) and
    routing.npz (block indices and masks; see moba_lab.pictures.routings.save_routings). Example:

        moba inspect --prompt-file report.txt --block-size 256 --topk 4
    """
    choice = options.choose_config(
        model, backend, full_layers, block_size=block_size, topk=topk, keep_first=keep_first, keep_recent=keep_recent,
        router=router,
    )  # fmt: skip
    require_packages("matplotlib")
    require_folder("out", out)
    text = options.read_prompt(prompt, prompt_file)
    out.mkdir(parents=True, exist_ok=True)

    from moba.hf.record import record_routings
    from moba_lab.cli.pictures import write_pictures
    from moba_lab.cli.session import open_session, reading_progress, say
    from moba_lab.models.generation import num_keys_read, prefill

    session = open_session(model, choice, Attention.moba, dtype, device, yarn)
    ids = session.encode(text, chat=chat, max_new_tokens=0)
    with record_routings(session.model) as record, reading_progress() as progress:
        task = progress.add_task("reading", total=ids.numel())
        prefill(session.model, ids, on_progress=lambda num_read: progress.update(task, completed=num_read))
    if not record:
        raise ValueError(f"full_layers={choice.config.full_layers} leaves no layer with MoBA, so there is no routing")
    read, dense = num_keys_read(choice.config, session.num_layers, ids.numel())
    say(f"{ids.numel():,} tokens read, {read / dense:.1%} of the keys that full attention reads")
    write_pictures(out, record.joined(), session.tokenizer, ids, Path(prompt_file or "").name)
