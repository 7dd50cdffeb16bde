"""Tokens in, tokens out: the jitted steps, sampling and beam search, and the generator around them."""
