"""LLaVA-1.5 and InternVL-Chat-V1-0: configurations, prompts and pixels, against the golden bundles."""

import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from support.golden import DATA, bundle

from internvl_jax.config import (
    ConfigError,
    ProjectorConfig,
    config_from_hf,
    config_to_hf,
    load_config,
    vision_tower_to_hf,
)
from internvl_jax.config.conversation_templates import TEMPLATES, build_prompt
from internvl_jax.processing.conversation import expand_images, place_images, prepare_prompt
from internvl_jax.processing.images import ImageError, load_image, load_processor
from internvl_jax.processing.tokenizer import encode_prompt, load_tokenizer

V1_0, LLAVA = DATA / "internvl_chat_v1_0", DATA / "llava_1_5"
VICUNA = TEMPLATES["vicuna_v1"]
IMAGES = ["rgb", "exif_rot", "rgba", "gray", "palette"]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def published(name):
    """config.json and the vision tower's."""
    if name == "llava_hf":
        return read(LLAVA / "hf" / "config.json"), None
    if name == "llava":
        return read(LLAVA / "original/config.json"), read(LLAVA / "clip-vit-large-patch14-336/config.json")
    return read(V1_0 / "checkpoint/config.json"), read(V1_0 / "InternViT-6B-224px/config.json")


# Configurations.

NAMES = ["internvl_chat_v1_0", "llava", "llava_hf"]


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name):
    config, tower = published(name)
    read = config_from_hf(config, tower)
    written, written_tower = config_to_hf(read), vision_tower_to_hf(read)
    assert json.loads(json.dumps(written)) == written
    assert (written_tower is None) == (tower is None)
    assert config_from_hf(written, written_tower) == read
    assert config_from_hf(config_to_hf(read, config), written_tower) == read
    assert config_to_hf(read, {**config, "transformers_version": "4.0"})["transformers_version"] == "4.0"


@pytest.mark.parametrize(
    ("name", "directory"),
    [("internvl_chat_v1_0", V1_0 / "checkpoint"), ("llava", LLAVA / "original"), ("llava_hf", LLAVA / "hf")],
)
def test_golden_values(name, directory):
    config = load_config(directory)
    assert config == config_from_hf(*published(name)) == load_config(directory / "config.json")
    expected = bundle("internvl_chat_v1_0" if name == "internvl_chat_v1_0" else "llava_1_5")[1]["config"]
    assert config.select_layer == expected.get("mm_vision_select_layer", expected.get("select_layer"))
    clip = name != "internvl_chat_v1_0"
    assert config.vision.image_size == expected["image_size" if clip else "tower_image_size"]
    assert config.image_size == (84 if clip else 336)
    assert config.tokens_per_image == (expected["image_tokens"] if clip else 576)
    assert (config.vision.hidden_act, config.vision.layer_norm_eps) == (
        ("quick_gelu", 1e-5) if clip else ("gelu", 1e-6)
    )
    assert config.projector == ProjectorConfig(config.vision.hidden_size, 64, layer_norm=False)
    assert (config.unshuffle, config.ps_version, config.template) == (1, "v2", "vicuna_v1")
    assert (config.pad_to_square, config.center_crop) == (name != "llava_hf", True)
    vocabularies = {"internvl_chat_v1_0": 860, "llava": 860, "llava_hf": 896}
    assert config.text.vocab_size == vocabularies[name]
    assert config.image_token_id == (860 if name == "llava_hf" else -200)
    assert config.text.rms_norm_eps == 1e-5
    assert config.text.pad_token_id == (861 if name == "llava_hf" else 0)


def test_image_size_of_internvit_follows_its_name():
    """The rule of the reference: the position table says nothing. A field of our own overrides it."""
    config, tower = published("internvl_chat_v1_0")
    for name, size in (("a/InternViT-6B-224px", 336), ("./pretrained/intern_vit_6b_448px/", 448)):
        assert config_from_hf({**config, "mm_vision_tower": name}, tower).image_size == size
    assert config_from_hf({**config, "force_image_size": 84}, tower).image_size == 84


def test_names_of_the_layout():
    config, tower = published("llava")
    newer = {**config, "model_type": "llava_llama", "image_aspect_ratio": "square", "mm_patch_merge_type": "flat"}
    read = config_from_hf(newer, tower)
    assert (read.layout, read.pad_to_square) == ("llava", False)
    bare = {**tower["vision_config"], "model_type": "clip_vision_model"}
    assert config_from_hf(config, bare) == config_from_hf(config, tower)


def test_defaults_that_transformers_leaves_out():
    """The published 7B file has no sizes of the language model, and no file has an activation of the tower."""
    config, _ = published("llava_hf")
    config["text_config"] = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096}
    text = config_from_hf(config).text
    sizes = (text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.intermediate_size)
    assert sizes == (4096, 32, 32, 11008)
    transformers = pytest.importorskip("transformers")
    written = transformers.LlavaConfig().to_dict()
    config = config_from_hf(written)
    assert (config.vision.hidden_size, config.vision.num_hidden_layers, config.tokens_per_image) == (1024, 24, 576)
    back = transformers.LlavaConfig.from_dict(config_to_hf(config))
    assert config_from_hf(back.to_dict()) == config


@pytest.mark.parametrize(
    ("name", "where", "value", "message"),
    [
        ("llava", "mm_projector_type", "linear", "two-layer projector"),
        ("llava", "mm_vision_select_feature", "cls_patch", "only features without the class token"),
        ("llava", "mm_use_im_start_end", True, "tokens around images"),
        ("llava", "mm_resampler_type", "perceiver", "resamplers"),
        ("llava", "image_aspect_ratio", "anyres", "tiles"),
        ("llava", "mm_hidden_size", 1024, "the width of openai/clip-vit-large-patch14-336 is 64"),
        ("llava", "mm_vision_tower", None, "neither a text_config nor an mm_vision_tower"),
        ("llava", "mm_vision_tower", 7, "which is not a string"),
        ("llava", "mm_vision_select_layer", None, "no 'mm_vision_select_layer'"),
        ("llava", "mm_vision_select_layer", -9, "select_layer -9 is outside"),
        ("llava", "hidden_size", None, "config.json has no 'hidden_size'"),
        ("llava_hf", "projector_hidden_act", "relu", "exact GELU only"),
        ("llava_hf", "multimodal_projector_bias", False, "with biases only"),
        ("llava_hf", "vision_feature_select_strategy", "full", "only features without the class token"),
        ("llava_hf", "vision_feature_layer", [-2, -5], "only one layer"),
        ("llava_hf", "image_token_index", None, "no 'image_token_index'"),
        ("llava_hf", "text_config/model_type", "mistral", "only llama"),
        ("llava_hf", "vision_config/model_type", "siglip_vision_model", "only CLIP's"),
        ("llava_hf", "vision_config/hidden_act", "gelu", "quick GELU only"),
    ],
)
def test_what_cannot_be_run_is_named(name, where, value, message):
    config, tower = published(name)
    config = copy.deepcopy(config)
    *sections, field = where.split("/")
    (config[sections[0]] if sections else config)[field] = value
    with pytest.raises(ConfigError, match=message):
        config_from_hf(config, tower)


def test_towers_that_cannot_be_run(logged):
    config, tower = published("llava")
    with pytest.raises(ConfigError, match=r"the tower's config\.json is needed too"):
        config_from_hf(config)
    with pytest.raises(ConfigError, match=r"model_type 'siglip': clip and intern_vit_6b are implemented"):
        config_from_hf(config, {**tower, "model_type": "siglip"})
    config_from_hf({**config, "a_new_field": 1}, tower)
    assert logged == ["config.json: ignored fields: a_new_field"]


def test_where_the_tower_is_looked_for(tmp_path):
    checkpoint = tmp_path / "llava-v1.5-13b"
    checkpoint.mkdir()
    shutil.copy(LLAVA / "original/config.json", checkpoint)
    name = "clip-vit-large-patch14-336"
    with pytest.raises(
        ConfigError, match=f"published separately: put its directory .* at {checkpoint / name} or beside"
    ):
        load_config(checkpoint)
    for place in (tmp_path / name, checkpoint / name):
        place.mkdir()
        shutil.copy(LLAVA / name / "config.json", place)
        assert load_config(checkpoint) == load_config(LLAVA / "original")
        shutil.rmtree(place)


# Prompts.


@pytest.mark.parametrize("name", ["internvl_chat_v1_0", "llava_1_5"])
def test_golden_prompts_and_ids(name):
    _, facts = bundle(name)
    cases = facts["prompts" if name == "internvl_chat_v1_0" else "orig_prompts"]
    tokenizer = load_tokenizer(V1_0 / "checkpoint" if name == "internvl_chat_v1_0" else LLAVA / "original")
    assert len(cases) >= 5
    for case in cases:
        *turns, question = case["messages"]
        history = list(zip(turns[::2], turns[1::2]))
        assert build_prompt(VICUNA, history, question) == case["prompt"]
        prompt = prepare_prompt(VICUNA, question, history, [1] * len(case["images"]))
        assert prompt == case["prompt"]
        assert encode_prompt(tokenizer, prompt, "<image>", -200) == case["input_ids"]
        wide = prepare_prompt(VICUNA, question, history, [3] * len(case["images"]))
        expected = [i for token in case["input_ids"] for i in [token] * (3 if token == -200 else 1)]
        assert encode_prompt(tokenizer, wide, "<image>", -200) == expected


def test_golden_tokenizing_around_images():
    tokenizer = load_tokenizer(V1_0 / "checkpoint")
    for case in bundle("internvl_chat_v1_0")[1]["tokenizer_encode"]:
        assert encode_prompt(tokenizer, case["text"], "<image>", -200) == case["ids"], case["text"]


def test_golden_ids_of_transformers_layout():
    """Its vocabulary has the image token, which the slow tokenizer cuts out whole."""
    tokenizer = load_tokenizer(LLAVA / "hf")
    for case in bundle("llava_1_5")[1]["hf_prompts"]:
        for text, ids, mask in zip(case["texts"], case["input_ids"], case["attention_mask"]):
            expected = [token for token, real in zip(ids, mask) if real]
            assert encode_prompt(tokenizer, text, "<image>", 860) == expected
            wide = expand_images(text, 3, 1, VICUNA.image)
            expected = [i for token in expected for i in [token] * (3 if token == 860 else 1)]
            assert encode_prompt(tokenizer, wide, "<image>", 860) == expected


def test_placing_images():
    question = place_images("What is this?", 1, False)
    assert prepare_prompt(VICUNA, question, [], [2]).endswith(" USER: <image><image>\nWhat is this? ASSISTANT:")
    assert prepare_prompt(VICUNA, "hi", [], [], system="Be brief.") == "Be brief. USER: hi ASSISTANT:"
    with pytest.raises(ValueError, match="has 1 <image> placeholder"):
        prepare_prompt(VICUNA, "what is <image>?", [], [])


# Pixels.


@pytest.mark.parametrize("image", IMAGES)
def test_golden_pixels_bit_for_bit(image):
    arrays, facts = bundle("internvl_chat_v1_0")
    opened = load_image(V1_0 / facts["images"][image]["file"], honor_exif=False)
    config = load_config(V1_0 / "checkpoint")
    compared = 0
    for name, size, pad in (("r1", 84, True), ("r2", 56, True), ("r1_nopad", 84, False)):
        if f"images/{image}/pixel_values_{name}" in arrays:
            changed = dataclasses.replace(config, image_size=size, pad_to_square=pad)
            pixels = load_processor(V1_0 / "checkpoint", changed)(opened)
            np.testing.assert_array_equal(pixels, arrays[f"images/{image}/pixel_values_{name}"], err_msg=name)
            compared += 1
    assert compared == {"rgb": 3, "gray": 2}.get(image, 1)
    arrays, facts = bundle("llava_1_5")
    opened = load_image(LLAVA / facts["images"][image]["file"], honor_exif=False)
    for directory, name in (("original", "orig"), ("hf", "hf")):
        if f"{name}/pixel_values/{image}" in arrays:
            processor = load_processor(LLAVA / directory, load_config(LLAVA / directory))
            np.testing.assert_array_equal(processor(opened), arrays[f"{name}/pixel_values/{image}"], err_msg=directory)


@pytest.mark.parametrize("size", [(200, 100), (101, 67), (33, 301), (84, 84), (85, 84), (1000, 7), (7, 5)])
def test_crops_against_transformers(size):
    transformers = pytest.importorskip("transformers")
    reference = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 84}, crop_size={"height": 84, "width": 84}, do_center_crop=True
    )
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(values)
    processor = load_processor(LLAVA / "hf", load_config(LLAVA / "hf"))
    expected = reference(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(processor(image), expected, rtol=0, atol=1e-6)


def test_processors_that_are_not_there(tmp_path):
    shutil.copy(LLAVA / "hf/config.json", tmp_path)
    config = load_config(tmp_path)
    assert load_processor(tmp_path, config) is None
    bare = dataclasses.replace(config, vision=None, projector=None)
    assert load_processor(tmp_path, bare) is None
    processor = load_processor(LLAVA / "hf", config)
    with pytest.raises(ImageError, match="cropped in RGB: use the image path 'eval'"):
        processor(Image.new("RGB", (9, 9)), "native")


@pytest.mark.parametrize(("layout", "token_id"), [("original", -200), ("hf", 860)])
def test_an_image_token_in_an_answer_is_text(layout, token_id):
    tokenizer = load_tokenizer(LLAVA / layout)
    history = [("<image>\nWhat is written?", "It says <image>.")]
    prompt = prepare_prompt(VICUNA, "<image>\nAnd here?", history, [1] * 2, literal_mark="|")
    ids = encode_prompt(tokenizer, prompt, "<image>", token_id, literal_mark="|")
    assert ids.count(token_id) == 2
    assert "It says <image>." in tokenizer.decode([token for token in ids if token >= 0])
