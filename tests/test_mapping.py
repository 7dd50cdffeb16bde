"""The tables: every part of every leaf has exactly one published tensor, and the way back is exact."""

import math

import ml_dtypes
import numpy as np
import pytest

from checkpoints_convert.mapping import ConversionError, plan, tensors
from internvl_jax.checkpoint import named_leaves
from internvl_jax.config import PRESETS, ChatConfig, ProjectorConfig, TextConfig, VisionConfig
from internvl_jax.models import chat_model

VISION = VisionConfig(
    hidden_size=20, num_hidden_layers=3, num_attention_heads=5, intermediate_size=28, image_size=56, patch_size=14
)
BIASED = VisionConfig(
    hidden_size=20, num_hidden_layers=3, num_attention_heads=5, intermediate_size=28, image_size=56,
    norm_type="layer_norm", qkv_bias=True, qk_normalization=False,
)  # fmt: skip
LLAMA = TextConfig(
    vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=6, intermediate_size=44,
    num_key_value_heads=2, head_dim=6, max_position_embeddings=64,
)  # fmt: skip
TIED = TextConfig(
    vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=6, intermediate_size=44,
    num_key_value_heads=6, head_dim=4, max_position_embeddings=64, tie_word_embeddings=True, attention_bias=True,
    mlp_bias=True,
)  # fmt: skip


def chat(vision, text, layout):
    version = "v1" if layout == "internvl_chat" else "v2"
    return ChatConfig(vision, ProjectorConfig(80, 24), text, layout=layout, ps_version=version, select_layer=-2)


CONFIGS = {
    "internvl_chat": chat(VISION, LLAMA, "internvl_chat"),
    "internvl_chat, biases, tied": chat(BIASED, TIED, "internvl_chat"),
    "internvl": chat(BIASED, LLAMA, "internvl"),
    "internvl, q/k norm, tied": chat(VISION, TIED, "internvl"),
    "intern_vit_6b": ChatConfig(VISION, None, None, layout="intern_vit_6b"),
    "llama": ChatConfig(None, None, LLAMA, layout="llama"),
    "llama, tied": ChatConfig(None, None, TIED, layout="llama"),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@every_config
def test_tensors_cover_the_tree_once(config):
    leaves = dict(named_leaves(chat_model.abstract_params(config)))
    times = {name: np.zeros(leaf.shape, int) for name, leaf in leaves.items()}
    for tensor in tensors(config):
        part = times[tensor.path][tensor.index]
        assert part.shape == tensor.our_shape, tensor
        times[tensor.path][tensor.index] += 1
    assert all((count == 1).all() for count in times.values())


@every_config
def test_way_back_is_exact(config):
    rng = np.random.default_rng(0)
    for tensor in tensors(config):
        bits = rng.integers(0, 2**16, tensor.shape, np.uint16)
        ours = tensor.to_ours(bits.view(ml_dtypes.bfloat16))
        assert ours.shape == tensor.our_shape
        np.testing.assert_array_equal(tensor.to_theirs(ours).view(np.uint16), bits)
        if tensor.transposed and len(tensor.our_shape) == 2 and len(tensor.shape) == 2:
            np.testing.assert_array_equal(ours.view(np.uint16), bits.T)


def test_transpose_of_more_than_a_strip():
    tensor = next(t for t in tensors(PRESETS["nano"]()) if t.key.endswith("fc1.weight"))
    values = np.arange(math.prod(tensor.shape), dtype=np.float32).reshape(tensor.shape)
    assert min(tensor.shape) > 64
    np.testing.assert_array_equal(tensor.to_ours(values), values.T)


def test_fused_kernel():
    """torch's fused qkv has its rows ordered (q/k/v, head, dim); separate ones land in the same places."""
    fused = {t.key: t for t in tensors(CONFIGS["internvl_chat"])}["vision_model.encoder.layers.0.attn.qkv.weight"]
    apart = {t.key: t for t in tensors(CONFIGS["internvl"])}
    weight = np.arange(60 * 20, dtype=np.float32).reshape(60, 20)
    ours = fused.to_ours(weight)
    assert ours.shape == (20, 3, 5, 4)
    assert ours[7, 1, 3, 2] == weight[20 + 3 * 4 + 2, 7]
    for part, name in enumerate("qkv"):
        tensor = apart[f"vision_tower.encoder.layer.0.attention.{name}_proj.weight"]
        np.testing.assert_array_equal(tensor.to_ours(weight[20 * part : 20 * part + 20]), ours[:, part])
        assert tensor.index == (0, slice(None), part)


def shapes(config):
    return {tensor.key: tensor.shape for tensor in tensors(config)}


def test_plan_lists_every_problem():
    config = CONFIGS["internvl_chat"]
    found = shapes(config)
    del found["mlp1.0.weight"]
    del found["language_model.model.layers.1.mlp.up_proj.weight"]
    found["vision_model.encoder.layers.3.ls1"] = (20,)
    found["mlp1.3.bias"] = (25,)
    with pytest.raises(ConversionError) as caught:
        plan(config, found)
    lines = str(caught.value).splitlines()
    assert "config.json" in lines[0]
    assert [line.strip() for line in lines[1:]] == [
        "misshapen: mlp1.3.bias is [25], config.json asks for [24]",
        "missing: language_model.model.layers.1.mlp.up_proj.weight [44, 24]",
        "missing: mlp1.0.weight [80]",
        "unexpected: vision_model.encoder.layers.3.ls1 [20]",
    ]


def test_plan_passes_over_buffers_and_repeated_heads():
    found = shapes(CONFIGS["llama, tied"])
    expected = set(found)
    found["model.layers.0.self_attn.rotary_emb.inv_freq"] = (2,)
    found["lm_head.weight"] = (37, 24)
    assert set(plan(CONFIGS["llama, tied"], found)) == expected
    untied = {**shapes(CONFIGS["llama"]), "model.rotary_emb.inv_freq": (3,)}
    assert "lm_head.weight" in plan(CONFIGS["llama"], untied)


def test_both_namings_of_the_transformers_layout():
    """transformers 4.52 moved the towers under `model.`; files of either age are read."""
    config = CONFIGS["internvl"]
    newer = {}
    for key, shape in shapes(config).items():
        key = "model." + key.replace("language_model.model.", "language_model.")
        newer[key.replace("model.language_model.lm_head", "lm_head")] = shape
    matched = plan(config, newer)
    assert {tensor.key for tensor in matched.values()} == set(shapes(config))
    assert matched["model.language_model.norm.weight"].path == "language_model/norm/scale"


def test_full_size():
    """The tables of V1-1 hold as many numbers as the tree does."""
    config = PRESETS["internvl_chat_v1_1"]()
    count = sum(math.prod(tensor.shape) for tensor in tensors(config))
    assert count == chat_model.count_params(chat_model.abstract_params(config))
