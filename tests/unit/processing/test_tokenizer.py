"""Tokenizers: ids against the golden bundle, transformers 4.37 (recorded) and the tokenizers library; bad files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.paths import DATA

from internvl_jax.config.conversation_templates import TEMPLATES
from internvl_jax.processing import tokenizer as tokenizer_module
from internvl_jax.processing.conversation import place_images, prepare_prompt
from internvl_jax.processing.tokenizer import (
    FastTokenizer,
    SentencePieceTokenizer,
    StreamDecoder,
    TokenizerError,
    load_tokenizer,
    pad_left,
    special_tokens_in,
)

BUNDLE = DATA / "internvl_chat_v1_1"
CHECKPOINT = BUNDLE / "checkpoint"
GOLDENS = json.loads((BUNDLE / "goldens.json").read_text("utf-8"))
RECORDED = json.loads((DATA / "tokenizer_transformers_4_37.json").read_text("utf-8"))["cases"]
SETTINGS = {True: "legacy_true", False: "legacy_false"}
BYTES = 3  # id of the token of byte 0


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not_legacy"])
def either(request):
    return load_tokenizer(CHECKPOINT, legacy=request.param)


def directory_of(path, files):
    """A directory with the bundle's sentencepiece model and these JSON files."""
    shutil.copy(CHECKPOINT / "tokenizer.model", path)
    for name, content in files.items():
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def config(without=(), **changes):
    values = json.loads((CHECKPOINT / "tokenizer_config.json").read_text()) | changes
    return {name: value for name, value in values.items() if name not in without}


# Golden ids.


def test_golden_ids_of_texts(either):
    for case in GOLDENS["tokenizer_encode"]:
        assert either.encode(case["text"]) == case[SETTINGS[either.legacy]], case["text"]
        assert either.encode(case["text"], add_bos=False) == case[SETTINGS[either.legacy]][1:], case["text"]


def test_golden_texts_of_ids(either):
    for case in GOLDENS["tokenizer_decode"]:
        assert either.decode(case["ids"]) == case[f"{SETTINGS[either.legacy]}_skip"], case["ids"]
        kept = either.decode(case["ids"], skip_special_tokens=False)
        assert kept == case[f"{SETTINGS[either.legacy]}_keep"], case["ids"]


def test_golden_ids_of_prompts(either):
    for case in GOLDENS["prompts"]:
        assert either.encode(case["query"]) == case[f"input_ids_{SETTINGS[either.legacy]}"], case["id"]


def test_golden_responses_and_the_checkpoints_own_setting():
    tokenizer = load_tokenizer(CHECKPOINT)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.legacy is GOLDENS["config"]["legacy"]
    for case in GOLDENS["prompts"]:
        assert tokenizer.encode(case["query"]) == case["input_ids"]
        assert tokenizer.decode(case["generated_ids"]).strip() == case["response"]
    assert tokenizer.vocab_size == GOLDENS["config"]["tokenizer_len"]
    for token, index in GOLDENS["config"]["token_ids"].items():
        assert tokenizer.token_to_id(token) == index
    named = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id
    assert named == (1, 2, GOLDENS["config"]["pad_token_id"], 0)
    assert tokenizer.token_to_id("<no such token>") is None
    assert tokenizer.token_to_id("<unk>") == 0


def test_golden_batches_are_padded_on_the_left():
    tokenizer, arrays = load_tokenizer(CHECKPOINT), np.load(BUNDLE / "goldens.npz")
    for case in GOLDENS["batches"]:
        questions = [place_images(question, 1, False) for question in case["questions"]]
        prompts = [prepare_prompt(TEMPLATES["internvl_zh"], q, [], 1, 16) for q in questions]
        ids, mask = pad_left([tokenizer.encode(prompt) for prompt in prompts], tokenizer.pad_id)
        np.testing.assert_array_equal(ids, arrays[f"batch/{case['id']}/input_ids"])
        np.testing.assert_array_equal(mask, arrays[f"batch/{case['id']}/attention_mask"])


def test_emoji_and_rare_characters_fall_back_to_bytes(either):
    for text in ("🐳", "👩‍👩‍👧", "é́", "\x00", "𠮷"):
        assert either.decode(either.encode(text)) == text
    assert either.encode("🐳", add_bos=False)[1:] == [BYTES + byte for byte in "🐳".encode()]


def test_special_tokens_that_are_typed_are_special(either):
    for token, index in {**GOLDENS["config"]["token_ids"], "<s>": 1, "</s>": 2, "<unk>": 0}.items():
        assert either.encode(f"a{token}b", add_bos=False).count(index) == 1
        assert either.decode([index], skip_special_tokens=False) == token
        assert either.decode([index]) == ""


def test_an_id_that_does_not_exist_is_refused(either):
    for index in (-1, either.vocab_size, 10**9):
        with pytest.raises(TokenizerError, match=f"token {index} is outside the tokenizer's 869 tokens"):
            either.decode([5, index])


def test_text_that_is_no_unicode_is_refused(either):
    with pytest.raises(TokenizerError, match="half of a surrogate pair at character 3"):
        either.encode("abc\ud83d")


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
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": "<img>"}}, "not in the known form"),
        ("tokenizer_config.json", {"added_tokens_decoder": ["<img>"]}, "not in the known form"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"860": {"special": True}}}, "not in the known form"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"860": {"content": 5}}}, "not in the known form"),
        ("added_tokens.json", {"<img>": "first"}, "not in the known form"),
        ("special_tokens_map.json", {"pad_token": 5}, "not in the known form"),
        ("special_tokens_map.json", {"additional_special_tokens": [None]}, "not in the known form"),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "QWenTokenizer"},
            "tokenizer_class QWenTokenizer; .*add a tokenizer",
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


# tokenizer.json.

LETTERS = "abcdefghijklmnopqrstuvwxyzABCHT.,!?0123456789:请描述这张图片\n"
WORDS = ["▁the", "▁cat", "in", "er", "图片", "▁T", "he"]


def llama_style():
    """BPE over characters with byte fallback, as LLaMA's tokenizer.json: the blank is a mark, one in front."""
    tokenizers = pytest.importorskip("tokenizers")
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "c"), ("▁c", "a"), ("▁ca", "t"), ("i", "n"), ("e", "r")]
    merges += [("图", "片"), ("▁", "T"), ("h", "e")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
    pieces += [left + right for left, right in merges]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def byte_level():
    """BPE over bytes, as GPT-2's and Qwen's tokenizer.json; "<s>" is added at the end."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(
        ["the cat in the hat", "请描述这张图片。图片中有什么？", "where there is the other"], trainer
    )
    return tokenizer


@pytest.fixture(params=[llama_style, byte_level])
def fast(request, tmp_path):
    """A directory with a tokenizer.json, and the library's own object."""
    tokenizers = pytest.importorskip("tokenizers")
    library = request.param()
    library.add_special_tokens(["<s>", "</s>", tokenizers.AddedToken("<img>", rstrip=True), "</img>"])
    library.add_tokens(["<ref>"])
    # Left over from training, as many published files have it; neither may touch a prompt.
    library.enable_truncation(5)
    library.enable_padding(length=40)
    library.save(str(tmp_path / "tokenizer.json"))
    library.no_truncation()
    library.no_padding()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names})
    )
    return tmp_path, library


TEXTS = [
    "",
    " ",
    "the cat",
    " the  cat ",
    "The cat <img> in</img>\nthe <ref>hat</ref>!",
    "请描述这张图片 🐳 é",
    "<s>a</s>",
    "a,b .c",
]


def random_ids(tokenizer, rng, seed_texts=("the cat 请描述 🐳🐳 图片 é",)):
    """Sequences of ids that a model might emit: texts cut anywhere, joined with any other tokens."""
    text = [i for source in seed_texts for i in tokenizer.encode(source)]
    for _ in range(120):
        start, length = rng.randint(len(text)), rng.randint(1, 12)
        piece = text[start : start + length]
        noise = rng.randint(tokenizer.vocab_size, size=rng.randint(0, 5)).tolist()
        yield [int(i) for i in (piece + noise if rng.rand() < 0.5 else noise + piece)]


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


# Streaming.


def check_streaming(tokenizer, sequences, rng):
    for ids in sequences:
        whole = tokenizer.decode(ids)
        for longest in (1, 4):  # tokens per push
            decoder, said, at = StreamDecoder(tokenizer), "", 0
            while at < len(ids):
                step = rng.randint(1, longest + 1)
                said += decoder.push(ids[at : at + step])
                at += step
                # What is out stays: it is a beginning of the text, whatever follows.
                assert whole.startswith(said), ids
            assert said + decoder.flush() == whole, ids
            assert decoder.flush() == ""


def test_pieces_of_a_stream_join_to_the_whole(either):
    rng = np.random.RandomState(2)
    check_streaming(either, random_ids(either, rng), rng)
    byte_tokens = [[BYTES + byte for byte in rng.permutation(list("🐳请é a".encode())).tolist()] for _ in range(60)]
    check_streaming(either, byte_tokens, rng)
    check_streaming(either, [case["ids"] for case in GOLDENS["tokenizer_decode"]], rng)
    check_streaming(either, [case["generated_ids"] for case in GOLDENS["prompts"]], rng)


def test_pieces_of_a_stream_from_a_tokenizer_json(fast):
    rng = np.random.RandomState(3)
    tokenizer = load_tokenizer(fast[0])
    check_streaming(tokenizer, random_ids(tokenizer, rng), rng)


def test_pieces_of_a_stream_that_is_tidied(tmp_path):
    rng = np.random.RandomState(4)
    files = {"tokenizer_config.json": config(clean_up_tokenization_spaces=True)}
    tokenizer = load_tokenizer(directory_of(tmp_path, files))
    check_streaming(tokenizer, random_ids(tokenizer, rng, ["it is n't , he 's . ! a ' b"]), rng)


def test_a_stream_says_what_is_certain_and_holds_back_what_is_not(either):
    decoder = StreamDecoder(either)
    assert decoder.push(either.encode("你好 world", add_bos=False)) == "你好 world"
    assert decoder.push(either.encode(" ", add_bos=False)[:1]) == ""  # a blank at the end may yet go
    assert decoder.push(either.encode("a", add_bos=False)).strip(" ") == "a"
    whale = [BYTES + byte for byte in "🐳".encode()]
    assert [decoder.push([token]) for token in whale] == ["", "", "", "🐳"]
    assert decoder.push(whale[:2]) == ""
    assert decoder.flush() == "\ufffd\ufffd"


def test_special_tokens_between_the_bytes_of_a_character(fast, either):
    for tokenizer in (load_tokenizer(fast[0]), either):
        character = tokenizer.encode("🐳", add_bos=False)
        ids = [i for token in character for i in (token, tokenizer.eos_id)]
        check_streaming(tokenizer, [ids, ids[:-4], ids * 2, [*ids, character[-1]]], np.random.RandomState(5))
        assert tokenizer.decode(ids) == "🐳"


def test_a_stream_of_characters_from_a_tokenizer_json(fast):
    tokenizer = load_tokenizer(fast[0])
    text = "the 请🐳"
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push([token]) for token in tokenizer.encode(text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + decoder.flush() == text


# Arrays, and what may be imported.


def test_pad_left():
    ids, mask = pad_left([[5, 6, 7], [8], [], np.array([9, 10])], pad_id=3)
    np.testing.assert_array_equal(ids, [[5, 6, 7], [3, 3, 8], [3, 3, 3], [3, 9, 10]])
    np.testing.assert_array_equal(mask, [[1, 1, 1], [0, 0, 1], [0, 0, 0], [0, 1, 1]])
    assert ids.dtype == mask.dtype == np.int32
    # A pad id in the text is text.
    np.testing.assert_array_equal(pad_left([[3, 3], [1]], pad_id=3)[1], [[1, 1], [0, 1]])
    assert pad_left([], pad_id=0)[0].shape == (0, 0)


def test_processing_never_imports_jax_or_torch():
    modules = sorted(path.stem for path in Path(tokenizer_module.__file__).parent.glob("[!_]*.py"))
    assert {"conversation", "images", "tokenizer"} <= set(modules)
    code = f"""
import sys
from importlib import import_module
for module in {modules}:
    import_module("internvl_jax.processing." + module)
from internvl_jax.processing.tokenizer import load_tokenizer
load_tokenizer({str(CHECKPOINT)!r}).encode("a")
heavy = sorted({{"jax", "jaxlib", "flax", "torch", "transformers", "orbax"}} & set(sys.modules))
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# Special tokens that people type.


def everything_literal(text):
    return [(0, len(text))]


def test_special_tokens_that_are_typed_can_be_ordinary_text(either):
    special = {**GOLDENS["config"]["token_ids"], "<s>": 1, "</s>": 2, "<unk>": 0}
    assert either.special_tokens == set(special)
    for token, index in special.items():
        for text in (f"a{token}b", token, f" {token} {token}\n{token}", f"{token}<"):
            ids = either.encode(text, add_bos=False, literal=everything_literal(text))
            assert not set(ids) & set(special.values()), text
            assert either.decode(ids, skip_special_tokens=True).strip() == text.strip()
        # Where it is not typed but written by a template, it is what it was.
        text = f"a{token}b{token}c"
        ids = either.encode(text, add_bos=False, literal=[(len(text) - len(token) - 1, len(text))])
        assert ids.count(index) == 1
        first = either.encode(f"a{token}", add_bos=False)
        assert ids[: len(first)] == first
        # Side by side, each is what it is said to be.
        for text, start in ((f"{token}x{token}", len(token)), (f"{token}{token}x", len(token))):
            assert either.encode(text, add_bos=False, literal=[(start, len(text))]).count(index) == 1
            assert either.encode(f"{token}x", add_bos=False, literal=[(len(token), len(text))]).count(index) == 1
    for case in GOLDENS["tokenizer_encode"]:
        if not special_tokens_in(either, case["text"]):
            assert either.encode(case["text"], literal=everything_literal(case["text"])) == either.encode(case["text"])
    assert special_tokens_in(either, "a</s>b<img></img> <image>") == ["</s>", "<img>", "</img>"]


def test_tokens_that_are_added_as_ordinary_text_stay_tokens(tmp_path):
    values = config()
    values["added_tokens_decoder"]["869"] = {"content": "hello", "special": False}
    tokenizer = load_tokenizer(directory_of(tmp_path, {"tokenizer_config.json": values}))
    assert "hello" not in tokenizer.special_tokens
    assert 869 in tokenizer.encode("say hello </s>", literal=[(0, 14)])
    assert 2 not in tokenizer.encode("say hello </s>", literal=[(0, 14)])


def test_pieces_that_are_written_as_a_special_token_are_spelled(tmp_path):
    """Some sentencepiece models have the marker itself as a piece: it must not come back by that way."""
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat in the hat <img> b </img> img", "where there is the other"] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["<img>"],
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
    )
    index = 3
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {str(index): {"content": "<img>"}}})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("the <img> cat").count(index) == 1
    ids = tokenizer.encode("the <img> cat", literal=[(0, 13)])
    assert index not in ids
    assert tokenizer.decode(ids) == "the <img> cat"


def test_typed_special_tokens_in_a_tokenizer_json(fast):
    path, _ = fast
    tokenizer = load_tokenizer(path)
    special = {token: tokenizer.token_to_id(token) for token in ("<s>", "</s>", "<img>", "</img>")}
    assert tokenizer.special_tokens == set(special)
    for text in ("the</s>cat", "</s>", " <img> the", "the <ref>hat</img><s>"):
        ids = tokenizer.encode(text, add_bos=False, literal=everything_literal(text))
        assert not set(ids) & set(special.values())
        assert tokenizer.decode(ids, skip_special_tokens=False).strip() == text.strip()
        assert (tokenizer.token_to_id("<ref>") in ids) is ("<ref>" in text)  # an added word, not a special token
        # Template around it: the first three tokens and the last are read, the middle is text.
        whole = f"<s>the</s>{text}</s>"
        around = tokenizer.encode(whole, add_bos=False, literal=[(10, 10 + len(text))])
        template = tokenizer.encode("<s>the</s>", add_bos=False)
        assert around[: len(template)] == template
        assert around[-1] == special["</s>"]
        assert sum(index in special.values() for index in around) == 3
    for text in TEXTS:
        if not special_tokens_in(tokenizer, text):
            assert tokenizer.encode(text, literal=everything_literal(text)) == tokenizer.encode(text)
        # With nothing literal in reach, the renamed copy reads as the original does.
        other, renamed = tokenizer._renamed(text, [])
        assert other.encode(renamed).ids == tokenizer._tokenizer.encode(text).ids


def test_known_ids(fast, either, tmp_path):
    assert either.known(900).tolist() == [True] * 869 + [False] * 31
    assert either.known(5).tolist() == [True] * 5
    tokenizer = load_tokenizer(fast[0])
    assert tokenizer.known(tokenizer.vocab_size + 2).sum() == len(fast[1].get_vocab())
    values = config(additional_special_tokens=[])
    values["added_tokens_decoder"] = {"0": {"content": "<unk>"}, "1": {"content": "<s>"}, "2": {"content": "</s>"}}
    values["added_tokens_decoder"]["870"] = {"content": "<late>"}  # a hole before it
    (tmp_path / "hole").mkdir()
    holes = load_tokenizer(directory_of(tmp_path / "hole", {"tokenizer_config.json": values}))
    assert np.flatnonzero(~holes.known(875)).tolist() == [*range(860, 870), 871, 872, 873, 874]
