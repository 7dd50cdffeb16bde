"""What the reference does to training pictures of data sets that ask for it (data_augment)."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

from internvl_jax.processing.images import ImageError, load_image

SCALE, RATIO = (0.8, 1.0), (3 / 4, 4 / 3)  # of the crop's area to the picture's, and of its width to its height
QUALITIES = (75, 100)  # of JPEG, both included
JPEG_SIDE = 65_500  # pixels, of libjpeg

AUGMENTATIONS = ("crop", "jpeg")


def augment(image: Image.Image, kind: str, rng: np.random.Generator) -> Image.Image:
    """An RGB picture, changed. "crop" is what V1-1's release did, "jpeg" what later releases do."""
    return random_crop(image, rng) if kind == "crop" else degrade(image, rng)


def random_crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The crop of torchvision's RandomResizedCrop(scale=(0.8, 1)); resizing it is the image processor's part.

    Ten attempts at a random area and ratio; then the largest centred crop whose ratio is within bounds.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return _cut(image, int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h)
    low, high = RATIO
    w, h = width, height
    if width / height < low:
        h = round(width / low)
    elif width / height > high:
        w = round(height * high)
    return _cut(image, (width - w) // 2, (height - h) // 2, w, h)


def _cut(image: Image.Image, left: int, top: int, width: int, height: int) -> Image.Image:
    """As image.crop, which warns of large crops, and warnings can only be muted for the whole process."""
    box = (left, top, left + width, top + height)
    return image.resize((width, height), Image.Resampling.NEAREST, box=box)


def degrade(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Written as JPEG of a random quality, and read again. Raises ImageError where JPEG cannot hold it."""
    quality = int(rng.integers(QUALITIES[0], QUALITIES[1] + 1))
    if max(image.size) > JPEG_SIDE:
        raise ImageError(
            f"{image.width} x {image.height} pixels cannot be written as JPEG, whose sides have at most {JPEG_SIDE:,}"
        )
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return load_image(file.getvalue(), honour_exif=False)
