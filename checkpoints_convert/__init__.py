"""Conversion from and to PyTorch checkpoints, and comparison with PyTorch. Only here is torch imported."""
