"""Estimates what an epoch of a data set takes, in batches and image slots, from a few thousand samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from internvl_jax.data.annotations import Corpus, DataError, Progress
from internvl_jax.data.batch import IGNORED
from internvl_jax.data.check import make_samples, simulate_packing
from internvl_jax.data.packing import Layout
from internvl_jax.data.samples import Problem, SampleMaker

SAMPLES = 2000
DECODED = 8  # of them whose images are decoded, to detect a wrong directory
MARGIN = 1.1  # image slots over the mean


@dataclass(frozen=True)
class EpochEstimate:
    """Statistics of randomly drawn samples. Deterministic for the same data and seed.

    Attributes:
        epoch: samples per epoch, invalid ones included.
        sizes: tokens and images of each valid sample drawn.
        supervised: supervised tokens of all of them.
        problems: the invalid samples drawn.
    """

    epoch: int
    sizes: tuple[tuple[int, int], ...]
    supervised: int
    problems: tuple[Problem, ...]

    @property
    def usable(self) -> float:
        """The fraction of samples that are valid."""
        return len(self.sizes) / (len(self.sizes) + len(self.problems))

    @property
    def tokens(self) -> float:
        """Mean tokens per sample."""
        return sum(tokens for tokens, _ in self.sizes) / len(self.sizes)

    @property
    def images(self) -> float:
        """Mean images per sample."""
        return sum(images for _, images in self.sizes) / len(self.sizes)

    def image_slots(self, rows: int, length: int, packed: bool) -> int:
        """Image slots of a batch: a tenth more than its rows take on average, and enough for any one sample.

        Args:
            rows: rows per batch.
            length: tokens per row.
            packed: several samples share a row.
        """
        samples = rows * (length / self.tokens if packed else 1)
        most = max(images for _, images in self.sizes)
        wanted = math.ceil(MARGIN * samples * self.images)
        return max(1, most, wanted if packed else min(wanted, rows * most))

    def batches(self, layout: Layout) -> float:
        """Batches of that layout per epoch."""
        _, count = simulate_packing(self.sizes, layout)
        return count * self.epoch * self.usable / len(self.sizes)


def estimate_epoch(
    corpus: Corpus, maker: SampleMaker, *, seed: int = 0, limit: int = SAMPLES, progress: Progress | None = None
) -> EpochEstimate:
    """Draw up to `limit` samples of an epoch and count their tokens and images.

    Args:
        corpus: the records of an epoch.
        maker: makes samples of them; its number of image slots is ignored.
        seed: of the draw.
        limit: samples to draw.
        progress: called after each sample.

    Raises:
        DataError: no sample drawn is valid, or no image of the first few can be read.
    """
    count = min(limit, len(corpus))
    numbers = np.sort(np.random.default_rng(seed).choice(len(corpus), count, replace=False))
    maker = replace(maker, image_slots=10**6)
    counting = replace(maker, with_pixels=False)
    sizes: list[tuple[int, int]] = []
    problems: list[Problem] = []
    with_images: list[int] = []
    supervised = 0
    for done, item in enumerate(make_samples(corpus, counting, numbers), 1):
        if progress is not None:
            progress(done, count, "reading a sample of the data")
        if isinstance(item, Problem):
            problems.append(item)
            continue
        images = counting.count_images(item)
        sizes.append((len(item.input_ids), images))
        if images and len(with_images) < DECODED:
            with_images.append(int(numbers[done - 1]))
        supervised += int(np.sum(item.labels != IGNORED))
    if not sizes:
        raise DataError(f"none of {count} samples can be used; {problems[0].location}: {problems[0].message}")
    decoded = list(make_samples(corpus, maker, np.asarray(with_images, np.int64)))
    unread = [item for item in decoded if isinstance(item, Problem)]
    if decoded and len(unread) == len(decoded):
        raise DataError(
            f"none of {len(decoded)} images can be read: is the data set's root right? {unread[0].location}: "
            f"{unread[0].message}"
        )
    return EpochEstimate(len(corpus), tuple(sizes), supervised, tuple(problems))
