"""What type checkers are told of the public functions' options is what these take."""

from __future__ import annotations

import inspect

import pytest

import moba
from moba import options

RESULTS = {"return_lse", "return_routing"}


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (moba.moba_attention, options.Options),
        (moba.moba_attention_varlen, options.PackedOptions),
        (moba.moba_attention_paged, options.PagedOptions),
    ],
)
def test_options_are_those_that_the_function_takes(function, told):
    parameters = inspect.signature(function).parameters.values()
    taken = {x.name: x.annotation for x in parameters if x.kind == x.KEYWORD_ONLY and x.name not in RESULTS}
    annotations = {name: kind.__forward_arg__ for name, kind in told.__annotations__.items()}
    assert {name: kind.removeprefix("Required[").removesuffix("]") for name, kind in annotations.items()} == taken
