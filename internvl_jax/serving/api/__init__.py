"""The HTTP server: OpenAI's API and a page, in front of the engine."""
