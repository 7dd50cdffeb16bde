"""What the project needs of a tokenizer, and what both implementations share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

Span = tuple[int, int]  # characters of a text: the first one, and one past the last

SPACE_MARK = "▁"  # how sentencepiece writes a blank
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
REPLACEMENT = "\ufffd"  # what bytes that are not (yet) UTF-8 decode to

# The reference's clean-up of English text, in its order. A checkpoint asks for it by clean_up_tokenization_spaces.
_SPACE_BEFORE = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class TokenizerError(ValueError):
    """Tokenizer files are missing, damaged or contradictory, or a text cannot be encoded; the message says which."""


class Tokenizer(Protocol):
    """The interface of SentencePieceTokenizer and FastTokenizer.

    Attributes:
        bos_id: id of the bos token; None where there is none. The same holds for the other three.
        eos_id: id of the eos token.
        pad_id: id of the padding token.
        unk_id: id of the unknown token.
        vocab_size: the largest id plus one, added tokens included.
        special_tokens: texts that `encode` reads as tokens with a meaning of their own to the model.
    """

    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    vocab_size: int
    special_tokens: frozenset[str]

    def encode(self, text: str, add_bos: bool | None = None, literal_spans: Sequence[Span] = ()) -> list[int]:
        """Encode a text.

        Args:
            text: any Unicode text.
            add_bos: whether the bos token comes first; None: as the checkpoint's files say.
            literal_spans: spans of the text, in order, in which special tokens are read as ordinary text.

        Returns:
            Token ids.

        Raises:
            TokenizerError: the text is not valid Unicode.
        """
        ...

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Decode token ids.

        Raises:
            TokenizerError: an id is outside the vocabulary (SentencePieceTokenizer only).
        """
        ...

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its exact content; None if there is no such token."""
        ...

    def token_bytes(self, index: int) -> bytes:
        """The bytes that a token of the vocabulary stands for within a text."""
        ...

    def known_ids(self, size: int) -> np.ndarray:
        """Which ids below `size` belong to a token, [size] bool. A model's embedding may have more rows."""
        ...

    def stable_text(self, ids: Sequence[int]) -> str:
        """The beginning of `decode(ids)` that no further token can change."""
        ...


def check_unicode(text: str) -> None:
    """Raise TokenizerError for a text with half of a surrogate pair, which has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text is not valid Unicode: half of a surrogate pair at character {error.start}"
        ) from None


def match_any(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern for the leftmost of the tokens; of several that begin at one character, the longest."""
    longest_first = sorted((token for token in tokens if token), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def overlaps(span: Span, others: Sequence[Span]) -> bool:
    """Whether a span shares a character with any of the others."""
    return any(start < span[1] and span[0] < end for start, end in others)


def ids_to_mask(ids: Iterable[int], size: int) -> np.ndarray:
    """[size] bool, true at each of the ids that is below `size`."""
    mask = np.zeros(size, bool)
    mask[[index for index in ids if index < size]] = True
    return mask


def piece_bytes(piece: str) -> bytes:
    """The bytes of a sentencepiece token: a byte, or text in which a mark stands for a blank."""
    if _BYTE_PIECE.fullmatch(piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE_MARK, " ").encode()


def clean_up_spaces(text: str) -> str:
    """Remove blanks before punctuation and English contractions, as transformers' clean_up_tokenization does."""
    for pattern in _SPACE_BEFORE:
        text = text.replace(pattern, pattern.strip())
    return text


def special_tokens_in(tokenizer: Tokenizer, text: str) -> list[str]:
    """The special tokens that a text spells out, in order. `encode` would let them end turns or stand for images."""
    return match_any(tokenizer.special_tokens).findall(text)
