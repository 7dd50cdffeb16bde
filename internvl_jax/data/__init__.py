"""Training data: annotation files become samples, samples become packed batches. Host only."""
