"""Structured output: answers that follow a JSON schema, a regular expression or a list of choices (llguidance)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from internvl_jax.processing.tokenizer import Tokenizer

MAX_GRAMMAR = 1 << 20  # characters


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like. Exactly one attribute is set.

    Attributes:
        json_schema: a JSON schema; {} is any JSON value.
        regex: a regular expression in Rust's syntax, of the whole answer.
        choice: the answers that are possible.
    """

    json_schema: Any = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        given = [value is not None for value in (self.json_schema, self.regex, self.choice)]
        if sum(given) != 1:
            raise ValueError("a grammar is a JSON schema, a regular expression or a list of choices")
        if self.choice is not None and not (self.choice and all(self.choice)):
            raise ValueError("choices are one or more texts that are not empty")


class GrammarCompiler:
    """Makes matchers of grammars for one model.

    Args:
        tokenizer: the model's tokenizer.
        vocab_size: of the model.
        eos_token_ids: tokens that end an answer.

    Raises:
        ImportError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]):
        import llguidance

        known = tokenizer.known_ids(vocab_size)
        special = {index for token in tokenizer.special_tokens if (index := tokenizer.token_to_id(token)) is not None}
        vocabulary = _Vocabulary(tokenizer, known, sorted({*special, *eos_token_ids}), eos_token_ids[0])
        self._library = llguidance
        self._words = -(-vocab_size // 32)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(vocabulary),
            n_vocab=vocab_size,
            eos_token=list(eos_token_ids),
        )

    def matcher(self, grammar: Grammar) -> Matcher:
        """Compile a grammar.

        Raises:
            ValueError: the grammar is invalid, or uses what is not supported; the message says which.
        """
        library = self._library.LLMatcher
        if grammar.json_schema is not None:
            # Without blanks and line ends, which a model could write without end.
            compact: Any = {"whitespace_flexible": False}
            text = library.grammar_from_json_schema(json.dumps(grammar.json_schema), overrides=compact)
        elif grammar.regex is not None:
            text = library.grammar_from_regex(grammar.regex)
        else:
            text = library.grammar_from_regex("|".join(map(re.escape, grammar.choice or ())))
        if len(text) > MAX_GRAMMAR:
            raise ValueError(f"the grammar is longer than {MAX_GRAMMAR:,} characters")
        problem = library.validate_grammar(text, self._tokenizer)
        if problem and not problem.startswith("WARNING"):
            lines = problem.splitlines()  # of a regular expression, with a drawing of where the error is
            reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            raise ValueError(f"the grammar cannot be used: {(reasons or lines)[0]}")
        return Matcher(library(self._tokenizer, text), self._words)


class Matcher:
    """An answer's place in its grammar. Created by `GrammarCompiler.matcher`."""

    def __init__(self, matcher: Any, words: int):
        self._matcher, self._words = matcher, words

    def allowed(self) -> np.ndarray:
        """The tokens that may come next: [W] int32, bit i of word w is token 32 w + i."""
        return np.frombuffer(self._matcher.compute_bitmask(), np.int32)[: self._words]

    def advance(self, tokens: Sequence[int]) -> bool:
        """Go on by tokens. False if the grammar does not allow them."""
        return all(self._matcher.is_stopped() or self._matcher.consume_token(token) for token in tokens)


class _Vocabulary:
    """A tokenizer as llguidance takes it."""

    def __init__(self, tokenizer: Tokenizer, known: np.ndarray, special: list[int], eos: int):
        self.eos_token_id, self.bos_token_id = eos, tokenizer.bos_id
        self.tokens = [
            tokenizer.token_bytes(index) if exists else f"<unused {index}>".encode()
            for index, exists in enumerate(known.tolist())
        ]
        self.special_token_ids = sorted({*special, *np.flatnonzero(~known).tolist()})
        ordinary = set(range(len(self.tokens))) - set(self.special_token_ids)
        self._ids = {self.tokens[index]: index for index in sorted(ordinary, reverse=True)}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: bytes) -> list[int]:
        """Tokens whose bytes joined are the text, the longest first.

        The tokenizer itself would put a blank in front of a word, as at the beginning of a text.
        """
        ids: list[int] = []
        start = 0
        while start < len(text):
            sizes = range(min(self._longest, len(text) - start), 0, -1)
            size = next(size for size in sizes if text[start : start + size] in self._ids)
            ids.append(self._ids[text[start : start + size]])
            start += size
        return ids
