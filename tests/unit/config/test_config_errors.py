"""Configurations that are warned about or refused: the message names the field and what is wrong."""

import dataclasses
import re
from collections.abc import Hashable
from pathlib import Path

import pytest
from support.config_cases import CHAT, INTERNVL, LLAMA, VIT, changed, golden_json

from internvl_jax.config import (
    ConfigError,
    ProjectorConfig,
    TextConfig,
    config_from_hf,
    config_to_hf,
    find_vision_tower,
    load_config,
)
from internvl_jax.config.validation import LIMITS


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
        ("max_dynamic_patch", 0),
        ("max_dynamic_patch", 41),
        ("min_dynamic_patch", 9),
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
        ("text_config/model_type", "internlm2", "internlm2"),
        ("text_config/model_type", "qwen3_moe", "qwen3_moe"),
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
        None: "token_id$|rope|head_dim$|num_key_value_heads$|force_image_size$|template$|^system_message$|"
        "^tie_word_embeddings$",
    }.get(wrong if isinstance(wrong, Hashable) else repr(wrong), "-")
    ignored = "architectures$|_config/model_type$|^tie_word_embeddings$"
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
