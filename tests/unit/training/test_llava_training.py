"""Training of the comparison systems: labels, loss and gradients of LLaVA's code, and its template for pretraining."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.golden import assert_close, published
from support.llava_cases import V1_0, expand, facts, loaded, v1_0_pixels

from internvl_jax.config import IMAGE_TOKEN_INDEX
from internvl_jax.config.conversation_templates import TEMPLATES
from internvl_jax.data import labels
from internvl_jax.data.batch import IGNORED, Batch
from internvl_jax.data.labels import SampleError
from internvl_jax.processing.conversation import image_token_index
from internvl_jax.processing.tokenizer import load_tokenizer
from internvl_jax.training import objective

VICUNA = TEMPLATES["vicuna_v1"]
ARRAYS, FACTS = facts("internvl_chat_v1_0")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(V1_0 / "checkpoint")


def build(turns, tokenizer, template=VICUNA, tokens=1):
    return labels.build(turns, template, tokenizer, tokens, IMAGE_TOKEN_INDEX)


@pytest.mark.parametrize("sample", FACTS["train_samples"], ids=lambda sample: sample["id"])
def test_golden_labels(sample, tokenizer):
    """The bundle writes one id for an image; here each of its tokens has one."""
    turns = labels.read_turns(sample["conversations"])
    placed = labels.place_training_images(turns, len(sample["images"]), first=True)
    assert placed[0][0] == sample["preprocessed_first_turn"]
    ids, made = build(placed, tokenizer)
    assert ids.tolist() == sample["input_ids"]
    assert made.tolist() == sample["labels"]
    longer, _ = build(placed, tokenizer, tokens=36)
    assert longer.tolist() == expand(sample["input_ids"], 36)


def test_captions_as_llava_pretrains(tokenizer):
    """preprocess_plain of LLaVA's train.py: the question gives way to its image; the caption and a line break are
    learned. Tokenized as tokenizer_image_token does it, piece by piece."""
    turns = labels.place_training_images([("Describe it briefly.\n<image>", "A red car on a road.")], 1)
    ids, made = build(labels.captions(turns), tokenizer, labels.plain(VICUNA), tokens=3)
    caption = tokenizer.encode("A red car on a road.\n")
    assert caption[0] == tokenizer.bos_id
    assert ids.tolist() == [tokenizer.bos_id, *[IMAGE_TOKEN_INDEX] * 3, *caption[1:]]
    assert made.tolist() == [IGNORED] * 4 + caption[1:]
    for wrong in ([("What?", "A car.")], [("<image>", "A car."), ("And?", "A road.")]):
        with pytest.raises(SampleError, match="a caption is one answer to one question with an image"):
            labels.captions(wrong)


def test_captions_for_a_model_with_image_tokens_of_its_own():
    own = load_tokenizer(V1_0.parent / "internvl_chat_v1_1" / "checkpoint")
    template = labels.plain(TEMPLATES["internvl_zh"])
    ids, made = labels.build([("<image>", "A car.")], template, own, 2)
    assert ids.tolist() == own.encode("<img><IMG_CONTEXT><IMG_CONTEXT></img>A car.\n")
    assert own.decode(made[made != IGNORED]).strip() == "A car."


def test_golden_loss_and_gradients():
    pytest.importorskip("torch")
    config, params = loaded(V1_0 / "checkpoint")
    config = replace(config, image_size=84)
    samples = FACTS["train_samples"]
    rows = [expand(sample["input_ids"], config.tokens_per_image) for sample in samples]
    shape = (len(rows), max(map(len, rows)))
    ids, targets, real = np.zeros(shape, np.int32), np.full(shape, IGNORED, np.int32), np.zeros(shape, np.int32)
    for number, row in enumerate(rows):
        ids[number, : len(row)], real[number, : len(row)] = row, 1
        targets[number, : len(row)] = ARRAYS["train/expanded_labels"][number, : len(row)]
    pixels = np.stack([v1_0_pixels(config, name) for sample in samples for name in sample["images"]])
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32)
    batch = Batch(ids, targets, real, positions, image_token_index(ids == config.image_token_id), pixels)
    running = jax.tree.map(lambda leaf: leaf[: config.num_vision_layers], params["vision_model"]["layers"])
    frozen = {**params["vision_model"], "layers": running}
    trained = {name: part for name, part in params.items() if name != "vision_model"}

    @jax.jit
    def run(trained):
        weights = objective.loss_weights(jnp.asarray(batch.labels), jnp.asarray(batch.segment_ids))

        def of(trained):
            whole = {**trained, "vision_model": frozen}
            return objective.loss({"params": whole}, config, batch, weights, objective.LossOptions(remat=True)).loss

        return jax.value_and_grad(of)(trained)

    loss, grads = jax.device_get(run(trained))
    assert float(loss) == pytest.approx(float(ARRAYS["train/loss"]), abs=1e-4)
    ours = published(config, {**grads, "vision_model": params["vision_model"]})
    compared = [name for name in ARRAYS if name.startswith("train/grad/")]
    assert len(compared) == 5
    for name in compared:
        key = name.removeprefix("train/grad/")
        assert_close(ours[key], ARRAYS[name], 1e-4 * np.abs(ARRAYS[name]).max(), key)
