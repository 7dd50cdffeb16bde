"""The chat model on random parameters: merging of images, selected layers, models that lack parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.chat_model_cases import IMAGE, TEXT, VISION, encode, forward, rows_with_images, tower
from support.golden import assert_close, random_tree

from internvl_jax.config import config_from_hf
from internvl_jax.data.batch import global_image_index
from internvl_jax.models import chat_model
from internvl_jax.processing.conversation import image_token_index


@pytest.fixture(scope="module")
def tiny():
    hf = {"model_type": "internvl", "vision_config": VISION, "text_config": TEXT, "image_token_id": IMAGE,
          "image_seq_length": 4, "vision_feature_layer": -2}  # fmt: skip
    config = config_from_hf(hf)
    return config, random_tree(chat_model.abstract_params(config))


def noise(*shape):
    return np.random.default_rng(4).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("counts", [[2, 0, 1], [0, 0, 3], [1, 1, 1], [3, 0, 0]], ids=str)
def test_merge_against_a_loop(counts):
    rng = np.random.default_rng(3)
    ids, _ = rows_with_images(counts, 4, seed=sum(counts))
    embeddings = rng.standard_normal((*ids.shape, 5)).astype(np.float32)
    features = rng.standard_normal((sum(counts), 4, 5)).astype(np.float32)
    merged = chat_model.merge_images(embeddings, features, image_token_index(ids == IMAGE))
    left = iter(features.reshape(-1, 5))
    expected = embeddings.copy()
    for row, column in np.argwhere(ids == IMAGE):
        expected[row, column] = next(left)
    assert next(left, None) is None
    assert np.array_equal(merged, expected)
    on_device = jax.jit(image_token_index)(ids == IMAGE)
    assert np.array_equal(on_device, image_token_index(ids == IMAGE))
    assert on_device.dtype == image_token_index(ids == IMAGE).dtype == np.int32


def test_merge_of_processes_that_share_a_batch():
    """A process's parts of the rows need not stand together, and its images are dealt to them in order."""
    parts = [(0, 3), (1, 2)]  # of four: two rows and two image slots each
    rng = np.random.default_rng(3)
    ids, _ = rows_with_images([2, 1, 0, 1, 3, 0, 0, 1], 4, seed=1)
    embeddings = rng.standard_normal((*ids.shape, 5)).astype(np.float32)
    features = rng.standard_normal((8, 4, 5)).astype(np.float32)
    index = np.full(ids.shape, -5, np.int32)
    for mine in parts:
        rows = [row for part in mine for row in (2 * part, 2 * part + 1)]
        index[rows] = global_image_index(image_token_index(ids[rows] == IMAGE), mine, 2 * 4)
    assert index.dtype == np.int32
    merged = jax.jit(chat_model.merge_images)(embeddings, features, index)
    left = [iter(features[slots].reshape(-1, 5)) for slots in ([0, 1, 6, 7], [2, 3, 4, 5])]
    expected = embeddings.copy()
    for row, column in np.argwhere(ids == IMAGE):
        expected[row, column] = next(left[(0, 1, 1, 0)[row // 2]])
    assert np.array_equal(merged, expected)


def test_rows_get_what_they_get_alone(tiny):
    config, params = tiny
    counts = [2, 0, 1]
    ids, mask = rows_with_images(counts, 4)
    pixels = noise(3, 3, 56, 56)
    together, _ = forward(params, config, ids, pixels, mask > 0, image_token_id=IMAGE)
    assert np.std(together) > 0.1
    first = 0
    for row, count in enumerate(counts):
        mine = pixels[first : first + count] if count else None
        first += count
        keep = mask[row] > 0
        alone, _ = forward(params, config, ids[row][keep][None], mine, image_token_id=IMAGE)
        assert_close(together[row][keep], alone[0], 1e-5, f"row {row}")


def test_images_are_taken_in_prompt_order(tiny):
    """Two images exchanged change the answer, and exchanged in the prompt's rows change it back."""
    config, params = tiny
    row, _ = rows_with_images([1], 4)
    ids = np.concatenate([row, row])
    pixels = noise(2, 3, 56, 56)
    valid = np.ones(ids.shape, bool)
    logits, _ = forward(params, config, ids, pixels, valid, image_token_id=IMAGE)
    swapped, _ = forward(params, config, ids, pixels[::-1], valid, image_token_id=IMAGE)
    assert np.abs(logits - swapped).max() > 1e-2
    assert_close(swapped[::-1], logits, 1e-5, "swapped")


def test_images_that_are_not_square(tiny):
    """Rows of patches are rows: each visual token is the square of 2 x 2 patches at its place."""
    config, params = tiny
    config = dataclasses.replace(config, ps_version="v2")
    size, width = config.vision.patch_size, config.vision.hidden_size
    projected, out = encode(params, config, noise(2, 3, 4 * size, 6 * size), collect=True)
    grid = out["selected"].reshape(2, 4, 6, width)
    tokens = out["unshuffled"].reshape(2, 2, 3, 4 * width)
    for row, column in np.ndindex(2, 3):
        square = grid[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(2, -1)
        assert np.array_equal(np.sort(tokens[:, row, column]), np.sort(square))
    assert projected.shape == (2, 6, config.text.hidden_size)


@pytest.mark.parametrize("select_layer", [-5, -2, 3])
def test_select_layer(tiny, select_layer):
    """hidden_states[select_layer] without the class token, whether the layers past it are there or not."""
    config, params = tiny
    config = dataclasses.replace(config, select_layer=select_layer)
    pixels = noise(3, 3, 56, 56)
    _, out = tower(params["vision_model"], config.vision, pixels, collect=True)
    expected = out["hidden_states"][select_layer][:, 1:]
    layers = jax.tree.map(lambda x: x[: config.num_vision_layers], params["vision_model"]["layers"])
    short = {**params, "vision_model": {**params["vision_model"], "layers": layers}}
    for tree in (params, short) if config.num_vision_layers else (params,):
        assert_close(encode(tree, config, pixels, collect=True)[1]["selected"], expected, 1e-5, "selected")


def test_parts_alone(tiny):
    """A tower without the rest has parameters of that part only."""
    config, params = tiny
    vision = dataclasses.replace(config, projector=None, text=None)
    text = dataclasses.replace(config, projector=None, vision=None)
    assert set(chat_model.abstract_params(vision)) == {"vision_model"}
    assert set(chat_model.abstract_params(text)) == {"language_model"}
    abstract = jax.tree.leaves(chat_model.abstract_params(config, jnp.bfloat16))
    assert [(leaf.shape, leaf.dtype) for leaf in abstract] == [(x.shape, jnp.bfloat16) for x in jax.tree.leaves(params)]
    assert chat_model.count_params(params) == sum(x.size for x in jax.tree.leaves(params))
