"""The internvl-jax command line, one file per command."""
