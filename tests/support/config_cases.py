"""Configurations of each published layout, as their config.json has them."""

import copy
import json

from support.golden import DATA

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
