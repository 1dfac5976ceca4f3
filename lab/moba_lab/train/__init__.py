"""Training models with MoBA: a recipe over transformers' Trainer. Schedules of attention are in `moba.hf.schedule`."""
