"""The JSON files beside a tokenizer's vocabulary: special tokens, added tokens and settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_jax.processing.tokenizer_types import TokenizerError
from internvl_jax.utils.files import read_json_object, wrong_download

# The named special tokens, in the order in which the reference assigns ids to new ones.
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULT_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # LlamaTokenizer's own


@dataclass(frozen=True)
class AddedToken:
    """A token beside the vocabulary, with the flags of transformers' AddedToken.

    Attributes:
        content: its text.
        lstrip: blanks on its left are removed.
        rstrip: blanks on its right are removed.
        single_word: it counts only where blanks, other added tokens or the text's ends are on both sides.
        special: False: ordinary text that is a single token.
    """

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    special: bool = True


@dataclass(frozen=True)
class TokenizerFiles:
    """What the JSON files say.

    Attributes:
        named: the special tokens that have a name (NAMED_TOKENS), by name.
        additional: additional_special_tokens.
        added: added tokens by id.
        legacy: the slow LlamaTokenizer's flag.
        add_bos: add_bos_token; None where the files do not say.
        add_eos: add_eos_token.
        clean_up: clean_up_tokenization_spaces.
        tokenizer_class: the class of transformers, or "".
    """

    named: dict[str, AddedToken]
    additional: list[AddedToken]
    added: dict[int, AddedToken]
    legacy: bool
    add_bos: bool | None
    add_eos: bool
    clean_up: bool
    tokenizer_class: str

    def content(self, name: str) -> str | None:
        """The text of a named special token; None if there is none."""
        return self.named[name].content if name in self.named else None


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
    """Read a checkpoint's tokenizer_config.json and the older files beside it.

    The reference's precedence: with an added_tokens_decoder, tokenizer_config.json alone counts. Without one the older
    files count, and special_tokens_map.json comes before tokenizer_config.json.

    Raises:
        TokenizerError: a file is damaged, its tokens have an unknown form, or two files disagree.
    """
    config = _read_optional(directory / "tokenizer_config.json")
    settings = {**DEFAULT_TOKENS, **config}
    try:
        if "added_tokens_decoder" in config:
            added, known, additional = _current_tokens(directory, config)
        else:
            special_map = _read_optional(directory / "special_tokens_map.json")
            settings.update(special_map)
            added, known = _older_tokens(directory)
            additional = [t for file in (config, special_map) for t in file.get("additional_special_tokens") or ()]
        by_content = {token.content: token for token in added.values()}
        # A token given as a bare text has the flags that it has as an added token.
        named = {name: _token(settings[name]) for name in NAMED_TOKENS if settings.get(name) is not None}
        return TokenizerFiles(
            named={name: known.get(token.content, token) for name, token in named.items()},
            additional=[by_content.get(t, AddedToken(t)) if isinstance(t, str) else _token(t) for t in additional],
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
        raise TokenizerError(f"{directory}: special or added tokens have an unknown form ({error!r})") from None


_Tokens = tuple[dict[int, AddedToken], dict[str, AddedToken]]  # by id; those with known flags, by content


def _current_tokens(directory: Path, config: dict[str, Any]) -> tuple[*_Tokens, list[Any]]:
    added = {int(index): _token(value) for index, value in config["added_tokens_decoder"].items()}
    _check_agreement(directory, added, _read_optional(directory / "added_tokens.json"))
    known = {token.content: token for token in added.values()}
    return added, known, list(config.get("additional_special_tokens") or [])


def _older_tokens(directory: Path) -> _Tokens:
    fast = _read_optional(directory / "tokenizer.json").get("added_tokens", [])
    older = _read_optional(directory / "added_tokens.json")
    added = {int(index): AddedToken(content) for content, index in older.items()}
    added.update({int(value["id"]): _token(value) for value in fast})
    return added, {value["content"]: _token(value) for value in fast}


def _token(value: Any) -> AddedToken:
    """A token as the JSON files write it: a text, or an object with flags."""
    if isinstance(value, str):
        return AddedToken(value)
    if not isinstance(value["content"], str):
        raise TypeError(f"{value['content']!r} is not a text")
    flags = {name: bool(value.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
    return AddedToken(value["content"], **flags, special=value.get("special") is not False)


def _check_agreement(directory: Path, added: dict[int, AddedToken], older: dict[str, Any]) -> None:
    for content, index in older.items():
        if index in added and added[index].content != content:
            raise TokenizerError(
                f"{directory}: token {index} is {added[index].content!r} in tokenizer_config.json and {content!r} in "
                "added_tokens.json; keep the file that belongs to the weights"
            )


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json_object(path, TokenizerError) if path.exists() else {}


def read_vocabulary(path: Path) -> bytes:
    """The bytes of tokenizer.model or tokenizer.json.

    Raises:
        TokenizerError: the file is empty, or a placeholder such as a Git LFS pointer.
        OSError: as the system reports it.
    """
    if (problem := wrong_download(path)) is not None:
        raise TokenizerError(problem)
    if not (data := path.read_bytes()):
        raise TokenizerError(f"{path} is damaged (it is empty); download it again")
    return data
