"""Images, conversations and tokens, on the host before and after the model. Never imports jax."""
