"""tokenizer.json against the tokenizers library and transformers."""

import json
import shutil

import numpy as np
import pytest
from support.tokenizer_cases import (
    CHECKPOINT,
    TEXTS,
    random_ids,
)

from internvl_jax.processing.tokenizer import (
    FastTokenizer,
    SentencePieceTokenizer,
    TokenizerError,
    load_tokenizer,
)


def test_tokenizer_json_against_the_library(fast):
    path, library = fast
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, FastTokenizer)
    for text in TEXTS:
        assert tokenizer.encode(text) == library.encode(text).ids
        without = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_bos=False) == without
        assert tokenizer.encode(text, add_bos=True) == [tokenizer.bos_id, *without]
    for ids in random_ids(tokenizer, np.random.RandomState(0)):
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == library.decode(ids, skip_special_tokens=skip)
    assert tokenizer.vocab_size == library.get_vocab_size()
    for token in ("<img>", "<ref>", "the", "<no such token>"):
        assert tokenizer.token_to_id(token) == library.token_to_id(token)
    assert (tokenizer.eos_id, tokenizer.unk_id) == (library.token_to_id("</s>"), library.token_to_id("<unk>"))
    with pytest.raises(TokenizerError, match="half of a surrogate pair"):
        tokenizer.encode("\udc00")


def test_tokenizer_json_against_transformers(fast):
    transformers = pytest.importorskip("transformers")
    path, _ = fast
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    tokenizer = load_tokenizer(path)
    for text in TEXTS:
        assert tokenizer.encode(text) == reference(text).input_ids
        assert tokenizer.encode(text, add_bos=False) == reference(text, add_special_tokens=False).input_ids
    for ids in random_ids(tokenizer, np.random.RandomState(1)):
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)


def test_settings_beside_a_tokenizer_json(fast):
    path, library = fast
    values = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(values | {"add_bos_token": False, "add_eos_token": True}))
    assert load_tokenizer(path).encode("the") == library.encode("the</s>", add_special_tokens=False).ids
    (path / "tokenizer_config.json").write_text(json.dumps(values | {"clean_up_tokenization_spaces": True}))
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode("the cat .")) == "the cat."
    with pytest.raises(TokenizerError, match=r"tokenizer\.json has no legacy setting"):
        load_tokenizer(path, legacy=True)
    # The slow tokenizer's own files go first, unless they name another class.
    shutil.copy(CHECKPOINT / "tokenizer.model", path)
    assert isinstance(load_tokenizer(path), FastTokenizer)
    (path / "tokenizer_config.json").write_text(json.dumps(values | {"tokenizer_class": "LlamaTokenizer"}))
    assert isinstance(load_tokenizer(path), SentencePieceTokenizer)


def test_a_tokenizer_json_that_cannot_be_used(fast):
    path, library = fast
    values = json.loads((path / "tokenizer_config.json").read_text())
    for content, known in [("<img>", library.token_to_id("<img>")), ("<other>", "no token")]:
        added = {"added_tokens_decoder": {"7": {"content": content}}}
        (path / "tokenizer_config.json").write_text(json.dumps(values | added))
        with pytest.raises(
            TokenizerError, match=rf"tokenizer\.json has '{content}' as {known}, the files beside it as 7"
        ):
            load_tokenizer(path)
    (path / "tokenizer_config.json").unlink()
    whole = (path / "tokenizer.json").read_text()
    for content in ("", "{}", whole[: len(whole) // 2]):
        (path / "tokenizer.json").write_text(content)
        with pytest.raises(TokenizerError, match=r"tokenizer\.json is (damaged|not readable JSON).*download it again"):
            load_tokenizer(path)
