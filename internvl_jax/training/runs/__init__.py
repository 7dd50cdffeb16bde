"""A run of `internvl-jax train`: prepared, trained, reported, its model written."""
