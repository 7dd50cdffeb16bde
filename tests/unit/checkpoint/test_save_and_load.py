"""Parameters on disk: whole or not at all, readable by Orbax alone."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.checkpoint_cases import abstract, assert_equal

from internvl_jax import checkpoint
from internvl_jax.checkpoint import CheckpointError, Writer, load, save, stored_tree, writer


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


def test_exists_already(saved):
    with pytest.raises(CheckpointError, match="exists already"):
        save(*saved)


def test_leaving_without_commit_leaves_nothing(tmp_path):
    tree = {"mlp1": {"norm": {"scale": jnp.ones(4)}}}
    with Writer(tmp_path, tree) as out:
        out.write("mlp1/norm/scale", ..., np.ones(4, np.float32))
        assert any(tmp_path.iterdir())
    assert not any(tmp_path.iterdir())


def test_failure_while_opening_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no")

    monkeypatch.setattr(writer, "LeafFile", refuse)
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


@pytest.mark.parametrize("layers", [6, 4])
def test_vision_layers_of_another_width_are_misshapen(saved, layers):
    """Fewer layers may be wanted than are stored; narrower or wider ones may not."""
    directory, tree = saved
    for name, axis in (("ls1", 1), ("mlp/fc1/kernel", 1), ("mlp/fc1/kernel", 2), ("ls1", 0)):
        leaf = tree["vision_model"]["layers"]
        for part in name.split("/"):
            leaf = leaf[part]
        for more in (-1, 1):
            shape = [layers, *leaf.shape[1:]]
            shape[axis] += more
            wanted: dict = {"vision_model": {"layers": {}}}
            node = wanted["vision_model"]["layers"]
            *parents, last = name.split("/")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
            if axis == 0 and shape[0] <= leaf.shape[0]:
                load(directory, wanted)
                continue
            with pytest.raises(CheckpointError, match=f"misshapen: vision_model/layers/{name} is "):
                load(directory, wanted)


def test_a_process_reads_what_its_devices_hold(tmp_path, monkeypatch):
    """jax asks for the parts of this process's devices, and only their chunks are read from the disk, each once."""
    monkeypatch.setattr(writer, "chunk_shape", lambda name, shape, itemsize: (1, shape[1] // 4, shape[2]))
    values = np.arange(3 * 16 * 32, dtype=np.float32).reshape(3, 16, 32)
    save(tmp_path, {"vision_model": {"layers": {"kernel": values}}})
    mine = [(slice(0, 3), slice(4, 8), slice(None)), (slice(0, 3), slice(8, 12), slice(None))]

    class Sharding:
        def addressable_devices_indices_map(self, shape):
            return dict(enumerate([*mine, mine[0]]))  # two of three devices hold the same

    def make(shape, sharding, callback):
        return [callback(index) for index in sharding.addressable_devices_indices_map(shape).values()]

    monkeypatch.setattr(jax, "make_array_from_callback", make)
    leaf = types.SimpleNamespace(shape=values.shape, dtype=values.dtype, sharding=Sharding())
    before, announced = checkpoint.bytes_read(), []
    abstract = {"vision_model": {"layers": {"kernel": leaf}}}
    loaded = load(tmp_path, abstract, progress=lambda done, total, what: announced.append((done, total)))
    parts = loaded["vision_model"]["layers"]["kernel"]
    metadata = tmp_path / "params" / "vision_model.layers.kernel" / ".zarray"  # which TensorStore reads as it opens it
    assert checkpoint.bytes_read() - before == values.nbytes // 2 + metadata.stat().st_size
    assert announced == [(values.nbytes // 2, values.nbytes // 2)]
    for index, part in zip([*mine, mine[0]], parts):
        np.testing.assert_array_equal(part, values[index])
