"""What goes into the engine and what comes out: requests, outputs, and the errors of submitting."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from internvl_jax.inference.generation.sampling import GenerationConfig
from internvl_jax.serving.structured import Grammar

TOP_LOGPROBS = 20  # the most alternatives per token that a request may ask for, as in OpenAI's API


class EngineError(RuntimeError):
    """The engine takes no request."""


class QueueFull(EngineError):
    """As many requests are waiting as may wait."""

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} requests are waiting already: try again later")
        self.retry_after = retry_after  # seconds


class EngineStopped(EngineError):
    """The engine is shutting down."""


@dataclass(frozen=True)
class PromptImage:
    """A preprocessed image of a prompt.

    Attributes:
        pixel_values: [3,H,W] float32, normalized.
        key: digest of everything that its features depend on; equal keys share features.
    """

    pixel_values: np.ndarray
    key: bytes


@dataclass(frozen=True)
class Request:
    """A prompt, and how to answer it.

    Attributes:
        request_id: unique among the requests that the engine holds.
        input_ids: tokens of the prompt, with image tokens in place.
        images: its images in prompt order.
        generation: generation settings, without beams.
        logprobs: how many alternatives per token come with log-probabilities; None: no log-probabilities.
        grammar: what the answer must look like; None: anything.
        salt: requests with different salts share nothing in the caches.
        deadline: time.monotonic() at which the answer ends; None: none.
    """

    request_id: str
    input_ids: tuple[int, ...]
    images: tuple[PromptImage, ...] = ()
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    logprobs: int | None = None
    grammar: Grammar | None = None
    salt: str = ""
    deadline: float | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one token, of the model's own distribution (before penalties and temperature).

    Attributes:
        token: the token.
        logprob: its log-probability.
        top: the most probable tokens and their log-probabilities, in falling order.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Timings:
    """Seconds of a request, and its tokens.

    Attributes:
        queued: from submission until its prompt was started.
        prefill: from then until the first token.
        decode: from then until the end.
        prompt_tokens: tokens of the prompt.
        cached_tokens: of these, tokens whose keys and values came from the prefix cache.
        generated_tokens: tokens of the answer.
    """

    queued: float
    prefill: float
    decode: float
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


@dataclass(frozen=True)
class Output:
    """The next part of an answer.

    Attributes:
        text: text after that of earlier outputs.
        tokens: tokens after those of earlier outputs; more than the text shows while a stop string may be beginning.
        logprobs: of these tokens, if the request asked for them.
        finish_reason: None while the answer goes on, then "stop" (end token or stop string), "length", "cancelled",
            "deadline" or "error".
        error: what went wrong, with the reason "error".
        timings: with the last output.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: str | None = None
    error: str | None = None
    timings: Timings | None = None
