"""The tables: every part of every leaf has exactly one published tensor, and the way back is exact."""

import math
import re

import ml_dtypes
import numpy as np
import pytest

from checkpoints_convert.mapping import ConversionError, plan, tensors
from internvl_jax.checkpoint import named_leaves
from internvl_jax.config import PRESETS, ChatConfig, ProjectorConfig, TextConfig, VisionConfig, clip_vision
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


# By hand, not by the tables: where each number of a file goes. Widths: vision 20 = 5 heads of 4, 14 x 14 patches of 3
# channels; LLaMA 24, its heads of 6 (LLAMA) or 4 (TIED).


def linear(w, inputs, outputs):
    return w[outputs, inputs]


def rows_by_head(dim):
    return lambda w, d, n, h: w[n * dim + h, d]


def columns_by_head(dim):
    return lambda w, n, h, d: w[d, n * dim + h]


def vector_by_head(dim):
    return lambda w, n, h: w[n * dim + h]


def same(w, *index):
    return w[index]


VISION_BY_HAND = {
    r"class_embedding|cls_token": (lambda w, d: w[0, 0, d], "embeddings/class_embedding", ()),
    r"position_embeddings?": (lambda w, p, d: w[0, p, d], "embeddings/position_embedding", ()),
    r"patch_embedding(s\.projection)?\.weight": (
        lambda w, i, d: w[d, i // 196, i % 196 // 14, i % 14], "embeddings/patch_embedding/kernel", ()),
    r"patch_embedding(s\.projection)?\.bias": (same, "embeddings/patch_embedding/bias", ()),
    r"attn\.qkv\.weight": (lambda w, d, part, n, h: w[part * 20 + n * 4 + h, d], "layers/attn/qkv/kernel", (1,)),
    r"attn\.qkv\.bias": (lambda w, part, n, h: w[part * 20 + n * 4 + h], "layers/attn/qkv/bias", (1,)),
    r"attention\.q_proj\.weight": (rows_by_head(4), "layers/attn/qkv/kernel", (1, slice(None), 0)),
    r"attention\.k_proj\.weight": (rows_by_head(4), "layers/attn/qkv/kernel", (1, slice(None), 1)),
    r"attention\.v_proj\.weight": (rows_by_head(4), "layers/attn/qkv/kernel", (1, slice(None), 2)),
    r"attention\.q_proj\.bias": (vector_by_head(4), "layers/attn/qkv/bias", (1, 0)),
    r"attention\.k_proj\.bias": (vector_by_head(4), "layers/attn/qkv/bias", (1, 1)),
    r"attention\.v_proj\.bias": (vector_by_head(4), "layers/attn/qkv/bias", (1, 2)),
    r"(attn|attention)\.q_norm\.weight": (vector_by_head(4), "layers/attn/q_norm/scale", (1,)),
    r"(attn|attention)\.k_norm\.weight": (vector_by_head(4), "layers/attn/k_norm/scale", (1,)),
    r"(attn\.proj|projection_layer)\.weight": (columns_by_head(4), "layers/attn/proj/kernel", (1,)),
    r"(attn\.proj|projection_layer)\.bias": (same, "layers/attn/proj/bias", (1,)),
    r"ls1|lambda_1": (same, "layers/ls1", (1,)),
    r"ls2|lambda_2": (same, "layers/ls2", (1,)),
    r"(norm1|layernorm_before)\.weight": (same, "layers/norm1/scale", (1,)),
    r"(norm2|layernorm_after)\.weight": (same, "layers/norm2/scale", (1,)),
    r"(norm1|layernorm_before)\.bias": (same, "layers/norm1/bias", (1,)),
    r"(norm2|layernorm_after)\.bias": (same, "layers/norm2/bias", (1,)),
    r"mlp\.fc1\.weight": (linear, "layers/mlp/fc1/kernel", (1,)),
    r"mlp\.fc2\.weight": (linear, "layers/mlp/fc2/kernel", (1,)),
    r"mlp\.fc1\.bias": (same, "layers/mlp/fc1/bias", (1,)),
    r"mlp\.fc2\.bias": (same, "layers/mlp/fc2/bias", (1,)),
}  # fmt: skip
CLIP_BY_HAND = {
    r"class_embedding": (same, "embeddings/class_embedding", ()),
    r"position_embedding\.weight": (same, "embeddings/position_embedding", ()),
    r"patch_embedding\.weight": (
        lambda w, i, d: w[d, i // 196, i % 196 // 14, i % 14], "embeddings/patch_embedding/kernel", ()),
    r"pre_layrnorm\.weight": (same, "embeddings/pre_layrnorm/scale", ()),
    r"pre_layrnorm\.bias": (same, "embeddings/pre_layrnorm/bias", ()),
    r"self_attn\.q_proj\.weight": (rows_by_head(4), "layers/attn/qkv/kernel", (1, slice(None), 0)),
    r"self_attn\.k_proj\.weight": (rows_by_head(4), "layers/attn/qkv/kernel", (1, slice(None), 1)),
    r"self_attn\.v_proj\.weight": (rows_by_head(4), "layers/attn/qkv/kernel", (1, slice(None), 2)),
    r"self_attn\.q_proj\.bias": (vector_by_head(4), "layers/attn/qkv/bias", (1, 0)),
    r"self_attn\.k_proj\.bias": (vector_by_head(4), "layers/attn/qkv/bias", (1, 1)),
    r"self_attn\.v_proj\.bias": (vector_by_head(4), "layers/attn/qkv/bias", (1, 2)),
    r"self_attn\.out_proj\.weight": (columns_by_head(4), "layers/attn/proj/kernel", (1,)),
    r"self_attn\.out_proj\.bias": (same, "layers/attn/proj/bias", (1,)),
    r"layer_norm1\.weight": (same, "layers/norm1/scale", (1,)),
    r"layer_norm1\.bias": (same, "layers/norm1/bias", (1,)),
    r"layer_norm2\.weight": (same, "layers/norm2/scale", (1,)),
    r"layer_norm2\.bias": (same, "layers/norm2/bias", (1,)),
    r"mlp\.fc1\.weight": (linear, "layers/mlp/fc1/kernel", (1,)),
    r"mlp\.fc2\.weight": (linear, "layers/mlp/fc2/kernel", (1,)),
    r"mlp\.fc1\.bias": (same, "layers/mlp/fc1/bias", (1,)),
    r"mlp\.fc2\.bias": (same, "layers/mlp/fc2/bias", (1,)),
}  # fmt: skip
PROJECTOR_BY_HAND = {
    r"(mlp1\.0|layer_norm)\.weight": (same, "norm/scale", ()),
    r"(mlp1\.0|layer_norm)\.bias": (same, "norm/bias", ()),
    r"(mlp1\.1|linear_1|mm_projector\.0)\.weight": (linear, "fc1/kernel", ()),
    r"(mlp1\.1|linear_1|mm_projector\.0)\.bias": (same, "fc1/bias", ()),
    r"(mlp1\.3|linear_2|mm_projector\.2)\.weight": (linear, "fc2/kernel", ()),
    r"(mlp1\.3|linear_2|mm_projector\.2)\.bias": (same, "fc2/bias", ()),
}


def llama_by_hand(dim):
    table = {
        r"model\.embed_tokens\.weight": (same, "embed_tokens/embedding", ()),
        r"model\.norm\.weight": (same, "norm/scale", ()),
        r"lm_head\.weight": (linear, "lm_head/kernel", ()),
        r"self_attn\.o_proj\.weight": (columns_by_head(dim), "layers/self_attn/o_proj/kernel", (1,)),
        r"self_attn\.o_proj\.bias": (same, "layers/self_attn/o_proj/bias", (1,)),
    }
    for name in ("q_proj", "k_proj", "v_proj"):
        table[rf"self_attn\.{name}\.weight"] = (rows_by_head(dim), f"layers/self_attn/{name}/kernel", (1,))
        table[rf"self_attn\.{name}\.bias"] = (vector_by_head(dim), f"layers/self_attn/{name}/bias", (1,))
    for name in ("input_layernorm", "post_attention_layernorm"):
        table[rf"layers\.1\.{name}\.weight"] = (same, f"layers/{name}/scale", (1,))
    for name in ("gate_proj", "up_proj", "down_proj"):
        table[rf"mlp\.{name}\.weight"] = (linear, f"layers/mlp/{name}/kernel", (1,))
        table[rf"mlp\.{name}\.bias"] = (same, f"layers/mlp/{name}/bias", (1,))
    return table


CLIP = clip_vision(
    hidden_size=20, num_hidden_layers=3, num_attention_heads=5, intermediate_size=28, image_size=56, patch_size=14
)


def llava(layout):
    projector = ProjectorConfig(20, 24, layer_norm=False)
    return ChatConfig(CLIP, projector, LLAMA, layout=layout, downsample_ratio=1.0, ps_version="v2", vision_tower="clip")


BY_HAND = {**CONFIGS, "llava": llava("llava"), "llava_hf": llava("llava_hf")}


@pytest.mark.parametrize("config", BY_HAND.values(), ids=BY_HAND)
def test_every_number_goes_where_it_belongs(config):
    """Every kind of tensor, number by number: W[d, n * dim + h] is o_proj's [n, h, d], and so on."""
    vision = CLIP_BY_HAND if config.layout.startswith("llava") else VISION_BY_HAND
    by_part = {"vision_model/": vision, "mlp1/": PROJECTOR_BY_HAND, "language_model/": {}}
    if config.text is not None:
        by_part["language_model/"] = llama_by_hand(config.text.head_dim)
    checked = 0
    for tensor in tensors(config):
        if tensor.index and tensor.index[0] != 1:
            continue  # all layers are alike, and a number of one of the second layer is enough
        part = next(part for part in by_part if tensor.path.startswith(part))
        found = [row for pattern, row in by_part[part].items() if re.search(rf"(^|\.)({pattern})$", tensor.key)]
        assert len(found) == 1, tensor.key
        value_at, path, index = found[0]
        assert (tensor.path, tensor.index) == (part + path, index), tensor.key
        weight = np.arange(math.prod(tensor.shape), dtype=np.int32).reshape(tensor.shape)
        ours = tensor.to_ours(weight)
        places = np.indices(ours.shape)
        np.testing.assert_array_equal(ours, value_at(weight, *places), err_msg=tensor.key)
        checked += 1
    assert checked >= 11


@every_config
def test_a_transposed_tensor_of_equal_size_is_refused(config):
    found = shapes(config)
    for key, shape in shapes(config).items():
        if len(shape) < 2 or shape == shape[::-1] or (".1." not in key and ".0." in key):
            continue
        with pytest.raises(ConversionError, match=f"misshapen: {re.escape(key)} is") as caught:
            plan(config, {**found, key: shape[::-1]})
        assert len(str(caught.value).splitlines()) == 2


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


def test_a_long_list_of_problems_is_cut():
    with pytest.raises(ConversionError) as caught:
        plan(PRESETS["internvl_chat_v1_1"](), {})
    lines = str(caught.value).splitlines()
    assert len(lines) == 102
    assert lines[-1].strip() == f"and {len(tensors(PRESETS['internvl_chat_v1_1']())) - 100} more"
