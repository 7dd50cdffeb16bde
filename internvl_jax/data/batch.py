"""What a training step reads: the one type that the data pipeline makes and the objective takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.struct
import numpy as np

IGNORED = -100  # the label of a token that is not supervised, as in the reference


class Batch(flax.struct.PyTreeNode):
    """Rows of tokens with the images that stand in them. Shapes are static: a bucket has one.

    A row holds one sample, or several packed behind one another, and padding at its end. Made by several processes,
    each holds its own rows and image slots.
    """

    input_ids: Any  # [B,T] int32; 0 on padding
    labels: Any  # [B,T] int32, aligned with input_ids and not shifted; IGNORED where unsupervised
    segment_ids: Any  # [B,T] int32: 0 on padding, 1, 2, ... for the samples of a row; attention stays within one
    positions: Any  # [B,T] int32: from 0 in each sample; 0 on padding
    image_index: Any  # [B,T] int32: for an image token its row among the visual tokens [M*P,D]; -1 for other tokens
    pixel_values: Any  # [M,3,S,S] float32: images in the order of their tokens over the rows, then slots of zeros
    image_labels: Any = None  # [M,K] int32: what annotations say of each image, where a loss asks for it (samples.py)


def global_image_index(image_index: np.ndarray, parts: Sequence[int], tokens: int) -> np.ndarray:
    """Turn an index into this process's visual tokens into one into those of all processes.

    Args:
        image_index: [...,T] int32, `Batch.image_index` of this process.
        parts: numbers of the parts of the global batch that this process loads, ascending; its images are dealt to
            them in order, an equal number to each.
        tokens: visual tokens of one part.

    Returns:
        The index among the visual tokens of all parts, of the same shape and dtype.
    """
    moved = np.asarray(parts, np.int32)[image_index // tokens] * tokens + image_index % tokens
    return np.where(image_index < 0, -1, moved).astype(np.int32)


def pad_rows(batch: Batch, length: int) -> Batch:
    """The batch (of numpy arrays) with rows of `length` tokens: processes that share a step need one shape.

    Raises ValueError where the rows are longer already.
    """
    rows, tokens = batch.input_ids.shape
    if tokens > length:
        raise ValueError(f"rows of {tokens} tokens cannot be padded to {length}")

    def pad(array: np.ndarray, value: int) -> np.ndarray:
        return np.concatenate([array, np.full((rows, length - tokens), value, array.dtype)], axis=1)

    return batch.replace(
        input_ids=pad(batch.input_ids, 0),
        labels=pad(batch.labels, IGNORED),
        segment_ids=pad(batch.segment_ids, 0),
        positions=pad(batch.positions, 0),
        image_index=pad(batch.image_index, -1),
    )
