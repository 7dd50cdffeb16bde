"""One request on its way through the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from internvl_jax.inference.answer_text import AnswerDecoder, AnswerStream
from internvl_jax.inference.replies import NOT_FINITE
from internvl_jax.serving.requests import Output, Request, Timings, TokenLogprobs
from internvl_jax.serving.structured import Matcher


class Sequence:
    """A request, its prompt as far as it is read, and its answer so far.

    Args:
        request: the request.
        on_output: called with every Output.
        decoder: decodes its tokens.
        matcher: its place in the request's grammar; None without one.
    """

    def __init__(
        self,
        request: Request,
        on_output: Callable[[Output], None],
        decoder: AnswerDecoder,
        matcher: Matcher | None = None,
    ):
        self.request, self.matcher = request, matcher
        self.finish_reason: str | None = None
        self.features: np.ndarray | None = None  # [image tokens, D]
        self.read = 0  # tokens of the prompt
        self.cached_tokens = 0
        self.block_keys: list[bytes] = []
        self.tokens: list[int] = []
        self._on_output = on_output
        self._decoder = decoder
        self._stream = AnswerStream(decoder, request.generation.stop)
        self._logprobs: list[TokenLogprobs] = []
        self._sent = 0
        self._submitted = time.monotonic()
        self._started: float | None = None
        self._first: float | None = None

    @property
    def finished(self) -> bool:
        """Whether the last output has been sent."""
        return self.finish_reason is not None

    def abandon(self) -> None:
        """End without an output."""
        self.finish_reason = "cancelled"

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return self.read + len(self.tokens)

    def start(self) -> None:
        """The prompt is taken up."""
        self._started = time.monotonic()

    def is_late(self, now: float) -> bool:
        """Whether the deadline has passed."""
        return self.request.deadline is not None and now >= self.request.deadline

    def push(self, tokens: list[int], logprobs: list[TokenLogprobs], reason: str | None) -> None:
        """Add tokens of the answer and send what can be shown.

        Args:
            tokens: the next tokens.
            logprobs: theirs, if they are wanted.
            reason: why the answer ended, or None.
        """
        if self._first is None:
            self._first = time.monotonic()
        if self.matcher is not None and reason != "error" and not self.matcher.advance(tokens):
            self.finish("error", "the answer left its grammar")
            return
        self.tokens += tokens
        self._logprobs += logprobs
        if reason == "error":
            self.finish("error", NOT_FINITE)
            return
        try:
            text = self._stream.push(self.tokens, last=reason is not None)
            if self._stream.finished:
                ended = "stop" if self._stream.stopped else reason or "stop"
                _, self.tokens, ended = self._decoder.finish(self.tokens, ended, self.request.generation.stop)
                self._send(text, ended)
            elif text or tokens:
                self._send(text, None)
        except ValueError as problem:
            self.finish("error", f"the answer's tokens cannot be decoded ({problem})")

    def finish(self, reason: str, error: str | None = None) -> None:
        """End the answer where it is."""
        self._send("", reason, error)

    def _send(self, text: str, reason: str | None, error: str | None = None) -> None:
        tokens = tuple(self.tokens[self._sent :])
        logprobs = None
        if self.request.logprobs is not None:
            logprobs = tuple(self._logprobs[self._sent : len(self.tokens)])
        self._sent = len(self.tokens)
        output = Output(text, tokens, logprobs, reason, error)
        if reason is not None:
            self.finish_reason = reason
            output = replace(output, timings=self._timings())
        self._on_output(output)

    def _timings(self) -> Timings:
        now = time.monotonic()
        started = now if self._started is None else self._started
        first = now if self._first is None else self._first
        return Timings(
            queued=started - self._submitted,
            prefill=first - started,
            decode=now - first,
            prompt_tokens=len(self.request.input_ids),
            cached_tokens=self.cached_tokens,
            generated_tokens=len(self.tokens),
        )
