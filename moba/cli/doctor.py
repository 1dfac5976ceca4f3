"""`moba doctor`: what this machine has, and whether it computes MoBA correctly."""

from __future__ import annotations


def doctor() -> None:
    """Versions, devices, backends."""
