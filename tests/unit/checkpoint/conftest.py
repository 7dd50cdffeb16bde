"""A saved checkpoint, and a copy of it to damage."""

import os
import shutil

import jax.numpy as jnp
import pytest
from support.checkpoint_cases import random_tree

from internvl_jax.checkpoint import save


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
