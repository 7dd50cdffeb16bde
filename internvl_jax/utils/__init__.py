"""Files, logs and progress bars, which every package may use."""
