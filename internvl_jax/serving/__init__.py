"""Serving: an engine that answers many requests at once, by continuous batching."""
