"""Pixel unshuffle and the projector: golden arrays, a written-out loop, transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import modules
from support.golden import DATA, assert_close, bundle, random_tree

from internvl_jax.config import ProjectorConfig, load_config
from internvl_jax.models import chat_model, projector

BUNDLE = DATA / "internvl_chat_v1_1"


@pytest.fixture(scope="module")
def golden():
    pytest.importorskip("torch")
    from checkpoints_convert.convert import load_hf

    config = load_config(BUNDLE / "checkpoint")
    params = load_hf(BUNDLE / "checkpoint", chat_model.abstract_params(config))
    return config.projector, params["mlp1"], bundle("internvl_chat_v1_1")[0]


project = jax.jit(modules.project, static_argnames=("config", "dtype"))


def written_out(x, ratio):
    """v2, element by element: token (i, j) lists its square row by row, every patch's channels together."""
    images, height, width, features = x.shape
    y = np.zeros((images, height // ratio, width // ratio, ratio * ratio * features), x.dtype)
    for i in range(height):
        for j in range(width):
            place = ((i % ratio) * ratio + j % ratio) * features
            y[:, i // ratio, j // ratio, place : place + features] = x[:, i, j]
    return y


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_golden_unshuffle(version):
    arrays, _ = bundle("internvl_chat_v1_1")
    counting = np.arange(192).reshape(1, 4, 6, 8)
    ours = projector.pixel_unshuffle(jnp.asarray(counting), 2, version)
    assert np.array_equal(ours[0], arrays[f"pixel_shuffle_arange/{version}"])
    selected = jnp.asarray(arrays["vision/selected"]).reshape(1, 8, 8, -1)
    ours = projector.pixel_unshuffle(selected, 2, version)
    assert np.array_equal(ours[0], arrays[f"vision/pixel_shuffle_{version}"])


@pytest.mark.parametrize(("height", "width", "ratio"), [(4, 6, 1), (4, 6, 2), (6, 9, 3), (8, 4, 4), (5, 10, 5)])
def test_any_whole_ratio(height, width, ratio):
    x = np.random.default_rng(0).standard_normal((2, height, width, 3)).astype(np.float32)
    second = np.asarray(projector.pixel_unshuffle(jnp.asarray(x), ratio, "v2"))
    assert second.shape == (2, height // ratio, width // ratio, 3 * ratio**2)
    if ratio == 1:
        assert np.array_equal(second, x)
    assert np.array_equal(second, written_out(x, ratio))
    first = projector.pixel_unshuffle(jnp.asarray(x), ratio, "v1")
    assert np.array_equal(first, second.transpose(0, 2, 1, 3))


def test_grid_that_cannot_be_folded():
    with pytest.raises(ValueError, match="5 x 4 patches cannot be folded by 2"):
        projector.pixel_unshuffle(jnp.zeros((1, 5, 4, 3)), 2, "v2")


def test_golden_projector(golden):
    config, params, arrays = golden
    for version in ("v1", "v2"):
        x = arrays[f"vision/pixel_shuffle_{version}"].reshape(1, 16, -1)
        assert_close(project(params, config, jnp.asarray(x))[0], arrays[f"vision/mlp1_{version}"], 1e-4, version)


def test_golden_layer_norm_eps(golden):
    """Rows of tiny variance show the eps, which the logits do not; ten times it is far outside the tolerance."""
    config, params, arrays = golden
    x, expected = jnp.asarray(arrays["probe/mlp1_input"])[None], arrays["probe/mlp1_output"]
    assert_close(project(params, config, x)[0], expected, 1e-5, "probe")
    for factor in (10, 0.1):
        wrong = dataclasses.replace(config, layer_norm_eps=factor * config.layer_norm_eps)
        with pytest.raises(AssertionError, match="largest error"):
            assert_close(project(params, wrong, x)[0], expected, 1e-2, "probe")


def test_golden_bfloat16(golden):
    config, params, arrays = golden
    x = jnp.asarray(arrays["vision/pixel_shuffle_v1"].reshape(1, 16, -1))
    ours = project(params, config, x, dtype=jnp.bfloat16)
    assert ours.dtype == jnp.bfloat16
    exact, theirs = arrays["vision/mlp1_v1"], arrays["vision/mlp1_v1_bf16"]
    ours = np.asarray(ours[0], np.float32)
    assert_close(ours, exact, 1.1 * np.abs(theirs - exact).max(), "bfloat16 against float32")
    assert np.sqrt(np.mean((ours - exact) ** 2)) < 1.1 * np.sqrt(np.mean((theirs - exact) ** 2))


def test_stored_dtype():
    config = ProjectorConfig(32, 16)
    params = random_tree(jax.eval_shape(lambda key: modules.init_projector(key, config), jax.random.key(0)))
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    widened = jax.tree.map(lambda x: x.astype(np.float32), stored)
    x = np.random.default_rng(1).standard_normal((1, 3, 32)).astype(np.float32)
    ours = project(stored, config, x)
    assert ours.dtype == jnp.float32
    assert_close(ours, project(widened, config, x), 1e-6, "stored in bfloat16")
