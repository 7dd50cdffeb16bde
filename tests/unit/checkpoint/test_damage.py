"""Damaged checkpoints: missing, truncated and changed files, NaN and Inf are noticed and named."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.checkpoint_cases import abstract, chunk_of, flip, random_tree

from internvl_jax import checkpoint
from internvl_jax.checkpoint import CheckpointError, load, save, stored_tree


def test_truncated_chunk(damaged):
    chunk = chunk_of(damaged, "vision_model.layers.mlp.fc1.kernel")
    data = chunk.read_bytes()
    chunk.unlink()
    chunk.write_bytes(data[:-2])
    with pytest.raises(CheckpointError) as caught:
        load(damaged, abstract(random_tree()))
    assert f"{chunk}: {len(data) - 2} bytes, expected {len(data)}" in str(caught.value)


def test_missing_chunk(damaged):
    chunk = chunk_of(damaged, "mlp1.fc1.bias")
    chunk.unlink()
    with pytest.raises(CheckpointError, match=r"no bytes, expected"):
        stored_tree(damaged)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"tree_metadata": {"a": 1}}'])
def test_damaged_metadata(damaged, content):
    path = damaged / "params" / "_METADATA"
    path.unlink()
    path.write_text(content)
    with pytest.raises(CheckpointError, match="damaged"):
        stored_tree(damaged)


def test_damaged_array_metadata(damaged):
    path = damaged / "params" / "mlp1.fc1.bias" / ".zarray"
    path.unlink()
    path.write_text(json.dumps({"shape": [3]}))
    with pytest.raises(CheckpointError, match=r"mlp1\.fc1\.bias"):
        stored_tree(damaged)


@pytest.mark.parametrize("name", ["vision_model.layers.mlp.fc1.kernel", "mlp1.fc1.bias"])
def test_flipped_bits_are_seen(damaged, saved, name):
    chunk = chunk_of(damaged, name)
    flip(chunk, 101)
    flip(chunk, 40)
    tree = saved[1]
    for read in (
        lambda: load(damaged, abstract(tree)),
        lambda: checkpoint.verify(damaged),
        lambda: checkpoint.Reader(damaged).read(name.replace(".", "/"), (0,) if "layers" in name else ...),
    ):
        with pytest.raises(CheckpointError, match="the checksum does not match") as caught:
            read()
        assert str(chunk) in str(caught.value)
    (damaged / "params" / "checksums.json").unlink()  # as earlier versions wrote
    load(damaged, abstract(tree))
    assert checkpoint.verify(damaged) == (sum(leaf.nbytes for leaf in jax.tree.leaves(tree)), False)


def test_verify(saved):
    directory, tree = saved
    calls = []
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert checkpoint.verify(directory, progress=lambda *call: calls.append(call)) == (size, True)
    assert calls[-1] == (size, size, "verifying")


def test_verify_lists_all(damaged):
    chunks = [chunk_of(damaged, name) for name in ("vision_model.layers.ls1", "mlp1.fc2.kernel")]
    for chunk in chunks:
        flip(chunk, 0)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.verify(damaged)
    assert all(str(chunk) in str(caught.value) for chunk in chunks)


def test_damaged_checksums_and_metadata(damaged):
    params = damaged / "params"
    flip(params / "mlp1.fc1.bias" / ".zarray", (params / "mlp1.fc1.bias" / ".zarray").read_bytes().index(b"dtype"))
    with pytest.raises(CheckpointError, match=r"mlp1\.fc1\.bias"):
        stored_tree(damaged)
    metadata = (params / "mlp1.fc2.bias" / ".zarray").read_text()
    (params / "mlp1.fc1.bias" / ".zarray").write_text(metadata.replace("bfloat16", "<f2"))  # of the same size
    with pytest.raises(CheckpointError, match=r"mlp1\.fc1\.bias/\.zarray is damaged"):
        load(damaged, abstract(random_tree()))
    (params / "mlp1.fc1.bias" / ".zarray").write_text(metadata)
    path = params / "checksums.json"
    text = path.read_text()
    for content, words in (
        (text.replace("mlp1.norm.scale", "mlp1.norm.stale"), "lacks mlp1.norm.scale"),
        (text[:-1], "not readable JSON"),
        ("{}", "damaged"),
        ('{"crc32": {"a": {"0": "x"}}}', "a checksum is not a number"),
    ):
        path.unlink()
        path.write_text(content)
        with pytest.raises(CheckpointError, match=words):
            load(damaged, {"mlp1": {"norm": {"scale": jax.ShapeDtypeStruct((480,), jnp.float32)}}})


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("checksums", [True, False])
def test_numbers_that_are_not_finite_are_named(number, checksums, tmp_path):
    tree = {"vision_model": {"layers": {"mlp": {"fc1": {"kernel": np.ones((3, 4, 5), "bfloat16")}}}}}
    tree["vision_model"]["layers"]["mlp"]["fc1"]["kernel"][2, 3, 1] = number
    save(tmp_path, tree)
    if not checksums:
        (tmp_path / "params" / "checksums.json").unlink()
    name = "vision_model/layers/mlp/fc1/kernel"
    for read in (
        lambda: load(tmp_path, abstract(tree)),
        lambda: load(tmp_path, abstract(tree, jnp.float32)),
        lambda: checkpoint.verify(tmp_path),
        lambda: checkpoint.Reader(tmp_path).read(name, (2,)),
    ):
        with pytest.raises(CheckpointError, match=rf"{name} holds numbers that are not finite \({number}\)"):
            read()
    checkpoint.Reader(tmp_path).read(name, (1,))
    few = {"vision_model": {"layers": {"mlp": {"fc1": {"kernel": jax.ShapeDtypeStruct((2, 4, 5), jnp.float32)}}}}}
    load(tmp_path, few)  # the third layer is not read


def test_a_cast_that_overflows_is_named(tmp_path):
    save(tmp_path, {"a": np.full(3, 3.4e38, np.float32)})
    with pytest.raises(CheckpointError, match="a holds numbers that are not finite"):
        load(tmp_path, {"a": jax.ShapeDtypeStruct((3,), jnp.bfloat16)})


def test_a_scale_that_is_not_finite_is_named(tmp_path):
    kernel = {"qvalue": np.ones((2, 3, 4), "int8"), "scale": np.full((2, 1, 4), np.nan, np.float32)}
    save(tmp_path, {"language_model": {"layers": {"kernel": kernel}}})
    with pytest.raises(CheckpointError, match="language_model/layers/kernel/scale holds numbers"):
        load(tmp_path, stored_tree(tmp_path))


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_an_error_of_the_system_is_not_taken_for_damage(saved, monkeypatch, error):
    directory, tree = saved
    real = Path.read_bytes

    def refuse(file):
        def read(path):
            if path.name == file:
                raise type(error)(error.errno, error.strerror, str(path))
            return real(path)

        return read

    for file in ("_METADATA", ".zarray", "checksums.json"):
        monkeypatch.setattr(Path, "read_bytes", refuse(file))
        with pytest.raises(type(error), match=file):
            load(directory, abstract(tree))
