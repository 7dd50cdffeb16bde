"""Padded and cropped images without their large intermediates, against PIL with them."""

import numpy as np
import pytest
from PIL import Image

from internvl_jax.processing.resampling import DIRECT_PIXELS, expand_to_square, pad_and_resize, resize_and_crop

BICUBIC = Image.Resampling.BICUBIC


def padded_by_pil(image, color, size):
    return expand_to_square(image, color).resize((size, size), BICUBIC)


def cropped_by_pil(image, size):
    width, height = image.size
    short = min(width, height)
    resized = image.resize((int(size * width / short), int(size * height / short)), BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def random_image(rng, width, height):
    """Noise, or black and white only, which makes the bicubic kernel overshoot."""
    values = rng.integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values if rng.integers(2) else (values > 127).astype(np.uint8) * 255)


def assert_same(ours, pils):
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(pils))


@pytest.mark.parametrize("seed", range(4))
def test_random_sizes_are_pils_bit_for_bit(seed):
    rng = np.random.default_rng(seed)
    padded = cropped = 0
    for _ in range(40):
        sides = int(np.exp(rng.uniform(0, np.log(400)))), int(np.exp(rng.uniform(0, np.log(1500))))
        width, height = sides if rng.integers(2) else sides[::-1]
        image = random_image(rng, width, height)
        size = int(rng.choice([14, 28, 112, 224, 336]))
        color = tuple(int(value) for value in rng.integers(0, 256, 3))
        if max(sides) > 2 * min(sides):  # otherwise PIL is asked
            assert_same(pad_and_resize(image, color, size, direct=0), padded_by_pil(image, color, size))
            padded += 1
        if size * size * max(sides) / min(sides) < 4e6:
            assert_same(resize_and_crop(image, size, direct=0), cropped_by_pil(image, size))
            cropped += size > 1.5 * min(sides)
    assert padded > 15
    assert cropped > 3


@pytest.mark.parametrize("sides", [(3, 7000), (900, 6500)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_large_image_is_pils_bit_for_bit(sides, turned):
    image = random_image(np.random.default_rng(0), *(sides[::-1] if turned else sides))
    assert max(image.size) ** 2 > DIRECT_PIXELS
    assert_same(pad_and_resize(image, (123, 116, 103), 224), padded_by_pil(image, (123, 116, 103), 224))


@pytest.mark.parametrize("turned", [False, True])
def test_a_long_center_crop_is_pils_bit_for_bit(turned):
    image = random_image(np.random.default_rng(0), *((2, 700) if turned else (700, 2)))
    assert 336 * 336 * 700 / 2 > DIRECT_PIXELS
    assert_same(resize_and_crop(image, 336), cropped_by_pil(image, 336))


@pytest.mark.parametrize("size", [(1, 1), (5, 5), (336, 336), (2000, 1500), (1500, 2000), (700, 400)])
def test_ordinary_images_go_through_pil(size):
    image = random_image(np.random.default_rng(0), *size)
    assert_same(pad_and_resize(image, (1, 2, 3), 336), padded_by_pil(image, (1, 2, 3), 336))
    assert_same(resize_and_crop(image, 336), cropped_by_pil(image, 336))


@pytest.mark.parametrize("turned", [False, True])
def test_a_line_of_60_000_pixels(turned):
    """Larger than PIL can be asked for: the line is a twentieth of a pixel thick, and its padding is even."""
    image = Image.new("RGB", (10, 60_000) if turned else (60_000, 10), (255, 255, 255))
    made = np.asarray(pad_and_resize(image, (100, 100, 100), 301)).astype(int)
    made = made.transpose(1, 0, 2) if turned else made
    assert np.all(made[:148] == 100)
    assert np.all(made[153:] == 100)
    assert np.all(made == made[:, :1])
    middle = 10 * 301 / 60_000 * 155  # of the kernel's weight at its center, 1
    assert abs(made[150, 0, 0] - 100 - middle) < 1.5
