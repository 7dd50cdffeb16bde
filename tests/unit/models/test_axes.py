"""Logical axes of parameters, and the PartitionSpecs that follow from them."""

import dataclasses

import flax.linen as nn
import jax
import pytest
from jax.sharding import PartitionSpec as P

from internvl_jax.config import PRESETS
from internvl_jax.models import axes, chat_model
from internvl_jax.models.axes import axes_of, find_axes, linear_layers, logical_axes
from internvl_jax.models.layers import RMSNorm
from internvl_jax.models.param_sharding import param_specs, resize_axes
from internvl_jax.parallel.mesh import AXES
from internvl_jax.parallel.partitioning import AXIS_RULES, logical_spec, path_of
from internvl_jax.quantize import quantize_params

NANO = PRESETS["nano"]()
CONFIGS = {name: make() for name, make in PRESETS.items()} | {
    "biases": dataclasses.replace(
        NANO,
        vision=dataclasses.replace(NANO.vision, qkv_bias=True),
        text=dataclasses.replace(NANO.text, attention_bias=True, mlp_bias=True),
    ),
    "qwen2": dataclasses.replace(NANO, text=dataclasses.replace(NANO.text, family="qwen2")),
    "qwen3": dataclasses.replace(NANO, text=dataclasses.replace(NANO.text, family="qwen3")),
    "tied": dataclasses.replace(NANO, text=dataclasses.replace(NANO.text, tie_word_embeddings=True)),
    "vision only": dataclasses.replace(NANO, projector=None, text=None),
    "text only": dataclasses.replace(NANO, vision=None, projector=None),
}

# Written by hand for every parameter, so that a change of a declaration or of AXIS_RULES shows: the path, its spec in
# vision mode "tensor" and in "data", without trailing None.
# fmt: off
SPECS = [
    ("language_model/embed_tokens/embedding", ("tensor", "fsdp"), ("tensor", "fsdp")),
    ("language_model/layers/input_layernorm/scale", (), ()),
    ("language_model/layers/mlp/down_proj/bias", (), ()),
    ("language_model/layers/mlp/down_proj/kernel", (None, "tensor", "fsdp"), (None, "tensor", "fsdp")),
    ("language_model/layers/mlp/gate_proj/bias", (None, "tensor"), (None, "tensor")),
    ("language_model/layers/mlp/gate_proj/kernel", (None, "fsdp", "tensor"), (None, "fsdp", "tensor")),
    ("language_model/layers/mlp/up_proj/bias", (None, "tensor"), (None, "tensor")),
    ("language_model/layers/mlp/up_proj/kernel", (None, "fsdp", "tensor"), (None, "fsdp", "tensor")),
    ("language_model/layers/post_attention_layernorm/scale", (), ()),
    ("language_model/layers/self_attn/k_norm/scale", (), ()),
    ("language_model/layers/self_attn/k_proj/bias", (None, "tensor"), (None, "tensor")),
    ("language_model/layers/self_attn/k_proj/kernel", (None, "fsdp", "tensor"), (None, "fsdp", "tensor")),
    ("language_model/layers/self_attn/o_proj/bias", (), ()),
    ("language_model/layers/self_attn/o_proj/kernel", (None, "tensor", None, "fsdp"), (None, "tensor", None, "fsdp")),
    ("language_model/layers/self_attn/q_norm/scale", (), ()),
    ("language_model/layers/self_attn/q_proj/bias", (None, "tensor"), (None, "tensor")),
    ("language_model/layers/self_attn/q_proj/kernel", (None, "fsdp", "tensor"), (None, "fsdp", "tensor")),
    ("language_model/layers/self_attn/v_proj/bias", (None, "tensor"), (None, "tensor")),
    ("language_model/layers/self_attn/v_proj/kernel", (None, "fsdp", "tensor"), (None, "fsdp", "tensor")),
    ("language_model/lm_head/kernel", ("fsdp", "tensor"), ("fsdp", "tensor")),
    ("language_model/norm/scale", (), ()),
    ("mlp1/fc1/bias", ("tensor",), ()),
    ("mlp1/fc1/kernel", ("fsdp", "tensor"), ("fsdp",)),
    ("mlp1/fc2/bias", (), ()),
    ("mlp1/fc2/kernel", ("tensor", "fsdp"), (None, "fsdp")),
    ("mlp1/norm/bias", (), ()),
    ("mlp1/norm/scale", (), ()),
    ("vision_model/embeddings/class_embedding", (), ()),
    ("vision_model/embeddings/patch_embedding/bias", (), ()),
    ("vision_model/embeddings/patch_embedding/kernel", (), ()),
    ("vision_model/embeddings/position_embedding", (), ()),
    ("vision_model/embeddings/pre_layrnorm/bias", (), ()),
    ("vision_model/embeddings/pre_layrnorm/scale", (), ()),
    ("vision_model/layers/attn/k_norm/scale", (None, "tensor"), ()),
    ("vision_model/layers/attn/proj/bias", (), ()),
    ("vision_model/layers/attn/proj/kernel", (None, "tensor", None, "fsdp"), (None, None, None, "fsdp")),
    ("vision_model/layers/attn/q_norm/scale", (None, "tensor"), ()),
    ("vision_model/layers/attn/qkv/bias", (None, None, "tensor"), ()),
    ("vision_model/layers/attn/qkv/kernel", (None, "fsdp", None, "tensor"), (None, "fsdp")),
    ("vision_model/layers/ls1", (), ()),
    ("vision_model/layers/ls2", (), ()),
    ("vision_model/layers/mlp/fc1/bias", (None, "tensor"), ()),
    ("vision_model/layers/mlp/fc1/kernel", (None, "fsdp", "tensor"), (None, "fsdp")),
    ("vision_model/layers/mlp/fc2/bias", (), ()),
    ("vision_model/layers/mlp/fc2/kernel", (None, "tensor", "fsdp"), (None, None, "fsdp")),
    ("vision_model/layers/norm1/bias", (), ()),
    ("vision_model/layers/norm1/scale", (), ()),
    ("vision_model/layers/norm2/bias", (), ()),
    ("vision_model/layers/norm2/scale", (), ()),
]
# fmt: on


def trimmed(spec):
    spec = list(spec)
    while spec and spec[-1] is None:
        spec.pop()
    return tuple(spec)


def gathered(path, spec):
    """In vision mode "gather" the tower's width, and the projector's input, are sharded over the tensor axis too."""
    tower = path.startswith(("vision_model/layers", "mlp1/fc1"))
    return tuple(("fsdp", "tensor") if tower and axis == "fsdp" else axis for axis in spec)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_specs(name, scheme):
    abstract = chat_model.abstract_params(CONFIGS[name])
    if scheme is not None:
        if "language_model" not in abstract:
            scheme = "int8"
        abstract = jax.eval_shape(lambda tree: quantize_params(tree, scheme), abstract)
    for mode, expected in (
        ("tensor", {path: spec for path, spec, _ in SPECS}),
        ("data", {path: spec for path, _, spec in SPECS}),
        ("gather", {path: gathered(path, spec) for path, _, spec in SPECS}),
    ):
        specs = param_specs(abstract, vision=mode)
        leaves = jax.tree_util.tree_leaves_with_path(abstract)
        for (keys, leaf), spec in zip(leaves, jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)), strict=True):
            wanted = expected[path_of(keys)]
            if keys[-1] == jax.tree_util.GetAttrKey("scale"):  # not along axes that share a scale
                wanted = trimmed(axes if size > 1 else None for axes, size in zip(wanted, leaf.shape))
            assert trimmed(spec) == wanted, path_of(keys)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_declared(name):
    config = CONFIGS[name]
    declared = logical_axes(config)
    abstract = chat_model.abstract_params(config)
    assert jax.tree.structure(declared) == jax.tree.structure(abstract)
    for (keys, found), leaf in zip(jax.tree_util.tree_leaves_with_path(declared), jax.tree.leaves(abstract)):
        assert len(found.names) == len(leaf.shape)
        assert (found.names, found.inputs) == (axes_of(path_of(keys)).names, axes_of(path_of(keys)).inputs)


def test_parameters_stay_plain():
    for leaf in jax.tree.leaves(chat_model.abstract_params(NANO), is_leaf=lambda leaf: True):
        assert isinstance(leaf, dict | jax.ShapeDtypeStruct)


def test_an_undeclared_parameter_is_refused(monkeypatch):
    class Undeclared(nn.Module):
        @nn.compact
        def __call__(self, x):
            return self.param("extra", nn.initializers.zeros_init(), (7,))

    tree = {"mlp1": Undeclared().init(jax.random.key(0), 0)["params"]}
    monkeypatch.setattr(axes, "init_params", lambda key, config: tree)
    with pytest.raises(ValueError, match=r"mlp1/extra \[7\] is a parameter without logical axes"):
        logical_axes(dataclasses.replace(NANO, select_layer=-3))
    with pytest.raises(ValueError, match="mlp1/extra is not a parameter of the model"):
        param_specs(tree)
    with pytest.raises(ValueError, match=r"scale \[3\] is declared with 2 logical axes"):
        RMSNorm((3,), 1e-6, axes=("heads", "head_dim")).init(jax.random.key(0), jax.numpy.ones(3))


def test_every_rule_is_used_and_every_axis_has_one():
    used = {name for found in axes.declared_parameters().values() for name in found.names}
    assert used - set(AXIS_RULES) == set()
    activations = {"batch", "images", "tokens"}
    assert set(AXIS_RULES) - used - activations == {"rank"}  # of adapters
    assert {axis for rule in AXIS_RULES.values() for axis in ((rule,) if isinstance(rule, str) else rule or ())} == set(
        AXES
    )
    with pytest.raises(ValueError, match="no sharding rule for the logical axis depth"):
        logical_spec("depth")


def test_adapters_follow_their_kernels():
    assert linear_layers("vision_model") == ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")
    assert linear_layers("language_model")[:2] == ("self_attn/q_proj", "self_attn/k_proj")
    assert linear_layers("language_model")[2:] == (
        "self_attn/v_proj", "self_attn/o_proj", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj",
    )  # fmt: skip
    path = "vision_model/layers/attn/proj"
    assert axes_of(f"{path}/lora_a").names == ("layers", "vision_heads", "head_dim", "rank")
    assert axes_of(f"{path}/lora_b").names == ("layers", "rank", "vision_embed")
    assert find_axes("vision_model/layers/norm1/lora_a") is None


def test_padding_follows_the_axes():
    tree = chat_model.abstract_params(NANO)
    padded = jax.eval_shape(lambda tree: resize_axes(tree, {"vision_heads": 8, "vocab": 1024}), tree)
    changed = {
        path_of(keys): leaf.shape
        for (keys, leaf), old in zip(jax.tree_util.tree_leaves_with_path(padded), jax.tree.leaves(tree))
        if leaf.shape != old.shape
    }
    assert changed == {
        "language_model/embed_tokens/embedding": (1024, 128),
        "language_model/lm_head/kernel": (128, 1024),
        "vision_model/layers/attn/qkv/kernel": (6, 120, 3, 8, 24),
        "vision_model/layers/attn/proj/kernel": (6, 8, 24, 120),
        "vision_model/layers/attn/q_norm/scale": (6, 8, 24),
        "vision_model/layers/attn/k_norm/scale": (6, 8, 24),
    }
