"""What transformers loads is read, whatever its files hold beside parameters; what is no weights is told by name."""

import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from support.published import VIT_BIN, VIT_SAFE, assert_same_bits, single_file, state_of  # noqa: E402

from checkpoints_convert import readers  # noqa: E402
from checkpoints_convert.convert import convert, load_hf  # noqa: E402
from checkpoints_convert.export import export  # noqa: E402
from checkpoints_convert.mapping import ConversionError, is_buffer, quantized_by  # noqa: E402
from checkpoints_convert.readers import open_weights  # noqa: E402
from internvl_jax import checkpoint  # noqa: E402
from internvl_jax.config import load_config  # noqa: E402
from internvl_jax.models import chat_model  # noqa: E402

BUFFER = "encoder.layers.0.self_attn.rotary_emb.inv_freq"


def read(directory, dtype=jnp.float32):
    return load_hf(directory, chat_model.abstract_params(load_config(directory), dtype))


def assert_reads_as(directory, original=VIT_BIN):
    jax.tree.map(np.testing.assert_array_equal, read(directory), read(original))


def assert_comes_back(directory, tmp_path):
    convert(directory, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    assert_same_bits(state_of(tmp_path / "back"), state_of(directory))


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(VIT_BIN, tmp_path / "hf")
    return tmp_path / "hf"


def edit_index(directory, change, name="pytorch_model.bin.index.json"):
    values = json.loads((directory / name).read_text())
    change(values["weight_map"])
    (directory / name).write_text(json.dumps(values))


def test_pickles_of_torch_before_1_6(copy, tmp_path, monkeypatch, caplog):
    for path in copy.glob("*.bin"):
        torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    monkeypatch.setattr(readers, "REMAP", 1000)  # a file that is read whole is not read again and again
    loads, original = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **options: loads.append(path.name) or original(path, **options))
    caplog.set_level("INFO", "checkpoints_convert")
    assert_reads_as(copy)
    assert loads[:4] == [path.name for path in sorted(copy.glob("*.bin"))] * 2
    assert re.search(r"cannot be mapped: it is read as a whole, \d+\.\d\d KiB of memory", caplog.text)
    assert_comes_back(copy, tmp_path)


def test_old_pickles_run_no_code(tmp_path, capfd):
    class Code:
        def __reduce__(self):
            return os.system, ("echo was run >&2",)

    directory = single_file(tmp_path, lambda state: None)
    state = {**state_of(VIT_BIN), "code": Code()}
    torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ConversionError, match="holds more than tensors"):
        open_weights(directory)
    assert "was run" not in capfd.readouterr().err


@pytest.mark.parametrize("cut", [1, 21, 300, 700, 5000])
def test_truncated_pickles_are_damage_wherever_they_end(cut, copy):
    """Of some lengths torch says EINVAL, which is not the system's word."""
    path = sorted(copy.glob("*.bin"))[0]
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ConversionError, match=f"{path.name} is truncated or damaged"):
        read(copy)


def test_truncated_old_pickles(copy):
    path = copy / "pytorch_model-00002-of-00002.bin"
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    for size in (3, len(data) // 2, len(data) - 4):
        path.write_bytes(data[:size])
        with pytest.raises(ConversionError, match=f"{path.name} is truncated or damaged .*download it again"):
            read(copy)


@pytest.mark.parametrize(
    "name", [BUFFER, "x.rotary_emb.cos_cached", "x.rotary_emb.sin_cached", "embeddings.position_ids", "x.masked_bias",
             "rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"],
)  # fmt: skip
def test_buffers_in_the_index_or_in_a_file_alone(name, copy, tmp_path):
    assert is_buffer(name)
    edit_index(copy, lambda index: index.update({name: "pytorch_model-00001-of-00002.bin"}))
    assert_reads_as(copy)
    edit_index(copy, lambda index: index.pop(name))
    path = copy / "pytorch_model-00002-of-00002.bin"
    torch.save({**torch.load(path, weights_only=True), name: torch.arange(6.0).reshape(1, 6)}, path)
    assert_reads_as(copy)
    assert_comes_back(copy, tmp_path)


def test_what_is_no_buffer_is_missed():
    names = ("encoder.layers.0.ls1", "model.layers.0.self_attn.q_proj.weight", "x.inv_frequency", "my_inv_freq.weight")
    assert not any(map(is_buffer, names))


@pytest.mark.parametrize("other", [torch.float32, torch.float16])
def test_layers_of_another_dtype(other, tmp_path, caplog):
    """Exact: the stack is read in the dtype that holds all of them, and exported in each one's own."""
    original = read(VIT_BIN)
    changed = [key for key in state_of(VIT_BIN) if ".layers.2." in key]

    def change(state):
        for key in changed:
            state[key] = state[key].to(other)
        state["encoder.layers.2.ls1"] = state["encoder.layers.2.ls1"] * (1 + 2**-9)  # a number that bfloat16 rounds

    directory = single_file(tmp_path, change)
    caplog.set_level("INFO", "checkpoints_convert")
    assert_comes_back(directory, tmp_path)
    assert "are stored in several dtypes, or in float64: read as float32" in caplog.text
    stored = checkpoint.stored_tree(tmp_path / "ours")["vision_model"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(stored["layers"])} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(stored["embeddings"])} == {"bfloat16"}
    ours = read(directory)
    np.testing.assert_array_equal(
        ours["vision_model"]["layers"]["ls1"][2],
        state_of(directory)["encoder.layers.2.ls1"].float().numpy(),
    )
    if other is torch.float32:  # float16 has rounded others too
        original["vision_model"]["layers"].pop("ls1"), ours["vision_model"]["layers"].pop("ls1")
        jax.tree.map(np.testing.assert_array_equal, ours, original)


def test_float64_is_read_as_float32(tmp_path):
    directory = single_file(tmp_path, lambda state: state.update({k: v.double() for k, v in state.items()}))
    assert_reads_as(directory)
    convert(directory, tmp_path / "ours")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(checkpoint.stored_tree(tmp_path / "ours"))} == {"float32"}
    export(tmp_path / "ours", tmp_path / "back")
    assert {values.dtype for values in state_of(tmp_path / "back").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("names", "method"),
    [
        (("a.q_proj.qweight", "a.q_proj.scales"), "GPTQ or AWQ (a.q_proj.qweight)"),
        (("a.weight", "a.weight.absmax"), "bitsandbytes (a.weight.absmax)"),
        (("a.SCB",), "bitsandbytes (a.SCB)"),
        (("a.weight.quant_state.bitsandbytes__nf4",), "bitsandbytes (a.weight.quant_state.bitsandbytes__nf4)"),
        (("a.weight_packed",), "compressed-tensors (a.weight_packed)"),
        (("a.weight_scale_inv",), "fp8 (a.weight_scale_inv)"),
        (("a.weight", "a.bias", "scale"), None),
    ],
)
def test_quantized_tensors_are_known_by_their_names(names, method):
    assert quantized_by(names) == method


def test_quantized_tensors_without_a_word_in_the_config(tmp_path):
    def change(state):
        state["encoder.layers.0.mlp.fc1.qweight"] = state.pop("encoder.layers.0.mlp.fc1.weight").to(torch.int32)

    directory = single_file(tmp_path, change)
    for run in (lambda: convert(directory, tmp_path / "ours"), lambda: read(directory)):
        with pytest.raises(ConversionError, match=r"is quantized by GPTQ or AWQ .*: take the checkpoint that"):
            run()
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("stale", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_a_stale_index_beside_complete_files_of_the_other_form(stale, single, tmp_path):
    """The one that is looked at first, or both forms are damaged: then the missing files are named alone."""
    good = VIT_BIN if "safetensors" in stale else VIT_SAFE
    directory = tmp_path / "hf"
    shutil.copytree(good, directory)
    if single and good == VIT_BIN:
        torch.save(state_of(good), directory / "pytorch_model.bin")
        (directory / "pytorch_model.bin.index.json").unlink()
    (directory / stale).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    if good == VIT_SAFE:  # safetensors come first
        assert_reads_as(directory, VIT_SAFE)
        return
    there = "pytorch_model.bin" if single else "pytorch_model-00001-of-00002.bin, pytorch_model-00002-of-00002.bin"
    with pytest.raises(ConversionError) as caught:
        read(directory)
    assert "missing: model-00001-of-00002.safetensors (named in model.safetensors.index.json)" in str(caught.value)
    assert f"complete: {there}. Remove model.safetensors.index.json" in str(caught.value)
    (directory / stale).unlink()
    assert_reads_as(directory)


def test_an_index_whose_files_are_absent(copy):
    (copy / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ConversionError, match=r"missing: pytorch_model-00002-of-00002\.bin \(named in the index\)"):
        read(copy)


@pytest.mark.parametrize("form", ["pytorch_model-00001-of-00001.bin", "model-00001-of-00001.safetensors"])
def test_one_shard_of_one_needs_no_index(form, tmp_path):
    directory = single_file(tmp_path, lambda state: None)
    (directory / "pytorch_model.bin").unlink()
    save = torch.save if form.endswith("bin") else safetensors_torch.save_file
    save({key: values.contiguous() for key, values in state_of(VIT_BIN).items()}, directory / form)
    assert_reads_as(directory)
    assert_comes_back(directory, tmp_path)


def llama(directory, **changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    values = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, **changes}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).save_pretrained(directory)
    return safetensors_torch.load_file(directory / "model.safetensors")


def test_a_tied_embedding_under_the_heads_name(tmp_path):
    state = llama(tmp_path / "hf", tie_word_embeddings=True)
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "other")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    safetensors_torch.save_file(state, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    assert_reads_as(tmp_path / "other", tmp_path / "hf")
    assert_comes_back(tmp_path / "other", tmp_path)


def test_names_without_the_models_prefix(tmp_path):
    """As a LlamaModel alone is saved; transformers puts them into a LlamaForCausalLM, whose head is tied."""
    state = llama(tmp_path / "hf", tie_word_embeddings=True)
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "other")
    state = {key.removeprefix("model."): values for key, values in state.items()}
    safetensors_torch.save_file(state, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    assert_reads_as(tmp_path / "other", tmp_path / "hf")
    assert_comes_back(tmp_path / "other", tmp_path)


# Files that are not what their names say.

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 9931000000\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>401</title></head></html>"


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
@pytest.mark.parametrize(
    ("content", "words", "advice"),
    [
        (POINTER, "is a git-lfs pointer", "git lfs pull"),
        (PAGE, "is a web page", "download it again"),
        (b"", "it is empty", "download it again"),
    ],
)
def test_weights_that_are_none(weights, content, words, advice, tmp_path):
    shutil.copytree(VIT_BIN if weights == "bin" else VIT_SAFE, tmp_path / "hf")
    path = next((tmp_path / "hf").glob("*model-00002*"))
    path.write_bytes(content)
    with pytest.raises(ConversionError) as caught:
        read(tmp_path / "hf")
    assert all(text in str(caught.value) for text in (path.name, words, advice))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.model", POINTER, "tokenizer.model is a git-lfs pointer.*git lfs pull"),
        ("tokenizer.model", PAGE, "tokenizer.model is a web page"),
        ("tokenizer.model", b"", "tokenizer.model is empty"),
        ("tokenizer.json", POINTER, "tokenizer.json is a git-lfs pointer"),
        ("preprocessor_config.json", PAGE, "preprocessor_config.json is a web page"),
        ("README.md", POINTER, "README.md is a git-lfs pointer"),
        ("config.json", POINTER, "config.json is a git-lfs pointer"),
        ("config.json", PAGE, "config.json is a web page"),
        ("pytorch_model.bin.index.json", POINTER, "index.json is a git-lfs pointer"),
    ],
)
def test_side_files_that_are_none_are_found_before_work(name, content, words, copy, tmp_path):
    (copy / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        convert(copy, tmp_path / "ours")
    assert os.listdir(tmp_path) == ["hf"]


def test_side_files_that_may_be_anything(copy, tmp_path):
    (copy / "README.md").write_bytes(PAGE)
    (copy / "notes.txt").write_bytes(b"")
    convert(copy, tmp_path / "ours")
    assert (tmp_path / "ours" / "README.md").read_bytes() == PAGE


@pytest.mark.parametrize("source", [VIT_BIN, VIT_SAFE], ids=["bin", "safetensors"])
def test_byte_order_marks(source, tmp_path):
    shutil.copytree(source, tmp_path / "hf")
    for path in (tmp_path / "hf").glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert_reads_as(tmp_path / "hf", source)
    convert(tmp_path / "hf", tmp_path / "ours")
    for path in (*(tmp_path / "ours").glob("*.json"), *(tmp_path / "ours" / "params").glob("*")):
        if path.is_file() and not path.read_bytes().startswith(b"\xef"):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    export(tmp_path / "ours", tmp_path / "back")
    assert_same_bits(state_of(tmp_path / "back"), state_of(source))


@pytest.mark.parametrize("source", [VIT_BIN, VIT_SAFE], ids=["bin", "safetensors"])
@pytest.mark.parametrize("number", [5, 13])
def test_an_error_of_the_system_is_no_damage(source, number, monkeypatch):
    shard = next(source.glob("*model-00002*"))
    original = Path.open

    def refuse(path, *args, **kwargs):
        if path == shard:
            raise OSError(number, os.strerror(number), str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        read(source)
    assert caught.value.filename == str(shard)


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (RuntimeError("unable to mmap 99 bytes from file </a/b.bin>: Cannot allocate memory (12)"), 12),
        (RuntimeError("unable to open file </a/b.bin> in read-only mode: Input/output error (5)"), 5),
        (RuntimeError("PytorchStreamReader failed reading zip archive: failed finding central directory"), None),
        (MemoryError(), None),
    ],
)
def test_what_torch_says_of_the_system(error, number, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    expected = OSError if number else MemoryError if isinstance(error, MemoryError) else ConversionError
    with pytest.raises(expected) as caught:
        open_weights(VIT_BIN)
    assert getattr(caught.value, "errno", None) == number
