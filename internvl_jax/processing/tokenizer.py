"""Text to token ids and back, with the ids that the checkpoint was trained on.

The reference tokenizes with the slow LlamaTokenizer of transformers 4.37 (use_fast=False). Its rules around special
tokens, under either `legacy` setting, are written out here on top of sentencepiece, because the tokenizers of current
transformers releases give other ids on every InternVL-Chat-V1-1 prompt. Checkpoints that ship only a tokenizer.json
run on the `tokenizers` library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from internvl_jax.config import ConfigError, read_json

SPACE_MARK = "▁"  # sentencepiece writes a blank as this character
REPLACEMENT = "\ufffd"  # what bytes decode to that are no UTF-8 (yet)


class TokenizerError(ValueError):
    """Tokenizer files that are missing, damaged or contradictory; the message says which."""


class Tokenizer(Protocol):
    """What the project needs of a tokenizer."""

    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    vocab_size: int  # added tokens included

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Token ids of a text; the bos token in front as the checkpoint says, or as add_bos says."""
        ...

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        ...

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its exact content, None where there is none."""
        ...


@dataclass(frozen=True)
class _AddedToken:
    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class SentencePieceTokenizer:
    """The slow LlamaTokenizer's rules on a sentencepiece model. Made by `load_tokenizer`."""

    def __init__(
        self,
        model: bytes,
        *,
        added: dict[int, _AddedToken],
        special: dict[str, str | None],
        additional_special: Sequence[str],
        legacy: bool,
        add_bos: bool,
        add_eos: bool,
    ):
        import sentencepiece

        if not legacy:
            model = _without_dummy_prefix(model)
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise TokenizerError(f"tokenizer.model is damaged ({error}); download it again") from None
        self.legacy, self._add_bos, self._add_eos = legacy, add_bos, add_eos
        self._pieces = self._sp.get_piece_size()
        self._added = dict(added)
        self._ids = {token.content: index for index, token in self._added.items()}
        self._unk = special.get("unk_token") or "<unk>"
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (
            None if special.get(name) is None else self.token_to_id(special[name])
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        )
        named = [token for token in special.values() if token is not None]
        self._special = {*named, *additional_special}
        self._special_ids = {self.token_to_id(token) for token in self._special} - {None}
        # In decoding, added tokens stand apart from the text around them, the four named ones do not.
        self._apart = (set(self._ids) - self._special) | {
            token for token in additional_special if (self.token_to_id(token) or 0) >= self._pieces
        }
        self.vocab_size = max(self._pieces, *(index + 1 for index in self._added), 0)
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        self._unk_length = len(self._sp.encode(self._unk, out_type=str))

    def token_to_id(self, token: str) -> int | None:
        """The id of an added token or of a piece, None where there is none."""
        if token in self._ids:
            return self._ids[token]
        index = self._sp.piece_to_id(token)
        return index if self._sp.id_to_piece(index) == token else None

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Token ids of a text, as the reference's `tokenizer(text).input_ids`."""
        bos = [self.bos_id] if (self._add_bos if add_bos is None else add_bos) and self.bos_id is not None else []
        eos = [self.eos_id] if self._add_eos and self.eos_id is not None else []
        return bos + [self._id(piece) for piece in self._tokenize(text)] + eos

    def _id(self, piece: str) -> int:
        return self._ids[piece] if piece in self._ids else self._sp.piece_to_id(piece)

    def _tokenize(self, text: str) -> list[str]:
        if self.legacy or not text:
            return self._tokenize_parts(text)
        # The word-start mark of the first word is written by hand; in front of a special token it is taken back.
        pieces = self._tokenize_parts(SPACE_MARK + text.replace(SPACE_MARK, " "))
        if len(pieces) > 1 and pieces[0] == SPACE_MARK and pieces[1] in self._special:
            return pieces[1:]
        return pieces

    def _tokenize_parts(self, text: str) -> list[str]:
        """Added tokens are cut out whole; what lies between goes to sentencepiece part by part."""
        parts = self._split.split(text) if self._split else [text]
        # re.split alternates text and token; texts may be empty.
        for at in range(1, len(parts), 2):
            token = self._added[self._ids[parts[at]]]
            if token.rstrip:
                parts[at + 1] = parts[at + 1].lstrip()
            if token.lstrip:
                parts[at - 1] = parts[at - 1].rstrip()
            if token.single_word and parts[at - 1] and parts[at - 1][-1] != " ":
                parts[at - 1] += parts[at]
                parts[at] = ""
            elif token.single_word and parts[at + 1] and parts[at + 1][0] != " ":
                parts[at + 1] = parts[at] + parts[at + 1]
                parts[at] = ""
        pieces: list[str] = []
        for part in parts:
            if part in self._ids:
                pieces.append(part)
            elif part:
                pieces += self._tokenize_text(part)
        return pieces

    def _tokenize_text(self, text: str) -> list[str]:
        if self.legacy or not text.startswith((SPACE_MARK, " ")):
            return self._sp.encode(text, out_type=str)
        # Without its dummy prefix sentencepiece would strip the leading blank: shield it with the unknown token.
        pieces = self._sp.encode(self._unk + text, out_type=str)
        return pieces[self._unk_length :] if len(pieces) >= self._unk_length else pieces

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids, as the reference's `tokenizer.decode`. Raises TokenizerError for an unknown id."""
        pieces = [self._piece(int(i)) for i in ids if not (skip_special_tokens and int(i) in self._special_ids)]
        texts: list[str] = []
        run: list[str] = []
        for piece in pieces:
            if piece in self._apart:
                if run and (text := self._join(run)):
                    texts.append(text)
                run = []
                texts.append(piece)
            else:
                run.append(piece)
        if run:
            texts.append(self._join(run))
        return " ".join(texts)

    def _piece(self, index: int) -> str:
        if index in self._added:
            return self._added[index].content
        if not 0 <= index < self._pieces:
            raise TokenizerError(f"token {index} is outside the tokenizer's {self.vocab_size} tokens")
        return self._sp.id_to_piece(index)

    def _join(self, pieces: list[str]) -> str:
        """Pieces without added tokens to text; special tokens among them stay as they are written."""
        pieces = list(pieces)
        if pieces[0].startswith(SPACE_MARK):
            pieces[0] = pieces[0][1:]
        text, run, after_special = "", [], False
        for at, piece in enumerate(pieces):
            if piece in self._special:
                if self.legacy and at and not after_special:
                    text += " "
                text += self._sp.decode_pieces(run) + piece
                run, after_special = [], True
            else:
                run.append(piece)
                after_special = False
        return text + self._sp.decode_pieces(run)


class FastTokenizer:
    """A tokenizer.json, run by the `tokenizers` library. Made by `load_tokenizer`."""

    def __init__(self, path: Path, special: dict[str, str | None], add_bos: bool | None):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise TokenizerError(f"{path} is damaged ({error}); download it again") from None
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (
            None if special.get(name) is None else self.token_to_id(special[name])
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        )
        self._add_bos = add_bos
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its exact content, None where there is none."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Token ids of a text. By default tokenizer.json's own post-processor decides on the bos token."""
        if add_bos is None and self._add_bos is None:
            return self._tokenizer.encode(text).ids
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        wanted = self._add_bos if add_bos is None else add_bos
        return [self.bos_id, *ids] if wanted and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)


class StreamDecoder:
    """Decode tokens as they come: `push` returns the text that is certain, `flush` the rest.

    The pieces joined are `tokenizer.decode` of all ids. Held back is what more tokens may still change: a character
    whose bytes are not all there, and blanks at the end.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._given = ""

    def push(self, ids: Iterable[int]) -> str:
        """The newly certain text after these further tokens."""
        self._ids += [int(i) for i in ids]
        # Decoded anew from the first token: what a token says depends on those before it.
        return self._advance(self._tokenizer.decode(self._ids, self._skip).rstrip(REPLACEMENT + " "))

    def flush(self) -> str:
        """What was held back; bytes that never became a character are given as U+FFFD."""
        return self._advance(self._tokenizer.decode(self._ids, self._skip))

    def _advance(self, text: str) -> str:
        if not text.startswith(self._given):
            return ""
        new, self._given = text[len(self._given) :], text
        return new


def load_tokenizer(directory: str | Path, *, legacy: bool | None = None) -> Tokenizer:
    """Read a checkpoint's tokenizer files.

    A tokenizer.model is run by the slow tokenizer's rules, as the reference runs it, unless the files ask for the fast
    one: a tokenizer_class that ends in "Fast", or no tokenizer.model but a tokenizer.json.
    legacy: overrides the flag of tokenizer_config.json, which decides on ids around special tokens.
    Raises TokenizerError naming the file that is missing or damaged.
    """
    directory = Path(directory)
    config = _read_optional(directory / "tokenizer_config.json")
    model, fast = directory / "tokenizer.model", directory / "tokenizer.json"
    special_map = _read_optional(directory / "special_tokens_map.json")
    special = {
        name: _special(name, config, special_map) for name in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    wants_fast = str(config.get("tokenizer_class", "")).endswith("Fast")
    if fast.exists() and (wants_fast or not model.exists()):
        return FastTokenizer(fast, special, config.get("add_bos_token"))
    if not model.exists():
        raise TokenizerError(f"{directory} has neither tokenizer.model nor tokenizer.json; download one of them")
    # The class's own defaults, for files that leave a token out.
    for name, default in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")):
        special[name] = special[name] or default
    additional = [
        _content(t)
        for t in config.get("additional_special_tokens") or special_map.get("additional_special_tokens") or []
    ]
    added = _added_tokens(directory, config)
    flag = config.get("legacy")
    tokenizer = SentencePieceTokenizer(
        model.read_bytes(),
        added=added,
        special=special,
        additional_special=additional,
        legacy=(True if flag is None else bool(flag)) if legacy is None else legacy,
        add_bos=config.get("add_bos_token", True),
        add_eos=config.get("add_eos_token", False),
    )
    return tokenizer


def _added_tokens(directory: Path, config: dict[str, Any]) -> dict[int, _AddedToken]:
    """Added tokens by id: those of tokenizer_config.json, and those of added_tokens.json that it does not name."""
    added = {}
    try:
        for index, value in (config.get("added_tokens_decoder") or {}).items():
            flags = {name: bool(value.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
            added[int(index)] = _AddedToken(value["content"], **flags)
        for content, index in _read_optional(directory / "added_tokens.json").items():
            added.setdefault(int(index), _AddedToken(content))
            if added[int(index)].content != content:
                raise TokenizerError(
                    f"{directory}: token {index} is {added[int(index)].content!r} in tokenizer_config.json and "
                    f"{content!r} in added_tokens.json"
                )
    except (AttributeError, KeyError, TypeError) as error:
        raise TokenizerError(f"{directory}: added tokens are not in the expected form ({error!r})") from None
    return added


def _special(name: str, config: dict[str, Any], special_map: dict[str, Any]) -> str | None:
    value = config.get(name) if name in config else special_map.get(name)
    return None if value is None else _content(value)


def _content(value: Any) -> str:
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str):
        raise TokenizerError(f"a special token is {value!r}, not a text")
    return content


def _read_optional(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) if path.exists() else {}
    except ConfigError as error:
        raise TokenizerError(str(error)) from None


def _without_dummy_prefix(model: bytes) -> bytes:
    """The sentencepiece model that does not write a word-start mark in front of every text."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
    except Exception as error:  # protobuf's DecodeError, whose import differs between versions
        raise TokenizerError(f"tokenizer.model is damaged ({error}); download it again") from None
    proto.normalizer_spec.add_dummy_prefix = False
    return proto.SerializeToString()


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids to one array, padding on the left: (input_ids [B,T], attention_mask [B,T]), both int32."""
    width = max(map(len, rows))
    ids = np.full((len(rows), width), pad_id, np.int32)
    mask = np.zeros((len(rows), width), np.int32)
    for number, row in enumerate(rows):
        if row:
            ids[number, width - len(row) :] = row
            mask[number, width - len(row) :] = 1
    return ids, mask
