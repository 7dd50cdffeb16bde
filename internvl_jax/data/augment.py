"""Augmentation of training images, as in the reference code, for data sets that ask for it (data_augment)."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

from internvl_jax.processing.images import ImageError, load_image

SCALE, RATIO = (0.8, 1.0), (3 / 4, 4 / 3)  # of the crop's area to the image's; width to height of the crop
QUALITIES = (75, 100)  # of JPEG, inclusive
JPEG_SIDE = 65_500  # pixels; libjpeg's limit

AUGMENTATIONS = ("crop", "jpeg")


def augment(image: Image.Image, kind: str, rng: np.random.Generator) -> Image.Image:
    """Augment an RGB image.

    Args:
        image: the image.
        kind: "crop", as V1-1's release, or "jpeg", as later releases.
        rng: source of randomness.

    Raises:
        ImageError: the image is too large for JPEG.
    """
    return random_crop(image, rng) if kind == "crop" else jpeg_compress(image, rng)


def random_crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The crop of torchvision's RandomResizedCrop(scale=(0.8, 1)), without its resizing.

    Tries a random area and ratio ten times, then takes the largest center crop whose ratio is within bounds.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return crop(image, int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h)
    low, high = RATIO
    w, h = width, height
    if width / height < low:
        h = round(width / low)
    elif width / height > high:
        w = round(height * high)
    return crop(image, (width - w) // 2, (height - h) // 2, w, h)


def crop(image: Image.Image, left: int, top: int, width: int, height: int) -> Image.Image:
    """As `image.crop`, but without its warning about large crops, which cannot be muted for one thread only."""
    box = (left, top, left + width, top + height)
    return image.resize((width, height), Image.Resampling.NEAREST, box=box)


def jpeg_compress(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Compress with JPEG of a random quality, and decode.

    Raises:
        ImageError: the image is too large for JPEG.
    """
    quality = int(rng.integers(QUALITIES[0], QUALITIES[1] + 1))
    if max(image.size) > JPEG_SIDE:
        raise ImageError(
            f"{image.width} x {image.height} pixels cannot be written as JPEG, whose sides have at most {JPEG_SIDE:,}"
        )
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return load_image(file.getvalue(), honor_exif=False)
