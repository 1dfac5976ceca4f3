"""What we do with MoBA: training, data, evaluations, benchmarks, pictures, and the `moba` command."""
