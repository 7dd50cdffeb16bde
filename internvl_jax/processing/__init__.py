"""What happens on the host before and after the model: pictures, conversations, tokens. Never imports jax."""
