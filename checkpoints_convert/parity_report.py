"""What a comparison with the reference found: errors, limits, the table and its JSON form."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

TINY = float(np.finfo(np.float32).tiny)

# Largest relative error, (local, accumulated), by kind of stage: single operations, blocks, the end of the whole model.
LIMITS = {"pixels": (None, 1e-6), "op": (1e-5, 1e-3), "block": (1e-4, 1e-3), "probe": (1e-4, None)}
KL_LIMIT = 1e-4  # nats, at every position


class ParityError(ValueError):
    """Two directories that cannot be compared, or inputs that do not fit them; the message says why."""


@dataclass(frozen=True)
class Errors:
    """How far an array is from the reference's."""

    max_abs: float
    mean_abs: float
    relative: float  # largest |error| / (|reference| + its root mean square)
    cosine: float

    @classmethod
    def of(cls, theirs: np.ndarray, ours: np.ndarray) -> Errors:
        """Raises ParityError where the shapes differ."""
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
    """One row of the report."""

    name: str
    kind: str  # of LIMITS
    local: Errors | None
    accumulated: Errors | None

    @property
    def local_passed(self) -> bool:
        return self.local is None or self.local.relative <= LIMITS[self.kind][0]

    @property
    def passed(self) -> bool:
        # Written so that NaN fails.
        return self.local_passed and (self.accumulated is None or self.accumulated.relative <= LIMITS[self.kind][1])


@dataclass(frozen=True)
class Distribution:
    """How far the next-token distributions of the two chains differ."""

    max_kl: float  # KL(reference || ours), nats, the worst position's
    mean_kl: float
    greedy_agreement: float  # share of positions with the same best token
    greedy_passed: bool  # where they differ, the reference holds both for equal within the logits' limit

    @classmethod
    def of(cls, theirs: np.ndarray, ours: np.ndarray) -> Distribution:
        """Logits [1,T,V] of either side."""
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
        return self.max_kl <= KL_LIMIT and self.greedy_passed


@dataclass
class Report:
    """What was compared, how far it differs, and what it cost."""

    checkpoint: Path
    reference: Path
    image: str | None  # the file, "drawn" or "random" (no preprocessor_config.json)
    prompt: str | None  # None: random tokens, or no language model
    prompt_tokens: int
    stages: list[Stage] = field(default_factory=list)
    distribution: Distribution | None = None
    seconds: float = 0.0
    peak_rss: int = 0  # bytes, of this process since it started

    @property
    def passed(self) -> bool:
        return all(stage.passed for stage in self.stages) and (self.distribution is None or self.distribution.passed)

    @property
    def culprits(self) -> list[str]:
        """The stages that add an error of their own."""
        return [stage.name for stage in self.stages if not stage.local_passed]

    def to_dict(self) -> dict[str, Any]:
        """For JSON. A number that is not finite is null."""
        stages = [
            {
                "stage": stage.name,
                "passed": stage.passed,
                "limits": dict(zip(("local", "accumulated"), LIMITS[stage.kind])),
                "local": _finite(stage.local),
                "accumulated": _finite(stage.accumulated),
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
        """The table, then the verdict."""
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("stage", no_wrap=True)
        for name in ("local\nmax", "\nrelative", "accum.\nmax", "\nmean", "\nrelative", "\n1-cos"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("limits on\nrelative", no_wrap=True)
        table.add_column("")
        for stage in self.stages:
            local, total = stage.local, stage.accumulated
            cells = ["", ""] if local is None else [f"{local.max_abs:.1e}", f"{local.relative:.1e}"]
            cells += ["", "", "", ""] if total is None else [
                f"{v:.1e}" for v in (total.max_abs, total.mean_abs, total.relative, 1 - total.cosine)
            ]  # fmt: skip
            limits = " ".join(f"{limit:.0e}".replace("e-0", "e-") if limit else "    " for limit in LIMITS[stage.kind])
            table.add_row(stage.name, *cells, limits, "ok" if stage.passed else "[bold red]FAIL[/]")
        console.print(table)
        if self.distribution is not None:
            d = self.distribution
            console.print(
                f"logits: KL max {d.max_kl:.1e}, mean {d.mean_kl:.1e} (limit {KL_LIMIT:.0e}); greedy agreement "
                f"{d.greedy_agreement:.1%}  {'ok' if d.passed else '[bold red]FAIL[/]'}",
                soft_wrap=True,
            )
        asked = "" if self.prompt is None else f", prompt {self.prompt!r}"
        console.print(
            f"image: {self.image or 'none'}; {self.prompt_tokens} prompt tokens{asked}", markup=False, soft_wrap=True
        )
        versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
        console.print(
            f"float32; {versions}; {self.seconds:.0f} s, peak memory {self.peak_rss / 1e9:.2f} GB", soft_wrap=True
        )
        if self.passed:
            console.print("[bold green]passed[/]: every stage is within its limits")
        elif self.culprits:
            console.print(f"[bold red]FAILED[/]: the difference is made in {', '.join(self.culprits)}", soft_wrap=True)
        else:
            console.print("[bold red]FAILED[/]: no single stage, the error builds up over many")


def rms(x: np.ndarray) -> float:
    """Root mean square."""
    return math.sqrt(float(np.mean(np.square(x, dtype=np.float64))))


def _finite(values: Any) -> dict[str, Any] | None:
    """A dataclass for JSON, which has no NaN and no infinity."""
    if values is None:
        return None
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(values).items()}


def _versions() -> dict[str, str]:
    return {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
