"""InternVL-Chat-V1-2 and InternVL 2, 2.5 and 3.5: the model from the published files, against the original code."""

import filecmp
import json

import jax
import numpy as np
import pytest
from support.golden import assert_close
from support.newer_cases import BUNDLES, Bundle

from checkpoints_convert.convert import convert, load_hf
from checkpoints_convert.export import export
from internvl_jax.config import config_to_hf, load_config
from internvl_jax.inference.generation.bound_model import bind_model
from internvl_jax.inference.generation.generator import Generator
from internvl_jax.inference.generation.sampling import GenerationConfig
from internvl_jax.models import chat_model
from internvl_jax.models.chat_model import InternVLChat
from internvl_jax.processing.images import load_image, load_processor
from internvl_jax.quantize import quantize_params


class Family(Bundle):
    """A bundle, and its model."""

    def __init__(self, name):
        super().__init__(name)
        self.config = load_config(self.directory)
        self.processor = load_processor(self.directory, self.config)
        self.params = load_hf(self.directory, chat_model.abstract_params(self.config))
        self.image_token = self.facts["config"]["token_ids"]["<IMG_CONTEXT>"]
        model = bind_model(self.config, self.params, dtype="float32")
        self.generator = Generator(model, image_token_id=self.image_token)

    def pixels(self, prompt):
        """Normalized tiles of a prompt's images (tests/unit/processing compares them)."""
        limit = prompt["max_num"] if self.config.dynamic_image_size else None
        images = (load_image(self.image(name), honor_exif=False) for name in prompt["images"])
        return np.concatenate([self.processor.tiles(image, max_num=limit) for image in images])


@pytest.fixture(scope="module", params=BUNDLES)
def family(request):
    return Family(request.param)


def test_every_stage(family):
    prompt = family.prompts["en_single"]
    pixels = family.pixels(prompt)
    ids = family.arrays["logits/en_single/input_ids"][None]
    model = InternVLChat(family.config, image_token_id=family.image_token)
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(lambda params: model.apply({"params": params}, ids, pixels, collect=True))
        logits, out = apply(family.params)
    states = family.arrays["vision/hidden_states"]
    assert_close(out["vision"]["hidden_states"], states[: len(out["vision"]["hidden_states"])], 1e-4, "tower")
    version = family.config.ps_version
    assert_close(out["vision"]["projected"], family.arrays[f"vision/mlp1_{version}"], 1e-4, "projector")
    hidden = family.arrays["logits/en_single/llm_hidden_states"]
    assert_close(out["language"]["hidden_states"][:, 0], hidden, 2e-4, "hidden states")
    assert_close(logits[0], family.arrays["logits/en_single/fp32"], 2e-4, "logits")


@pytest.mark.long  # chat's answers, in tests/unit/inference, are the same tokens
def test_greedy_tokens(family):
    """Every prompt of the bundle, with the recorded ids and tiles: one or several images, turns, video, Chinese."""
    for prompt in family.prompts.values():
        features = None
        if prompt["images"]:
            features = family.generator.encode(family.pixels(prompt))
        gen = GenerationConfig(max_new_tokens=16, eos_token_ids=(family.facts["config"]["chat_eos_token_id"],))
        tokens, _ = family.generator.generate(np.asarray(prompt["input_ids"])[None], None, features, gen)
        assert tokens[0].tolist() == prompt["generated_ids"], prompt["id"]


@pytest.mark.long
def test_int8_weights(family):
    """The logits of 8-bit weights follow those of the original's; tests/unit/test_quantize.py has exact figures."""
    prompt = family.prompts["en_single"]
    model = bind_model(family.config, quantize_params(family.params, "int8"), dtype="float32")
    generator = Generator(model, image_token_id=family.image_token)
    ids = family.arrays["logits/en_single/input_ids"][None]
    logits = generator.logits(ids, None, generator.encode(family.pixels(prompt)))
    expected = family.arrays["logits/en_single/fp32"]
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.999


def test_converted_and_exported_bit_for_bit(family, tmp_path):
    convert(family.directory, tmp_path / "converted")
    export(tmp_path / "converted", tmp_path / "exported")
    weights = [path.name for path in family.directory.iterdir() if path.suffix in (".safetensors", ".bin")]
    assert weights
    same, different, errors = filecmp.cmpfiles(family.directory, tmp_path / "exported", weights, shallow=False)
    assert (sorted(same), different, errors) == (sorted(weights), [], [])
    assert load_config(tmp_path / "converted") == family.config


def test_configuration_written_and_read_again(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(family.config)))
    assert load_config(tmp_path) == family.config
