"""Answers as callers get them: a Reply, or a Stream of its text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

NOT_FINITE = (
    "the model's logits are not finite (NaN or Inf): its weights are damaged or diverged, or overflow in this dtype"
)


class AnswerError(ValueError):
    """The model gave no answer: its logits are not finite, or its tokens cannot be decoded."""


@dataclass(frozen=True)
class Reply:
    """The answer to one question.

    Attributes:
        text: the answer; empty if there is an error.
        tokens: generated token ids, including the end token or the tokens that complete a stop string.
        finish_reason: "stop" (end token or stop string), "length" or "error".
        history: turns so far, for the `history` of the next question; without this turn if there is an error.
        prompt_tokens: length of the prompt in tokens.
        timings: seconds of the whole batch: "encode", "prefill", "decode" and "total".
        error: why there is no answer, or None.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    history: list[tuple[str, str]]
    prompt_tokens: int
    timings: dict[str, float]
    error: str | None = None

    def __repr__(self) -> str:
        if self.error is not None:
            return f"Reply(error={self.error!r})"
        return f"Reply({self.text!r}, {len(self.tokens)} tokens, finish_reason={self.finish_reason!r})"

    def to_dict(self) -> dict[str, Any]:
        """The fields for JSON, with `text` under the name "answer", and "error" only if there is one."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["history"] = [list(turn) for turn in self.history]
        if self.error is None:
            del values["error"]
        return {"answer": values.pop("text"), **values}


def require_answers(replies: Sequence[Reply]) -> Sequence[Reply]:
    """Return the replies.

    Raises:
        AnswerError: one of them has an error.
    """
    for reply in replies:
        if reply.error is not None:
            raise AnswerError(reply.error)
    return replies


class Stream:
    """A streamed answer. Iterate over its pieces of text; `reply` is the whole answer afterwards."""

    def __init__(self, pieces: Iterator[str | Reply]):
        self._pieces = pieces
        self._reply: Reply | None = None

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            if isinstance(piece, Reply):
                self._reply = piece
            else:
                yield piece

    @property
    def reply(self) -> Reply:
        """The whole answer.

        Raises:
            RuntimeError: the stream has not been iterated to its end.
        """
        if self._reply is None:
            raise RuntimeError("the answer is not finished: iterate over the stream first")
        return self._reply
