"""Parameters on disk: whole or not at all, readable by Orbax alone, damage noticed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import environment

from internvl_jax import checkpoint
from internvl_jax.checkpoint import CheckpointError, Writer, chunk_shape, load, save, stored_tree
from internvl_jax.config import PRESETS
from internvl_jax.models import chat_model

NANO = PRESETS["nano"]()


def random_tree(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = chat_model.abstract_params(NANO)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), dtype), shapes)


def abstract(tree, dtype=None):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype), tree)


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (name, a), (_, b) in zip(checkpoint.named_leaves(ours), checkpoint.named_leaves(theirs)):
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with nano's parameters, random bfloat16, and the parameters."""
    directory, tree = tmp_path_factory.mktemp("saved"), random_tree(jnp.bfloat16)
    save(directory, tree)
    return directory, tree


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of `saved` to damage, whose files are links."""
    shutil.copytree(saved[0], tmp_path / "copy", copy_function=os.link)
    return tmp_path / "copy"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_save_and_load(dtype, tmp_path):
    tree = {"mlp1": {"norm": {"scale": jnp.linspace(-3, 3, 7, dtype=dtype)}}}
    save(tmp_path, tree)
    assert checkpoint.is_converted(tmp_path)
    assert_equal(load(tmp_path, abstract(tree)), tree)


def test_whole_model(saved):
    directory, tree = saved
    assert_equal(load(directory, abstract(tree)), tree)
    assert abstract(tree) == stored_tree(directory)
    assert_equal(load(directory, abstract(tree, jnp.float32)), jax.tree.map(lambda x: x.astype(jnp.float32), tree))


def test_progress(saved):
    directory, tree = saved
    calls = []
    load(directory, abstract(tree), progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert done[-1] == calls[-1][1] == sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", ["StandardCheckpointer", "PyTreeCheckpointer"])
def test_orbax_alone_restores(saved, name):
    ocp = pytest.importorskip("orbax.checkpoint")
    directory, tree = saved
    with getattr(ocp, name)() as checkpointer:
        if name == "StandardCheckpointer":
            restored = checkpointer.restore(directory / "params", abstract(tree))
        else:
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            restored = checkpointer.restore(directory / "params", restore_args=as_numpy)
    assert_equal(restored, tree)


def test_what_is_not_wanted_is_not_read(saved):
    directory, tree = saved
    wanted = {"vision_model": abstract(tree["vision_model"])}
    wanted["vision_model"]["layers"] = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((4, *leaf.shape[1:]), leaf.dtype), wanted["vision_model"]["layers"]
    )
    loaded = load(directory, wanted)
    assert_equal(loaded["vision_model"]["layers"], jax.tree.map(lambda leaf: leaf[:4], tree["vision_model"]["layers"]))
    assert set(loaded) == {"vision_model"}


def test_reader(saved):
    directory, tree = saved
    reader = checkpoint.Reader(directory)
    leaf = tree["vision_model"]["layers"]["attn"]["qkv"]["kernel"]
    assert reader.leaves["vision_model/layers/attn/qkv/kernel"] == (leaf.shape, leaf.dtype)
    index = (2, slice(None), 1)
    np.testing.assert_array_equal(reader.read("vision_model/layers/attn/qkv/kernel", index), leaf[index])
    np.testing.assert_array_equal(reader.read("mlp1/norm/scale"), tree["mlp1"]["norm"]["scale"])


def test_chunks_of_the_full_size():
    """A layer each, in parts where it is large; what is small stays whole."""
    shapes = dict(checkpoint.named_leaves(chat_model.abstract_params(PRESETS["internvl_chat_v1_1"]())))
    chunks = {name: chunk_shape(name, leaf.shape, 2) for name, leaf in shapes.items()}
    assert all(chunk[0] == 1 for name, chunk in chunks.items() if "/layers/" in name)
    assert chunks["language_model/layers/mlp/gate_proj/kernel"][-1] == 13824 // 8
    assert chunks["vision_model/layers/ls1"] == (1, 3200)
    assert max(np.prod(chunk) for chunk in chunks.values()) * 2 < 80e6


def test_exists_already(saved):
    with pytest.raises(CheckpointError, match="exists already"):
        save(*saved)


def test_leaving_without_commit_leaves_nothing(tmp_path):
    tree = {"mlp1": {"norm": {"scale": jnp.ones(4)}}}
    with Writer(tmp_path, tree) as writer:
        writer.write("mlp1/norm/scale", ..., np.ones(4, np.float32))
        assert any(tmp_path.iterdir())
    assert not any(tmp_path.iterdir())


def test_failure_while_opening_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no")

    monkeypatch.setattr(checkpoint, "_open", refuse)
    with pytest.raises(OSError, match="no"):
        Writer(tmp_path, {"mlp1": {"norm": {"scale": jnp.ones(4)}}})
    assert not any(tmp_path.iterdir())


def test_not_a_checkpoint(tmp_path):
    assert not checkpoint.is_converted(tmp_path)
    with pytest.raises(CheckpointError, match="convert a checkpoint"):
        stored_tree(tmp_path)


def test_missing_and_misshapen_leaves(saved):
    directory, tree = saved
    wanted = abstract(tree)
    wanted["mlp1"]["more"] = jax.ShapeDtypeStruct((3,), jnp.float32)
    scale = wanted["mlp1"]["norm"]["scale"]
    wanted["mlp1"]["norm"]["scale"] = jax.ShapeDtypeStruct((7,), scale.dtype)
    layers = wanted["language_model"]["layers"]["input_layernorm"]
    layers["scale"] = jax.ShapeDtypeStruct((2, *layers["scale"].shape[1:]), jnp.float32)
    with pytest.raises(CheckpointError) as caught:
        load(directory, wanted)
    text = str(caught.value)
    assert "missing: mlp1/more [3]" in text
    assert f"misshapen: mlp1/norm/scale is {list(scale.shape)}, config.json asks for [7]" in text
    assert "misshapen: language_model/layers/input_layernorm/scale" in text


def chunk_of(directory, name):
    return next(path for path in sorted((directory / "params" / name).iterdir()) if path.name[0] != ".")


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


ON_EIGHT_DEVICES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from internvl_jax import checkpoint, sharding
from internvl_jax.config import ChatConfig
from internvl_jax.models import chat_model

published, converted = sys.argv[1:]
config = ChatConfig.from_file(published)
plain = chat_model.abstract_params(config, jnp.float32)
expected = checkpoint.load(converted, plain)
for spec in ("tensor=4", "fsdp=4,tensor=2", "data=8"):
    mesh = sharding.make_mesh(spec)
    shardings = sharding.storage_shardings(plain, mesh)
    wanted = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), plain, shardings
    )
    from checkpoints_convert.convert import load_hf
    for tree in (checkpoint.load(converted, wanted), load_hf(published, wanted)):
        for (name, a), (_, b), (_, c) in zip(*map(checkpoint.named_leaves, (tree, expected, wanted))):
            assert a.sharding == c.sharding, name
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)
    split = [leaf for leaf in jax.tree.leaves(tree) if not leaf.is_fully_replicated]
    assert (len(split) > 10) == (spec != "data=8"), spec
print("equal")
"""


def test_onto_meshes_of_eight_devices(tmp_path):
    """Converted and published directories, read onto meshes, against one device."""
    pytest.importorskip("torch")
    from checkpoints_convert.convert import convert

    published = Path(__file__).parent / "data" / "internvl_chat_v1_1" / "checkpoint"
    convert(published, tmp_path / "converted")
    result = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES, str(published), str(tmp_path / "converted")],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.strip() == "equal", result.stderr[-3000:]
