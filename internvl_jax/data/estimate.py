"""What an epoch of a data set takes, steps and image slots, from a few thousand samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from internvl_jax.data.annotations import Corpus, DataError, Progress
from internvl_jax.data.batch import IGNORED
from internvl_jax.data.check import fill, in_order
from internvl_jax.data.packing import Layout
from internvl_jax.data.samples import Problem, SampleMaker

LOOKED_AT = 2000  # samples
PICTURES = 8  # of them whose pictures are opened: a wrong directory shows
MARGIN = 1.1  # image slots over the mean


@dataclass(frozen=True)
class Survey:
    """Samples of an epoch, drawn at random. The same for the same data and seed."""

    epoch: int  # samples, those that cannot be used included
    sizes: tuple[tuple[int, int], ...]  # tokens and images of those that can be used
    supervised: int  # tokens of all of them
    problems: tuple[Problem, ...]

    @property
    def usable(self) -> float:
        """The part of the samples that can be used."""
        return len(self.sizes) / (len(self.sizes) + len(self.problems))

    @property
    def tokens(self) -> float:
        """Mean of a sample."""
        return sum(tokens for tokens, _ in self.sizes) / len(self.sizes)

    @property
    def images(self) -> float:
        """Mean of a sample."""
        return sum(images for _, images in self.sizes) / len(self.sizes)

    def image_slots(self, rows: int, length: int, packed: bool) -> int:
        """Image slots for a batch: a tenth more than rows take on average, and enough for any one sample."""
        samples = rows * (length / self.tokens if packed else 1)
        most = max(images for _, images in self.sizes)
        wanted = math.ceil(MARGIN * samples * self.images)
        return max(1, most, wanted if packed else min(wanted, rows * most))

    def batches(self, layout: Layout) -> float:
        """Batches of that layout that an epoch makes."""
        _, count = fill(self.sizes, layout)
        return count * self.epoch * self.usable / len(self.sizes)


def survey(
    corpus: Corpus, maker: SampleMaker, *, seed: int = 0, most: int = LOOKED_AT, progress: Progress | None = None
) -> Survey:
    """Look at up to `most` samples. maker: with any number of image slots; too many images are no problem here.

    Raises DataError where none of them can be used, or none of the pictures that are opened.
    """
    count = min(most, len(corpus))
    numbers = np.sort(np.random.default_rng(seed).choice(len(corpus), count, replace=False))
    counting = replace(maker, with_pixels=False, image_slots=10**6)
    sizes, problems, supervised = [], [], 0
    seeing: list[int] = []
    for number, made in enumerate(in_order(corpus, counting, numbers), 1):
        if progress is not None:
            progress(number, count, "looking at the data")
        if isinstance(made, Problem):
            problems.append(made)
        else:
            sizes.append((len(made.input_ids), counting.images_of(made)))
            if sizes[-1][1] and len(seeing) < PICTURES:
                seeing.append(numbers[number - 1])
            supervised += int(np.sum(made.labels != IGNORED))
    if not sizes:
        raise DataError(f"none of {count} samples can be used; {problems[0].place}: {problems[0].message}")
    opened = list(in_order(corpus, replace(maker, image_slots=10**6), np.asarray(seeing)))
    unseen = [made for made in opened if isinstance(made, Problem)]
    if opened and len(unseen) == len(opened):
        raise DataError(
            f"none of {len(opened)} pictures can be read: is the data set's root right? {unseen[0].place}: "
            f"{unseen[0].message}"
        )
    return Survey(len(corpus), tuple(sizes), supervised, tuple(problems))
