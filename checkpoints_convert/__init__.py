"""Between PyTorch checkpoints and this project's: read, map, convert, export, compare. Only this room knows torch."""
