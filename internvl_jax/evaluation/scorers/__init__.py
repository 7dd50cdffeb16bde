"""The benchmarks' scorers, one file per family."""
