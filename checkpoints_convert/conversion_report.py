"""The report of a conversion or an export."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from internvl_jax.utils import formats


@dataclass(frozen=True)
class ConversionReport:
    """What was written, and what it cost.

    Attributes:
        destination: the directory.
        tensors: the number of tensors.
        bytes: their size.
        seconds: how long it took.
        peak_rss: the process's peak memory since it started, in bytes.
    """

    destination: Path
    tensors: int
    bytes: int
    seconds: float
    peak_rss: int

    def summary(self) -> str:
        """One line for people."""
        return (
            f"{self.destination}: {self.tensors:,} tensors, {formats.disk(self.bytes)}, in "
            f"{formats.duration(self.seconds)}; peak memory {formats.memory(self.peak_rss)}"
        )


def make_report(destination: Path, tensors: int, size: int, started: float) -> ConversionReport:
    """Report what was written since `started` (of time.perf_counter): `tensors` tensors of `size` bytes."""
    return ConversionReport(destination, tensors, size, time.perf_counter() - started, peak_rss())


def peak_rss() -> int:
    """The peak memory of this process since it started, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
