"""Pictures of routings and of evaluations."""
