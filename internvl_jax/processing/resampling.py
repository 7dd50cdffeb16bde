"""PIL's bicubic resize of padded or cropped images, without large intermediates. numpy and PIL only.

A 1 x 60,000 image padded to a square has 3.6 billion pixels, nearly all of them padding. Only the other pixels are
computed here, with PIL's own arithmetic (Resample.c): one axis after the other, rounded to 8 bits in between. The
result is PIL's, bit for bit. Ordinary images go through PIL itself.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

DIRECT_PIXELS = 1 << 25  # PIL itself may make an intermediate of so many pixels, or of twice the image's

_BITS = 22  # of PIL's fixed-point weights for 8-bit channels
_BLOCK = 1 << 21  # numbers that are multiplied at once
_GROUP = 16  # output pixels that are computed at once; neighbors share most of their inputs
_SUPPORT = 2.0  # of the bicubic kernel, in pixels


def pad_and_resize(image: Image.Image, color: tuple[int, ...], size: int, direct: int = DIRECT_PIXELS) -> Image.Image:
    """Centre an image on a square of its longer side and resize the square.

    Args:
        image: an RGB image.
        color: the padding, 0 to 255 per channel.
        size: side of the result in pixels.
        direct: intermediates of up to so many pixels are left to PIL.

    Returns:
        The image, size x size.
    """
    width, height = image.size
    side = max(width, height)
    if side * side <= max(direct, 2 * width * height):
        return expand_to_square(image, color).resize((size, size), Image.Resampling.BICUBIC)
    first = (side - min(width, height)) // 2
    if width > height:
        # PIL resizes rows first. All rows of padding are equal.
        rows = np.asarray(image.resize((size, height), Image.Resampling.BICUBIC))
        padding = Image.new("RGB", (width, 1), color).resize((size, 1), Image.Resampling.BICUBIC)
        made = _resample(rows, first, side, size, range(size), np.asarray(padding)[0])
        return Image.fromarray(np.stack(made))
    columns = np.ascontiguousarray(np.asarray(image).transpose(1, 0, 2))
    made = _resample(columns, first, side, size, range(size), np.asarray([color], np.uint8))
    # A column of padding alone has a single color, [1,3].
    distinct = {column.tobytes(): column for column in made}
    number = {key: at for at, key in enumerate(distinct)}
    tall = np.empty((height, len(distinct), 3), np.uint8)
    for at, column in enumerate(distinct.values()):
        tall[:, at] = column
    short = np.asarray(Image.fromarray(tall).resize((len(distinct), size), Image.Resampling.BICUBIC))
    return Image.fromarray(np.ascontiguousarray(short[:, [number[column.tobytes()] for column in made]]))


def resize_and_crop(image: Image.Image, size: int, direct: int = DIRECT_PIXELS) -> Image.Image:
    """Resize the shorter side of an image and crop the center of the longer one.

    Args:
        image: an RGB image.
        size: side of the result in pixels.
        direct: intermediates of up to so many pixels are left to PIL.

    Returns:
        The image, size x size.
    """
    width, height = image.size
    short = min(width, height)
    new_width, new_height = int(size * width / short), int(size * height / short)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    if new_width * new_height <= max(direct, 2 * width * height):
        resized = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
        return resized.crop((left, top, left + size, top + size))
    if width > height:
        first, last = _span(width, new_width, range(left, left + size))
        strip = np.asarray(image.crop((first, 0, last, height))).transpose(1, 0, 2)
        columns = np.stack(_resample(strip, first, width, new_width, range(left, left + size)), axis=1)
        return Image.fromarray(columns).resize((size, size), Image.Resampling.BICUBIC)
    first, last = _span(height, new_height, range(top, top + size))
    rows = image.crop((0, first, width, last)).resize((size, last - first), Image.Resampling.BICUBIC)
    return Image.fromarray(np.stack(_resample(np.asarray(rows), first, height, new_height, range(top, top + size))))


def expand_to_square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """Centre an image on a square of its longer side, filled with `color`."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _resample(
    strip: np.ndarray, first: int, length: int, size: int, wanted: range, padding: np.ndarray | None = None
) -> list[np.ndarray]:
    """Compute output pixels of one resized axis as PIL does.

    Args:
        strip: [n,M,3] uint8, n pixels of the axis, for M positions of the other axis.
        first: the index of the strip's first pixel on the axis.
        length: pixels of the axis before.
        size: pixels of the axis after.
        wanted: indices of the output pixels.
        padding: [M,3] or [1,3] uint8, the value of all pixels outside the strip; None: they are not needed.

    Returns:
        For each wanted pixel [M,3] uint8; [1,3] where only a padding of that shape contributes.
    """
    made: dict[int, np.ndarray] = {}
    for at in range(0, len(wanted), _GROUP):
        group: list[tuple[int, int, int, np.ndarray]] = []
        for number in wanted[at : at + _GROUP]:
            start, weights = _weights(length, size, number)
            low, high = max(start, first), min(start + len(weights), first + len(strip))
            if low < high:
                group.append((number, low - first, weights.sum(), weights[low - start : high - start]))
            elif padding is not None:
                made[number] = _rounded(weights.sum() * padding)
        if group:
            made |= zip((number for number, *_ in group), _weighted(strip, [item[1:] for item in group], padding))
    return [made[number] for number in wanted]


def _weighted(strip: np.ndarray, parts: list[tuple[int, float, np.ndarray]], padding: np.ndarray | None) -> np.ndarray:
    """Weighted sums of a strip's pixels, [N,M,3] uint8.

    Args:
        strip: as for `_resample`.
        parts: for each of N output pixels the first input pixel in the strip, the sum of all weights, and the weights
            within the strip.
        padding: as for `_resample`.
    """
    low, high = min(first for first, *_ in parts), max(first + len(weights) for first, _, weights in parts)
    matrix = np.zeros((len(parts), high - low))
    for row, (first, _, weights) in zip(matrix, parts):
        row[first - low : first - low + len(weights)] = weights
    outside = np.asarray([total for _, total, _ in parts]) - matrix.sum(axis=1)
    made = np.empty((len(parts), *strip.shape[1:]), np.uint8)
    step = max(1, _BLOCK // (3 * max(matrix.shape)))
    for at in range(0, strip.shape[1], step):
        block = strip[low:high, at : at + step].astype(np.float64)
        # Sums of integers below 2^53 are exact in any order.
        total = (matrix @ block.reshape(high - low, -1)).reshape(len(parts), -1, 3)
        if padding is not None:
            total += outside[:, None, None] * (padding if len(padding) == 1 else padding[at : at + step])
        made[:, at : at + step] = _rounded(total)
    return made


def _rounded(total: np.ndarray) -> np.ndarray:
    """From fixed point to 8 bits, rounded as PIL does: half a unit is added, then the fraction dropped."""
    return np.clip(np.floor((total + (1 << (_BITS - 1))) / (1 << _BITS)), 0, 255).astype(np.uint8)


def _weights(length: int, size: int, number: int) -> tuple[int, np.ndarray]:
    """The input pixels of output pixel `number`: index of the first, and weights times 2^22, integers as float64.

    Operations and their order are PIL's, so that all roundings are the same.
    """
    scale = length / size
    wide = max(scale, 1.0)
    center, support = (number + 0.5) * scale, _SUPPORT * wide
    start = max(int(center - support + 0.5), 0)
    end = min(int(center + support + 0.5), length)
    away = np.abs((np.arange(end - start) + start - center + 0.5) * (1.0 / wide))
    near = ((-0.5 + 2.0) * away - (-0.5 + 3.0)) * away * away + 1
    far = (((away - 5) * away + 8) * away - 4) * -0.5
    weights = np.where(away < 1.0, near, np.where(away < 2.0, far, 0.0))
    weights /= np.cumsum(weights)[-1]  # a sum from left to right, as in C; sum() adds in pairs
    scaled = weights * (1 << _BITS)
    return start, np.trunc(np.where(weights < 0, scaled - 0.5, scaled + 0.5))


def _span(length: int, size: int, wanted: range) -> tuple[int, int]:
    """The range of input pixels of the output pixels `wanted`: the first, and one past the last."""
    start, _ = _weights(length, size, wanted[0])
    end, weights = _weights(length, size, wanted[-1])
    return start, end + len(weights)
