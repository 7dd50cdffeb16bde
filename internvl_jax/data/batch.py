"""The batch of a training step: what the data pipeline produces and the objective takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.struct
import numpy as np

IGNORED = -100  # label of tokens that are not supervised, as in the reference code


class Batch(flax.struct.PyTreeNode):
    """Rows of tokens with their images.

    A row has one sample, or several packed one after the other, then padding. Of a run of several processes, each
    loads rows and images of its own, and `put_batch` (training) makes the global batch.

    Attributes:
        input_ids: [B,T] int32; 0 on padding.
        labels: [B,T] int32, aligned with input_ids, not shifted; IGNORED where unsupervised.
        segment_ids: [B,T] int32: 1, 2, ... for the samples of a row, 0 on padding. Attention stays within a segment.
        positions: [B,T] int32: from 0 in each sample; 0 on padding.
        image_index: [B,T] int32: for an image token its row among the visual tokens [M*P,D], -1 for other tokens.
        pixel_values: [M,3,S,S] float32: normalized images in the order of their tokens, then empty slots of zeros.
        image_labels: [M,K] int32: labels of each image, for losses that use them (`SampleMaker.image_labels`).
    """

    input_ids: Any
    labels: Any
    segment_ids: Any
    positions: Any
    image_index: Any
    pixel_values: Any
    image_labels: Any = None


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
    """Pad the rows of a batch of numpy arrays to `length` tokens; processes that share a step need one shape.

    Raises:
        ValueError: the rows are longer.
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
