"""Benchmarks: their files, prompts and scorers, runs over them, and the results table."""
