"""What happens on the host before and after the model: images, conversations, tokens. Never imports jax."""
