"""Between PyTorch checkpoints and this project's: read, map, convert, export, compare. The one room that knows torch."""
