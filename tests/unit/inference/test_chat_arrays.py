"""Chat on arrays: tokens, logits and features against the golden bundle; inputs that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.chat_cases import (
    ARRAYS,
    CHECKPOINT,
    FACTS,
    PROMPTS,
    golden_pixels,
)
from support.golden import assert_close, kl

import internvl_jax

pytest.importorskip("torch")  # the golden checkpoint is PyTorch's


def flipped(ids, mask):
    """The same rows padded on the other side."""
    return [np.stack([np.roll(row, -(keep == 0).sum()) for row, keep in zip(x, mask)]) for x in (ids, mask)]


def test_generate_on_arrays(chat):
    batch = FACTS["batches"][0]
    ids, mask, expected = (
        ARRAYS[f"batch/batch_two/{name}"] for name in ("input_ids", "attention_mask", "generated_ids")
    )
    pixels = golden_pixels(batch["images"])
    tokens = chat.generate(ids, pixels, mask, max_new_tokens=32)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, expected)
    right, right_mask = flipped(ids, mask)
    np.testing.assert_array_equal(chat.generate(right, pixels, right_mask, max_new_tokens=32), expected)
    prompt = PROMPTS["text_only"]
    assert chat.generate(prompt["input_ids"], max_new_tokens=32).tolist() == [prompt["generated_ids"]]
    assert chat.generate([prompt["input_ids"]], attention_mask=[1] * 24, max_new_tokens=3).shape == (1, 3)
    search = FACTS["beam_search"][1]
    assert chat.generate(prompt["input_ids"], max_new_tokens=32, num_beams=5).tolist() == [search["generated_ids"]]


def test_logits_on_arrays(chat):
    for name in ("en_single", "zh_multi_turn", "two_separate"):
        pixels = golden_pixels(PROMPTS[name]["images"])
        logits = chat.logits(ARRAYS[f"logits/{name}/input_ids"], pixels)
        assert logits.dtype == np.float32
        assert_close(logits[0], ARRAYS[f"logits/{name}/fp32"], 2e-4, name)
    ids, mask = ARRAYS["batch/batch_two/input_ids"], ARRAYS["batch/batch_two/attention_mask"]
    pixels, expected = golden_pixels(FACTS["batches"][0]["images"]), ARRAYS["logits/batch_two/fp32"][mask > 0]
    assert_close(chat.logits(ids, pixels, mask)[mask > 0], expected, 2e-4, "left padding")
    right, right_mask = flipped(ids, mask)
    assert_close(chat.logits(right, pixels, right_mask)[right_mask > 0], expected, 2e-4, "right padding")


def test_encode(chat):
    names = ["rgb", "exif_rot", "rgba", "gray", "palette"]
    assert_close(chat.encode(golden_pixels(names)), ARRAYS["vision/mlp1_batch"], 1e-4, "visual tokens")
    single = chat.encode(ARRAYS["images/rgb/quickstart"])
    assert single.shape == (1, 16, 64)
    assert_close(single[0], ARRAYS["vision/mlp1_v1"], 1e-4, "visual tokens of one image")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixel_values": np.zeros((1, 3, 112, 112), np.float32)}, "0 image tokens .id 862; none., but 1 images x 16"),
        ({"pixel_values": np.zeros((1, 112, 112, 3), np.float32)}, r"\[images, 3, height, width\], not \[1, 112"),
        ({"pixel_values": np.zeros((0, 3, 112, 112), np.float32)}, "holds no images: leave it out"),
        ({"pixel_values": np.zeros((1, 3, 112, 112), np.uint8)}, "must be normalized floats, not uint8"),
        ({"pixel_values": np.zeros((1, 3, 126, 112), np.float32)}, "9 x 8 patches: whole multiples of 28 pixels"),
        ({"pixel_values": np.zeros((1, 3, 8, 112), np.float32)}, "0 x 8 patches"),
        ({"input_ids": [[862] * 16]}, "16 image tokens .* but there are no images"),
        ({"input_ids": [[869]]}, "token 869 at position 0 is outside the vocabulary of 869"),
        ({"input_ids": [[1.5]]}, "input_ids must be integers"),
        ({"attention_mask": [[1, 1, 1]]}, "attention_mask must hold 0 and 1"),
        ({"max_new_tokens": 511}, r"row 0: 2 prompt tokens \+ 511 new ones exceed the context"),
        ({"stop": "end"}, "stop strings need text: use chat"),
        ({"beams": 2}, "no such generation setting: beams"),
    ],
    ids=str,
)
def test_bad_arrays(chat, options, message, monkeypatch):
    monkeypatch.setattr(chat.generator, "encode", lambda *_: pytest.fail("work has started"))
    arguments = {"input_ids": [[5, 6]], **options}
    with pytest.raises(ValueError, match=message):
        chat.generate(**arguments)
    if set(options) <= {"input_ids", "pixel_values", "attention_mask"}:
        with pytest.raises(ValueError, match=message):
            chat.logits(**arguments)


def test_bfloat16(chat):
    """The bfloat16 model's logits, on the golden prompts that have some."""
    half = internvl_jax.load(CHECKPOINT, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("bfloat16")}
    for name in ("en_single", "zh_multi_turn"):
        ids, pixels = ARRAYS[f"logits/{name}/input_ids"], golden_pixels(PROMPTS[name]["images"])
        divergence = kl(ARRAYS[f"logits/{name}/fp32"], half.logits(ids, pixels)[0])
        assert divergence.mean() <= 1e-2, f"{name}: KL {divergence.mean():.2g}, at most {divergence.max():.2g}"
