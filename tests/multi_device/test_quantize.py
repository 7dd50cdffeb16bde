"""Quantized models on meshes of eight devices against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.golden import assert_close
from support.mesh_cases import IMAGE, answers, batch_of, config_of, params_of
from support.quantize_cases import V1_1, quantized, run

from internvl_jax import checkpoint
from internvl_jax.evaluation.quantize_report import answer_logits, divergence
from internvl_jax.inference.generation.bound_model import BoundModel, PromptBatch
from internvl_jax.inference.loading import load
from internvl_jax.models import param_sharding
from internvl_jax.parallel.mesh import make_mesh
from internvl_jax.processing.conversation import image_token_index
from internvl_jax.quantize import is_quantized

CONFIG = config_of(5, 2)


@pytest.mark.parametrize(("scheme", "spec"), [("int8", "fsdp=2,tensor=4"), ("int4", "data=2,tensor=4")])
def test_mesh_equals_one_device(scheme, spec):
    params = quantized(params_of(CONFIG), scheme)
    batch = batch_of(CONFIG, 8)
    expected, decoded = run(params, CONFIG, batch), forced(params)
    mesh = make_mesh(spec, config=CONFIG)
    placed = param_sharding.place_params(jax.tree.map(jnp.copy, params), CONFIG, mesh)  # which it may use up
    with jax.set_mesh(mesh):
        ours = run(placed, CONFIG, batch)[..., : CONFIG.text.vocab_size]
        through_cache = forced(placed)
    assert_close(ours, expected, 1e-3, f"logits, {scheme} on {spec}")
    # What differs in its last bit may be rounded the other way in an int8 cache.
    assert divergence(decoded, through_cache).max() < 1e-4
    if scheme == "int8":
        tokens, ours = (answers(p, CONFIG, 3, mesh=m, cache_dtype="int8") for p, m in ((params, None), (placed, mesh)))
        assert np.mean(ours == tokens) >= 0.9, (ours, tokens)
    check_shards(placed)
    restored = param_sharding.unpad_params(placed, CONFIG)
    for (name, ours), (_, theirs) in zip(checkpoint.named_leaves(restored), checkpoint.named_leaves(params)):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), err_msg=name)


def forced(params):
    """Logits of six given tokens after each of four prompts, read through an int8 cache."""
    rng, text = np.random.default_rng(0), CONFIG.text
    ids, features = batch_of(CONFIG, 4)[0], rng.standard_normal((4, CONFIG.tokens_per_image, text.hidden_size))
    model = BoundModel(params, CONFIG, jnp.dtype("float32"), jnp.dtype("int8"))
    prompt = PromptBatch(ids, np.ones(ids.shape, bool), features.astype(np.float32), image_token_index(ids == IMAGE))
    logits = answer_logits(model, prompt, rng.integers(4, text.vocab_size, (4, 6)).astype(np.int32))
    return np.asarray(logits)[..., : text.vocab_size]


def check_shards(params):
    """Scales lie where their integers lie."""
    kernel = params["language_model"]["layers"]["mlp"]["up_proj"]["kernel"]  # [L,D,F]
    integers, scales = (leaf.sharding.shard_shape(leaf.shape) for leaf in (kernel.qvalue, kernel.scale))
    assert integers[2] == scales[2] == 96 // 4
    kernel = params["vision_model"]["layers"]["attn"]["proj"]["kernel"]  # [L,N,H,D], 5 heads padded to 8
    assert kernel.qvalue.shape[1] == 8
    assert kernel.scale.shape[1] == 1


def test_loading_onto_a_mesh_quantizes_as_converting_does(tmp_path):
    pytest.importorskip("torch")
    from checkpoints_convert.convert import convert

    convert(V1_1, tmp_path / "plain")
    convert(V1_1, tmp_path / "int4", quantize="int4")
    chats = [
        load(tmp_path / "int4", mesh="data=2,tensor=4"),
        load(tmp_path / "plain", mesh="data=2,tensor=4", quantize="int4"),
        load(V1_1, mesh="fsdp=2,tensor=4", quantize="int4"),
    ]
    trees = [param_sharding.unpad_params(chat.params, chat.config) for chat in chats]
    for tree in trees[1:]:
        for (name, ours), (_, theirs) in zip(checkpoint.named_leaves(tree), checkpoint.named_leaves(trees[0])):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), err_msg=name)
    kernels = [leaf for leaf in jax.tree.leaves(trees[1], is_leaf=is_quantized) if is_quantized(leaf)]
    assert {kernel.qvalue.dtype for kernel in kernels} == {jnp.dtype("int8"), jnp.dtype("int4")}
