"""Boxes in answers: `<ref>a dog</ref><box>[[x1, y1, x2, y2]]</box>`, in thousandths of the image's width and height."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from internvl_jax.processing.images import to_rgb

logger = logging.getLogger(__name__)

UNITS = 1000  # coordinates are fractions of the width and height, times this
COLORS = ("red", "lime", "blue", "yellow", "magenta", "cyan", "orange", "purple")

# A box with its label, if one stands right before it.
_BOXES = re.compile(r"(?:<ref>(?P<label>[^<]*)</ref>\s*)?<box>(?P<boxes>[^<]*)</box>")
_NUMBER = r"\s*(\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"\[{','.join([_NUMBER] * 4)}\]")


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of the image that the question was about.

    Attributes:
        label: what the answer calls it; empty if it has no label.
        left, top, right, bottom: edges in pixels, from the upper left corner.
    """

    label: str
    left: float
    top: float
    right: float
    bottom: float


def parse_boxes(text: str, width: int, height: int) -> list[Box]:
    """The boxes of an answer, in its order.

    Tiles do not matter here: coordinates refer to the whole image, which is resized to its grid without padding.

    Args:
        text: an answer decoded with its special tokens, which `<ref>` and `<box>` are.
        width: of the image, in pixels.
        height: of the image.

    Returns:
        The boxes. One that is not within the image, or whose edges are in the wrong order, is left out with a warning.
    """
    found = []
    for match in _BOXES.finditer(text):
        boxes = _BOX.findall(match["boxes"])
        if not boxes:
            logger.warning("%r holds no box of four numbers: it is left out", match[0])
        for numbers in boxes:
            left, top, right, bottom = map(float, numbers)
            if not (left <= right <= UNITS and top <= bottom <= UNITS):
                logger.warning("the box [%s] is not within the image: it is left out", ", ".join(numbers))
                continue
            across, down = width / UNITS, height / UNITS
            found.append(Box((match["label"] or "").strip(), left * across, top * down, right * across, bottom * down))
    return found


def draw_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """Return a copy of the image in RGB with the boxes and their labels; boxes of one label have one color."""
    drawn = to_rgb(image).copy()
    canvas = ImageDraw.Draw(drawn)
    line = max(1, round(max(drawn.size) / 300))
    size = max(10, round(max(drawn.size) / 50))
    labels = list(dict.fromkeys(box.label for box in boxes))
    for box in boxes:
        color = COLORS[labels.index(box.label) % len(COLORS)]
        canvas.rectangle((box.left, box.top, box.right, box.bottom), outline=color, width=line)
        if box.label:
            canvas.text((box.left + line, box.top + line), box.label, fill=color, font_size=size)
    return drawn
