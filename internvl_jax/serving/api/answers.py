"""From the engine's outputs to the objects of OpenAI's API."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from internvl_jax.processing.tokenizer import Tokenizer, TokenizerError
from internvl_jax.processing.tokenizer_types import REPLACEMENT
from internvl_jax.serving.requests import Output, TokenLogprobs


@dataclass
class Answer:
    """One answer so far."""

    text: str = ""
    tokens: int = 0
    cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, output: Output) -> None:
        """Add an output."""
        self.text += output.text
        self.tokens += len(output.tokens)
        self.logprobs += output.logprobs or ()
        self.finish_reason = output.finish_reason
        if output.timings is not None:
            self.cached_tokens = output.timings.cached_tokens


def usage(prompt_tokens: int, answers: Sequence[Answer]) -> dict[str, Any]:
    """The usage object; prompts of several choices count once."""
    completion = sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": max((answer.cached_tokens for answer in answers), default=0)},
    }


class TokenTexts:
    """The texts of single tokens, as they stand within an answer.

    Args:
        tokenizer: the model's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # Decoding drops a blank in front of the first token, so each is decoded behind another.
        self._anchor = tokenizer.encode(":", add_bos=False)[-1]
        self._anchor_text = tokenizer.decode([self._anchor], skip_special_tokens=False)

    def __call__(self, token: int) -> str:
        """The text of a token; "token_id:N" for a row of the vocabulary without a token."""
        try:
            if not self._tokenizer.decode([self._anchor, token])[len(self._anchor_text) :]:
                return self._tokenizer.decode([token], skip_special_tokens=False)
            return self._tokenizer.decode([self._anchor, token])[len(self._anchor_text) :]
        except (TokenizerError, OverflowError):
            return f"token_id:{token}"


def _entry(texts: TokenTexts, token: int, logprob: float) -> dict[str, Any]:
    text = texts(token)
    # Part of a character has no text of its own.
    return {"token": text, "logprob": logprob, "bytes": None if REPLACEMENT in text else list(text.encode())}


def chat_logprobs(texts: TokenTexts, logprobs: Sequence[TokenLogprobs] | None) -> dict[str, Any] | None:
    """Log-probabilities as chat completions give them; None where they were not asked for."""
    if logprobs is None:
        return None
    content = [
        {
            **_entry(texts, one.token, one.logprob),
            "top_logprobs": [_entry(texts, token, value) for token, value in one.top],
        }
        for one in logprobs
    ]
    return {"content": content, "refusal": None}


def text_logprobs(texts: TokenTexts, logprobs: Sequence[TokenLogprobs] | None, offset: int) -> dict[str, Any] | None:
    """Log-probabilities as completions give them; None where they were not asked for.

    Args:
        texts: the texts of tokens.
        logprobs: of consecutive tokens.
        offset: characters of the answer before the first of them.
    """
    if logprobs is None:
        return None
    names = [texts(one.token) for one in logprobs]
    offsets = [offset + sum(map(len, names[:at])) for at in range(len(names))]
    return {
        "tokens": names,
        "token_logprobs": [one.logprob for one in logprobs],
        "top_logprobs": [{texts(token): value for token, value in one.top} for one in logprobs],
        "text_offset": offsets,
    }


@dataclass(frozen=True)
class Head:
    """What all objects of one response begin with.

    Attributes:
        id: the request's id.
        model: the model's name.
        chat: whether it is a chat completion.
        created: seconds since 1970.
    """

    id: str
    model: str
    chat: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """A response that is not streamed."""
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """A part of a streamed response."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, **({} if usage is None else {"usage": usage})}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def choice(self, number: int, answer: Answer, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """A whole answer."""
        said = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
        content = said if self.chat else {"text": answer.text}
        return {"index": number, **content, "logprobs": logprobs, "finish_reason": answer.finish_reason}

    def delta(
        self, number: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        """A part of an answer."""
        content: dict[str, Any] = {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        return {"index": number, **content, "logprobs": logprobs, "finish_reason": finish_reason}
