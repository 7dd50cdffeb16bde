"""Tokenizer files for tests: the golden checkpoint's with changed settings, and small tokenizer.json."""

import json
import shutil

import pytest
from support.paths import DATA

BUNDLE = DATA / "internvl_chat_v1_1"
CHECKPOINT = BUNDLE / "checkpoint"
GOLDENS = json.loads((BUNDLE / "goldens.json").read_text("utf-8"))
RECORDED = json.loads((DATA / "tokenizer_transformers_4_37.json").read_text("utf-8"))["cases"]
SETTINGS = {True: "legacy_true", False: "legacy_false"}
BYTES = 3  # id of the token of byte 0


def directory_of(path, files):
    """A directory with the bundle's sentencepiece model and these JSON files."""
    shutil.copy(CHECKPOINT / "tokenizer.model", path)
    for name, content in files.items():
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def config(without=(), **changes):
    values = json.loads((CHECKPOINT / "tokenizer_config.json").read_text()) | changes
    return {name: value for name, value in values.items() if name not in without}


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


def everything_literal(text):
    return [(0, len(text))]
