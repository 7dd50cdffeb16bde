"""The model as pure functions on parameters: InternViT, pixel unshuffle, MLP projector, LLaMA, and the chat model."""
