"""Training models with MoBA: which attention each layer uses at each step, and a recipe over transformers' Trainer."""

from moba.train.schedule import (
    MoBASchedule,
    Schedule,
    activation,
    anneal_block_size,
    anneal_topk,
    apply_schedule,
    hybrid,
    throughout,
)

__all__ = [
    "MoBASchedule",
    "Schedule",
    "activation",
    "anneal_block_size",
    "anneal_topk",
    "apply_schedule",
    "hybrid",
    "throughout",
]
