"""The report of a comparison with the reference: errors, limits, a table and its JSON form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text

from internvl_jax.utils import formats

TINY = float(np.finfo(np.float32).tiny)

# Limits on the relative error, (local, accumulated), by kind of stage: single operations, blocks, the whole model.
LIMITS: dict[str, tuple[float | None, float | None]] = {
    "pixels": (None, 1e-6),
    "op": (1e-5, 1e-3),
    "block": (1e-4, 1e-3),
    "probe": (1e-4, None),
}
KL_LIMIT = 1e-4  # nats, at every position


class ParityError(ValueError):
    """The directories cannot be compared, or the inputs do not fit the model; the message says why."""


@dataclass(frozen=True)
class Errors:
    """How far an array is from the reference's.

    Attributes:
        max_abs: the largest absolute error.
        mean_abs: the mean absolute error.
        relative: the largest |error| / (|reference| + root mean square of the reference).
        cosine: the cosine similarity.
    """

    max_abs: float
    mean_abs: float
    relative: float
    cosine: float

    @classmethod
    def of(cls, theirs: np.ndarray, ours: np.ndarray) -> Errors:
        """Compare two arrays. Raises ParityError if their shapes differ."""
        if theirs.shape != ours.shape:
            raise ParityError(f"the reference has shape {list(theirs.shape)}, this implementation {list(ours.shape)}")
        a, b = theirs.astype(np.float64), ours.astype(np.float64)
        error = np.abs(b - a)
        scale = np.abs(a) + rms(a)
        lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
        return cls(
            float(error.max()),
            float(error.mean()),
            float((error / np.maximum(scale, TINY)).max()),
            float(np.vdot(a, b)) / lengths if lengths else float(np.array_equal(a, b)),
        )


@dataclass(frozen=True)
class Stage:
    """One row of the report.

    Attributes:
        name: the stage, such as "vision.layers.3".
        kind: a key of LIMITS.
        local: errors on the reference's input.
        accumulated: errors on the chain's own input.
    """

    name: str
    kind: str
    local: Errors | None
    accumulated: Errors | None

    @property
    def local_passed(self) -> bool:
        """Whether the stage's own error is within its limit."""
        return _within(self.local, LIMITS[self.kind][0])

    @property
    def passed(self) -> bool:
        """Whether both errors are within their limits."""
        return self.local_passed and _within(self.accumulated, LIMITS[self.kind][1])


@dataclass(frozen=True)
class Distribution:
    """How far the next-token distributions of the two chains differ.

    Attributes:
        max_kl: the largest KL(reference || ours) of any position, in nats.
        mean_kl: its mean over positions.
        greedy_agreement: the share of positions with the same most likely token.
        greedy_passed: at all other positions the reference's logits of the two tokens are equal within the limit.
    """

    max_kl: float
    mean_kl: float
    greedy_agreement: float
    greedy_passed: bool

    @classmethod
    def of(cls, theirs: np.ndarray, ours: np.ndarray) -> Distribution:
        """Compare logits [1,T,V] of both sides."""
        if not (np.isfinite(theirs).all() and np.isfinite(ours).all()):
            return cls(math.nan, math.nan, 0.0, False)
        a, b = (x[0].astype(np.float64) for x in (theirs, ours))
        p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (a, b))
        kl = np.sum(np.exp(p) * (p - q), axis=-1)
        best, rows = b.argmax(axis=-1), np.arange(len(a))
        tie = LIMITS["op"][1] * (np.abs(a).max(axis=-1) + rms(a))
        return cls(
            float(kl.max()),
            float(kl.mean()),
            float(np.mean(best == a.argmax(axis=-1))),
            bool(np.all(a.max(axis=-1) - a[rows, best] <= tie)),
        )

    @property
    def passed(self) -> bool:
        """Whether KL and greedy tokens are within their limits."""
        return self.max_kl <= KL_LIMIT and self.greedy_passed


@dataclass
class Report:
    """What was compared, how far it differs, and what it cost.

    Attributes:
        checkpoint: the directory that this implementation ran.
        reference: the directory that the reference ran.
        image: the image file, "drawn" or "random" (without preprocessor_config.json); None without a vision tower.
        prompt: the question; None for random tokens, or without a language model.
        prompt_tokens: length of the prompt.
        stages: the errors of each stage.
        distribution: how far the next-token distributions differ.
        seconds: how long it took.
        peak_rss: the process's peak memory since it started, in bytes.
    """

    checkpoint: Path
    reference: Path
    image: str | None
    prompt: str | None
    prompt_tokens: int
    stages: list[Stage] = field(default_factory=list)
    distribution: Distribution | None = None
    seconds: float = 0.0
    peak_rss: int = 0

    @property
    def passed(self) -> bool:
        """Whether every stage and the distribution are within their limits."""
        return all(stage.passed for stage in self.stages) and (self.distribution is None or self.distribution.passed)

    @property
    def culprits(self) -> list[str]:
        """The stages whose own error exceeds its limit."""
        return [stage.name for stage in self.stages if not stage.local_passed]

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON; NaN and infinity become null."""
        stages = [
            {
                "stage": stage.name,
                "passed": stage.passed,
                "limits": dict(zip(("local", "accumulated"), LIMITS[stage.kind])),
                "local": None if stage.local is None else _finite(stage.local),
                "accumulated": None if stage.accumulated is None else _finite(stage.accumulated),
            }
            for stage in self.stages
        ]
        return {
            "passed": self.passed,
            "culprits": self.culprits,
            "checkpoint": str(self.checkpoint),
            "reference": str(self.reference),
            "image": self.image,
            "prompt": self.prompt,
            "prompt_tokens": self.prompt_tokens,
            "stages": stages,
            "logits": None
            if self.distribution is None
            else {**_finite(self.distribution), "kl_limit": KL_LIMIT, "passed": self.distribution.passed},
            "versions": _versions(),
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss,
        }

    def print(self, console: Console) -> None:
        """Print the table, then the verdict.

        On a narrow console the table has only the relative errors, their limits and the verdict.
        """
        table = self._table(ALL_COLUMNS)
        width = console.measure(table, options=console.options.update(width=UNLIMITED)).maximum
        fits = width <= console.width
        console.print(table if fits else self._table(MAIN_COLUMNS), soft_wrap=False)
        if not fits:
            console.print(f"(a terminal of {width} columns, a pipe or --json shows every error)", style="dim")
        if self.distribution is not None:
            d = self.distribution
            console.print(
                f"logits: KL max {d.max_kl:.1e}, mean {d.mean_kl:.1e} (limit {KL_LIMIT:.0e}), greedy agreement "
                f"{d.greedy_agreement:.1%} ",
                _verdict(d.passed),
                soft_wrap=True,
            )
        prompt = "" if self.prompt is None else f", prompt {self.prompt!r}"
        console.print(
            f"image: {self.image or 'none'}; {self.prompt_tokens} prompt tokens{prompt}", markup=False, soft_wrap=True
        )
        versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
        console.print(
            f"float32; {versions}; {formats.duration(self.seconds)}, peak memory {formats.memory(self.peak_rss)}",
            soft_wrap=True,
        )
        if self.passed:
            console.print(Text("passed", "bold green") + ": every stage is within its limits")
            return
        if self.culprits:
            reason = f": the error originates in {', '.join(self.culprits)}"
        else:
            reason = ": no single stage exceeds its own limit, the error accumulates over many"
        console.print(Text("FAILED", "bold red") + reason, soft_wrap=True)

    def _table(self, columns: Sequence[str]) -> Table:
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("stage", overflow="fold")
        for name in columns:
            table.add_column(name.replace(" ", "\n", 1), justify="right", no_wrap=True)
        table.add_column("limits on\nrelative", no_wrap=True)
        table.add_column("", no_wrap=True)
        for stage in self.stages:
            errors = _cells(stage)
            limits = " ".join(f"{limit:.0e}".replace("e-0", "e-") if limit else "    " for limit in LIMITS[stage.kind])
            table.add_row(stage.name, *(errors[name] for name in columns), limits, _verdict(stage.passed))
        return table


UNLIMITED = 10_000  # columns
ALL_COLUMNS = ("local max", "local relative", "accum. max", "accum. mean", "accum. relative", "accum. 1-cos")
MAIN_COLUMNS = ("local relative", "accum. relative")


def _cells(stage: Stage) -> dict[str, str]:
    """A stage's errors as text, by column; empty where there is none."""
    values: dict[str, float] = {}
    if stage.local is not None:
        values |= {"local max": stage.local.max_abs, "local relative": stage.local.relative}
    if (total := stage.accumulated) is not None:
        values |= {"accum. max": total.max_abs, "accum. mean": total.mean_abs}
        values |= {"accum. relative": total.relative, "accum. 1-cos": 1 - total.cosine}
    return {name: f"{values[name]:.1e}" if name in values else "" for name in ALL_COLUMNS}


def _verdict(passed: bool) -> Text:
    return Text("ok") if passed else Text("FAIL", "bold red")


def rms(x: np.ndarray) -> float:
    """Root mean square."""
    return math.sqrt(float(np.mean(np.square(x, dtype=np.float64))))


def _within(errors: Errors | None, limit: float | None) -> bool:
    """Whether errors are absent or within a limit; NaN is not."""
    return errors is None or limit is None or errors.relative <= limit


def _finite(values: Any) -> dict[str, Any]:
    """A dataclass for JSON, in which NaN and infinity become null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(values).items()}


def _versions() -> dict[str, str]:
    return {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
