"""Text to token ids and back, with the ids that the checkpoint was trained on.

A tokenizer.model runs by the rules of the slow LlamaTokenizer, as in the reference; a checkpoint that has only a
tokenizer.json runs on the `tokenizers` library.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from internvl_jax.processing.fast_tokenizer import FastTokenizer, read_fast, read_qwen2
from internvl_jax.processing.sentencepiece_tokenizer import SentencePieceTokenizer
from internvl_jax.processing.tokenizer_files import read_tokenizer_files
from internvl_jax.processing.tokenizer_types import Tokenizer, TokenizerError, special_tokens_in

__all__ = [
    "FastTokenizer",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerError",
    "encode_prompt",
    "load_tokenizer",
    "pad_left",
    "special_tokens_in",
]


def load_tokenizer(directory: str | Path, *, legacy: bool | None = None) -> Tokenizer:
    """Read a checkpoint's tokenizer files.

    A tokenizer.json is used where there is no tokenizer.model, or where tokenizer_class names another class than the
    slow LlamaTokenizer. Qwen2's tokenizer may also be a vocab.json with merges.txt. No code of a checkpoint is run.

    Args:
        directory: the checkpoint's directory.
        legacy: overrides the flag of tokenizer_config.json, which decides on ids around special tokens.

    Returns:
        The tokenizer.

    Raises:
        TokenizerError: a file is missing or damaged, or has a setting that is not implemented.
    """
    directory = Path(directory)
    files = read_tokenizer_files(directory)
    model, fast = directory / "tokenizer.model", directory / "tokenizer.json"
    if fast.exists() and (not model.exists() or files.tokenizer_class not in ("", "LlamaTokenizer")):
        if legacy is not None:
            raise TokenizerError(f"{fast} has no legacy setting: it is a flag of the slow tokenizer")
        return FastTokenizer(read_fast(fast), fast, files)
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    if not model.exists() and vocab.exists() and merges.exists() and files.tokenizer_class.startswith("Qwen2Tokenizer"):
        return FastTokenizer(read_qwen2(vocab, merges, files), vocab, files)
    if not model.exists():
        raise TokenizerError(
            f"{directory} has neither tokenizer.model nor tokenizer.json, nor vocab.json and merges.txt of Qwen2; "
            "download them"
        )
    if files.tokenizer_class == "InternLM2Tokenizer":  # the slow LlamaTokenizer's rules before `legacy` was a flag
        return SentencePieceTokenizer(model, files, legacy=True, keep_blanks=True)
    if files.tokenizer_class not in ("", "LlamaTokenizer", "LlamaTokenizerFast"):
        raise TokenizerError(
            f"{directory} names the tokenizer_class {files.tokenizer_class}, but tokenizer.model can be used only for "
            "LlamaTokenizer and InternLM2Tokenizer: add a tokenizer.json"
        )
    return SentencePieceTokenizer(model, files, legacy=files.legacy if legacy is None else legacy)


class StreamDecoder:
    """Decodes tokens as they arrive, without special tokens.

    `push` returns the text that is certain, `flush` the rest. The pieces joined are `tokenizer.decode` of all ids. Text
    that further tokens may still change is held back.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._num_returned = 0  # characters

    def push(self, ids: Iterable[int]) -> str:
        """Add tokens; returns the text that has become certain."""
        self._ids += [int(i) for i in ids]
        # Decoded from the first token each time: a token's text depends on those before it.
        return self._advance(self._tokenizer.stable_text(self._ids))

    def flush(self) -> str:
        """Return the text that was held back; bytes that never became a character are U+FFFD."""
        return self._advance(self._tokenizer.decode(self._ids))

    def _advance(self, text: str) -> str:
        # The text may be shorter than what was returned, by trailing blanks: nothing is taken back.
        new = text[self._num_returned :]
        self._num_returned += len(new)
        return new


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: str,
    image_token: str,
    image_token_id: int | None,
    add_bos: bool | None = None,
    literal_mark: str | None = None,
) -> list[int]:
    """Token ids of a prompt with image tokens in it.

    Where `image_token_id` is not in the vocabulary, the text between images is tokenized piece by piece, as LLaVA's
    tokenizer_image_token does: each piece as if a text began with it, without its bos token.

    Args:
        tokenizer: the tokenizer.
        prompt: the text, with one `image_token` for each visual token.
        image_token: the image token as text.
        image_token_id: the id that replaces it.
        add_bos: whether the prompt begins with the bos token, as in `Tokenizer.encode`.
        literal_mark: the mark that `conversation.mark_literal` put around typed text. Special tokens there are ordinary
            text.

    Returns:
        Token ids.
    """

    def encode(text: str, add_bos: bool | None = None) -> list[int]:
        parts = text.split(literal_mark) if literal_mark else [text]
        ends = list(itertools.accumulate(map(len, parts)))
        return tokenizer.encode("".join(parts), add_bos, list(zip(ends[::2], ends[1::2])))

    if image_token_id is None or tokenizer.token_to_id(image_token) == image_token_id:
        return encode(prompt, add_bos)
    pieces = [""]
    for number, part in enumerate(prompt.split(literal_mark) if literal_mark else [prompt]):
        first, *others = [part] if number % 2 else part.split(image_token)  # typed text has no images
        pieces[-1] += (literal_mark if number and literal_mark else "") + first
        pieces += others
    ids = encode(pieces[0], add_bos)
    for piece in pieces[1:]:
        rest = encode(piece)
        ids += [image_token_id, *(rest[1:] if rest[:1] == [tokenizer.bos_id] else rest)]
    return ids


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad rows of ids on the left to one length.

    Args:
        rows: token ids of B rows.
        pad_id: the padding token's id.

    Returns:
        input_ids [B,T] and attention_mask [B,T], both int32.
    """
    width = max(map(len, rows), default=0)
    ids = np.full((len(rows), width), pad_id, np.int32)
    mask = np.zeros((len(rows), width), np.int32)
    for number, row in enumerate(rows):
        if len(row):
            ids[number, width - len(row) :] = row
            mask[number, width - len(row) :] = 1
    return ids, mask
