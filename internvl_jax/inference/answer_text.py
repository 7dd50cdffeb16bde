"""From generated tokens to the text of an answer: decoding, stop strings, streaming."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from internvl_jax.processing.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class AnswerDecoder:
    """Decodes the answers of one model.

    Attributes:
        tokenizer: the model's tokenizer.
        known: [V] bool, tokens that the tokenizer has. The only other token that may be generated is an end token.
    """

    tokenizer: Tokenizer
    known: np.ndarray

    def known_tokens(self, tokens: Sequence[int]) -> list[int]:
        """The tokens without an end token that the tokenizer does not have."""
        return [token for token in tokens if self.known[token]]

    def text(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of an answer, which may go on beyond a stop string.

        Raises:
            TokenizerError: the tokens cannot be decoded.
        """
        return self.tokenizer.decode(self.known_tokens(tokens), skip_special_tokens=skip_special_tokens)

    def finish(self, tokens: list[int], reason: str, stops: Sequence[str]) -> tuple[str, list[int], str]:
        """End an answer at its first stop string.

        Args:
            tokens: generated tokens. The host searches for stop strings only now and then, so there may be more tokens
                than belong to the answer.
            reason: why generation ended.
            stops: stop strings.

        Returns:
            The text, the tokens up to the end of the stop string, and the finish reason.

        Raises:
            TokenizerError: the tokens cannot be decoded.
        """
        text = self.text(tokens)
        cut = cut_at_stop(text, stops)
        if cut is None:
            return text.strip(), tokens, reason
        complete = bisect_left(
            range(len(tokens)),
            True,
            key=lambda count: cut_at_stop(self.text(tokens[:count]), stops) is not None,
        )
        return cut.strip(), tokens[:complete], "stop"


class AnswerStream:
    """The text of one answer while it is generated.

    Attributes:
        finished: whether the answer is complete.
        stopped: whether it ended at a stop string.
    """

    def __init__(self, decoder: AnswerDecoder, stops: Sequence[str]):
        self.finished = self.stopped = False
        self._decoder, self._stops = decoder, stops
        self._stream = StreamDecoder(decoder.tokenizer)
        self._num_tokens = 0
        self._text = self._shown = ""

    def push(self, tokens: Sequence[int], *, last: bool) -> str:
        """The text that can be shown after what was shown before.

        Args:
            tokens: all tokens so far.
            last: whether generation has ended.
        """
        self._text += self._stream.push(self._decoder.known_tokens(tokens[self._num_tokens :]))
        self._num_tokens = len(tokens)
        if last:
            self._text += self._stream.flush()
        cut = cut_at_stop(self._text, self._stops)
        if cut is not None:
            self._text, self.stopped = cut, True
        self.finished = last or self.stopped
        # Blanks around the answer are not part of it, and a possible beginning of a stop string must not be shown.
        visible = self._text.strip()
        if not self.finished:
            visible = _without_partial_stop(visible, self._stops).rstrip()
        piece = visible[len(self._shown) :]
        self._shown += piece
        return piece


def cut_at_stop(text: str, stops: Sequence[str]) -> str | None:
    """The text before the first stop string; None if there is none."""
    found = [text.find(stop) for stop in stops if stop in text]
    return text[: min(found)] if found else None


def _without_partial_stop(text: str, stops: Sequence[str]) -> str:
    """The text without an ending that may be the beginning of a stop string."""
    longest = max(
        (n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])), default=0
    )
    return text[: len(text) - longest]
