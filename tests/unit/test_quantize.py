"""Quantized weights and caches: rounding, products, whole models, meshes, checkpoints, and what is refused."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from support import modules
from support.golden import assert_close, kl
from support.mesh_cases import IMAGE, batch_of, config_of, params_of
from support.paths import DATA
from support.quantize_cases import V1_1, quantized, run

import internvl_jax
from internvl_jax import checkpoint
from internvl_jax.config import PRESETS, load_config
from internvl_jax.inference.generation.beam_search import reorder, widen
from internvl_jax.inference.generation.bound_model import bind_model
from internvl_jax.inference.generation.generator import Generator
from internvl_jax.inference.generation.sampling import GenerationConfig
from internvl_jax.inference.loading import unstack_towers
from internvl_jax.models import chat_model, kv_cache
from internvl_jax.models.layers import Linear, product, split_groups
from internvl_jax.quantize import (
    QuantizeError,
    Scheme,
    group_size,
    is_quantized,
    quantize_kernel,
    quantize_params,
    scheme_of,
)

VIT = DATA / "intern_vit" / "checkpoint_bin"
LLAVA = DATA / "llava_1_5" / "original"
CONFIG = config_of(5, 2)
SCHEMES = ("int8", "int4")
FACTS = json.loads((DATA / "internvl_chat_v1_1" / "goldens.json").read_text(encoding="utf-8"))
ARRAYS = np.load(DATA / "internvl_chat_v1_1" / "goldens.npz")


@jax.jit
def dequantized(params):
    """The float32 parameters that quantized ones stand for."""
    return jax.tree.map(
        lambda leaf: qwix.dequantize(leaf.astype(jnp.float32)) if is_quantized(leaf) else leaf,
        params,
        is_leaf=is_quantized,
    )


quantized_kernel = jax.jit(quantize_kernel, static_argnames=("inputs", "qtype"))


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize(("shape", "inputs"), [((256, 6), 1), ((256, 3, 4), 1), ((3, 16, 6), 2)], ids=["up", "q", "o"])
@pytest.mark.parametrize("qtype", [jnp.int8, jnp.int4])
def test_rounding_is_at_most_half_a_step(qtype, shape, inputs):
    kernel = normal(shape) * np.exp(normal(shape[-1:], 1))  # columns of different size
    ours = quantized_kernel(kernel, inputs=inputs, qtype=jnp.dtype(qtype))
    step = dequantized(ours.replace(qvalue=np.ones(shape, np.int8)))
    bound = 0.5 if qtype == jnp.int8 else 0.54  # int4's scales are bfloat16: off by 1/256 of up to 7.5 steps
    assert ours.qvalue.dtype == qtype
    error = np.abs(np.asarray(dequantized(ours)) - kernel) / np.asarray(step)
    assert error.max() <= bound + 1e-4
    assert error.mean() == pytest.approx(0.25, abs=0.04)  # uniform: as good as rounding can be


def test_what_shares_a_scale():
    shapes = jax.eval_shape(
        partial(quantize_params, scheme="int4"), chat_model.abstract_params(V1_1_FULL, jnp.bfloat16)
    )
    language, vision = shapes["language_model"]["layers"], shapes["vision_model"]["layers"]
    assert language["mlp"]["up_proj"]["kernel"].scale.shape == (40, 40, 13824)  # 128 of 5120
    assert language["mlp"]["down_proj"]["kernel"].scale.shape == (40, 216, 5120)  # 64 of 13824: 27 groups on 8 devices
    assert language["self_attn"]["q_proj"]["kernel"].scale.shape == (40, 40, 40, 128)
    assert language["self_attn"]["o_proj"]["kernel"].scale.shape == (40, 40, 1, 5120)  # of each head
    assert vision["attn"]["qkv"]["kernel"].scale.shape == (48, 1, 3, 25, 128)
    assert vision["attn"]["proj"]["kernel"].scale.shape == (48, 1, 1, 3200)
    assert {leaf.qvalue.dtype.name for leaf in quantized_leaves(language)} == {"int4"}
    assert {leaf.qvalue.dtype.name for leaf in quantized_leaves([vision, shapes["mlp1"]])} == {"int8"}
    assert shapes["language_model"]["lm_head"]["kernel"].qvalue.dtype == jnp.int8
    # What is left of 19.11 billion parameters: embeddings, norms, biases, layer scales.
    kept = [leaf for leaf in jax.tree.leaves(shapes, is_leaf=is_quantized) if not is_quantized(leaf)]
    assert chat_model.count_params(kept) < 0.012 * chat_model.count_params(chat_model.abstract_params(V1_1_FULL))


V1_1_FULL = PRESETS["internvl_chat_v1_1"]()


def quantized_leaves(tree):
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_quantized) if is_quantized(leaf)]


@pytest.mark.parametrize("qtype", [jnp.int8, jnp.int4])
@pytest.mark.parametrize(
    ("eqn", "axes", "shape"),
    [
        ("BTD,DNH->BTNH", ("embed", "heads", "head_dim"), (256, 3, 4)),
        ("BTD,DCNH->BTCNH", ("embed", "qkv", "vision_heads", "head_dim"), (256, 3, 5, 4)),
        ("BTNH,NHD->BTD", ("heads", "head_dim", "embed"), (4, 16, 24)),
        ("BTF,FD->BTD", ("mlp", "embed"), (352, 24)),
        ("...D,DV->...V", ("embed", "vocab"), (256, 31)),
    ],
)
def test_products(eqn, axes, shape, qtype):
    inputs = 2 if "NHD" in eqn else 1
    kernel = quantized_kernel(normal(shape) / 16, inputs=inputs, qtype=jnp.dtype(qtype))
    x = normal((2, 3, *shape[:inputs]), 1)
    expected = np.einsum(eqn, x, np.asarray(dequantized(kernel)))
    bias = normal(expected.shape[2:], 2)

    @jax.jit
    def run(x, kernel, bias):
        alone = product(eqn, x, kernel, jnp.float32)
        if "..." in eqn:  # the head is no Linear
            return alone, alone + bias
        layer = Linear(eqn, shape, axes, jnp.float32, use_bias=True)
        return alone, layer.apply({"params": {"kernel": split_groups(kernel), "bias": bias}}, x)

    y, with_bias = run(x, kernel, bias)
    assert_close(y, expected, 1e-5)
    assert_close(with_bias, expected + bias, 1e-5)


@pytest.mark.parametrize("scheme", [*SCHEMES, Scheme("int4", int4_vision=True)], ids=["int8", "int4", "int4 vision"])
def test_model_equals_its_dequantized_parameters(scheme):
    params = quantized(params_of(CONFIG), scheme)
    expected = run(dequantized(params), CONFIG, batch_of(CONFIG, 2))
    assert_close(run(params, CONFIG, batch_of(CONFIG, 2)), expected, 1e-4)


def generator(params, **options):
    return Generator(bind_model(CONFIG, params, dtype=jnp.float32, **options), image_token_id=IMAGE)


def test_int8_cache_equals_attention_to_what_it_holds():
    """Decoding against a cache of integers, and against the numbers that they stand for in a cache of float32."""
    text, params = CONFIG.text, params_of(CONFIG)["language_model"]
    x, steps = normal((2, 9, text.hidden_size)), normal((2, 1, text.hidden_size), 1)
    valid = np.ones((2, 9), bool)
    valid[1, :3] = False
    positions = np.maximum(np.cumsum(valid, 1) - 1, 0).astype(np.int32)

    @partial(jax.jit, static_argnames="dtype")
    def read(params, dtype):
        cache = kv_cache.init_cache(text, 2, 16, dtype, layers=params["layers"])
        return modules.run_llama(params, text, x, positions, valid, cache, fresh=True)[1]

    @jax.jit
    def decode(params, cache):
        hidden, cache, _ = modules.run_llama(params, text, steps, positions[:, -1:] + 1, jnp.ones((2, 1), bool), cache)
        return modules.logits(params, text, hidden), cache

    @jax.jit
    def in_float32(cache):
        stacks = [jax.tree.map(lambda q, s: q * s[..., None], *pair) for pair in zip((cache.k, cache.v), cache.scales)]
        return cache.replace(k=stacks[0], v=stacks[1], scales=None)

    for stacked in (True, False):
        tree = params if stacked else unstack_towers({"language_model": params})["language_model"]
        cache = read(tree, jnp.int8)
        assert {leaf.dtype.name for leaf in jax.tree.leaves((cache.k, cache.v))} == {"int8"}
        plain, exact = in_float32(cache), read(tree, jnp.float32)
        for ours, theirs in zip(*(jax.tree.leaves((c.k, c.v)) for c in (plain, exact))):
            largest = np.abs(theirs).max(axis=-1, keepdims=True)  # of a token and head
            assert np.all(np.abs(ours - theirs) <= largest / 127.5 / 2 * 1.001 + 1e-7)  # half a step
        logits, after = decode(tree, cache)
        expected, _ = decode(tree, plain)  # but for the new token's own k and v, which are not rounded there
        assert kl(expected, logits).max() < 1e-3
        assert jax.tree.structure(after) == jax.tree.structure(cache)


def test_decoding_with_an_int8_cache():
    """The whole way from quantized weights to tokens, stacked and by layers."""
    ids, pixels, valid = batch_of(CONFIG, 3)
    params = quantized(params_of(CONFIG), "int8")
    reference, ours = generator(params_of(CONFIG)), generator(params, cache_dtype="int8")
    features = reference.encode(pixels)
    gen = GenerationConfig(max_new_tokens=8)
    expected, _ = reference.generate(ids, valid.astype(int), features, gen)
    tokens, _ = ours.generate(ids, valid.astype(int), ours.encode(pixels), gen)
    assert np.mean(tokens == expected) >= 0.75, (tokens, expected)
    by_layer = generator(unstack_towers(params), cache_dtype="int8")
    np.testing.assert_array_equal(by_layer.generate(ids, valid.astype(int), ours.encode(pixels), gen)[0], tokens)
    state = ours.prefill(ids, valid.astype(int), features, gen)
    assert state.cache.k.dtype == jnp.int8
    assert state.cache.scales[0].shape == state.cache.k.shape[:-1]
    assert reference.prefill(ids, valid.astype(int), features, gen).cache.scales is None


def test_beams_carry_scales_along():
    """Widening and reordering move integers and scales alike; a search runs on what they stand for."""

    def random(shape, seed):
        return jax.tree.map(
            np.asarray, qwix.quantize(jnp.asarray(normal(shape, seed)), jnp.int8, channelwise_axes=(0, 1, 2, 3))
        )

    k, v = random((2, 3, 2, 5, 8), 0), random((2, 3, 2, 5, 8), 1)  # [L,B,K,S,H]
    cache = kv_cache.KVCache(
        k=k.qvalue,
        v=v.qvalue,
        scales=(k.scale[..., 0], v.scale[..., 0]),
        positions=np.zeros((3, 5), np.int32),
        valid=np.ones((3, 5), bool),
        length=np.int32(5),
    )

    @jax.jit
    def moved(cache):
        source = jnp.array([1, 0, 2, 2, 4, 4])
        return reorder(widen(cache, 2, 3), source, prompt_slots=4)

    def numbers(cache):
        return [np.asarray(q * s[..., None]) for q, s in zip((cache.k, cache.v), cache.scales)]

    ours = numbers(moved(cache))
    expected = moved(cache.replace(k=numbers(cache)[0], v=numbers(cache)[1], scales=None))
    for a, b in zip(ours, (expected.k, expected.v)):
        np.testing.assert_array_equal(a, b)
    assert ours[0].shape == (2, 6, 2, 8, 8)


def test_beam_search_with_an_int8_cache():
    ids, _, valid = batch_of(CONFIG, 2)
    ids, gen = np.where(ids == IMAGE, 7, ids), GenerationConfig(max_new_tokens=6, num_beams=3)
    tokens, expected = (
        generator(params_of(CONFIG), cache_dtype=dtype).generate(ids, valid.astype(int), None, gen)[0]
        for dtype in ("int8", None)
    )
    np.testing.assert_array_equal(tokens, expected)  # margins of random weights are far wider than the rounding


@jax.jit
def noisy(params, like, seed):
    """params with uniform noise of a step's width where `like` is quantized: rounding's errors, but by chance."""
    leaves, tree = jax.tree.flatten(like, is_leaf=is_quantized)
    moved = []
    for index, (leaf, kernel) in enumerate(zip(leaves, tree.flatten_up_to(params))):
        if is_quantized(leaf):
            steps = qwix.dequantize(leaf.replace(qvalue=jnp.ones_like(leaf.qvalue)).astype(jnp.float32))
            key = jax.random.fold_in(jax.random.key(seed), index)
            kernel = kernel + steps * jax.random.uniform(key, kernel.shape, minval=-0.5, maxval=0.5)
        moved.append(kernel)
    return tree.unflatten(moved)


def golden_cost(chat):
    """KL from the reference's float32 logits, and how often the likeliest token is its own, over its prompts."""
    expected, ours = [], []
    for prompt in FACTS["prompts"]:
        if f"logits/{prompt['id']}/fp32" in ARRAYS:
            pixels = np.stack([ARRAYS[f"images/{name}/quickstart"] for name in prompt["images"]])
            expected.append(ARRAYS[f"logits/{prompt['id']}/fp32"])
            ours.append(chat.logits(np.array([prompt["input_ids"]]), pixels)[0])
    expected, ours = np.concatenate(expected), np.concatenate(ours)
    return kl(expected, ours), np.mean(expected.argmax(-1) == ours.argmax(-1))


@pytest.mark.parametrize(("scheme", "bound"), [("int8", 0.02), ("int4", 1.5)])
def test_quality_on_the_golden_bundle(scheme, bound):
    """Quantizing costs no more than noise of the same size on the float32 weights: 1.5 times its KL, 10 points.

    Measured: int8 0.010 beside 0.009 (0.008 to 0.011 in five draws), int4 1.2 beside 1.1 (1.0 to 1.2); the same
    likeliest token at 91% of positions beside 93%, and 35% beside 34%. An error in a scale or in a product would cost
    more than its noise. That 4 bits cost so much is the bundle's doing: its weights are random, so its logits lie
    close together; a trained model loses 0.004 (docs/quantization.md). `bound` is twice, for int4 1.5 times, what was
    measured.
    """
    pytest.importorskip("torch")
    ours, same = golden_cost(internvl_jax.load(V1_1, quantize=scheme))
    chat = internvl_jax.load(V1_1)
    plain, like = chat.params, quantized(chat.params, scheme)
    by_chance = []
    for seed in range(3):
        by_chance.append(golden_cost(chat.with_params(noisy(plain, like, seed))))
    noise, agreement = (float(np.mean([np.mean(one[place]) for one in by_chance])) for place in (0, 1))
    print(f"{scheme}: KL {ours.mean():.2g}, largest {ours.max():.2g}, same token {same:.1%}; ", end="")
    print(f"noise: KL {noise:.2g}, same token {agreement:.1%}")
    assert ours.mean() <= min(bound, 1.5 * noise)
    assert same >= agreement - 0.1


@pytest.mark.parametrize("scheme", [pytest.param("int8", marks=pytest.mark.long), "int4"])
def test_checkpoints(scheme, tmp_path):
    """Quantized on the way in, or by convert, or in memory: the same numbers, and Orbax alone can restore them."""
    pytest.importorskip("torch")
    from checkpoints_convert.convert import convert
    from checkpoints_convert.export import export
    from checkpoints_convert.mapping import ConversionError

    convert(V1_1, tmp_path / "plain")
    report = convert(V1_1, tmp_path / "quantized", quantize=scheme)
    stored = checkpoint.stored_tree(tmp_path / "quantized")
    assert scheme_of(stored) == Scheme(scheme)
    config = load_config(V1_1)
    plain = checkpoint.load(tmp_path / "plain", checkpoint.stored_tree(tmp_path / "plain"))
    expected = quantized(plain, scheme)
    assert jax.tree.structure(stored) == jax.tree.structure(expected)
    restored = checkpoint.load(tmp_path / "quantized", stored)
    assert_same(restored, expected)
    assert report.bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored))

    assert internvl_jax.load(tmp_path / "quantized").config == config
    chats = [
        internvl_jax.load(tmp_path / "quantized"),
        internvl_jax.load(tmp_path / "quantized", quantize=scheme),
        internvl_jax.load(tmp_path / "plain", quantize=scheme),
        internvl_jax.load(V1_1, quantize=scheme),
    ]
    for chat in chats[1:]:
        assert_same(chat.params, chats[0].params)
    layers = chats[0].params["language_model"]["layers"]
    assert layers[1]["mlp"]["up_proj"]["kernel"].qvalue.dtype.name == scheme
    assert layers[1]["input_layernorm"]["scale"].dtype == jnp.float32

    import orbax.checkpoint as ocp

    tree = ocp.StandardCheckpointer().restore(tmp_path / "quantized" / "params")
    kernel = expected["language_model"]["layers"]["mlp"]["up_proj"]["kernel"]
    by_orbax = tree["language_model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert_same(by_orbax, {"qvalue": kernel.qvalue, "scale": kernel.scale})

    checkpoint.save(tmp_path / "again", restored)
    assert_same(checkpoint.load(tmp_path / "again", stored), restored)
    with pytest.raises(ConversionError, match="is quantized"):
        export(tmp_path / "quantized", tmp_path / "exported")
    other = {"int8": "int4", "int4": "int8"}[scheme]
    with pytest.raises(QuantizeError, match=f"is {scheme} already"):
        internvl_jax.load(tmp_path / "quantized", quantize=other)


@pytest.mark.parametrize("scheme", [pytest.param("int8", marks=pytest.mark.long), "int4"])
def test_llava(scheme, tmp_path):
    """CLIP is treated as InternViT is: 8 bits under either scheme, and what is no product as it was."""
    pytest.importorskip("torch")
    from checkpoints_convert.convert import convert

    convert(LLAVA, tmp_path / "quantized", quantize=scheme)
    chats = [internvl_jax.load(tmp_path / "quantized"), internvl_jax.load(LLAVA, quantize=scheme)]
    assert_same(chats[0].params, chats[1].params)
    plain = internvl_jax.load(LLAVA)
    tower, before = (chat.params["vision_model"] for chat in (chats[0], plain))
    for layer in tower["layers"]:
        kernels = [leaf for leaf in jax.tree.leaves(layer, is_leaf=is_quantized) if is_quantized(leaf)]
        assert [kernel.qvalue.dtype for kernel in kernels] == [jnp.int8] * 4  # qkv, proj, fc1, fc2
    assert_same(tower["embeddings"], before["embeddings"])
    assert_same(tower["layers"][0]["attn"]["qkv"]["bias"], before["layers"][0]["attn"]["qkv"]["bias"])
    params = chats[0].params
    assert params["mlp1"]["fc1"]["kernel"].qvalue.dtype == params["language_model"]["lm_head"]["kernel"].qvalue.dtype
    assert params["language_model"]["layers"][1]["mlp"]["up_proj"]["kernel"].qvalue.dtype.name == scheme
    # What is computed is what the integers stand for: the same model in float32 with the rounded weights.
    pixels = normal((2, 3, 84, 84))
    visual = chats[0].encode(pixels)
    plain = plain.with_params(dequantized(params))
    assert_close(visual, plain.encode(pixels), 1e-4, "visual tokens")
    ids = np.array([[1, *[-200] * 36, 300, 17, 42]])
    assert_close(chats[0].logits(ids, pixels[:1]), plain.logits(ids, pixels[:1]), 1e-3, "logits")


def assert_same(ours, theirs):
    leaves, others = list(checkpoint.named_leaves(ours)), list(checkpoint.named_leaves(theirs))
    assert [name for name, _ in leaves] == [name for name, _ in others]
    for (name, a), (_, b) in zip(leaves, others):
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


def test_a_vision_tower_in_four_bits_is_refused_unless_forced(tmp_path):
    pytest.importorskip("torch")
    from checkpoints_convert.convert import convert

    with pytest.raises(QuantizeError, match="ruin"):
        convert(VIT, tmp_path / "vit", quantize="int4")
    assert not (tmp_path / "vit").exists()
    with pytest.raises(QuantizeError, match="ruin"):
        internvl_jax.load(VIT, quantize="int4")
    convert(VIT, tmp_path / "vit", quantize=Scheme("int4", int4_vision=True))
    assert scheme_of(checkpoint.stored_tree(tmp_path / "vit")) == Scheme("int4", int4_vision=True)
    chat = internvl_jax.load(tmp_path / "vit")
    assert chat.params["vision_model"]["layers"][0]["mlp"]["fc1"]["kernel"].qvalue.dtype == jnp.int4
    chat = internvl_jax.load(VIT, quantize="int8")
    assert chat.params["vision_model"]["layers"][0]["mlp"]["fc1"]["kernel"].qvalue.dtype == jnp.int8


def test_refusals():
    with pytest.raises(QuantizeError, match=r"'int8' or 'int4'"):
        Scheme("fp8")
    with pytest.raises(QuantizeError, match="groups"):
        group_size(100, "kernel")
    with pytest.raises(ValueError, match="cache_dtype 'int4' is not supported"):
        internvl_jax.load(V1_1, cache_dtype="int4")
