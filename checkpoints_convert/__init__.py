"""Conversion between PyTorch checkpoints and this project's, and comparison with PyTorch. The only package with torch."""
