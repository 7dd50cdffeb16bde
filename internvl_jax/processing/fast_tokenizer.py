"""A tokenizer.json, run by the `tokenizers` library."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from internvl_jax.processing.tokenizer_files import TokenizerFiles, read_vocabulary
from internvl_jax.processing.tokenizer_types import (
    REPLACEMENT,
    Span,
    TokenizerError,
    check_unicode,
    clean_up_spaces,
    ids_to_mask,
    match_any,
    overlaps,
    piece_bytes,
)
from internvl_jax.utils.files import decode_text, read_json_object

# Byte-level BPE writes printable characters of Latin-1 as themselves, and the other bytes as those from 256 on.
_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
_BYTE_OF = {chr(byte): byte for byte in _PRINTED} | {chr(256 + at): byte for at, byte in enumerate(_OTHERS)}


class FastTokenizer:
    """A tokenizer on the `tokenizers` library. Use `load_tokenizer` to create one.

    Args:
        tokenizer: the library's tokenizer, from `read_fast` or `read_qwen2`.
        path: the file that it comes from, for error messages.
        files: the files beside it.

    Raises:
        TokenizerError: the file disagrees with the files beside it.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, path: Path, files: TokenizerFiles):
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()  # either may be set in the file
        self._tokenizer.no_padding()
        for index, token in files.added.items():
            if (found := self._tokenizer.token_to_id(token.content)) != index:
                raise TokenizerError(
                    f"{path} has {token.content!r} as {'no token' if found is None else found}, the files beside it as "
                    f"{index}; keep the files that belong to the weights"
                )
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (
            None if (content := files.content(name)) is None else self.token_to_id(content)
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        )
        self._add_bos, self._add_eos, self._clean_up = files.add_bos, files.add_eos, files.clean_up
        self._renamed: tuple[Any, dict[str, str]] | None = None  # made when a text first needs it
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = frozenset(token.content for token in added.values() if token.special and token.content)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._added_ids = set(added)
        self._byte_level = "ByteLevel" in str(self._tokenizer.decoder)
        self._skipped = {i for i, token in added.items() if token.special}
        self._bytes = {index for piece, index in vocabulary.items() if re.fullmatch("<0x[0-9A-F]{2}>", piece)}

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its exact content; None if there is no such token."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, add_bos: bool | None = None, literal_spans: Sequence[Span] = ()) -> list[int]:
        """Encode a text, see `Tokenizer.encode`; by default tokenizer.json's post-processor adds the bos token."""
        check_unicode(text)
        tokenizer = self._tokenizer
        if any(overlaps(found.span(), literal_spans) for found in match_any(self.special_tokens).finditer(text)):
            tokenizer, text = self.rename_special_tokens(text, literal_spans)
        if add_bos is None and self._add_bos is None:
            return tokenizer.encode(text).ids
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        bos = [self.bos_id] if (self._add_bos if add_bos is None else add_bos) and self.bos_id is not None else []
        eos = [self.eos_id] if self._add_eos and self.eos_id is not None else []
        return bos + ids + eos

    def rename_special_tokens(self, text: str, literal_spans: Sequence[Span]) -> tuple[Any, str]:
        """Make special tokens in literal spans ordinary text, by giving all others random names.

        The library cannot ignore special tokens in a part of a text, and tokenizing the text in parts gives other ids.

        Args:
            text: the text.
            literal_spans: spans in which special tokens are ordinary text.

        Returns:
            The library's tokenizer under the new names, and the text with the new names outside the spans.
        """
        if self._renamed is None:
            names = {token: f"<{secrets.token_hex(16)}>" for token in self.special_tokens}
            self._renamed = _rename(self._tokenizer, names), names
        tokenizer, names = self._renamed
        parts: list[str] = []
        start = position = 0
        special = match_any(self.special_tokens)
        while (found := special.search(text, position)) is not None:
            if overlaps(found.span(), literal_spans):
                position = found.start() + 1
                continue
            parts += [text[start : found.start()], names[found[0]]]
            start = position = found.end()
        return tokenizer, "".join(parts) + text[start:]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Decode token ids."""
        text = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)
        return clean_up_spaces(text) if self._clean_up else text

    def token_bytes(self, index: int) -> bytes:
        """The bytes of a token, see `Tokenizer.token_bytes`."""
        piece = self._tokenizer.id_to_token(index)
        if piece is None:
            raise TokenizerError(f"token {index} is outside the tokenizer's {self.vocab_size} tokens")
        if index in self._added_ids:
            return piece.encode()
        return bytes(map(_BYTE_OF.__getitem__, piece)) if self._byte_level else piece_bytes(piece)

    def known_ids(self, size: int) -> np.ndarray:
        """Which ids below `size` belong to a token, [size] bool."""
        return ids_to_mask(self._tokenizer.get_vocab(with_added_tokens=True).values(), size)

    def stable_text(self, ids: Sequence[int]) -> str:
        """The beginning of `decode(ids)` that no further token can change: all but the byte tokens at the end.

        The library decodes a run of byte tokens as a whole: one byte too many turns even its complete characters into
        U+FFFD.
        """
        end = len(ids)
        while end and (ids[end - 1] in self._bytes or ids[end - 1] in self._skipped):
            end -= 1
        return "" if self._clean_up else self.decode(ids[:end]).rstrip(REPLACEMENT + " ")


def read_fast(path: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json.

    Raises:
        TokenizerError: the file is damaged.
    """
    text = decode_text(read_vocabulary(path), path)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exceptions
        raise TokenizerError(f"{path} is damaged ({error}); download it again") from None


# How Qwen2 cuts a text before byte-level BPE: contractions, words, single digits, punctuation, line ends, blanks.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_qwen2(vocab: Path, merges: Path, files: TokenizerFiles) -> tokenizers.Tokenizer:
    """Make Qwen2's tokenizer, byte-level BPE, of its vocab.json and merges.txt.

    Raises:
        TokenizerError: a file is damaged, or an added token would not get its id.
    """
    table = read_json_object(vocab, TokenizerError)
    lines = decode_text(read_vocabulary(merges), merges).split("\n")
    rules = [line.split(" ") for line in lines if line and not line.startswith("#version:")]
    pairs = [(rule[0], rule[1]) for rule in rules if len(rule) == 2]
    if not all(isinstance(index, int) for index in table.values()) or len(pairs) < len(rules):
        raise TokenizerError(f"{vocab} or {merges} is damaged; download them again")
    try:
        tokenizer = tokenizers.Tokenizer(models.BPE(table, pairs, byte_fallback=False))
    except Exception as error:  # the library raises bare Exceptions
        raise TokenizerError(f"{vocab} and {merges} do not fit together ({error}); download them again") from None
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(tokenizers.Regex(_QWEN2_WORDS), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    for index, token in sorted(files.added.items()):
        added = tokenizers.AddedToken(
            token.content,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            single_word=token.single_word,
            normalized=False,
            special=token.special,
        )
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([added])
        if (found := tokenizer.token_to_id(token.content)) != index:
            raise TokenizerError(
                f"{vocab.parent}: the added token {token.content!r} is {index}, the next id is {found}"
            )
    return tokenizer


def _rename(tokenizer: Any, names: dict[str, str]) -> Any:
    """A copy of a tokenizer of the `tokenizers` library in which tokens have other texts and the same ids."""
    values = json.loads(tokenizer.to_str())
    for token in values["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = values["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    copy = tokenizers.Tokenizer.from_str(json.dumps(values))
    for token, name in names.items():
        if copy.token_to_id(name) != tokenizer.token_to_id(token):
            raise TokenizerError(
                f"the text spells the special token {token}, which this tokenizer cannot read as ordinary text"
            )
    return copy
