"""Checkpoints read onto meshes of eight devices, and written from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.checkpoint_cases import assert_equal
from support.paths import DATA

from internvl_jax import checkpoint
from internvl_jax.config import load_config
from internvl_jax.models import chat_model, param_sharding
from internvl_jax.parallel.mesh import make_mesh

PUBLISHED = DATA / "internvl_chat_v1_1" / "checkpoint"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The converted golden checkpoint, and its parameters on one device."""
    pytest.importorskip("torch")
    from checkpoints_convert.convert import convert

    directory = tmp_path_factory.mktemp("converted") / "checkpoint"
    convert(PUBLISHED, directory)
    return directory, checkpoint.load(directory, chat_model.abstract_params(load_config(PUBLISHED), jnp.float32))


@pytest.mark.parametrize("spec", ["tensor=4", "fsdp=4,tensor=2", "data=8"])
def test_onto_meshes_and_back(converted, tmp_path, monkeypatch, spec):
    """Converted and published directories are read onto a mesh as onto one device, and replicas do not all write."""
    from checkpoints_convert.convert import load_hf

    directory, expected = converted
    plain = chat_model.abstract_params(load_config(PUBLISHED), jnp.float32)
    shardings = param_sharding.storage_shardings(plain, make_mesh(spec))
    wanted = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), plain, shardings
    )
    trees = checkpoint.load(directory, wanted), load_hf(PUBLISHED, wanted)
    for tree in trees:
        for (name, ours), (_, one) in zip(checkpoint.named_leaves(tree), checkpoint.named_leaves(wanted)):
            assert ours.sharding == one.sharding, name
        assert_equal(tree, expected)
    split = [leaf for leaf in jax.tree.leaves(tree) if not leaf.is_fully_replicated]
    assert (len(split) > 10) == (spec != "data=8")

    written = dict.fromkeys(dict(checkpoint.named_leaves(tree)), 0)
    write = checkpoint.Writer.write

    def count(self, name, index, values):
        written[name] += np.asarray(values).size
        write(self, name, index, values)

    monkeypatch.setattr(checkpoint.Writer, "write", count)
    checkpoint.save(tmp_path, tree)
    assert written == {name: leaf.size for name, leaf in checkpoint.named_leaves(tree)}
    assert_equal(checkpoint.load(tmp_path, plain), expected)
