"""Packs samples of any length into batches of few shapes: several samples per row, or one per row in length buckets.

Which samples form the next batch is a function of the samples in the buffer. So a position in the data is the number
of samples read, and the numbers of those in the buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from internvl_jax.data.annotations import DataError
from internvl_jax.data.batch import IGNORED, Batch
from internvl_jax.data.samples import Sample
from internvl_jax.processing.conversation import image_token_index

# Batches whose tokens or images are buffered before one is packed: more fill the rows better and take more memory.
BUFFERED_BATCHES = 2


@dataclass(frozen=True)
class Layout:
    """Shapes of one process's batches.

    Attributes:
        rows: rows per batch, B.
        lengths: tokens per row, T: the buckets in ascending order; packed rows have a single length.
        image_slots: images per batch, M.
        packed: several samples share a row; otherwise each has its own, and all rows of a batch are of one bucket.

    Raises:
        DataError: a number is not possible.
    """

    rows: int
    lengths: tuple[int, ...]
    image_slots: int
    packed: bool = True

    def __post_init__(self) -> None:
        if self.rows < 1 or self.image_slots < 1:
            raise DataError(f"a batch needs rows and image slots, not {self.rows} and {self.image_slots}")
        if not self.lengths or self.lengths[0] < 2 or list(self.lengths) != sorted(set(self.lengths)):
            raise DataError(f"row lengths must be ascending and at least 2, not {list(self.lengths)}")
        if self.packed and len(self.lengths) > 1:
            raise DataError(f"packed rows have one length, not {list(self.lengths)}")

    @property
    def max_length(self) -> int:
        """Tokens of the longest rows."""
        return self.lengths[-1]

    def bucket(self, num_tokens: int) -> int:
        """The length of the shortest row with room for `num_tokens`."""
        return next(length for length in self.lengths if num_tokens <= length)


def choose(buffer: Sequence[Sample], layout: Layout, *, last: bool = False) -> list[list[int]] | None:
    """Choose the samples of the next batch.

    The first sample of the buffer (in buckets: the first of its bucket) is always chosen, so no sample stays in the
    buffer forever.

    Args:
        buffer: samples, each of which fits in a row and in the image slots of a batch.
        layout: the shapes of the batch.
        last: no more samples will come.

    Returns:
        Indices into the buffer, row by row; None if more samples should be buffered first.
    """
    if not buffer:
        return None
    if not layout.packed:
        return _choose_bucket(buffer, layout, last)
    tokens = sum(len(sample.input_ids) for sample in buffer)
    images = sum(len(sample.pixel_values) for sample in buffer)
    enough = BUFFERED_BATCHES * layout.rows * layout.max_length
    if tokens < enough and images < BUFFERED_BATCHES * layout.image_slots and not last:
        return None
    rows: list[list[int]] = [[] for _ in range(layout.rows)]
    room = [layout.max_length] * layout.rows
    slots = layout.image_slots
    for number, sample in enumerate(buffer):
        size = len(sample.input_ids)
        # Best fit: the fullest row with enough room.
        row = min((r for r in range(layout.rows) if size <= room[r]), key=lambda r: room[r], default=None)
        if row is not None and len(sample.pixel_values) <= slots:
            rows[row].append(number)
            room[row] -= size
            slots -= len(sample.pixel_values)
    return rows


def _choose_bucket(buffer: Sequence[Sample], layout: Layout, last: bool) -> list[list[int]] | None:
    buckets: dict[int, list[int]] = {}
    for number, sample in enumerate(buffer):
        buckets.setdefault(layout.bucket(len(sample.input_ids)), []).append(number)
    for numbers in buckets.values():
        if last or len(numbers) >= layout.rows:
            rows: list[list[int]] = []
            slots = layout.image_slots
            for number in numbers:
                if len(rows) < layout.rows and len(buffer[number].pixel_values) <= slots:
                    rows.append([number])
                    slots -= len(buffer[number].pixel_values)
            return rows
    return None


def assemble(
    rows: Sequence[Sequence[Sample]], layout: Layout, image_size: int, image_token_id: int | None = None
) -> Batch:
    """Pack rows of samples into a batch.

    Args:
        rows: the samples of each row, at most `layout.rows`; missing rows are padding.
        layout: the shapes of the batch.
        image_size: height and width of images, in pixels.
        image_token_id: the token that stands for a visual token; None where no sample has images.

    Returns:
        The batch, of numpy arrays.
    """
    samples = list(chain.from_iterable(rows))
    longest = max((sum(len(sample.input_ids) for sample in row) for row in rows), default=0)
    shape = (layout.rows, layout.bucket(longest))
    input_ids, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    labels = np.full(shape, IGNORED, np.int32)
    for row, row_samples in enumerate(rows):
        start = 0
        for segment, sample in enumerate(row_samples, 1):
            span = slice(start, start + len(sample.input_ids))
            input_ids[row, span] = sample.input_ids
            labels[row, span] = sample.labels
            labels[row, start] = IGNORED  # it would be predicted from the previous sample
            segments[row, span] = segment
            positions[row, span] = np.arange(len(sample.input_ids))
            start = span.stop
    pixels = np.zeros((layout.image_slots, 3, image_size, image_size), np.float32)
    labeled = [sample.image_labels for sample in samples if sample.image_labels is not None]
    image_labels = np.zeros((layout.image_slots, labeled[0].shape[1]), np.int32) if labeled else None
    slot = 0
    for sample in samples:
        count = len(sample.pixel_values)
        pixels[slot : slot + count] = sample.pixel_values
        if image_labels is not None and sample.image_labels is not None:
            image_labels[slot : slot + count] = sample.image_labels
        slot += count
    image_index = image_token_index((input_ids == image_token_id) & (segments > 0))
    return Batch(input_ids, labels, segments, positions, image_index, pixels, image_labels)
