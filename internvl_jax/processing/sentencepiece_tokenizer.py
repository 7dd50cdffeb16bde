"""A tokenizer.model, run by the rules of the slow LlamaTokenizer of transformers 4.37 (use_fast=False).

The reference tokenizes with that class. Its rules around special tokens, under either `legacy` setting, are written out
here on top of sentencepiece, because current releases of transformers give other ids for every prompt of
InternVL-Chat-V1-1.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from internvl_jax.processing.tokenizer_files import DEFAULT_TOKENS, AddedToken, TokenizerFiles, read_vocabulary
from internvl_jax.processing.tokenizer_types import (
    REPLACEMENT,
    SPACE_MARK,
    Span,
    TokenizerError,
    check_unicode,
    clean_up_spaces,
    ids_to_mask,
    match_any,
    overlaps,
    piece_bytes,
)

_CHATML = re.compile(r"<\|\w+\|>")

# normalizer_spec { add_dummy_prefix: false } in protobuf's encoding. Appended to a serialized model, it is merged into
# it. This needs no protobuf module: sentencepiece's own cannot be imported beside the one that transformers brings.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer:
    """The slow LlamaTokenizer's rules on a sentencepiece model. Use `load_tokenizer` to create one.

    Args:
        path: the tokenizer.model.
        files: the files beside it.
        legacy: the slow tokenizer's flag.
        keep_blanks: decode as InternLM2Tokenizer: a blank at the start stays, and one is put before a special token
            there.

    Raises:
        TokenizerError: the model is damaged, or a special token cannot get an id.
    """

    def __init__(self, path: Path, files: TokenizerFiles, *, legacy: bool, keep_blanks: bool = False):
        model = read_vocabulary(path)
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model + (b"" if legacy else NO_DUMMY_PREFIX))
        except RuntimeError as error:
            raise TokenizerError(f"{path} is damaged ({error}); download it again") from None
        self.legacy, self._clean_up, self._keep_blanks = legacy, files.clean_up, keep_blanks
        self._add_bos, self._add_eos = files.add_bos is not False, files.add_eos
        self._pieces = self._sp.get_piece_size()
        self._added = dict(files.added)
        self._ids = {token.content: index for index, token in self._added.items()}
        for token in (*files.named.values(), *files.additional):
            self._add_special(token, path)
        self._unk = files.content("unk_token") or DEFAULT_TOKENS["unk_token"]
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (
            None if (content := files.content(name)) is None else self.token_to_id(content)
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        )
        additional = {token.content for token in files.additional}
        self._special = additional | {token.content for token in files.named.values()}
        self._special_ids = {self._ids[token] for token in self._special}
        # decode puts blanks around added tokens, but not around the named ones.
        self._spaced = (set(self._ids) - self._special) | {t for t in additional if self._ids[t] >= self._pieces}
        self.vocab_size = max(self._pieces, *(index + 1 for index in self._added))
        self.special_tokens = frozenset(
            token.content
            for token in self._added.values()
            if token.content and (token.special or token.content in self._special)
        )
        # Yi has ChatML's tokens as symbols of the model, which no file beside it names.
        symbols = {piece for piece in map(self._sp.id_to_piece, range(self._pieces)) if _CHATML.fullmatch(piece)}
        self.special_tokens |= symbols
        self._split = match_any({*self._ids, *symbols})
        self._unk_length = len(self._sp.encode(self._unk, out_type=str))

    def _add_special(self, token: AddedToken, path: Path) -> None:
        """Register a special token, which is cut out whole like an added one. One without an id gets the next."""
        index = self.token_to_id(token.content)
        if index is None:
            index = self._pieces + sum(added >= self._pieces for added in self._added)
            if index in self._added:
                raise TokenizerError(
                    f"{path.parent}: the special token {token.content!r} has no id, and {index}, the next, belongs to "
                    f"{self._added[index].content!r}: the added tokens leave out an id; give it to {token.content!r}"
                )
        self._added[index] = token
        self._ids[token.content] = index

    def token_to_id(self, token: str) -> int | None:
        """The id of an added token or of a piece; None if there is no such token."""
        if token in self._ids:
            return self._ids[token]
        index = self._sp.piece_to_id(token)
        return index if self._sp.id_to_piece(index) == token else None

    def encode(self, text: str, add_bos: bool | None = None, literal_spans: Sequence[Span] = ()) -> list[int]:
        """Encode a text as the reference's `tokenizer(text).input_ids`, see `Tokenizer.encode`."""
        check_unicode(text)
        bos = [self.bos_id] if (self._add_bos if add_bos is None else add_bos) and self.bos_id is not None else []
        eos = [self.eos_id] if self._add_eos and self.eos_id is not None else []
        return bos + [self._id(piece) for piece in self._tokenize(text, literal_spans)] + eos

    def _id(self, piece: str) -> int:
        return self._ids[piece] if piece in self._ids else self._sp.piece_to_id(piece)

    def _tokenize(self, text: str, literal_spans: Sequence[Span]) -> list[str]:
        if self.legacy or not text:
            return self._tokenize_parts(text, literal_spans)
        # The first word's mark is added here, and removed again in front of a special token.
        shifted = [(start + 1, end + 1) for start, end in literal_spans]
        pieces = self._tokenize_parts(SPACE_MARK + text.replace(SPACE_MARK, " "), shifted)
        if len(pieces) > 1 and pieces[0] == SPACE_MARK and pieces[1] in self._special:
            return pieces[1:]
        return pieces

    def _tokenize_parts(self, text: str, literal_spans: Sequence[Span]) -> list[str]:
        """Cut out added tokens whole; sentencepiece tokenizes the text between them, part by part."""
        parts, plain = self._cut(text, literal_spans)
        for at, part in enumerate(parts):
            if plain[at] or part not in self._ids:
                continue
            token = self._added[self._ids[part]]
            left = parts[at - 1] if at else ""
            right = parts[at + 1] if at + 1 < len(parts) else ""
            if token.rstrip and right:
                parts[at + 1] = right.lstrip()
            if token.lstrip and left:
                parts[at - 1] = left.rstrip()
            # The reference tests the neighbors as they were before the blanks were stripped.
            if token.single_word and left and left[-1] != " ":
                parts[at - 1] += part
                parts[at] = ""
            elif token.single_word and right and right[0] != " ":
                parts[at + 1] = part + parts[at + 1]
                parts[at] = ""
        pieces: list[str] = []
        for at, part in enumerate(parts):
            if part in self._ids and not plain[at]:
                pieces.append(part)
            elif part:
                found = self._tokenize_text(part)
                # The model may have a piece with the same text as a special token.
                spelled = [self._spell(p) if p in self.special_tokens else [p] for p in found] if plain[at] else [found]
                pieces += itertools.chain.from_iterable(spelled)
        return pieces

    def _cut(self, text: str, literal_spans: Sequence[Span]) -> tuple[list[str], list[bool]]:
        """Split a text into added tokens and the text between them.

        Returns:
            The parts, none of them empty, and for each whether it spells a special token within a literal span.
        """
        parts: list[str] = []
        plain: list[bool] = []
        start = position = 0
        spells = False

        def add(part: str, spells: bool) -> None:
            if part:
                parts.append(part)
                plain.append(spells)

        while (found := self._split.search(text, position)) is not None:
            if found[0] in self.special_tokens and overlaps(found.span(), literal_spans):
                position, spells = found.start() + 1, True
                continue
            if found[0] not in self._ids:  # a symbol of the model, which needs no cutting out
                position = found.end()
                continue
            add(text[start : found.start()], spells)
            add(found[0], False)
            start, position, spells = found.end(), found.end(), False
        add(text[start:], spells)
        return parts, plain

    def _spell(self, piece: str) -> list[str]:
        """A piece as single characters; a character that is not a piece, as bytes if there are pieces for them."""
        spelled: list[str] = []
        for character in piece:
            if self._sp.piece_to_id(character) == self._sp.unk_id():
                as_bytes = [f"<0x{byte:02X}>" for byte in character.encode()]
                if all(self._sp.piece_to_id(byte) != self._sp.unk_id() for byte in as_bytes):
                    spelled += as_bytes
                    continue
            spelled.append(character)
        return spelled

    def _tokenize_text(self, text: str) -> list[str]:
        if self.legacy or not text.startswith((SPACE_MARK, " ")):
            return self._sp.encode(text, out_type=str)
        # Without the dummy prefix sentencepiece strips a leading blank: the unknown token in front protects it.
        pieces = self._sp.encode(self._unk + text, out_type=str)
        return pieces[self._unk_length :] if len(pieces) >= self._unk_length else pieces

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Decode token ids as the reference's `tokenizer.decode`.

        Raises:
            TokenizerError: an id is outside the vocabulary.
        """
        pieces = [self._piece(int(i)) for i in ids if not (skip_special_tokens and int(i) in self._special_ids)]
        texts: list[str] = []
        run: list[str] = []
        for piece in pieces:
            if piece in self._spaced:
                if run and (text := self._join(run)):
                    texts.append(text)
                run = []
                texts.append(piece)
            else:
                run.append(piece)
        if run:
            texts.append(self._join(run))
        # The reference joins with blanks and ignores spaces_between_special_tokens.
        text = " ".join(texts)
        return clean_up_spaces(text) if self._clean_up else text

    def token_bytes(self, index: int) -> bytes:
        """The bytes of a token, see `Tokenizer.token_bytes`."""
        piece = self._piece(index)
        return piece.encode() if index in self._added else piece_bytes(piece)

    def known_ids(self, size: int) -> np.ndarray:
        """Which ids below `size` belong to a token, [size] bool."""
        return ids_to_mask((*range(self._pieces), *self._added), size)

    def stable_text(self, ids: Sequence[int]) -> str:
        """The beginning of `decode(ids)` that no further token can change: no incomplete UTF-8, no final blanks."""
        return "" if self._clean_up else self.decode(ids).rstrip(REPLACEMENT + " ")

    def _piece(self, index: int) -> str:
        if index in self._added:
            return self._added[index].content
        if not 0 <= index < self._pieces:
            raise TokenizerError(f"token {index} is outside the tokenizer's {self.vocab_size} tokens")
        return self._sp.id_to_piece(index)

    def _join(self, pieces: list[str]) -> str:
        """The text of pieces without added tokens; special tokens among them are kept as text."""
        pieces = list(pieces)
        if pieces[0].startswith(SPACE_MARK) and not self._keep_blanks:
            pieces[0] = pieces[0][1:]
        text, after_special = "", False
        run: list[str] = []
        for at, piece in enumerate(pieces):
            if piece in self._special:
                if self.legacy and (at or self._keep_blanks) and not after_special:
                    text += " "
                text += self._sp.decode_pieces(run) + piece
                run, after_special = [], True
            else:
                run.append(piece)
                after_special = False
        return text + self._sp.decode_pieces(run)
