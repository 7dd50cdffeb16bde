"""Kernels (interpreted) against XLA's attention, forward and backward; and the rule that chooses between them."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import modules

from internvl_jax.config import PRESETS
from internvl_jax.models import attention as dispatch
from internvl_jax.models import cpu, kernels, kv_cache
from internvl_jax.models.attention import (
    attention,
    attention_xla,
    cache_mask,
    implementation,
    self_mask,
)
from internvl_jax.models.kv_cache import KeysValues
from internvl_jax.models.layers import positions_from_valid
from internvl_jax.models.stack import unstack

LONG = pytest.mark.long
HEAD_DIM = 8


def random(*shapes, seed=0):
    rng = np.random.RandomState(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def assert_close(actual, expected, tolerance, what):
    error = np.abs(np.asarray(actual) - np.asarray(expected))
    worst = np.unravel_index(error.argmax(), error.shape)
    assert error[worst] <= tolerance, f"{what}: off by {error[worst]:.3g} at {worst}, allowed {tolerance}"


def loss(q, k, v, weights, mask, valid, *, program):
    """A loss that looks at real tokens only, and the attention's result there."""
    with implementation(program):
        y = jnp.where(valid[..., None, None], attention(q, KeysValues(k, v), mask), 0.0)
    return jnp.sum(y * weights), y


@pytest.mark.parametrize(
    ("length", "causal", "kv_heads"),
    [(256, True, 2), (161, True, 1), pytest.param(128, True, 1, marks=LONG), (161, False, 2)],
)
def test_splash_equals_xla(length, causal, kv_heads, monkeypatch):
    """Rows padded on the left, on the right and not at all, several blocks, lengths that need padding."""
    monkeypatch.setattr(kernels, "SPLASH_BLOCK", 128)
    monkeypatch.setattr(kernels, "WIDE_BLOCK", 128)
    batch, heads = 3, 2
    queries, keys = (batch, length, heads, HEAD_DIM), (batch, kv_heads, length, HEAD_DIM)
    q, k, v, weights = random(queries, keys, keys, queries)
    valid, mask = jnp.ones((batch, length), bool), None
    if causal:
        valid = valid.at[0, : length // 2 + 3].set(False).at[1, -9:].set(False)
        mask = self_mask(positions_from_valid(valid), valid)
    results = []
    for program in ("xla", "pallas"):
        with implementation(program):
            assert dispatch.choose(q, k, mask, None) == {"xla": "xla", "pallas": "splash"}[program]
        gradient = jax.jit(jax.value_and_grad(partial(loss, program=program), (0, 1, 2), has_aux=True))
        results.append(gradient(q, k, v, weights, mask, valid))
    ((_, expected), expected_gradients), ((_, y), gradients) = results
    assert_close(y, expected, 1e-5, "forward")
    for name, actual, wanted in zip("qkv", gradients, expected_gradients):
        assert_close(actual, wanted, 1e-5, f"gradient of {name}")
    # Without a gradient, queries are padded less: another program.
    assert_close(loss(q, k, v, weights, mask, valid, program="pallas")[1], expected, 1e-5, "forward alone")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("length", "causal", "kv_heads", "int8"), [(33, False, 4, False), (20, True, 2, True)])
def test_by_head_equals_xla(length, causal, kv_heads, int8, dtype):
    """Forward and backward; several rows, of which one is padded, queries in groups, keys with scales."""
    q, k, v, weights = random(
        (2, length, 4, HEAD_DIM), (2, kv_heads, 33, HEAD_DIM), (2, kv_heads, 33, HEAD_DIM), (2, length, 4, HEAD_DIM)
    )
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    scales = tuple(1 + jnp.abs(x[..., 0].astype(jnp.float32)) for x in (k, v)) if int8 else None
    allowed = None
    if causal:
        place = np.tile(np.arange(33), (2, 1))
        allowed = cache_mask(
            jnp.asarray(place[:, -length:]), jnp.asarray(place), jnp.asarray(place > [[0], [4]])
        ).allowed

    def result(run):
        def loss(q, k, v):
            y = run(q, k, v, allowed, scales)
            return jnp.sum(y * weights), y

        (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
        assert y.dtype == dtype
        return [np.asarray(x, np.float32) for x in (y, *gradients)]

    for name, actual, expected in zip(
        ("y", "q", "k", "v"), result(partial(cpu.attention_by_head, attention_xla)), result(attention_xla)
    ):
        tolerance = 1e-5 if dtype == jnp.float32 else 2**-7 * np.abs(expected).max()
        assert_close(actual, expected, tolerance, name)


def test_by_head_in_blocks_equals_xla(monkeypatch):
    """Causal rows of samples and padding on either side: a block of queries reads the keys up to its end."""
    monkeypatch.setattr(cpu, "QUERY_BLOCK", 16)
    q, k, v, weights = random((2, 40, 4, HEAD_DIM), (2, 2, 40, HEAD_DIM), (2, 2, 40, HEAD_DIM), (2, 40, 4, HEAD_DIM))
    segments = jnp.asarray([[0] * 3 + [1] * 20 + [2] * 17, [1] * 9 + [2] * 25 + [0] * 6])
    place = jnp.tile(jnp.arange(40), (2, 1))
    mask = self_mask(place, segments > 0, segments)
    real = (segments > 0)[..., None, None]  # what padding attends to is left open

    def result(run):
        def loss(q, k, v):
            y = jnp.where(real, run(q, k, v, mask.allowed), 0)
            return jnp.sum(y * weights), y

        (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
        return y, *gradients

    blocks = result(partial(cpu.attention_by_head, attention_xla, causal=True))
    for name, actual, expected in zip(("y", "q", "k", "v"), blocks, result(attention_xla)):
        assert_close(actual, expected, 1e-5, name)


@pytest.mark.parametrize(("kv_heads", "groups"), [(5, 1), (2, 4)])
def test_decode_kernel_equals_xla(kv_heads, groups, monkeypatch):
    """Rows of which few slots, the last slots, or all are in use, one with a hole, one with none."""
    monkeypatch.setattr(kernels, "DECODE_BLOCK_BYTES", kv_heads * 128 * HEAD_DIM * 4)
    batch, slots, layers, layer = 5, 384, 3, 1
    stack = (layers, batch, kv_heads, slots, HEAD_DIM)
    q, k, v = random((batch, 1, kv_heads * groups, HEAD_DIM), stack, stack)
    assert kernels.decode_block(kv_heads, slots, HEAD_DIM, 4) == 128
    place = np.arange(slots)
    used = np.stack([place < 3, place >= 383, place >= 0, (place > 20) & (place < 300) & (place != 150), place < 0])
    mask = cache_mask(jnp.full((batch, 1), slots), jnp.tile(place, (batch, 1)), jnp.asarray(used))
    with implementation("pallas"):
        assert dispatch.choose(q, k, mask, None) == "decode"
        y = attention(q, KeysValues(k, v, layer=layer), mask)
        per_layer = attention(q, KeysValues(k[layer], v[layer]), mask)
    expected = attention_xla(q, k[layer], v[layer], mask.allowed)
    assert_close(y[:4], expected[:4], 1e-5, "stacked")
    np.testing.assert_array_equal(y, per_layer)
    assert np.isfinite(y).all()  # a row that may attend to nothing stays a number


def test_decode_kernel_at_the_edges_of_its_blocks(monkeypatch):
    """Spans that begin or end exactly at a block's edge, or one slot beside it: no slot is lost, least the newest."""
    monkeypatch.setattr(kernels, "DECODE_BLOCK_BYTES", 0)
    spans = [(0, 1), (0, 127), (0, 128), (0, 129), (5, 255), (127, 256), (128, 257), (129, 384), (256, 257), (383, 384)]
    batch, slots = len(spans), 384
    q, k, v = random((batch, 1, 2, HEAD_DIM), (batch, 2, slots, HEAD_DIM), (batch, 2, slots, HEAD_DIM))
    assert kernels.decode_block(2, slots, HEAD_DIM, 4) == 128
    place = np.tile(np.arange(slots), (batch, 1))
    used = np.stack([(place[0] >= start) & (place[0] < end) for start, end in spans])
    mask = cache_mask(jnp.full((batch, 1), slots), jnp.asarray(place), jnp.asarray(used))
    assert mask.span.tolist() == [list(span) for span in spans]
    with implementation("pallas"):
        y = attention(q, KeysValues(k, v), mask)
    assert_close(y, attention_xla(q, k, v, mask.allowed), 1e-5, "y")


@pytest.mark.parametrize("groups", [1, 2])
def test_decode_kernel_with_int8_keys(groups, monkeypatch):
    """Integers with a scale per token and head, against the same numbers in float32."""
    monkeypatch.setattr(kernels, "DECODE_BLOCK_BYTES", 0)
    rng = np.random.RandomState(0)
    stack = (2, 2, 3, 256, HEAD_DIM)
    k, v = (rng.randint(-127, 128, stack).astype(np.int8) for _ in "kv")
    scales = tuple(rng.uniform(0.005, 0.02, stack[:-1]).astype(np.float32) for _ in "kv")
    (q,) = random((2, 1, 3 * groups, HEAD_DIM))
    place = np.tile(np.arange(256), (2, 1))
    mask = cache_mask(jnp.full((2, 1), 256), jnp.asarray(place), jnp.asarray(place < 200))
    with implementation("pallas"):
        keys = KeysValues(jnp.asarray(k), jnp.asarray(v), tuple(map(jnp.asarray, scales)), 1)
        y = attention(q, keys, mask)
    full = [jnp.asarray(x[1] * scale[1][..., None]) for x, scale in zip((k, v), scales)]
    assert_close(y, attention_xla(q, *full, mask.allowed), 1e-5, "int8")


def test_decode_kernel_reads_only_slots_in_use(monkeypatch):
    """Blocks outside a row's span are never touched: what is there does not matter, even if it is no number."""
    monkeypatch.setattr(kernels, "DECODE_BLOCK_BYTES", 0)
    stack = (1, 2, 2, 512, HEAD_DIM)
    q, k, v = random((2, 1, 2, HEAD_DIM), stack, stack)
    place = np.tile(np.arange(512), (2, 1))
    used = (place >= 130) & (place < 250)
    mask = cache_mask(jnp.full((2, 1), 512), jnp.asarray(place), jnp.asarray(used))
    outside = (place < 128) | (place >= 256)
    k, v = (jnp.where(outside[None, :, None, :, None], jnp.nan, x) for x in (k, v))
    with implementation("pallas"):
        y = attention(q, KeysValues(k, v, layer=0), mask)
    assert_close(y, attention_xla(q, k[0, :, :, 128:256], v[0, :, :, 128:256], mask.allowed[:, :, 128:256]), 1e-5, "y")


@pytest.fixture(scope="module")
def text():
    """A small LLaMA whose prompts of 128 tokens and cache of 256 slots take the kernels."""
    config = replace(
        PRESETS["nano"]().text,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        intermediate_size=48,
        vocab_size=64,
    )
    abstract = jax.eval_shape(lambda: modules.init_llama(jax.random.key(0), config))
    rng = np.random.RandomState(1)
    return config, jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32), abstract)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "tuple"])
def test_prefill_and_decode_with_kernels(text, stacked):
    """A prompt padded on the left and three tokens after it: the same logits from either program."""
    config, params = text
    if not stacked:
        params = {**params, "layers": unstack(params["layers"])}
    ids = np.random.RandomState(0).randint(0, 64, (2, 131))
    valid = np.ones((2, 131), bool)
    valid[0, :50] = False
    positions = positions_from_valid(valid)

    def run(params, ids, valid, *, program):
        with implementation(program):
            cache, collected = kv_cache.init_cache(config, 2, 256, jnp.float32, layers=params["layers"]), []
            for start, end in ((0, 128), (128, 129), (129, 130), (130, 131)):
                x = modules.embed(params, ids[:, start:end], jnp.float32)
                hidden, cache, _ = modules.run_llama(
                    params, config, x, positions[:, start:end], valid[:, start:end], cache, fresh=start == 0
                )
                collected.append(modules.logits(params, config, hidden))
        return jnp.concatenate(collected, axis=1)

    results = [jax.jit(partial(run, program=program))(params, ids, valid) for program in ("xla", "pallas")]
    assert np.abs(results[0]).max() > 0.1
    assert_close(results[1][valid], results[0][valid], 1e-4, "logits")


def test_vision_tower_with_kernels():
    config = replace(
        PRESETS["nano"]().vision,
        hidden_size=24,
        num_attention_heads=3,
        intermediate_size=32,
        num_hidden_layers=2,
        image_size=56,
    )
    abstract = jax.eval_shape(lambda: modules.init_tower(jax.random.key(0), config))
    rng = np.random.RandomState(1)
    params = jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32), abstract)
    (pixels,) = random((2, 3, 56, 56))

    def run(params, *, program):
        with implementation(program):
            x = modules.run_tower(params, config, pixels)[0]
        return jnp.sum(x[:, 0] ** 2), x

    results = [
        jax.jit(jax.value_and_grad(partial(run, program=program), has_aux=True))(params)
        for program in ("xla", "pallas")
    ]
    ((_, expected), expected_gradients), ((_, x), gradients) = results
    assert_close(x, expected, 1e-4, "hidden states")
    paths = jax.tree_util.tree_leaves_with_path(expected_gradients)
    for (path, wanted), actual in zip(paths, jax.tree.leaves(gradients)):
        assert_close(actual, wanted, 1e-4 * max(1.0, float(np.abs(wanted).max())), jax.tree_util.keystr(path))


# The rule.


def shapes(length, slots, *, heads=8, kv_heads=8, head_dim=128, dtype=jnp.bfloat16):
    q = jax.ShapeDtypeStruct((2, length, heads, head_dim), dtype)
    return q, jax.ShapeDtypeStruct((2, kv_heads, slots, head_dim), dtype)


def masks(length, slots):
    at = jax.ShapeDtypeStruct((2, length), jnp.int32)
    kv = jax.ShapeDtypeStruct((2, slots), jnp.int32)
    return {
        "none": None,
        "self": jax.eval_shape(lambda p: self_mask(p, p > 0), at),
        "cache": jax.eval_shape(lambda p, s: cache_mask(p, s, s > 0), at, kv),
    }


@pytest.mark.parametrize(
    ("length", "slots", "mask", "program", "options"),
    [
        (1025, 1025, "none", "splash", {}),
        (1024, 1024, "none", "splash", {}),
        (1023, 1023, "none", "xla", {}),
        (1, 256, "cache", "decode", {}),
        (640, 640, "self", "splash", {}),
        (257, 257, "none", "xla", {}),
        (512, 512, "self", "splash", {}),
        (384, 384, "self", "xla", {}),
        (600, 600, "self", "splash", {}),
        (1, 2048, "cache", "decode", {}),
        (1, 2048, "cache", "decode", {"heads": 40, "kv_heads": 5}),
        (1, 192, "cache", "xla", {}),
        (1, 128, "cache", "xla", {}),
        (4, 2048, "cache", "xla", {}),
        (512, 512, "self", "xla", {"dtype": jnp.float32}),
        (512, 512, "self", "xla", {"head_dim": 64}),
    ],
)
def test_rule(length, slots, mask, program, options, monkeypatch):
    q, k = shapes(length, slots, **options)
    mask = masks(length, slots)[mask]
    large = length > 1 and length * slots >= 512 * 512
    assert dispatch.choose(q, k, mask, "tensor") == ("by_head" if large else "xla")  # this is no TPU
    with jax.set_mesh(jax.make_mesh((1,), ("tensor",))):
        assert dispatch.choose(q, k, mask, "tensor") == "xla"
    monkeypatch.setattr(dispatch, "on_tpu", lambda: True)
    monkeypatch.setattr(cpu, "on_cpu", lambda: False)
    assert dispatch.choose(q, k, mask, "tensor") == program
    with implementation("xla"):
        assert dispatch.choose(q, k, mask, "tensor") == "xla"


@pytest.mark.parametrize(
    ("length", "slots", "mask", "program"),
    [(1025, 1025, "none", "splash"), (512, 512, "self", "splash"), (1, 2048, "cache", "decode")],
)
def test_kernels_want_whole_heads_on_every_device(length, slots, mask, program, monkeypatch):
    """Two kv heads do not divide over four devices; over two they do, and so they do where heads are not split."""
    monkeypatch.setattr(dispatch, "on_tpu", lambda: True)
    monkeypatch.setattr(cpu, "on_cpu", lambda: False)
    q, k = shapes(length, slots, kv_heads=2)
    mask = masks(length, slots)[mask]
    for devices, split, expected in ((4, "tensor", "xla"), (2, "tensor", program), (4, None, program)):
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((devices,), ("tensor",))):
            assert dispatch.choose(q, k, mask, split) == expected
            with implementation("pallas"):
                assert dispatch.choose(q, k, mask, split) == expected


def test_implementation_is_checked_and_part_of_the_compiled_program():
    (q, k) = random((1, 128, 1, HEAD_DIM), (1, 1, 128, HEAD_DIM))
    run = jax.jit(lambda q, k: attention(q, KeysValues(k, k)))
    for program in ("xla", "pallas"):
        with implementation(program):
            kernel = "pallas_call" in str(jax.make_jaxpr(run)(q, k))
            assert kernel == (program == "pallas")
            run(q, k)
    assert run._cache_size() == 2
    with implementation("flash"), pytest.raises(ValueError, match='"auto", "xla" or "pallas", not \'flash\''):
        attention(q, KeysValues(k, k))


@pytest.mark.parametrize(
    ("length", "causal", "backward", "queries", "keys", "q_block", "kv_block"),
    [
        (1025, False, False, 1040, 1152, 1040, 1152),  # V1-1's images
        (1025, False, True, 1152, 1152, 384, 384),
        (4097, False, False, 4160, 4224, 1040, 384),
        (512, True, False, 512, 512, 512, 512),
        (768, True, False, 768, 768, 384, 384),
        (2048, True, True, 2048, 2048, 512, 512),
    ],
)
def test_splash_sizes(length, causal, backward, queries, keys, q_block, kv_block):
    sizes, padded_queries, padded_keys = kernels.splash_sizes(length, causal=causal, backward=backward)
    assert (padded_queries, padded_keys) == (queries, keys)
    assert (sizes.block_q, sizes.block_kv) == (q_block, kv_block)
    assert keys % sizes.block_kv == sizes.block_kv % sizes.block_kv_compute == 0
    assert sizes.has_backward_blocks == backward


@pytest.mark.parametrize(("kv_heads", "size"), [(5, 512), (10, 256), (20, 128), (40, 128)])
def test_decode_blocks(kv_heads, size):
    """V1-1's heads per device for tensor=8, 4, 2 and 1."""
    assert kernels.decode_block(kv_heads, 2048, 128, 2) == size
    assert kernels.decode_block(kv_heads, 96, 128, 2) == 0
