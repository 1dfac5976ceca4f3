"""transformers' own server with MoBA: `transformers serve` whose models attend with it.

python -m moba.hf.serve MODEL --continuous-batching --moba '{"block_size": 512, "topk": 8, "decode": "moba"}'

Every other option is one of `transformers serve`. Without --moba the config that the model carries is taken. What the
server itself needs comes with `pip install 'transformers[serving]'`.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import wraps
from typing import Any

from moba.config import MoBAConfig
from moba.hf.paged import enable_paged


def main(arguments: list[str] | None = None) -> None:
    """Start the server.

    Raises:
        ValueError: if the options or the model cannot be served with MoBA.
    """
    parser = argparse.ArgumentParser(
        prog="python -m moba.hf.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--moba", metavar="JSON", help="a MoBAConfig, as its to_dict makes it")
    ours, theirs = parser.parse_known_args(arguments)
    if "--continuous-batching" not in theirs:
        raise ValueError(
            "--continuous-batching must be given: without it transformers would serve the model without MoBA"
        )
    serve_with(None if ours.moba is None else _parse(ours.moba))
    from transformers.cli import transformers as command

    sys.argv = ["transformers", "serve", *theirs]
    command.main()


def serve_with(config: MoBAConfig | None) -> None:
    """Have each model that `transformers serve` loads in this process attend with MoBA, as `enable_paged` does.

    Args:
        config: None takes the one that each model carries.
    """
    from transformers.cli.serving.model_manager import ModelManager

    load = ModelManager.load_model_and_processor

    @wraps(load)
    def load_model_and_processor(self: Any, *args: Any, **kwargs: Any) -> Any:
        model, processor = load(self, *args, **kwargs)
        if "init_continuous_batching" not in vars(model):
            enable_paged(model, config)
        return model, processor

    ModelManager.load_model_and_processor = load_model_and_processor  # type: ignore[method-assign]


def _parse(text: str) -> MoBAConfig:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--moba must be a JSON object, got {text!r}: {error}") from None
    return MoBAConfig.from_dict(values)


if __name__ == "__main__":
    main()
