"""`moba bench`: measurements a sceptic can repeat, each after a check of correctness; a file for each command."""
