"""Chunks of arrays on disk, and their checksums."""

import json
import zlib

import jax
import numpy as np
import pytest
from support.checkpoint_cases import abstract, assert_equal, flip

from internvl_jax import checkpoint
from internvl_jax.checkpoint import CheckpointError, Writer, chunks, first_non_finite, load, writer
from internvl_jax.checkpoint.layout import chunk_shape
from internvl_jax.config import PRESETS
from internvl_jax.models import chat_model


def test_checksums_of_any_order_of_writing(tmp_path, monkeypatch):
    """Chunks that are written piece by piece, or by another process, are summed at the end; int4 as it lies on disk."""
    monkeypatch.setattr(writer, "chunk_shape", lambda name, shape, itemsize: tuple(-(-n // 2) for n in shape))
    rng = np.random.default_rng(0)
    values = {"a": rng.standard_normal((4, 6)).astype("bfloat16"), "b": rng.integers(-8, 8, (4, 6)).astype("int4")}
    with Writer(tmp_path, values) as out:
        out.write("a", (slice(0, 3), ...), values["a"][:3])
        out.write("a", (3,), values["a"][3])
        out.write("b", (slice(None), slice(0, 3)), values["b"][:, :3])
        out.write("b", (..., slice(3, 6)), values["b"][:, 3:])
        out.commit()
    sums = json.loads((tmp_path / "params" / "checksums.json").read_text())["crc32"]
    for name, files in sums.items():
        for file, crc in files.items():
            assert zlib.crc32((tmp_path / "params" / name / file).read_bytes()) == crc, (name, file)
    assert [sorted(sums[name]) for name in "ab"] == [[".zarray", "0.0", "0.1", "1.0", "1.1"]] * 2
    assert checkpoint.verify(tmp_path)[1]
    assert_equal(load(tmp_path, abstract(values)), values)
    flip(tmp_path / "params" / "b" / "1.0", 2)
    part = jax.ShapeDtypeStruct((4, 6), "int4", sharding=None)
    with pytest.raises(CheckpointError, match=r"b/1\.0 is damaged"):
        load(tmp_path, {"b": part})


def test_every_part_of_a_chunk_that_is_read_is_checked(tmp_path):
    chunks.write_checksums(tmp_path, {})
    metadata = chunks.array_metadata((8, 6), (4, 3), "float32")
    leaf = chunks.LeafFile(tmp_path / "a", "a", create=True, metadata=metadata)
    values = np.arange(48, dtype=np.float32).reshape(8, 6)
    leaf.write(..., values).result()
    again = chunks.LeafFile(tmp_path / "a", "a", leaf.all_checksums())
    np.testing.assert_array_equal(again.read(((3, 5), (2, 4))), values[3:5, 2:4])
    np.testing.assert_array_equal(again.read(((0, 4), (0, 3)), "bfloat16"), values[:4, :3].astype("bfloat16"))
    flip(tmp_path / "a" / "1.1", 7)
    again.read(((0, 4), (0, 6)))
    for bounds in (((4, 5), (3, 4)), ((0, 8), (5, 6)), ((0, 8), (0, 6))):
        with pytest.raises(CheckpointError, match=r"a/1\.1 is damaged"):
            again.read(bounds)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("size", [1, 17, (1 << 18) + 5])
def test_first_non_finite(dtype, size):
    values = np.random.default_rng(0).standard_normal(size).astype(dtype)
    values[0] = np.finfo(dtype).max if dtype != "bfloat16" else 3e38
    assert first_non_finite(values) is None
    for number in ("inf", "-inf", "nan"):
        values[-1] = float(number)
        assert first_non_finite(values) == number
    assert first_non_finite(np.zeros((0, 3), dtype)) is None
    assert first_non_finite(np.full(3, -1, "int8")) is None


def test_chunks_of_the_full_size():
    """A layer each, in parts where it is large; what is small stays whole."""
    shapes = dict(checkpoint.named_leaves(chat_model.abstract_params(PRESETS["internvl_chat_v1_1"]())))
    by_name = {name: chunk_shape(name, leaf.shape, 2) for name, leaf in shapes.items()}
    assert all(chunk[0] == 1 for name, chunk in by_name.items() if "/layers/" in name)
    assert by_name["language_model/layers/mlp/gate_proj/kernel"][-1] == 13824 // 8
    assert by_name["vision_model/layers/ls1"] == (1, 3200)
    assert max(np.prod(chunk) for chunk in by_name.values()) * 2 < 80e6
