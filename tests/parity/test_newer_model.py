"""The models of InternVL-Chat-V1-2 and InternVL 2, 2.5 and 3.5 against the original code, stage by stage.

What no prompt of the bundles' usual length shows: epsilons, packed weights, ragged batches, positions beyond the
context that the model was trained with, losses and gradients, and the native layout.
"""

import dataclasses
import filecmp
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.golden import DATA, assert_close, bundle, leaf, published

from checkpoints_convert.convert import convert, load_hf
from checkpoints_convert.export import export
from checkpoints_convert.mapping import PART, pack
from internvl_jax.config import config_from_hf, config_to_hf, load_config
from internvl_jax.data.batch import Batch
from internvl_jax.inference.generation.bound_model import bind_model
from internvl_jax.inference.generation.generator import Generator
from internvl_jax.inference.generation.sampling import GenerationConfig
from internvl_jax.models import chat_model
from internvl_jax.models.chat_model import InternVLChat
from internvl_jax.models.layers import LayerNorm, RMSNorm
from internvl_jax.models.projector import Projector
from internvl_jax.processing.conversation import image_token_index
from internvl_jax.training import objective
from internvl_jax.training.objective import LossOptions

BUNDLES = ("internvl_chat_v1_2", "internvl2_internlm2", "internvl2_5_qwen2", "internvl3_5_qwen3")
IMAGENET_MEAN, IMAGENET_STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


class Golden:
    """A bundle's model, arrays and facts."""

    def __init__(self, name, checkpoint="checkpoint"):
        directory = DATA / name / checkpoint
        self.arrays, self.facts = bundle(name)
        self.config = load_config(directory)
        self.params = load_hf(directory, chat_model.abstract_params(self.config))
        self.image_token = self.facts["config"]["token_ids"]["<IMG_CONTEXT>"]
        self.stop = self.facts["config"]["chat_eos_token_id"]

    @property
    def generator(self):
        return Generator(bind_model(self.config, self.params, dtype="float32"), image_token_id=self.image_token)


golden = cache(Golden)


def normalized(tiles):
    """Tiles [M,H,W,3] of grey levels as the model reads them."""
    return ((tiles.astype(np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD).transpose(0, 3, 1, 2)


def recorded_tiles(arrays, image, count):
    """An image cut into `count` tiles, thumbnail included; recorded for one of the limits that give so many."""
    keys = (key for key in arrays.files if key.startswith(f"pixels/{image}/") and key.endswith("tiles_uint8"))
    return next(arrays[key] for key in keys if len(arrays[key]) == count)


@pytest.mark.parametrize("name", BUNDLES)
def test_epsilons(name):
    """Rows of tiny variance, close to each norm's epsilon."""
    known = golden(name)
    config, arrays, params = known.config, known.arrays, known.params
    projected = Projector(config.projector, jnp.float32).apply({"params": params["mlp1"]}, arrays["probe/mlp1_input"])
    assert_close(projected, arrays["probe/mlp1_output"], 1e-5, "projector")

    norm = jax.tree.map(lambda leaf: leaf[0], params["vision_model"]["layers"]["norm1"])
    vision = config.vision
    tower = (
        RMSNorm((vision.hidden_size,), vision.layer_norm_eps)
        if vision.norm_type == "rms_norm"
        else LayerNorm(vision.hidden_size, vision.layer_norm_eps)
    )
    probe = tower.apply({"params": norm}, jnp.asarray(arrays["probe/vit_norm_input"]))
    assert_close(probe, arrays["probe/vit_norm_output"], 1e-5, "norm1")

    final = RMSNorm((config.text.hidden_size,), config.text.rms_norm_eps)
    variables = {"params": params["language_model"]["norm"]}
    probe = final.apply(variables, jnp.asarray(arrays["probe/llm_norm_input"]))
    assert_close(probe, arrays["probe/llm_norm_output"], 1e-5, "final norm")
    probe = final.apply(variables, jnp.asarray(arrays["probe/llm_norm_bf16_input"], jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(probe, np.float32), arrays["probe/llm_norm_bf16_output"])


def test_packed_queries_keys_and_values():
    """InternLM2's wqkv taken apart: the first layer's, before rotary positions."""
    known = golden("internvl2_internlm2")
    layers = known.params["language_model"]["layers"]
    x = known.arrays["logits/en_single/llm_hidden_states"][0]
    normed = RMSNorm((x.shape[-1],), known.config.text.rms_norm_eps).apply(
        {"params": {"scale": layers["input_layernorm"]["scale"][0]}}, jnp.asarray(x)
    )
    for ours, theirs in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
        kernel = np.asarray(layers["self_attn"][ours]["kernel"][0], np.float32)
        expected = known.arrays[f"llm/layer0_{theirs}"]
        assert_close(np.einsum("td,dnh->tnh", normed, kernel), expected, 1e-4, theirs)


@pytest.mark.parametrize("name", BUNDLES)
def test_ragged_batch(name):
    """Three rows padded on the left, with tiles of their own: greedy tokens, and logits of the last position."""
    known = golden(name)
    arrays, batch = known.arrays, known.facts["batches"][0]
    tiles = [recorded_tiles(arrays, image, count) for image, count in zip(batch["images"], batch["num_patches_list"])]
    generator = known.generator
    features = generator.encode(normalized(np.concatenate(tiles)))
    ids, mask = arrays["batch/ragged/input_ids"], arrays["batch/ragged/attention_mask"]
    logits = generator.logits(ids, mask, features)
    assert_close(logits[:, -1], arrays["batch/ragged/logits_last"], 2e-4, "logits")
    expected = arrays["batch/ragged/generated_ids"]
    gen = GenerationConfig(max_new_tokens=expected.shape[1], eos_token_ids=(known.stop,))
    tokens, _ = generator.generate(ids, mask, features, gen)
    for row, theirs in zip(tokens.tolist(), expected.tolist()):
        until = theirs.index(known.stop) + 1 if known.stop in theirs else len(theirs)
        assert row[:until] == theirs[:until]


def test_beyond_max_position_embeddings():
    """Dynamic NTK: one pass over 550 tokens of 512, and greedy tokens with keys that keep their older rotation."""
    known = golden("internvl2_internlm2")
    ids = known.arrays["long/input_ids"][None]
    assert ids.shape[1] > known.config.text.max_position_embeddings
    generator = known.generator
    tail = known.arrays["long/logits_tail"]
    short = np.pad(known.arrays["logits/text_only/input_ids"], (ids.shape[1] - 29, 0))[-ids.shape[1] :][None]
    mask = np.stack([np.ones(ids.shape[1], int), np.arange(ids.shape[1]) >= ids.shape[1] - 29])
    logits = generator.logits(np.concatenate([ids, short]), mask, None)
    assert_close(logits[0, -len(tail) :], tail, 2e-4, "logits")
    expected = known.arrays["long/generated_ids"].tolist()
    gen = GenerationConfig(max_new_tokens=len(expected), eos_token_ids=(known.stop,))
    tokens, _ = generator.generate(ids, None, None, gen)
    assert tokens[0].tolist() == expected
    given = np.concatenate([ids, [expected[:-1]]], axis=1)
    plain = known.facts["long"]["plain_rope_max_abs"]
    assert plain > 1  # what no scaling would cost
    assert given.shape[1] <= known.config.text.context


def packed(config, tensors):
    """Published tensors, packed where the files have packed ones."""
    parts = {}
    for key, values in tensors.items():
        name, _, part = key.partition(PART)
        parts.setdefault(name, {})[part] = values
    return {name: values[""] if "" in values else pack(config.required_text, values) for name, values in parts.items()}


def training_batch(known):
    arrays = known.arrays
    real = arrays["train/attention_mask"].astype(np.int32)
    ids = arrays["train/input_ids"]
    tiles = normalized(arrays["train/tiles_uint8"])
    return Batch(
        input_ids=ids,
        labels=arrays["train/labels"],
        segment_ids=real,
        positions=np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32),
        image_index=image_token_index(ids == known.image_token),
        pixel_values=tiles[arrays["train/image_flags"] == 1],
    )


@pytest.mark.parametrize("name", BUNDLES)
def test_loss_and_gradients(name):
    known = golden(name)
    config, arrays, facts, batch = known.config, known.arrays, known.facts["train"], training_batch(known)
    weights = objective.loss_weights(batch.labels, batch.segment_ids)

    @jax.jit
    def run(params):
        def of(params):
            sums = objective.loss({"params": params}, config, batch, weights, LossOptions(chunk=40, remat=True))
            return sums.loss, sums

        return jax.value_and_grad(of, has_aux=True)(params)

    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), known.params)
    (loss, sums), grads = jax.device_get(run(params))
    assert float(loss) == pytest.approx(float(arrays["train/loss"]), abs=1e-4)
    assert sums.num_supervised == facts["supervised_tokens"]
    assert float(optax.global_norm(grads)) == pytest.approx(facts["global_grad_norm"], rel=1e-4)
    ours = packed(config, published(config, grads))
    compared = [key for key in arrays.files if key.startswith("train/grad/")]
    assert len(compared) >= 12
    for key in compared:
        assert_close(ours[key.removeprefix("train/grad/")], arrays[key], 1e-4 * np.abs(arrays[key]).max(), key)


def test_native_layout():
    """The same weights under transformers' names, and logits of transformers' own classes."""
    known, native = golden("internvl3_5_qwen3"), golden("internvl3_5_qwen3", "checkpoint_hf")
    assert native.config.layout == "internvl"
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(native.params), jax.tree.leaves(known.params), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), err_msg=str(path))
    arrays = known.arrays
    ids, pixels = arrays["native/input_ids/single"][None], arrays["native/pixel_values/single"]
    model = InternVLChat(native.config, image_token_id=native.config.image_token_id)
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(lambda params: model.apply({"params": params}, ids, pixels))(native.params)
    assert_close(logits[0], arrays["native/logits/single/fp32"], 2e-4, "logits")


def test_native_layout_converted_and_exported_bit_for_bit(tmp_path):
    source = DATA / "internvl3_5_qwen3" / "checkpoint_hf"
    convert(source, tmp_path / "converted")
    assert load_config(tmp_path / "converted") == load_config(source)
    export(tmp_path / "converted", tmp_path / "exported")
    assert filecmp.cmp(source / "model.safetensors", tmp_path / "exported" / "model.safetensors", shallow=False)


def test_native_configuration_written_and_read_again():
    config = golden("internvl3_5_qwen3", "checkpoint_hf").config
    assert dataclasses.replace(config_from_hf(config_to_hf(config)), template=config.template) == config


def test_tied_embeddings_have_no_head():
    known = golden("internvl3_5_qwen3")
    assert known.config.text.tie_word_embeddings
    assert "lm_head" not in known.params["language_model"]
    assert leaf(known.params, "language_model/layers/self_attn/q_norm/scale").shape == (4, 32)
