"""What one training step reads: a batch of rows of one length, made by the data pipeline, read by the objective."""

from __future__ import annotations

from typing import Any

import flax.struct


class Batch(flax.struct.PyTreeNode):
    """Rows of tokens, each of one or several samples, and the images that they show."""

    input_ids: Any  # [B,T] int32, padded on the right
    labels: Any  # [B,T] int32, aligned with input_ids (not shifted); -100 where nothing is learned
    segment_ids: Any  # [B,T] int32: 0 padding, 1.. the samples of a row
    positions: Any  # [B,T] int32, from 0 at each sample
    pixel_values: Any  # [M,3,S,S] float32: images in the order of their tokens over the batch, then zeros
