"""Samples of any length become batches of few shapes: packed behind one another, or one a row in length buckets.

Which samples make a batch is a function of those that wait for one. So a position in the data is two things: how many
samples were read, and which of them wait.
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

# How many batches' tokens or images wait before one is packed: the more, the fuller the rows, and the more memory.
SURPLUS = 2


@dataclass(frozen=True)
class Layout:
    """The shapes of one process's batches.

    rows: B. lengths: the T that there are, ascending; packed rows have one. image_slots: M, of a whole batch.
    packed: several samples share a row; otherwise a row holds one, and a batch rows of one bucket.
    """

    rows: int
    lengths: tuple[int, ...]
    image_slots: int
    packed: bool = True

    def __post_init__(self) -> None:
        if self.rows < 1 or self.image_slots < 1:
            raise DataError(f"a batch needs rows and image slots, not {self.rows} and {self.image_slots}")
        if not self.lengths or self.lengths[0] < 2 or list(self.lengths) != sorted(set(self.lengths)):
            raise DataError(f"lengths of rows must ascend from 2 on, not {list(self.lengths)}")
        if self.packed and len(self.lengths) > 1:
            raise DataError(f"packed rows have one length, not {list(self.lengths)}")

    @property
    def max_length(self) -> int:
        return self.lengths[-1]

    def bucket(self, tokens: int) -> int:
        """The shortest row that holds so many tokens."""
        return next(length for length in self.lengths if tokens <= length)


def choose(waiting: Sequence[Sample], layout: Layout, *, last: bool = False) -> list[list[int]] | None:
    """Rows of numbers of waiting samples, for the next batch; None where it is better to wait for more.

    The first sample is always among the packed ones, and the first of its bucket among those of a bucket, so that
    none waits for ever. last: no more will come. Samples fit a row and a batch's image slots each by itself.
    """
    if not waiting:
        return None
    if not layout.packed:
        return _choose_bucket(waiting, layout, last)
    tokens = sum(len(sample.input_ids) for sample in waiting)
    images = sum(len(sample.pixel_values) for sample in waiting)
    enough = SURPLUS * layout.rows * layout.max_length
    if tokens < enough and images < SURPLUS * layout.image_slots and not last:
        return None
    rows: list[list[int]] = [[] for _ in range(layout.rows)]
    room = [layout.max_length] * layout.rows
    slots = layout.image_slots
    for number, sample in enumerate(waiting):
        size = len(sample.input_ids)
        # The fullest row that still has room.
        row = min((r for r in range(layout.rows) if size <= room[r]), key=lambda r: room[r], default=None)
        if row is not None and len(sample.pixel_values) <= slots:
            rows[row].append(number)
            room[row] -= size
            slots -= len(sample.pixel_values)
    return rows


def _choose_bucket(waiting: Sequence[Sample], layout: Layout, last: bool) -> list[list[int]] | None:
    buckets: dict[int, list[int]] = {}
    for number, sample in enumerate(waiting):
        buckets.setdefault(layout.bucket(len(sample.input_ids)), []).append(number)
    for numbers in buckets.values():
        if last or len(numbers) >= layout.rows:
            rows: list[list[int]] = []
            slots = layout.image_slots
            for number in numbers:
                if len(rows) < layout.rows and len(waiting[number].pixel_values) <= slots:
                    rows.append([number])
                    slots -= len(waiting[number].pixel_values)
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
            place = slice(start, start + len(sample.input_ids))
            input_ids[row, place] = sample.input_ids
            labels[row, place] = sample.labels
            labels[row, start] = IGNORED  # it would be predicted from the sample before
            segments[row, place] = segment
            positions[row, place] = np.arange(len(sample.input_ids))
            start = place.stop
    pixels = np.zeros((layout.image_slots, 3, image_size, image_size), np.float32)
    known = [sample.image_labels for sample in samples if sample.image_labels is not None]
    image_labels = np.zeros((layout.image_slots, known[0].shape[1]), np.int32) if known else None
    slot = 0
    for sample in samples:
        count = len(sample.pixel_values)
        pixels[slot : slot + count] = sample.pixel_values
        if image_labels is not None:
            image_labels[slot : slot + count] = sample.image_labels
        slot += count
    image_index = image_token_index((input_ids == image_token_id) & (segments > 0))
    return Batch(input_ids, labels, segments, positions, image_index, pixels, image_labels)
