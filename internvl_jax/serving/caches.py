"""The engine's caches: image features, and keys and values of prompt prefixes."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from internvl_jax.serving.requests import PromptImage, Request


class BytesCache:
    """Keeps the values that were used last, up to a number of bytes.

    Args:
        capacity: bytes; 0 keeps nothing.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.bytes = 0
        self.queries = 0
        self.hits = 0
        self._values: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: bytes) -> Any:
        """The value of a key, or None; counts as a query."""
        self.queries += 1
        entry = self._values.get(key)
        if entry is None:
            return None
        self.hits += 1
        self._values.move_to_end(key)
        return entry[0]

    def put(self, key: bytes, value: Any) -> None:
        """Keep a value, a tree of arrays, and drop those that were not used for longest."""
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(value))
        if key in self._values or size > self.capacity:
            return
        self._values[key] = (value, size)
        self.bytes += size
        while self.bytes > self.capacity:
            _, (_, dropped) = self._values.popitem(last=False)
            self.bytes -= dropped


def image_key(pixel_values: np.ndarray, *context: str) -> bytes:
    """Digest of an image as the model sees it: its pixels with shape and dtype, and the context.

    Args:
        pixel_values: [3,H,W] after preprocessing, so whatever mode, size, decoding or resizing changed is in it.
        context: the model and the tenant, for example.
    """
    digest = hashlib.sha256()
    for part in (*context, str(pixel_values.dtype), str(pixel_values.shape)):
        digest.update(f"{len(part)}:{part}".encode())
    digest.update(np.ascontiguousarray(pixel_values).tobytes())
    return digest.digest()


def make_images(pixel_values: Sequence[np.ndarray], *context: str) -> tuple[PromptImage, ...]:
    """Images of a prompt with their keys. Arguments as for `image_key`."""
    return tuple(PromptImage(pixels, image_key(pixels, *context)) for pixels in pixel_values)


def block_keys(request: Request, image_token_id: int | None, tokens_per_image: int, size: int) -> list[bytes]:
    """Keys of the whole blocks of a prompt, each of which stands for all tokens up to the end of its block.

    A key depends on the key before it, the block's tokens, the images that the block shows, and the salt: text before
    an image is shared by prompts with other images, the image's tokens only with the same image.

    Args:
        request: the prompt.
        image_token_id: the token that images replace.
        tokens_per_image: how many of them an image takes.
        size: tokens of a block.
    """
    parent = hashlib.sha256(request.salt.encode()).digest()
    ids = np.asarray(request.input_ids, np.int64)
    number = np.cumsum(ids == image_token_id) - 1  # which image token each one is
    keys = []
    for start in range(0, len(ids) - len(ids) % size, size):
        block = slice(start, start + size)
        shown = np.unique(number[block][ids[block] == image_token_id] // max(tokens_per_image, 1))
        digest = hashlib.sha256(parent + ids[block].tobytes())
        for index in shown:
            digest.update(request.images[index].key)
        parent = digest.digest()
        keys.append(parent)
    return keys
