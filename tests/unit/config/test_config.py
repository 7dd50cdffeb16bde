"""Configurations: every layout there and back, the golden files' values, what is warned about and what is refused."""

import copy
import dataclasses
import json
import re
from collections.abc import Hashable
from pathlib import Path

import pytest
from support.golden import DATA, bundle

from internvl_jax.config import (
    PRESETS,
    ConfigError,
    ProjectorConfig,
    TextConfig,
    config_from_hf,
    config_to_hf,
    find_vision_tower,
    load_config,
    vision_tower_to_hf,
)
from internvl_jax.config.validation import LIMITS
from internvl_jax.models.chat_model import abstract_params, count_params

CHAT = DATA / "internvl_chat_v1_1" / "checkpoint" / "config.json"
VIT = DATA / "intern_vit" / "checkpoint_safetensors" / "config.json"

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
INTERNVL = {
    "model_type": "internvl",
    "vision_config": {
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "intermediate_size": 64,
        "image_size": [56, 56],
        "patch_size": [14, 14],
        "norm_type": "rms_norm",
        "use_qk_norm": True,
        "attention_bias": True,
        "layer_norm_eps": 1e-5,
    },
    "text_config": LLAMA,
    "image_token_id": 7,
    "image_seq_length": 4,
    "vision_feature_layer": -2,
}


def golden_json(path=CHAT):
    return json.loads(path.read_text(encoding="utf-8"))


def changed(config, where, value):
    """A copy of config.json's dictionary with the field at "section/name" set."""
    config = copy.deepcopy(config)
    *sections, name = where.split("/")
    section = config
    for part in sections:
        section = section[part]
    section[name] = value
    return config


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
            if not hasattr(values, field):
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


@pytest.mark.parametrize(
    ("config", "section", "where"),
    [
        (CHAT, "", "config.json"),
        (CHAT, "llm_config/", "config.json: llm_config"),
        (CHAT, "vision_config/", "config.json: vision_config"),
        (VIT, "", "config.json"),
    ],
)
def test_unknown_fields_are_named(logged, config, section, where):
    values = changed(changed(golden_json(config), f"{section}sliding_window", 4), f"{section}a_new_field", None)
    read = config_from_hf(values)
    assert logged == [f"{where}: ignored fields: a_new_field, sliding_window"]
    assert read == config_from_hf(golden_json(config))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("model_type", "llava"),
        ("model_type", None),
        ("select_layer", 9),
        ("select_layer", -8),
        ("downsample_ratio", 0.4),
        ("downsample_ratio", 0),
        ("downsample_ratio", -0.5),
        ("downsample_ratio", 0.2),  # eight patches a side cannot be folded by five
        ("ps_version", "v3"),
        ("force_image_size", 3),
        ("dynamic_image_size", True),
        ("use_backbone_lora", 16),
        ("use_llm_lora", 16),
        ("vision_config/hidden_act", "quick_gelu"),
        ("vision_config/dropout", 0.1),
        ("vision_config/attention_dropout", 0.1),
        ("vision_config/norm_type", "batch_norm"),
        ("vision_config/num_attention_heads", 7),
        ("vision_config/image_size", 10),
        ("vision_config/drop_path_rate", 1.0),
        ("llm_config/hidden_act", "gelu"),
        ("llm_config/attention_dropout", 0.1),
        ("llm_config/num_key_value_heads", 3),
        ("llm_config/rope_scaling", {"rope_type": "yarn", "factor": 2.0}),
        ("llm_config/architectures", ["InternLM2ForCausalLM"]),
    ],
)
def test_unsupported_values_are_named(where, value):
    with pytest.raises(ConfigError) as error:
        config_from_hf(changed(golden_json(), where, value))
    message = str(error.value)
    named = where.rsplit("/", 1)[-1]
    named = {"rope_scaling": "rope scaling 'yarn'", "force_image_size": "image_size"}.get(named, named)
    assert named in message


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("vision_config/image_size", [56, 84], "only square"),
        ("vision_config/use_mean_pooling", False, "use_mean_pooling"),
        ("vision_config/use_absolute_position_embeddings", False, "use_absolute_position_embeddings"),
        ("vision_config/projection_dropout", 0.1, "projection_dropout"),
        ("vision_feature_layer", [-1, -2], "only one layer"),
        ("vision_feature_select_strategy", "full", "vision_feature_select_strategy"),
        ("projector_hidden_act", "relu", "projector_hidden_act"),
        ("image_seq_length", 5, "image_seq_length 5, its image and patch sizes give 4"),
        ("text_config/model_type", "qwen2", "qwen2"),
        ("image_token_id", None, "no 'image_token_id'"),
    ],
)
def test_unsupported_values_of_transformers_layout(where, value, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_from_hf(changed(INTERNVL, where, value))


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "linear"}, "needs a factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
        ({"rope_type": "longrope", "factor": 8.0}, "longrope"),
        ({"rope_type": "linear", "factor": 8.0, "attention_factor": 2}, "attention_factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "linear", "factor": 0.0}, "factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor"),
    ],
)
def test_rope_scaling_that_cannot_run(rope, message):
    with pytest.raises(ConfigError, match=message):
        config_from_hf({**LLAMA, "rope_scaling": rope})


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"])
def test_missing_fields_name_themselves(name):
    for section in ("vision_config", "llm_config"):
        values = golden_json()
        del values[section][name]
        with pytest.raises(ConfigError, match=f"config.json: {section} has no '{name}'"):
            config_from_hf(values)
    for values in (golden_json(VIT), dict(LLAMA)):
        del values[name]
        with pytest.raises(ConfigError, match=f"config.json has no '{name}'"):
            config_from_hf(values)


@pytest.mark.parametrize("name", ["vision_config", "llm_config", "text_config", "image_token_id"])
def test_missing_sections_name_themselves(name):
    values = golden_json() if name in golden_json() else dict(INTERNVL)
    del values[name]
    with pytest.raises(ConfigError, match=f"config.json has no '{name}'"):
        config_from_hf(values)


def own_fields(config):
    """Paths of the fields of a config.json that our configuration has a value for."""
    for name, value in config_to_hf(config_from_hf(config)).items():
        if isinstance(value, dict):
            yield name
            yield from (f"{name}/{field}" for field in value)
        else:
            yield name


@pytest.mark.parametrize("wrong", ["a text", ["a", "list"], {"an": "object"}, -7, 2.5, None], ids=repr)
def test_wrong_kinds_are_config_errors(wrong):
    """A value of the wrong kind is refused at once, or is a legal value of that field: never kept to fail later."""
    legal = {
        "a text": "template$",
        -7: "token_id$|^select_layer$",  # 0 of 6 layers
        2.5: "rope_theta$|_eps$",
        None: "token_id$|rope|head_dim$|num_key_value_heads$|force_image_size$|template$|^tie_word_embeddings$",
    }.get(wrong if isinstance(wrong, Hashable) else repr(wrong), "-")
    ignored = "architectures$|_config/model_type$|^use_thumbnail$|^tie_word_embeddings$"
    for config in (golden_json(), golden_json(VIT), INTERNVL, LLAMA):
        for where in own_fields(config):
            if re.search(f"{legal}|{ignored}", where):
                continue
            try:
                read = config_from_hf(changed(config, where, wrong))
            except ConfigError:
                continue
            pytest.fail(f"{config['model_type']}: {where} = {wrong!r} was read as {read}")


SIZES = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "image_size", "patch_size", "num_channels",
}  # fmt: skip
ABSURD = [0, -1, True, False, 2.0, "12", 10**9 + 1, 10**12, 10**400, float("nan"), float("inf"), [], {}]


@pytest.mark.parametrize("value", ABSURD, ids=lambda value: repr(value)[:12])
def test_absurd_sizes_are_refused_by_name(value):
    """At once: nothing is made in proportion to a number of a file."""
    seen = set()
    for config in (golden_json(), golden_json(VIT), INTERNVL, LLAMA):
        for where in own_fields(config):
            section, _, name = where.rpartition("/")
            if name not in SIZES:
                continue
            seen.add(name)
            with pytest.raises(ConfigError) as caught:
                config_from_hf(changed(config, where, value))
            words = f"config.json{f': {section}' if section else ''} has {name} = "
            assert str(caught.value).startswith(words), str(caught.value)
    assert seen == SIZES


@pytest.mark.parametrize("name", sorted(SIZES))
def test_limits_are_beyond_published_models(name):
    """Of LLaMA-3.1-405B, InternViT-6B and the largest vocabularies, with a factor of two to spare."""
    largest = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
               "num_key_value_heads": 128, "head_dim": 256, "vocab_size": 262144, "max_position_embeddings": 10**7,
               "image_size": 1024, "patch_size": 32, "num_channels": 3}  # fmt: skip
    assert LIMITS[name] >= 2 * largest[name]


@pytest.mark.parametrize("value", [10**400, -(10**400), 1e301, float("nan")])
def test_numbers_that_are_no_sizes(value):
    for where in ("rms_norm_eps", "rope_theta", "rope_scaling/factor"):
        values = {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
        with pytest.raises(ConfigError, match=where.split("/")[-1]):
            config_from_hf(changed(values, where, value))


def test_heads_that_do_not_divide():
    values = {name: value for name, value in LLAMA.items() if name != "head_dim"}
    values |= {"num_attention_heads": 7, "num_key_value_heads": 7}
    with pytest.raises(
        ConfigError, match=r"has hidden_size [0-9]+, which is not a multiple of num_attention_heads \(7\)"
    ):
        config_from_hf(values)
    assert config_from_hf({**values, "head_dim": 16}).text.head_dim == 16


@pytest.mark.parametrize("name", ["..", "/", "a/..", "a\0b", ""])
def test_towers_that_name_no_directory(name):
    with pytest.raises(ConfigError, match="mm_vision_tower"):
        find_vision_tower(Path("somewhere"), {"model_type": "llava_llama", "mm_vision_tower": name})


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, r"awq \(4 bits\)"),
        ({"quant_method": "gptq", "bits": 8}, r"gptq \(8 bits\)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"bitsandbytes \(4 bits\)"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"w_bit": 4}, r"an unnamed method \(4 bits\)"),
        ("int8", "an unnamed method"),
    ],
)
@pytest.mark.parametrize("section", ["", "llm_config", "vision_config"])
def test_quantized_checkpoints_are_named(settings, method, section):
    for name in ("quantization_config", "compression_config"):
        where = f"config.json{section and f': {section}'} has a {name}"
        with pytest.raises(
            ConfigError, match=f"^{where}: the checkpoint is quantized by {method}, which is not supported"
        ):
            config_from_hf(changed(golden_json(), f"{section}/{name}".strip("/"), settings))


@pytest.mark.parametrize("settings", [None, {}, {"quant_method": "bitsandbytes", "load_in_4bit": False}])
def test_quantization_that_is_turned_off(settings):
    assert config_from_hf({**golden_json(), "quantization_config": settings}) == config_from_hf(golden_json())


def test_what_transformers_writes_is_known(logged):
    """No field that transformers itself writes, of this release or an older one, is named as ignored."""
    transformers = pytest.importorskip("transformers")
    fields = {**transformers.PretrainedConfig().to_dict(), **transformers.GenerationConfig().to_dict()}
    names = {"bos_token_id", "eos_token_id", "pad_token_id", "model_type"}  # read, or the section's own
    fields = {name: value for name, value in fields.items() if name not in names}
    assert len(fields) > 60
    fields |= dict.fromkeys(("_model_name_or_path", "unk_token_id", "_name_or_path", "torch_dtype", "use_cache"))
    for config in (golden_json(), INTERNVL, golden_json(VIT), LLAMA):
        filled = {
            name: {**fields, **value} if name.endswith("_config") and isinstance(value, dict) else value
            for name, value in config.items()
        }
        assert config_from_hf({**fields, **filled}) == config_from_hf(config)
    values = {"vision_config": {"image_size": 56, "patch_size": 14}, "text_config": {"model_type": "llama"}}
    for made in (
        transformers.LlamaConfig(), transformers.LlavaConfig(**values),
        transformers.InternVLConfig(**values, image_seq_length=4),
    ):  # fmt: skip
        config_from_hf(made.to_dict())
    assert logged == []


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match=r"config.json does not exist"):
        load_config(tmp_path)
    path = tmp_path / "config.json"
    for text, message in (("{", "not readable JSON"), ("[1]", "holds a JSON list"), ("{}", "model_type None")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            load_config(path)
    for data, message in ((b"\xff\xfe\x00", "UTF-16 text"), (b"\xff\x00", "not UTF-8 text")):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=message):
            load_config(path)


def test_towers_that_do_not_fit():
    config = config_from_hf(golden_json())
    with pytest.raises(ConfigError, match="the projector reads 300 features, the vision model gives 80 x 4"):
        dataclasses.replace(config, projector=ProjectorConfig(300, config.text.hidden_size))
    with pytest.raises(ConfigError, match="differs from the language model's hidden_size"):
        dataclasses.replace(config, projector=ProjectorConfig(320, 65))
    with pytest.raises(ConfigError, match="a projector needs a vision model and a language model"):
        dataclasses.replace(config, vision=None)
    with pytest.raises(ConfigError, match="layout"):
        dataclasses.replace(config, layout="gguf")
    with pytest.raises(ConfigError, match="head_dim must be even"):
        TextConfig(**{**vars(config.text), "head_dim": 15})


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
