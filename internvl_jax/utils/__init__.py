"""Files, logs, progress bars and process start-up, which every package may use."""
