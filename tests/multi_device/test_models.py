"""Models on meshes of eight devices against one device."""

import contextlib
import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import modules
from support.golden import assert_close
from support.mesh_cases import IMAGE, answers, batch_of, config_of, grouped_of, llava_of, params_of

from internvl_jax.config import ChatConfig
from internvl_jax.inference.generation import generate
from internvl_jax.inference.generation.bound_model import bind_model
from internvl_jax.inference.generation.generator import Generator
from internvl_jax.inference.generation.sampling import GenerationConfig
from internvl_jax.models import param_sharding
from internvl_jax.models.attention import implementation
from internvl_jax.parallel import partitioning
from internvl_jax.parallel.mesh import IMAGE_AXES, make_mesh

MESHES = (
    "tensor=1",
    "tensor=2",
    "tensor=4",
    "tensor=8",
    "fsdp=4",
    "data=8",
    "data=2,tensor=4",
    "fsdp=2,tensor=4",
    "data=2,fsdp=2,tensor=2",
)


def place(config: ChatConfig, mesh, **options):
    """The same on a mesh: of a copy, since placing may use up what it is given."""
    return param_sharding.place_params(jax.tree.map(jnp.copy, params_of(config)), config, mesh, **options)


def test_placing_warns_of_nothing(recwarn):
    """jax warns of arrays that are donated and cannot be reused."""
    config = config_of(25, 8)  # on tensor=8 heads and vocabulary grow
    given = jax.tree.map(jnp.copy, params_of(config))
    placed = param_sharding.place_params(given, config, make_mesh("tensor=8", config=config))
    assert not list(recwarn)
    assert 0 < sum(leaf.is_deleted() for leaf in jax.tree.leaves(given)) < len(jax.tree.leaves(given))  # donated
    back = param_sharding.unpad_params(jax.tree.map(np.asarray, placed), config)
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(params_of(config))):
        np.testing.assert_array_equal(ours, theirs)


def loss_of(params, ids, pixels, valid, *, config):
    """Mean cross-entropy of the next tokens, and the logits."""
    logits, _ = modules.forward(params, config, ids, pixels, valid, image_token_id=IMAGE)
    log_probabilities = jax.nn.log_softmax(logits[:, :-1])
    picked = jnp.take_along_axis(log_probabilities, ids[:, 1:, None], axis=-1)[..., 0]
    counted = valid[:, :-1] & valid[:, 1:]  # what padding predicts means nothing
    return -jnp.sum(picked * counted) / counted.sum(), logits


def run(params, config, rows, mesh=None):
    """Loss, gradients and logits of one batch."""
    program = jax.jit(jax.value_and_grad(partial(loss_of, config=config), has_aux=True))
    if mesh is None:
        return program(params, *batch_of(config, rows))
    with jax.set_mesh(mesh):
        return program(params, *batch_of(config, rows))


@cache
def reference(config: ChatConfig, rows: int):
    params = params_of(config)
    return run(params, config, rows), answers(params, config, 3)


SYSTEMS = {"5-heads-gqa": config_of(5, 2), "25-heads": config_of(25, 8), "groups-of-3": grouped_of()}
FAMILY = {"llava": llava_of("llava"), "v1_0": llava_of("v1_0")}


# Heads padded and shared, all axes at once, and weights gathered; the other pairs are long.
SHORT = {
    ("groups-of-3", "tensor=8"),
    ("groups-of-3", "fsdp=2,tensor=4"),
    ("5-heads-gqa", "tensor=8"),
    ("5-heads-gqa", "data=2,fsdp=2,tensor=2"),
    ("25-heads", "fsdp=2,tensor=4"),
}


@pytest.mark.parametrize(
    ("system", "mesh_spec"),
    [
        pytest.param(system, spec, marks=() if (system, spec) in SHORT else pytest.mark.long)
        for system in SYSTEMS
        for spec in MESHES
    ],
)
def test_mesh_equals_one_device(system, mesh_spec):
    config, rows = SYSTEMS[system], 8
    mesh = make_mesh(mesh_spec, config=config)
    params = place(config, mesh)
    ((loss, logits), gradients), tokens = reference(config, rows)

    (mesh_loss, mesh_logits), mesh_gradients = run(params, config, rows, mesh)
    vocabulary = config.text.vocab_size
    valid = batch_of(config, rows)[2]
    assert_close(mesh_logits[..., :vocabulary][valid], logits[valid], 1e-3, "logits")
    assert (np.asarray(mesh_logits)[..., vocabulary:] < -1e30).all()
    assert_close(mesh_loss, loss, 1e-4, "loss")
    true = param_sharding.unpad_params(mesh_gradients, config)
    for (path, leaf), expected in zip(jax.tree_util.tree_leaves_with_path(true), jax.tree.leaves(gradients)):
        assert_close(leaf, expected, 1e-4, f"gradient of {partitioning.path_of(path)}")
    # Nothing but zeros was cropped: pads do not learn.
    padded_again = param_sharding.pad_params(true, config, mesh)
    for leaf, expected in zip(jax.tree.leaves(mesh_gradients), jax.tree.leaves(padded_again)):
        np.testing.assert_array_equal(leaf, expected)

    # Three rows and images, which few of these meshes divide.
    np.testing.assert_array_equal(answers(params, config, 3, mesh=mesh), tokens)


@pytest.mark.parametrize(("system", "mesh_spec"), [("llava", "fsdp=2,tensor=4"), ("v1_0", "data=2,fsdp=2,tensor=2")])
def test_llavas_family_equals_one_device(system, mesh_spec):
    """6 heads of CLIP padded for 4, and positions resized. The golden models' answers are in eight_devices_chat.py."""
    config = FAMILY[system]
    mesh = make_mesh(mesh_spec, config=config)
    ids, pixels, valid = batch_of(config, 8)
    logits = []
    for params, where in ((params_of(config), None), (place(config, mesh), mesh)):
        generator = Generator(bind_model(config, params, dtype=jnp.float32), image_token_id=IMAGE, mesh=where)
        logits.append(generator.logits(ids, valid.astype(int), generator.encode(pixels)))
    assert_close(logits[1][valid], logits[0][valid], 1e-3, "logits")


def test_kernels_on_a_mesh():
    """Kernels (interpreted) on each device's rows and heads: loss, gradients and greedy tokens of one device's XLA."""
    config = config_of(5, 2)
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, num_hidden_layers=1),
        text=dataclasses.replace(config.text, num_hidden_layers=1, max_position_embeddings=256),
    )
    mesh = make_mesh("data=2,tensor=2", config=config)
    rng = np.random.RandomState(5)
    ids = rng.randint(4, config.text.vocab_size, (2, 128)).astype(np.int32)
    ids[:, 100 : 100 + config.tokens_per_image] = IMAGE
    valid = np.ones(ids.shape, bool)
    valid[0, :70] = False
    pixels = rng.randn(2, 3, 56, 56).astype(np.float32)
    placed = place(config, mesh)
    results = []
    for params, where, program in ((params_of(config), None, "xla"), (placed, mesh, "pallas")):
        with implementation(program), contextlib.nullcontext() if where is None else jax.set_mesh(where):
            loss = jax.jit(jax.value_and_grad(partial(loss_of, config=config), has_aux=True))
            (value, _), gradients = loss(params, ids, None, valid)
        generator = Generator(bind_model(config, params, dtype=jnp.float32), image_token_id=IMAGE, mesh=where)
        gen = GenerationConfig(max_new_tokens=100)  # a cache of 256 slots
        with implementation(program):
            state = generator.prefill(ids, valid.astype(int), generator.encode(pixels), gen)
            tokens, _, _ = generator.read(generator.decode(state, 3))
        results.append((value, param_sharding.unpad_params(gradients, config), tokens))
    (expected_loss, expected_gradients, expected_tokens), (value, gradients, tokens) = results
    assert_close(value, expected_loss, 1e-4, "loss")
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    for (path, leaf), expected in zip(leaves, jax.tree.leaves(expected_gradients)):
        assert_close(leaf, expected, 1e-4, f"gradient of {partitioning.path_of(path)}")
    assert tokens == expected_tokens
    assert [len(row) for row in tokens] == [4, 4]


@pytest.mark.parametrize(
    ("system", "mesh_spec", "vision"),
    [
        ("5-heads-gqa", "tensor=8", "data"),
        ("5-heads-gqa", "tensor=8", "gather"),
        ("5-heads-gqa", "data=2,fsdp=2,tensor=2", "gather"),
        ("llava", "data=2,tensor=4", "data"),
        ("v1_0", "data=2,tensor=4", "gather"),
    ],
)
def test_images_over_all_devices(system, mesh_spec, vision):
    config = {**SYSTEMS, **FAMILY}[system]
    mesh = make_mesh(mesh_spec, config=config)
    pixels = batch_of(config, 3)[1]
    single = Generator(bind_model(config, params_of(config), dtype=jnp.float32), image_token_id=IMAGE).encode(pixels)
    params = place(config, mesh, vision=vision)
    generator = Generator(
        bind_model(config, params, dtype=jnp.float32, image_axes=IMAGE_AXES[vision]), image_token_id=IMAGE, mesh=mesh
    )
    heads = params["vision_model"]["layers"]["attn"]["qkv"]["kernel"].shape[-2]
    assert heads == config.vision.num_attention_heads
    assert_close(generator.encode(pixels), single, 1e-4, "visual tokens")


@pytest.mark.parametrize("num_beams", [1, 2])
def test_one_row_on_every_mesh_axis(num_beams):
    """One prompt where the mesh wants four rows; sampling settings and beams are per row too."""
    config = config_of(5, 2)
    mesh = make_mesh("data=2,fsdp=2,tensor=2", config=config)
    ids, pixels, _ = batch_of(config, 1)
    gen = GenerationConfig(max_new_tokens=6, num_beams=num_beams, temperature=0.7 if num_beams == 1 else 0.0, seed=(5,))
    results = []
    placed = place(config, mesh)
    for params, where in ((params_of(config), None), (placed, mesh)):
        generator = Generator(bind_model(config, params, dtype=jnp.float32), image_token_id=IMAGE, mesh=where)
        results.append(generator.generate(ids, None, generator.encode(pixels), gen)[0])
        assert generator.logits(ids, None, generator.encode(pixels)).shape == (1, 12, config.text.vocab_size)
    if num_beams > 1:  # draws depend on the padded vocabulary's size, beams do not
        np.testing.assert_array_equal(results[0], results[1])
    assert results[0].shape == results[1].shape == (1, 6)


def test_parameters_come_back_unchanged():
    config = config_of(25, 8)
    mesh = make_mesh("fsdp=2,tensor=4")
    placed = place(config, mesh)
    kernel = placed["vision_model"]["layers"]["attn"]["qkv"]["kernel"]
    assert kernel.shape[-2] == 28
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 50, 3, 7, 4)
    assert placed["language_model"]["embed_tokens"]["embedding"].shape == (512, 64)
    back = param_sharding.unpad_params(placed, config)
    jax.tree.map(np.testing.assert_array_equal, back, params_of(config))
    stored = param_sharding.storage_shardings(back, mesh)
    shard = stored["vision_model"]["layers"]["attn"]["qkv"]["kernel"].shard_shape((2, 100, 3, 25, 4))
    assert np.prod(shard) * 8 == 2 * 100 * 3 * 25 * 4  # 25 heads do not divide: the head's own axis does


def test_decode_compiles_once():
    config = config_of(5, 2)
    mesh = make_mesh("data=2,tensor=4", config=config)
    params = place(config, mesh)
    generator = Generator(bind_model(config, params, dtype=jnp.float32), image_token_id=IMAGE, mesh=mesh)
    ids, pixels, valid = batch_of(config, 3)
    counts = [generate.num_compiles()["decode"]]
    for _ in range(2):
        gen = GenerationConfig(max_new_tokens=9)
        state = generator.prefill(ids, valid.astype(int), generator.encode(pixels), gen)
        for _ in range(3):
            buffer = state.cache.k
            state = generator.decode(state, 2)
            assert buffer.is_deleted()  # donated: the cache is never held twice
        state = generator.end_rows(state, np.array([True, False, False]))
        state = generator.decode(state, 2)
        rows, _, running = generator.read(state)
        assert [len(row) for row in rows] == [7, 9, 9]
        assert not running.any()
        counts.append(generate.num_compiles()["decode"])
    assert counts[1] - counts[0] <= 1  # none where another test had these shapes
    assert counts[2] == counts[1]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_rows_that_fail_and_tokens_that_nobody_knows(num_beams):
    """As on one device: a row that is not finite fails alone, and an unknown token is not generated anywhere."""
    config = config_of(5, 2)
    mesh = make_mesh("data=2,fsdp=2,tensor=2", config=config)
    ids, pixels, _ = batch_of(config, 3)
    token = config.text.vocab_size - 1
    ids = np.where(ids == token, token - 1, ids)
    ids[1, 0] = token
    known = np.arange(config.text.vocab_size) % 3 != token % 3
    params = jax.tree.map(jnp.copy, params_of(config))
    embedding = params["language_model"]["embed_tokens"]["embedding"]
    params["language_model"]["embed_tokens"] = {"embedding": embedding.at[token].set(jnp.nan)}
    gen = GenerationConfig(max_new_tokens=6, num_beams=num_beams, eos_token_ids=())
    results = []
    placed = param_sharding.place_params(jax.tree.map(jnp.copy, params), config, mesh)
    for given, where in ((params, None), (placed, mesh)):
        generator = Generator(
            bind_model(config, given, dtype=jnp.float32), image_token_id=IMAGE, mesh=where, known=known
        )
        tokens, reasons = generator.generate(ids, None, generator.encode(pixels), gen)
        assert reasons == ["length", "error", "length"]
        assert known[tokens[[0, 2]]].all()
        results.append(tokens)
    np.testing.assert_array_equal(*results)
