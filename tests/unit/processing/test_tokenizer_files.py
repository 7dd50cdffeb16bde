"""Tokenizer files: settings and flags against transformers 4.37 (recorded), precedence, and unusable files."""

import shutil
from pathlib import Path

import pytest
from support.tokenizer_cases import (
    CHECKPOINT,
    GOLDENS,
    RECORDED,
    config,
    directory_of,
)

from internvl_jax.processing.tokenizer import (
    TokenizerError,
    load_tokenizer,
)

# transformers 4.37's slow tokenizer, recorded under flags and files that the bundle does not have.


@pytest.mark.parametrize("case", RECORDED.values(), ids=list(RECORDED))
def test_recorded_ids_and_texts(tmp_path, case):
    tokenizer = load_tokenizer(directory_of(tmp_path, case["files"]))
    named = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id
    assert [tokenizer.vocab_size, *named] == case["ids"]
    for text, ids in case["encode"]:
        assert tokenizer.encode(text) == ids, text
    for ids, skipped, kept in case["decode"]:
        assert tokenizer.decode(ids) == skipped, ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == kept, ids


def encode_with(path, text, **flags):
    """The pieces between bos and eos, with a new token <new> that has these flags."""
    path.mkdir()
    added = config()["added_tokens_decoder"] | {"869": {"content": "<new>", "special": False, **flags}}
    tokenizer = load_tokenizer(directory_of(path, {"tokenizer_config.json": config(added_tokens_decoder=added)}))
    return tokenizer.encode(text)


def test_flags_of_added_tokens(tmp_path):
    plain = encode_with(tmp_path / "plain", "x <new> y")
    assert plain.count(869) == 1
    assert encode_with(tmp_path / "lstrip", "x <new> y", lstrip=True) == encode_with(tmp_path / "l", "x<new> y")
    assert encode_with(tmp_path / "rstrip", "x <new> y", rstrip=True) == encode_with(tmp_path / "r", "x <new>y")
    assert encode_with(tmp_path / "word", "x <new> y", single_word=True) == plain
    assert 869 not in encode_with(tmp_path / "glued", "x<new> y", single_word=True)
    assert 869 in encode_with(tmp_path / "free", "x<new> y")


def test_the_longest_of_the_added_tokens_that_fit(tmp_path):
    added = config()["added_tokens_decoder"]
    added |= {str(index): {"content": content} for index, content in [(869, "<a"), (870, "<a>b"), (871, "<a>")]}
    tokenizer = load_tokenizer(directory_of(tmp_path, {"tokenizer_config.json": config(added_tokens_decoder=added)}))
    assert tokenizer.encode("<a><a>b<a<a>", add_bos=False) == [610, 871, 870, 869, 871]


def test_bos_and_eos_as_the_files_say(tmp_path):
    text = "Hello"
    ids = load_tokenizer(CHECKPOINT).encode(text, add_bos=False)
    for number, (bos, eos, expected) in enumerate(
        [(True, True, [1, *ids, 2]), (False, True, [*ids, 2]), (False, False, ids), (None, None, [1, *ids])]
    ):
        path = tmp_path / str(number)
        path.mkdir()
        files = {"tokenizer_config.json": config(add_bos_token=bos, add_eos_token=eos)}
        tokenizer = load_tokenizer(directory_of(path, files))
        assert tokenizer.encode(text) == expected
        assert tokenizer.encode(text, add_bos=True)[0] == 1


# Which files count.


def test_with_a_decoder_the_older_files_do_not_count(tmp_path):
    files = {
        "tokenizer_config.json": config(),
        "special_tokens_map.json": {"additional_special_tokens": ["<other>"], "pad_token": "<pad>"},
    }
    tokenizer = load_tokenizer(directory_of(tmp_path, files))
    assert tokenizer.token_to_id("<other>") is None
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (869, 0)


def test_without_a_decoder_the_older_files_give_the_same_ids(tmp_path):
    files = {name: (CHECKPOINT / name).read_text() for name in ("added_tokens.json", "special_tokens_map.json")}
    older = load_tokenizer(
        directory_of(tmp_path, files | {"tokenizer_config.json": config(without=["added_tokens_decoder"])})
    )
    newer = load_tokenizer(CHECKPOINT)
    for case in GOLDENS["tokenizer_encode"] + [{"text": case["query"]} for case in GOLDENS["prompts"]]:
        assert older.encode(case["text"]) == newer.encode(case["text"])
    for case in GOLDENS["tokenizer_decode"]:
        for skip in (True, False):
            assert older.decode(case["ids"], skip) == newer.decode(case["ids"], skip)


# Files that are damaged, missing or contradictory.


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is not readable JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json holds a JSON list"),
        ("added_tokens.json", "{'a': 1}", r"added_tokens\.json is not readable JSON"),
        ("special_tokens_map.json", "", r"special_tokens_map\.json is not readable JSON"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": "<img>"}}, "have an unknown form"),
        ("tokenizer_config.json", {"added_tokens_decoder": ["<img>"]}, "have an unknown form"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"860": {"special": True}}}, "have an unknown form"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"860": {"content": 5}}}, "have an unknown form"),
        ("added_tokens.json", {"<img>": "first"}, "have an unknown form"),
        ("special_tokens_map.json", {"pad_token": 5}, "have an unknown form"),
        ("special_tokens_map.json", {"additional_special_tokens": [None]}, "have an unknown form"),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "QWenTokenizer"},
            "tokenizer_class QWenTokenizer, .*add a tokenizer",
        ),
    ],
)
def test_json_files_that_cannot_be_used(tmp_path, name, content, complaint):
    with pytest.raises(TokenizerError, match=complaint) as caught:
        load_tokenizer(directory_of(tmp_path, {name: content}))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
def test_git_lfs_pointers(tmp_path, name):
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / file, tmp_path)
    if name == "tokenizer.json":
        (tmp_path / "tokenizer.model").unlink()
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 9\n")
    with pytest.raises(TokenizerError, match=rf"{name} is a git-lfs pointer, .* run 'git lfs pull'"):
        load_tokenizer(tmp_path)


def test_byte_order_marks(tmp_path):
    for path in CHECKPOINT.glob("*token*"):
        mark = b"\xef\xbb\xbf" if path.suffix == ".json" else b""
        (tmp_path / path.name).write_bytes(mark + path.read_bytes())
    text = "<img> two words </img>"
    assert load_tokenizer(tmp_path).encode(text) == load_tokenizer(CHECKPOINT).encode(text)


@pytest.mark.parametrize("content", [b"", None])
def test_a_model_that_cannot_be_used(tmp_path, content):
    whole = (CHECKPOINT / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(whole[: len(whole) // 2] if content is None else content)
    for legacy in (True, False):
        with pytest.raises(TokenizerError, match=rf"{tmp_path}/tokenizer\.model is damaged .*download it again"):
            load_tokenizer(tmp_path, legacy=legacy)


def test_a_model_that_storage_does_not_give_is_not_damaged(tmp_path, monkeypatch):
    """No advice to download again what may be as good as it was."""
    read = Path.read_bytes

    def fail(self):
        if self.name.startswith("tokenizer."):
            raise OSError(5, "Input/output error", str(self))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", fail)
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / "tokenizer.model").unlink(missing_ok=True)
        (tmp_path / name).touch()
        with pytest.raises((TokenizerError, OSError), match="Input/output error") as caught:
            load_tokenizer(tmp_path)
        assert str(tmp_path / name) in str(caught.value)
        assert "download" not in str(caught.value)


def test_no_tokenizer_at_all(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(TokenizerError, match=r"has neither tokenizer\.model nor tokenizer\.json"):
            load_tokenizer(path)


def test_files_that_contradict_each_other(tmp_path):
    files = {"tokenizer_config.json": config(), "added_tokens.json": {"<quad>": 860}}
    with pytest.raises(TokenizerError, match=r"token 860 is '<img>' in tokenizer_config\.json and '<quad>' in added_t"):
        load_tokenizer(directory_of(tmp_path, files))
    decoder = {index: token for index, token in config()["added_tokens_decoder"].items() if index != "860"}
    files = {"tokenizer_config.json": config(added_tokens_decoder=decoder), "added_tokens.json": {}}
    with pytest.raises(TokenizerError, match="'<img>' has no id, and 868, the next, belongs to '</box>'"):
        load_tokenizer(directory_of(tmp_path, files))
