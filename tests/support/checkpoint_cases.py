"""Parameters of nano to save, and damage to what was saved."""

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax import checkpoint
from internvl_jax.config import PRESETS
from internvl_jax.models import chat_model


def random_tree(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = chat_model.abstract_params(PRESETS["nano"]())
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), dtype), shapes)


def abstract(tree, dtype=None):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype), tree)


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (name, a), (_, b) in zip(checkpoint.named_leaves(ours), checkpoint.named_leaves(theirs)):
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


def chunk_of(directory, name):
    return next(path for path in sorted((directory / "params" / name).iterdir()) if path.name[0] != ".")


def flip(path, at, bit=3):
    """Change one bit of a file that may be a link."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.unlink()
    path.write_bytes(data)
