"""Sizes of an engine, and the counters that it keeps."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class EngineSettings:
    """Sizes of an engine.

    Attributes:
        rows: answers that run at once.
        slots: tokens of prompt and answer that a row has room for, a multiple of `chunk`.
        chunk: tokens of a prompt that are read between two dispatches of decoding.
        steps: decode steps per dispatch.
        images_per_call: images that are encoded together.
        max_waiting: requests that may wait; more are refused.
        image_cache_bytes: image features that are kept, on the host.
        prefix_cache_bytes: keys and values of prompts that are kept, on the device.

    Raises:
        ValueError: a size cannot be used.
    """

    rows: int = 8
    slots: int = 2048
    chunk: int = 256
    steps: int = 8
    images_per_call: int = 8
    max_waiting: int = 256
    image_cache_bytes: int = 1 << 30
    prefix_cache_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for one in fields(self):
            least = 0 if one.name.endswith("_bytes") else 1
            if getattr(self, one.name) < least:
                raise ValueError(f"{one.name} must be at least {least}, not {getattr(self, one.name)}")
        if self.slots % self.chunk:
            raise ValueError(f"slots ({self.slots}) must be a multiple of chunk ({self.chunk})")

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Sizes of the compiled chunks, ascending; the last chunk of a prompt takes the smallest that holds it."""
        return tuple(sorted({max(self.chunk // 4, 1), max(self.chunk // 2, 1), self.chunk}))


@dataclass
class EngineStats:
    """Counters since the start, and gauges.

    Attributes:
        running: requests with a row.
        waiting: requests without one.
        cache_usage: used part of the KV cache, 0 to 1.
        prompt_tokens: of all prompts that were read.
        generated_tokens: of all answers.
        finished: requests by finish reason.
        image_queries, image_hits: of the cache of image features, in images.
        prefix_queries, prefix_hits: of the cache of prompt prefixes, in tokens.
    """

    running: int = 0
    waiting: int = 0
    cache_usage: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    image_queries: int = 0
    image_hits: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
