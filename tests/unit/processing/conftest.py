"""Tokenizers under either setting, and of either kind of tokenizer.json."""

import json

import pytest
from support.tokenizer_cases import CHECKPOINT, byte_level, llama_style

from internvl_jax.processing.tokenizer import load_tokenizer


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not_legacy"])
def either(request):
    return load_tokenizer(CHECKPOINT, legacy=request.param)


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
