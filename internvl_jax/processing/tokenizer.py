"""Text to token ids and back, with the ids that the checkpoint was trained on.

The reference tokenizes with the slow LlamaTokenizer of transformers 4.37 (use_fast=False). Its rules around special
tokens, under either `legacy` setting, are written out here on top of sentencepiece, because the tokenizers of current
transformers releases give other ids on every InternVL-Chat-V1-1 prompt. Checkpoints that ship only a tokenizer.json
run on the `tokenizers` library.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from internvl_jax.utils.files import decode_text, not_itself, read_json_object

SPACE_MARK = "▁"  # sentencepiece writes a blank as this character
REPLACEMENT = "\ufffd"  # what bytes decode to that are no UTF-8 (yet)

# normalizer_spec { add_dummy_prefix: false } as protobuf writes it. Appended to a serialized model it is merged into
# it, so that no protobuf module is needed: sentencepiece's cannot be imported beside the one that transformers brings.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

# The special tokens that have a name, in the order in which the reference gives new ones their ids.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # LlamaTokenizer's own

# The reference's tidying of English text, in its order; a checkpoint asks for it by clean_up_tokenization_spaces.
CLEAN_UPS = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


Span = tuple[int, int]  # of characters: the first, and one past the last


class TokenizerError(ValueError):
    """Tokenizer files that are missing, damaged or contradictory; the message says which."""


class Tokenizer(Protocol):
    """What the project needs of a tokenizer."""

    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    vocab_size: int  # added tokens included
    special_tokens: frozenset[str]  # what encode cuts out of a text as a token that means something to the model

    def encode(self, text: str, add_bos: bool | None = None, literal: Sequence[Span] = ()) -> list[int]:
        """Token ids of a text; the bos token in front as the checkpoint says, or as add_bos says.

        literal: parts of the text, in order, in which special tokens are ordinary text.
        """
        ...

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        ...

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its exact content, None where there is none."""
        ...

    def known(self, size: int) -> np.ndarray:
        """Which of the ids below `size` have a token, [size] bool: a model may have rows for more."""
        ...

    def settled(self, ids: Sequence[int]) -> str:
        """The beginning of `decode(ids)` that no further token can change."""
        ...


@dataclass(frozen=True)
class _AddedToken:
    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    special: bool = True  # False: ordinary text that is one token


class SentencePieceTokenizer:
    """The slow LlamaTokenizer's rules on a sentencepiece model. Made by `load_tokenizer`."""

    def __init__(self, path: Path, files: _Files, *, legacy: bool):
        import sentencepiece

        model = _read_itself(path)
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model + (b"" if legacy else NO_DUMMY_PREFIX))
        except RuntimeError as error:
            raise TokenizerError(f"{path} is damaged ({error}); download it again") from None
        self.legacy, self._clean_up = legacy, files.clean_up
        self._add_bos, self._add_eos = files.add_bos is not False, files.add_eos
        self._pieces = self._sp.get_piece_size()
        self._added = dict(files.added)
        self._ids = {token.content: index for index, token in self._added.items()}
        for token in (*files.named.values(), *files.additional):
            self._add_special(token, path)
        self._unk = files.content("unk_token") or DEFAULTS["unk_token"]
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (
            None if (content := files.content(name)) is None else self.token_to_id(content)
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        )
        additional = {token.content for token in files.additional}
        self._special = additional | {token.content for token in files.named.values()}
        self._special_ids = {self._ids[token] for token in self._special}
        # In decoding, added tokens stand apart from the text around them, the named ones do not.
        self._apart = (set(self._ids) - self._special) | {t for t in additional if self._ids[t] >= self._pieces}
        self.vocab_size = max(self._pieces, *(index + 1 for index in self._added))
        self.special_tokens = frozenset(
            token.content
            for token in self._added.values()
            if token.content and (token.special or token.content in self._special)
        )
        self._split = _any_of(self._ids)
        self._unk_length = len(self._sp.encode(self._unk, out_type=str))

    def _add_special(self, token: _AddedToken, path: Path) -> None:
        """Special tokens are cut out whole too, whether the files list them as added or not; unknown ones get an id."""
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
        """The id of an added token or of a piece, None where there is none."""
        if token in self._ids:
            return self._ids[token]
        index = self._sp.piece_to_id(token)
        return index if self._sp.id_to_piece(index) == token else None

    def encode(self, text: str, add_bos: bool | None = None, literal: Sequence[Span] = ()) -> list[int]:
        """Token ids of a text, as the reference's `tokenizer(text).input_ids`, but for what is `literal`."""
        _check_text(text)
        bos = [self.bos_id] if (self._add_bos if add_bos is None else add_bos) and self.bos_id is not None else []
        eos = [self.eos_id] if self._add_eos and self.eos_id is not None else []
        return bos + [self._id(piece) for piece in self._tokenize(text, literal)] + eos

    def _id(self, piece: str) -> int:
        return self._ids[piece] if piece in self._ids else self._sp.piece_to_id(piece)

    def _tokenize(self, text: str, literal: Sequence[Span]) -> list[str]:
        if self.legacy or not text:
            return self._tokenize_parts(text, literal)
        # The word-start mark of the first word is written by hand; in front of a special token it is taken back.
        shifted = [(start + 1, end + 1) for start, end in literal]
        pieces = self._tokenize_parts(SPACE_MARK + text.replace(SPACE_MARK, " "), shifted)
        if len(pieces) > 1 and pieces[0] == SPACE_MARK and pieces[1] in self._special:
            return pieces[1:]
        return pieces

    def _tokenize_parts(self, text: str, literal: Sequence[Span]) -> list[str]:
        """Added tokens are cut out whole; what lies between goes to sentencepiece part by part."""
        parts, plain = self._cut(text, literal)
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
            # The reference looks at the neighbours as they were before the blanks were stripped.
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
                # sentencepiece may have pieces of its own that are written as special tokens are.
                spelled = [self._spell(p) if p in self.special_tokens else [p] for p in found] if plain[at] else [found]
                pieces += itertools.chain.from_iterable(spelled)
        return pieces

    def _cut(self, text: str, literal: Sequence[Span]) -> tuple[list[str], list[bool]]:
        """Added tokens and what lies between, no part empty; and which parts spell special tokens in literal text."""
        parts: list[str] = []
        plain: list[bool] = []
        start = position = 0
        spells = False

        def add(part: str, spells: bool) -> None:
            if part:
                parts.append(part)
                plain.append(spells)

        while (found := self._split.search(text, position)) is not None:
            if found[0] in self.special_tokens and _overlaps(found.span(), literal):
                position, spells = found.start() + 1, True
                continue
            add(text[start : found.start()], spells)
            add(found[0], False)
            start, position, spells = found.end(), found.end(), False
        add(text[start:], spells)
        return parts, plain

    def _spell(self, piece: str) -> list[str]:
        """A piece as its characters, those that are no pieces as bytes, where there are pieces for bytes."""
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
        # The reference joins by blanks whatever the files' spaces_between_special_tokens says.
        text = " ".join(texts)
        return _clean_up(text) if self._clean_up else text

    def known(self, size: int) -> np.ndarray:
        """As Tokenizer.known."""
        return _known((*range(self._pieces), *self._added), size)

    def settled(self, ids: Sequence[int]) -> str:
        """As Tokenizer.settled: without a character whose bytes are not all there, and blanks at the end."""
        return "" if self._clean_up else self.decode(ids).rstrip(REPLACEMENT + " ")

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
        text, after_special = "", False
        run: list[str] = []
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

    def __init__(self, path: Path, files: _Files):
        import tokenizers

        text = decode_text(_read_itself(path), path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exceptions
            raise TokenizerError(f"{path} is damaged ({error}); download it again") from None
        self._tokenizer.no_truncation()  # the file may ask for either
        self._tokenizer.no_padding()
        for index, token in files.added.items():
            if (known := self._tokenizer.token_to_id(token.content)) != index:
                raise TokenizerError(
                    f"{path} has {token.content!r} as {'no token' if known is None else known}, the files beside it as "
                    f"{index}; keep the files that belong to the weights"
                )
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (
            None if (content := files.content(name)) is None else self.token_to_id(content)
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        )
        self._add_bos, self._add_eos, self._clean_up = files.add_bos, files.add_eos, files.clean_up
        self._plain: tuple[Any, dict[str, str]] | None = None
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = frozenset(token.content for token in added.values() if token.special and token.content)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._skipped = {i for i, token in added.items() if token.special}
        self._bytes = {index for piece, index in vocabulary.items() if re.fullmatch("<0x[0-9A-F]{2}>", piece)}

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its exact content, None where there is none."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, add_bos: bool | None = None, literal: Sequence[Span] = ()) -> list[int]:
        """Token ids of a text. By default tokenizer.json's own post-processor decides on the bos token."""
        _check_text(text)
        tokenizer = self._tokenizer
        if any(_overlaps(found.span(), literal) for found in _any_of(self.special_tokens).finditer(text)):
            tokenizer, text = self._renamed(text, literal)
        if add_bos is None and self._add_bos is None:
            return tokenizer.encode(text).ids
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        bos = [self.bos_id] if (self._add_bos if add_bos is None else add_bos) and self.bos_id is not None else []
        eos = [self.eos_id] if self._add_eos and self.eos_id is not None else []
        return bos + ids + eos

    def _renamed(self, text: str, literal: Sequence[Span]) -> tuple[Any, str]:
        """The same tokenizer with other names for its special tokens, and the text with them where it is not literal.

        So that one pass over the whole text decides, as always; the names are drawn so that no text can hold them.
        """
        if self._plain is None:
            names = {token: f"<{secrets.token_hex(16)}>" for token in self.special_tokens}
            self._plain = _rename(self._tokenizer, names), names
        tokenizer, names = self._plain
        parts, start, position = [], 0, 0
        pattern = _any_of(self.special_tokens)
        while (found := pattern.search(text, position)) is not None:
            if _overlaps(found.span(), literal):
                position = found.start() + 1
                continue
            parts += [text[start : found.start()], names[found[0]]]
            start = position = found.end()
        return tokenizer, "".join(parts) + text[start:]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        text = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)
        return _clean_up(text) if self._clean_up else text

    def known(self, size: int) -> np.ndarray:
        """As Tokenizer.known."""
        return _known(self._tokenizer.get_vocab(with_added_tokens=True).values(), size)

    def settled(self, ids: Sequence[int]) -> str:
        """As Tokenizer.settled: without the byte tokens at the end.

        This library decodes a run of byte tokens as one: a byte too many turns even its complete characters into
        U+FFFD. Where every token is of bytes, only the last character may be incomplete.
        """
        end = len(ids)
        while end and (ids[end - 1] in self._bytes or ids[end - 1] in self._skipped):
            end -= 1
        return "" if self._clean_up else self.decode(ids[:end]).rstrip(REPLACEMENT + " ")


class StreamDecoder:
    """Decode tokens as they come, special ones skipped: `push` returns the text that is certain, `flush` the rest.

    The pieces joined are `tokenizer.decode` of all ids. Held back is what more tokens may still change.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0  # characters

    def push(self, ids: Iterable[int]) -> str:
        """The newly certain text after these further tokens."""
        self._ids += [int(i) for i in ids]
        # Decoded anew from the first token: what a token says depends on those before it.
        return self._advance(self._tokenizer.settled(self._ids))

    def flush(self) -> str:
        """What was held back; bytes that never became a character are given as U+FFFD."""
        return self._advance(self._tokenizer.decode(self._ids))

    def _advance(self, text: str) -> str:
        # A blank that was held back may be shorter than what was given: nothing is taken back.
        new = text[self._given :]
        self._given += len(new)
        return new


def load_tokenizer(directory: str | Path, *, legacy: bool | None = None) -> Tokenizer:
    """Read a checkpoint's tokenizer files.

    A tokenizer.model is run by the slow LlamaTokenizer's rules, as the reference runs it. A tokenizer.json is run where
    there is no tokenizer.model, or where tokenizer_class names another class than the slow one.
    legacy: overrides the flag of tokenizer_config.json, which decides on ids around special tokens.
    Raises TokenizerError naming the file that is missing or damaged, or the setting that is not implemented.
    """
    directory = Path(directory)
    files = _read_files(directory)
    model, fast = directory / "tokenizer.model", directory / "tokenizer.json"
    if fast.exists() and (not model.exists() or files.tokenizer_class not in ("", "LlamaTokenizer")):
        if legacy is not None:
            raise TokenizerError(f"{fast} has no legacy setting: it is a flag of the slow tokenizer")
        return FastTokenizer(fast, files)
    if not model.exists():
        raise TokenizerError(f"{directory} has neither tokenizer.model nor tokenizer.json; download one of them")
    if files.tokenizer_class not in ("", "LlamaTokenizer", "LlamaTokenizerFast"):
        raise TokenizerError(
            f"{directory} names the tokenizer_class {files.tokenizer_class}; tokenizer.model is run only for "
            "LlamaTokenizer: add a tokenizer.json"
        )
    return SentencePieceTokenizer(model, files, legacy=files.legacy if legacy is None else legacy)


@dataclass(frozen=True)
class _Files:
    """What the JSON files beside the vocabulary say."""

    named: dict[str, _AddedToken]  # bos_token, ... as far as there are
    additional: list[_AddedToken]
    added: dict[int, _AddedToken]
    legacy: bool
    add_bos: bool | None  # None: not said
    add_eos: bool
    clean_up: bool
    tokenizer_class: str

    def content(self, name: str) -> str | None:
        return self.named[name].content if name in self.named else None


def _read_files(directory: Path) -> _Files:
    """The reference's precedence: with an added_tokens_decoder, tokenizer_config.json alone counts; without, the older
    files count, and special_tokens_map.json before tokenizer_config.json."""
    config = _read_optional(directory / "tokenizer_config.json")
    older = _read_optional(directory / "added_tokens.json")
    settings = {**DEFAULTS, **config}
    try:
        if "added_tokens_decoder" in config:
            added = {int(index): _token(value) for index, value in config["added_tokens_decoder"].items()}
            _check_agreement(directory, added, older)
            known = {token.content: token for token in added.values()}
            additional = list(config.get("additional_special_tokens") or [])
        else:
            special_map = _read_optional(directory / "special_tokens_map.json")
            settings.update(special_map)
            additional = [t for file in (config, special_map) for t in file.get("additional_special_tokens") or ()]
            fast = _read_optional(directory / "tokenizer.json").get("added_tokens", [])
            added = {int(index): _AddedToken(content) for content, index in older.items()}
            added.update({int(value["id"]): _token(value) for value in fast})
            known = {value["content"]: _token(value) for value in fast}
        by_content = {token.content: token for token in added.values()}
        # Given as a bare text, a token has the flags that it has as an added one.
        named = {name: _token(settings[name]) for name in NAMED if settings.get(name) is not None}
        return _Files(
            named={name: known.get(token.content, token) for name, token in named.items()},
            additional=[by_content.get(t, _AddedToken(t)) if isinstance(t, str) else _token(t) for t in additional],
            added=added,
            legacy=settings.get("legacy") is not False,
            add_bos=settings.get("add_bos_token"),
            add_eos=bool(settings.get("add_eos_token")),
            clean_up=bool(settings.get("clean_up_tokenization_spaces")),
            tokenizer_class=settings.get("tokenizer_class") or "",
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{directory}: special or added tokens are not in the known form ({error!r})") from None


def _token(value: Any) -> _AddedToken:
    """A token as the JSON files write it: a text, or an object with flags."""
    if isinstance(value, str):
        return _AddedToken(value)
    if not isinstance(value["content"], str):
        raise TypeError(f"{value['content']!r} is not a text")
    flags = {name: bool(value.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
    return _AddedToken(value["content"], **flags, special=value.get("special") is not False)


def _check_agreement(directory: Path, added: dict[int, _AddedToken], older: dict[str, Any]) -> None:
    for content, index in older.items():
        if index in added and added[index].content != content:
            raise TokenizerError(
                f"{directory}: token {index} is {added[index].content!r} in tokenizer_config.json and {content!r} in "
                "added_tokens.json; keep the file that belongs to the weights"
            )


def _read_itself(path: Path) -> bytes:
    """The bytes of a file that is no git-lfs pointer or the like. An error of the system is raised as it is."""
    if (problem := not_itself(path)) is not None:
        raise TokenizerError(problem)
    if not (data := path.read_bytes()):
        raise TokenizerError(f"{path} is damaged (it is empty); download it again")
    return data


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json_object(path, TokenizerError) if path.exists() else {}


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(f"the text is no Unicode: half of a surrogate pair at character {error.start}") from None


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds the leftmost token, of those that begin there the longest."""
    longest_first = sorted((token for token in tokens if token), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _overlaps(span: Span, others: Sequence[Span]) -> bool:
    return any(start < span[1] and span[0] < end for start, end in others)


def _rename(tokenizer: Any, names: dict[str, str]) -> Any:
    """A copy of a tokenizer of the `tokenizers` library in which tokens are written otherwise; ids are the same."""
    import tokenizers

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
                f"the text spells the special token {token}, which this tokenizer cannot avoid to read"
            )
    return copy


def special_tokens_in(tokenizer: Tokenizer, text: str) -> list[str]:
    """The special tokens that a text spells out, in order. Read as such, they end turns or stand for images."""
    return _any_of(tokenizer.special_tokens).findall(text)


def _known(ids: Iterable[int], size: int) -> np.ndarray:
    known = np.zeros(size, bool)
    known[[index for index in ids if index < size]] = True
    return known


def _clean_up(text: str) -> str:
    for pattern in CLEAN_UPS:
        text = text.replace(pattern, pattern.strip())
    return text


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: str,
    image_token: str,
    image_token_id: int | None,
    add_bos: bool | None = None,
    literal: str | None = None,
) -> list[int]:
    """Token ids of a prompt with image tokens in it; each `image_token` becomes `image_token_id`.

    Where that is no token of the vocabulary, the text between images is tokenized piece by piece, as LLaVA's
    tokenizer_image_token does: each piece as if a text began with it, without its bos token.
    add_bos: of the whole prompt, as `Tokenizer.encode` takes it.
    literal: the mark that conversation.literally put around what was typed: special tokens there are ordinary text.
    """

    def encode(text: str, add_bos: bool | None = None) -> list[int]:
        parts = text.split(literal) if literal else [text]
        ends = list(itertools.accumulate(map(len, parts)))
        return tokenizer.encode("".join(parts), add_bos, list(zip(ends[::2], ends[1::2])))

    if tokenizer.token_to_id(image_token) == image_token_id:
        return encode(prompt, add_bos)
    pieces = [""]
    for number, part in enumerate(prompt.split(literal) if literal else [prompt]):
        first, *others = [part] if number % 2 else part.split(image_token)  # of what was typed, nothing is an image
        pieces[-1] += (literal if number and literal else "") + first
        pieces += others
    ids = encode(pieces[0], add_bos)
    for piece in pieces[1:]:
        rest = encode(piece)
        ids += [image_token_id, *(rest[1:] if rest[:1] == [tokenizer.bos_id] else rest)]
    return ids


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids to one array, padding on the left: (input_ids [B,T], attention_mask [B,T]), both int32."""
    width = max(map(len, rows), default=0)
    ids = np.full((len(rows), width), pad_id, np.int32)
    mask = np.zeros((len(rows), width), np.int32)
    for number, row in enumerate(rows):
        if len(row):
            ids[number, width - len(row) :] = row
            mask[number, width - len(row) :] = 1
    return ids, mask
