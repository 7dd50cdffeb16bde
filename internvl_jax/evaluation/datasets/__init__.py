"""Benchmark data sets: items, readers of the official files, and synthetic data sets for tests."""
