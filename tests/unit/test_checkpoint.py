"""Parameters on disk: whole or not at all, readable by Orbax alone, damage noticed."""

import json
import os
import shutil
import subprocess
import sys
import types
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.paths import DATA
from support.processes import environment

from internvl_jax import checkpoint, chunk_store
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

    monkeypatch.setattr(checkpoint, "LeafFile", refuse)
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
    monkeypatch.setattr(checkpoint, "chunk_shape", lambda name, shape, itemsize: (1, shape[1] // 4, shape[2]))
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
    store = checkpoint._open_leaves(tmp_path, ["vision_model/layers/kernel"])["vision_model/layers/kernel"]
    before = checkpoint.bytes_read()
    parts = checkpoint._load_leaf(store, leaf)
    assert checkpoint.bytes_read() - before == checkpoint._bytes_to_read(store, leaf) == values.nbytes // 2
    for index, part in zip([*mine, mine[0]], parts):
        np.testing.assert_array_equal(part, values[index])


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


def flip(path, at, bit=3):
    """Change one bit of a file that may be a link."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.unlink()
    path.write_bytes(data)


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
        with pytest.raises(CheckpointError, match="the checksum is not that of what was written") as caught:
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
        ('{"crc32": {"a": {"0": "x"}}}', "a checksum is no number"),
    ):
        path.unlink()
        path.write_text(content)
        with pytest.raises(CheckpointError, match=words):
            load(damaged, {"mlp1": {"norm": {"scale": jax.ShapeDtypeStruct((480,), jnp.float32)}}})


def test_checksums_of_any_order_of_writing(tmp_path, monkeypatch):
    """Chunks that are written piece by piece, or by another process, are summed at the end; int4 as it lies on disk."""
    monkeypatch.setattr(checkpoint, "chunk_shape", lambda name, shape, itemsize: tuple(-(-n // 2) for n in shape))
    rng = np.random.default_rng(0)
    values = {"a": rng.standard_normal((4, 6)).astype("bfloat16"), "b": rng.integers(-8, 8, (4, 6)).astype("int4")}
    with Writer(tmp_path, values) as writer:
        writer.write("a", (slice(0, 3), ...), values["a"][:3])
        writer.write("a", (3,), values["a"][3])
        writer.write("b", (slice(None), slice(0, 3)), values["b"][:, :3])
        writer.write("b", (..., slice(3, 6)), values["b"][:, 3:])
        writer.commit()
    sums = json.loads((tmp_path / "params" / "checksums.json").read_text())["crc32"]
    for name, chunks in sums.items():
        for file, crc in chunks.items():
            assert zlib.crc32((tmp_path / "params" / name / file).read_bytes()) == crc, (name, file)
    assert [sorted(sums[name]) for name in "ab"] == [[".zarray", "0.0", "0.1", "1.0", "1.1"]] * 2
    assert checkpoint.verify(tmp_path)[1]
    assert_equal(load(tmp_path, abstract(values)), values)
    flip(tmp_path / "params" / "b" / "1.0", 2)
    part = jax.ShapeDtypeStruct((4, 6), "int4", sharding=None)
    with pytest.raises(CheckpointError, match=r"b/1\.0 is damaged"):
        load(tmp_path, {"b": part})


def test_every_part_of_a_chunk_that_is_read_is_checked(tmp_path):
    chunk_store.write_checksums(tmp_path, {})
    metadata = chunk_store.array_metadata((8, 6), (4, 3), "float32")
    leaf = chunk_store.LeafFile(tmp_path / "a", "a", create=True, metadata=metadata)
    values = np.arange(48, dtype=np.float32).reshape(8, 6)
    leaf.write(..., values).result()
    again = chunk_store.LeafFile(tmp_path / "a", "a", leaf.complete())
    np.testing.assert_array_equal(again.read(((3, 5), (2, 4))), values[3:5, 2:4])
    np.testing.assert_array_equal(again.read(((0, 4), (0, 3)), "bfloat16"), values[:4, :3].astype("bfloat16"))
    flip(tmp_path / "a" / "1.1", 7)
    again.read(((0, 4), (0, 6)))
    for bounds in (((4, 5), (3, 4)), ((0, 8), (5, 6)), ((0, 8), (0, 6))):
        with pytest.raises(CheckpointError, match=r"a/1\.1 is damaged"):
            again.read(bounds)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("size", [1, 17, (1 << 18) + 5])
def test_not_finite(dtype, size):
    values = np.random.default_rng(0).standard_normal(size).astype(dtype)
    values[0] = np.finfo(dtype).max if dtype != "bfloat16" else 3e38
    assert chunk_store.not_finite(values) is None
    for number in ("inf", "-inf", "nan"):
        values[-1] = float(number)
        assert chunk_store.not_finite(values) == number
    assert chunk_store.not_finite(np.zeros((0, 3), dtype)) is None
    assert chunk_store.not_finite(np.full(3, -1, "int8")) is None


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


ON_EIGHT_DEVICES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from internvl_jax import checkpoint
from internvl_jax.models import param_sharding
from internvl_jax.parallel import mesh as mesh_lib
from internvl_jax.config import load_config
from internvl_jax.models import chat_model

published, converted = sys.argv[1:]
config = load_config(published)
plain = chat_model.abstract_params(config, jnp.float32)
expected = checkpoint.load(converted, plain)
for spec in ("tensor=4", "fsdp=4,tensor=2", "data=8"):
    mesh = mesh_lib.make_mesh(spec)
    shardings = param_sharding.storage_shardings(plain, mesh)
    wanted = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), plain, shardings
    )
    from checkpoints_convert.convert import load_hf
    for tree in (checkpoint.load(converted, wanted), load_hf(published, wanted)):
        for (name, a), (_, b), (_, c) in zip(*map(checkpoint.named_leaves, (tree, expected, wanted))):
            assert a.sharding == c.sharding, name
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)
        pieces = [np.asarray(values).size for _, values in checkpoint._own_pieces(name, a)]
        assert sum(pieces) == a.size, name  # replicas do not all write
    split = [leaf for leaf in jax.tree.leaves(tree) if not leaf.is_fully_replicated]
    assert (len(split) > 10) == (spec != "data=8"), spec
print("equal")
"""


def test_onto_meshes_of_eight_devices(tmp_path):
    """Converted and published directories, read onto meshes, against one device."""
    pytest.importorskip("torch")
    from checkpoints_convert.convert import convert

    published = DATA / "internvl_chat_v1_1" / "checkpoint"
    convert(published, tmp_path / "converted")
    result = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES, str(published), str(tmp_path / "converted")],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.strip() == "equal", result.stderr[-3000:]
