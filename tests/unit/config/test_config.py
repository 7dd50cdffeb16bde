"""Configurations: every layout there and back, the golden files' values, published sizes."""

import dataclasses
import json

import pytest
from support.config_cases import CHAT, INTERNVL, LLAMA, VIT, changed, golden_json
from support.golden import DATA, bundle

from internvl_jax.config import (
    PRESETS,
    ProjectorConfig,
    config_from_hf,
    config_to_hf,
    load_config,
    vision_tower_to_hf,
)
from internvl_jax.models.chat_model import abstract_params, count_params


def layouts():
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    text = {**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "eos_token_id": [2, 5]}
    return {
        "internvl_chat": golden_json(),
        "intern_vit_6b": golden_json(VIT),
        "intern_vit_6b, layer_norm": golden_json(VIT)
        | {"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True, "drop_path_rate": 0.1},
        "internvl": INTERNVL,
        "internvl, tied": {**INTERNVL, "text_config": text, "tie_word_embeddings": True},
        "llama": LLAMA,
        "llama, options": {**text, "head_dim": 16, "rope_theta": 5e5, "rope_scaling": llama3, "pad_token_id": 3},
        "llama, no ends": {**LLAMA, "eos_token_id": None, "bos_token_id": None},
        "llama, linear": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}},
    }


@pytest.mark.parametrize("name", layouts())
def test_there_and_back(name):
    config = config_from_hf(layouts()[name])
    written = config_to_hf(config)
    assert config.layout == written["model_type"] == name.split(",")[0]
    assert json.loads(json.dumps(written)) == written
    assert config_from_hf(written) == config


@pytest.mark.parametrize("name", layouts())
def test_writing_over_the_original_file(name):
    """What was read is what is written, and fields that mean nothing here survive."""
    original = layouts()[name]
    config = config_from_hf(original)
    written = config_to_hf(config, changed(original, "transformers_version", "4.0"))
    assert written["transformers_version"] == "4.0"
    assert config_from_hf(written) == config
    for section in ("vision_config", "llm_config", "text_config"):
        for field, value in original.get(section, {}).items():
            if field not in ("rope_scaling", "eos_token_id"):
                assert written[section][field] == value, (section, field)


@pytest.mark.parametrize("name", layouts())
def test_every_field_is_written(name):
    """A field of ours changed in the written file comes back changed, so that none is written and not read."""
    config = config_from_hf(layouts()[name])
    for part in ("vision", "text"):
        values = getattr(config, part)
        if values is None:
            continue
        changes = {"layer_norm_eps": 1e-4, "rms_norm_eps": 1e-4, "rope_theta": 123.0, "max_position_embeddings": 77,
                   "bos_token_id": 9, "eos_token_ids": (11, 12), "pad_token_id": 13, "vocab_size": 91,
                   "intermediate_size": 33, "num_hidden_layers": 9, "rope_scaling": None}  # fmt: skip
        for flag in ("attention_bias", "mlp_bias", "tie_word_embeddings", "qk_normalization", "qkv_bias"):
            changes[flag] = not getattr(values, flag, True)
        for field, value in changes.items():
            if field not in type(values).__dataclass_fields__:
                continue
            new = dataclasses.replace(values, **{field: value})
            if field == "layer_norm_eps" and config.layout != "internvl":
                new = dataclasses.replace(new, qk_norm_eps=value)
            new = dataclasses.replace(config, **{part: new})
            assert config_from_hf(config_to_hf(new)) == new, field


def test_golden_chat_config():
    """The values that goldens.json says a loader should arrive at, and the rest as the file has them."""
    expected = bundle("internvl_chat_v1_1")[1]["config"]
    config = load_config(CHAT.parent)
    assert config.layout == "internvl_chat"
    assert config.image_size == config.vision.image_size == expected["image_size"]
    assert config.tokens_per_image == expected["num_image_token"]
    assert config.select_layer == expected["select_layer"]
    assert config.text.vocab_size == expected["vocab_size"]
    assert config.text.pad_token_id == expected["llm_generation_pad_token_id"]
    assert config.text.bos_token_id == expected["bos_token_id"]
    assert config.text.eos_token_ids == (expected["eos_token_id"],)
    assert (config.vision.num_hidden_layers, config.num_vision_layers) == (6, 3)
    assert (config.ps_version, config.unshuffle, config.template) == ("v1", 2, "internvl_zh")
    assert not config.pad_to_square
    vision, text = golden_json()["vision_config"], golden_json()["llm_config"]
    for name in ("hidden_size", "num_attention_heads", "intermediate_size", "layer_norm_eps", "patch_size",
                 "qk_normalization", "qkv_bias", "num_channels", "drop_path_rate"):  # fmt: skip
        assert getattr(config.vision, name) == vision[name], name
    assert config.vision.norm_type == "rms_norm"
    assert config.vision.qk_norm_eps == vision["layer_norm_eps"]
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
                 "rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings"):  # fmt: skip
        assert getattr(config.text, name) == text[name], name
    assert config.text.head_dim == text["hidden_size"] // text["num_attention_heads"]
    assert config.projector == ProjectorConfig(4 * vision["hidden_size"], text["hidden_size"], 1e-5)


def test_golden_intern_vit_config():
    expected = bundle("intern_vit")[1]["config"]
    config = load_config(VIT)
    assert config.text is None
    assert config.projector is None
    assert {name: getattr(config.vision, name) for name in expected} == expected
    # The same tower in either published file format.
    assert config == load_config(DATA / "intern_vit" / "checkpoint_bin")


def test_transformers_own_configs():
    transformers = pytest.importorskip("transformers")
    text = {name: value for name, value in LLAMA.items() if name != "model_type"}
    written = transformers.LlamaConfig(**text, rope_theta=5e4, attention_bias=True).to_dict()
    config = config_from_hf(written)
    assert (config.text.rope_theta, config.text.rope_scaling, config.text.head_dim) == (5e4, None, 8)
    assert config.text.attention_bias
    scaling = {"rope_type": "linear", "factor": 4.0}
    config = config_from_hf(transformers.LlamaConfig(**text, rope_scaling=scaling).to_dict())
    assert (config.text.rope_scaling.rope_type, config.text.rope_scaling.factor) == ("linear", 4.0)
    assert config_from_hf(transformers.LlamaConfig().to_dict()).text.num_hidden_layers == 32

    options = {name: value for name, value in INTERNVL.items() if name != "model_type"}
    written = transformers.InternVLConfig(**options, tie_word_embeddings=False).to_dict()
    assert config_from_hf(written) == config_from_hf(INTERNVL)
    # And transformers reads what we write.
    back = transformers.InternVLConfig.from_dict(config_to_hf(config_from_hf(written)))
    assert config_from_hf(back.to_dict()) == config_from_hf(written)
    back = transformers.LlamaConfig.from_dict(config_to_hf(config))
    assert config_from_hf(back.to_dict()) == config


def test_old_and_new_rope_fields():
    new = {**LLAMA, "rope_parameters": {"rope_theta": 7e5, "rope_type": "linear", "factor": 2.0}}
    old = {**LLAMA, "rope_theta": 7e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert config_from_hf(new) == config_from_hf(old)
    assert config_from_hf(old).text.rope_theta == 7e5


def test_images_of_another_size_than_the_tower():
    """force_image_size: the tower keeps its table, the grid and the tokens follow the images."""
    config = config_from_hf(changed(golden_json(), "force_image_size", 168))
    assert (config.vision.image_size, config.vision.grid, config.image_size) == (112, 8, 168)
    assert config.tokens_per_image == 36


def test_published_parameter_counts():
    """InternVL-Chat-V1-1's model card: 5.91B + 91.78M + 13.12B = 19.11B."""
    config = PRESETS["internvl_chat_v1_1"]()
    params = abstract_params(config)
    vision, mlp, llm = (count_params(params[name]) for name in ("vision_model", "mlp1", "language_model"))
    total = count_params(params)
    assert total == vision + mlp + llm
    # In hundredths; the card rounds the tower (5.905B) and cuts the MLP (91.786M).
    for name, count, unit, published in (
        ("vision_model", vision, 1e7, 591),
        ("mlp1", mlp, 1e4, 9178),
        ("language_model", llm, 1e7, 1312),
        ("total", total, 1e7, 1911),
    ):
        assert published in (count // unit, round(count / unit)), (name, count)
    # The counts by hand, so that a wrong part cannot hide in the rounding.
    width, layers = 3200, 48
    layer = 3 * width**2 + 2 * width + width**2 + width + 2 * 12800 * width + 12800 + width + 4 * width
    assert vision == layers * layer + width * (588 + 1) + width + width * 1025
    assert mlp == 2 * 12800 + 12800 * 5120 + 5120 + 5120**2 + 5120
    layer = 4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120
    assert llm == 40 * layer + 2 * 42186 * 5120 + 5120
    assert (config.num_vision_layers, config.tokens_per_image, config.vision.num_attention_heads) == (45, 256, 25)


@pytest.mark.parametrize(
    ("sizes", "published"),
    [
        # Billions, of the model cards' tables. Of 3.5's small models, whose embeddings are tied, they count the head.
        ("internvl_chat_v1_2 internvl2_40b", 40.1),
        ("internvl_chat_v1_5 internvl2_26b internvl2_5_26b", 25.5),
        ("internvl2_1b internvl2_5_1b internvl3_1b", 0.9),
        ("internvl2_2b internvl2_5_2b", 2.2),
        ("internvl3_2b", 2.1),
        ("internvl2_5_4b", 3.7),
        ("internvl2_8b internvl2_5_8b", 8.1),
        ("internvl3_8b", 7.9),
        ("internvl3_14b internvl3_5_14b", 15.1),
        ("internvl2_5_38b internvl3_38b internvl3_5_38b", 38.4),
        ("internvl2_76b", 76.3),
        ("internvl2_5_78b internvl3_78b", 78.4),
        ("internvl3_5_1b", 1.1),
        ("internvl3_5_2b", 2.3),
        ("internvl3_5_4b", 4.7),
        ("internvl3_5_8b", 8.5),
    ],
)
def test_parameter_counts_of_newer_systems(sizes, published):
    for name in sizes.split():
        config = PRESETS[name]()
        head = config.text.tie_word_embeddings * config.text.vocab_size * config.text.hidden_size
        assert round((count_params(abstract_params(config)) + head) / 1e9, 1) == published, name


def test_parameter_counts_of_towers():
    """InternViT-300M (304M) and 6B without its last three layers (5.54B)."""
    for name, vision in (("internvl3_8b", 304.01e6), ("internvl3_38b", 5.536e9)):
        assert count_params(abstract_params(PRESETS[name]())["vision_model"]) == pytest.approx(vision, rel=5e-4)


def test_nano_parameter_counts():
    config = PRESETS["nano"]()
    params = abstract_params(config)
    vision, mlp, llm = (count_params(params[name]) for name in ("vision_model", "mlp1", "language_model"))
    width, hidden = config.vision.hidden_size, config.vision.intermediate_size
    layer = 4 * width**2 + 2 * width + width + 2 * hidden * width + hidden + width + 4 * width
    assert vision == config.vision.num_hidden_layers * layer + width * (588 + 1) + width + width * 65
    assert mlp == 2 * 4 * width + (4 * width + 1 + 128 + 1) * 128
    text = config.text
    layer = 4 * 128**2 + 3 * 128 * text.intermediate_size + 2 * 128
    assert llm == text.num_hidden_layers * layer + 2 * text.vocab_size * 128 + 128
    assert 1e6 < count_params(params) < 8e6
    assert config.vision.num_attention_heads % 2 == 1
    assert config.vision.qk_normalization


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_their_file(name):
    config = PRESETS[name]()
    assert config_from_hf(config_to_hf(config), vision_tower_to_hf(config)) == config
