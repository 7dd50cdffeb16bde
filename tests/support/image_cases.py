"""Images for tests: the golden ones, random ones, and bytes of files."""

import io
import json
import struct
import zlib

import numpy as np
from PIL import Image
from support.paths import DATA

from internvl_jax.processing.images import load_image

CHAT = DATA / "internvl_chat_v1_1"
GOLDENS = np.load(CHAT / "goldens.npz")
FILES = {
    name: CHAT / entry["file"] for name, entry in json.loads((CHAT / "goldens.json").read_text())["images"].items()
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_image(mode="RGB", width=37, height=23, seed=0):
    colors = Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 4), np.uint8))
    return colors if mode == "RGBA" else colors.convert("RGB").convert(mode)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def load(source, **options):
    return load_image(source, **{"honor_exif": False, **options})


def png_header(width, height):
    """A PNG that says how large it is and has hardly any pixels."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(100))
    parts = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
