"""Measuring models: each evaluation takes a model and returns records, plain dicts that a JSON file can hold."""
