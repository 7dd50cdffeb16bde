"""MM-Vet: what a judge is asked, how its replies are read, and how its grades are summed up (Yu et al., 2023).

The judge's few-shot prompt is the benchmark's own and not part of this project: it is read from the evaluator that
comes with MM-Vet.
"""

from __future__ import annotations

import ast
import hashlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from internvl_jax.utils import files

PUBLISHED_JUDGE = "gpt-4-0613"  # of the published figures
TEMPERATURES = (0.0, 0.0, 0.5, 1.0, 1.5, 2.0)  # of successive calls
MAX_TOKENS = 3
PROMPT_SHA256 = "d1b3e0a5b4e72c888b77164489d705bba4dd149934fff564dfba6443d81afe3f"
RETRY = "\nPredict the correctness of the answer (digit): "

# Asks a judge: (message, temperature, max_tokens) -> reply.
Ask = Callable[[str, float, int], str]


@dataclass(frozen=True)
class Grade:
    """A judge's score of one answer between 0 and 1, and its replies on the way there."""

    score: float
    replies: tuple[str, ...]


def read_prompt(path: Path) -> str:
    """The few-shot prompt: a text file that holds it, or MM-Vet's evaluator (a Python file) with it among its strings.

    Raises ValueError where it is not the one that the published figures were made with.
    """
    text = files.read_text(path).replace("\r\n", "\n")
    texts = [text, text.strip("\n")]
    if path.suffix == ".py":
        with suppress(SyntaxError):
            constants = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
            texts = [value for value in constants if isinstance(value, str)]
    for candidate in texts:
        if hashlib.sha256(candidate.encode()).hexdigest() == PROMPT_SHA256:
            return candidate
    raise ValueError(
        f"{path} does not hold MM-Vet's few-shot prompt (SHA-256 {PROMPT_SHA256[:12]}...): name the "
        "mm-vet_evaluator.py of the yuweihao/MM-Vet repository"
    )


def judge_message(prompt: str, question: str, truth: str, answer: str) -> str:
    """The one message that a judge is sent about an answer."""
    truth = truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return f"{prompt}\n" + " | ".join((question, truth, answer, ""))


def grade(ask: Ask, message: str) -> Grade:
    """Ask until a reply is a number from 0 to 1, six times at most; 0 where none is. "nan" is no number here."""
    replies: list[str] = []
    for number, temperature in enumerate(TEMPERATURES):
        replies.append(ask(message + RETRY if number else message, temperature, MAX_TOKENS))
        score = _score(replies[-1])
        # The sixth reply is asked for, but not listened to, by the official evaluator.
        if score is not None and number < len(TEMPERATURES) - 1:
            return Grade(score, tuple(replies))
    return Grade(0.0, tuple(replies))


def _score(reply: str) -> float | None:
    try:
        score = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return score if math.isfinite(score) and 0 <= score <= 1 else None


@dataclass(frozen=True)
class Summary:
    """Percent, not rounded; `deviation` is that of the runs' totals (population)."""

    total: float
    deviation: float
    runs: tuple[float, ...]
    capabilities: dict[str, float]
    combinations: dict[str, float]  # of items with exactly these capabilities, joined by "_"


def summarize(capabilities: Mapping[str, Sequence[str]], scores: Mapping[str, Sequence[float]]) -> Summary:
    """From item -> its capabilities, and item -> its score in each run.

    Raises ValueError where items have different numbers of runs.
    """
    counts = {len(row) for row in scores.values()}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"items have {sorted(counts)} grades: every item needs one of each run")
    runs = tuple(100 * statistics.fmean(run) for run in zip(*scores.values()))
    means = {item: statistics.fmean(row) for item, row in scores.items()}
    by_capability: dict[str, list[float]] = {}
    by_combination: dict[str, list[float]] = {}
    for item, mean in means.items():
        for name in set(capabilities[item]):
            by_capability.setdefault(name, []).append(mean)
        by_combination.setdefault("_".join(sorted(set(capabilities[item]))), []).append(mean)
    return Summary(
        total=statistics.fmean(runs),
        deviation=statistics.pstdev(runs),
        runs=runs,
        capabilities={name: 100 * statistics.fmean(row) for name, row in by_capability.items()},
        combinations={name: 100 * statistics.fmean(row) for name, row in by_combination.items()},
    )
