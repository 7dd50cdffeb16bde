"""MM-Vet: the judge's prompt, parsing of its replies, and summary of its grades (Yu et al., 2023).

The few-shot prompt belongs to the benchmark and is not part of this project: it is read from MM-Vet's own evaluator.
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

PUBLISHED_JUDGE = "gpt-4-0613"  # of the published scores
TEMPERATURES = (0.0, 0.0, 0.5, 1.0, 1.5, 2.0)  # of successive attempts
MAX_TOKENS = 3
PROMPT_SHA256 = "d1b3e0a5b4e72c888b77164489d705bba4dd149934fff564dfba6443d81afe3f"
RETRY = "\nPredict the correctness of the answer (digit): "

# A judge: (message, temperature, max_tokens) -> reply.
Ask = Callable[[str, float, int], str]


@dataclass(frozen=True)
class Grade:
    """A judge's score of one answer, from 0 to 1, and all its replies."""

    score: float
    replies: tuple[str, ...]


def read_prompt(path: Path) -> str:
    """Read the few-shot prompt from a text file, or from the string constants of MM-Vet's evaluator (a Python file).

    Raises:
        ValueError: The file does not contain the prompt of the published scores.
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
        f"{path} does not contain MM-Vet's few-shot prompt (SHA-256 {PROMPT_SHA256[:12]}...): name the "
        "mm-vet_evaluator.py of the yuweihao/MM-Vet repository"
    )


def judge_message(prompt: str, question: str, truth: str, answer: str) -> str:
    """Return the message that a judge is sent about an answer."""
    truth = truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return f"{prompt}\n" + " | ".join((question, truth, answer, ""))


def grade(ask: Ask, message: str) -> Grade:
    """Ask up to six times, until a reply is a number from 0 to 1; the score is 0 if none is. NaN is not a number."""
    replies: list[str] = []
    for number, temperature in enumerate(TEMPERATURES):
        replies.append(ask(message + RETRY if number else message, temperature, MAX_TOKENS))
        score = _score(replies[-1])
        # The official evaluator requests a sixth reply but does not use it.
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
class GradeSummary:
    """Mean grades in percent, not rounded. `deviation` is the population standard deviation of the runs' totals."""

    total: float
    deviation: float
    runs: tuple[float, ...]
    capabilities: dict[str, float]
    combinations: dict[str, float]  # by the exact set of capabilities, joined by "_"


def summarize(capabilities: Mapping[str, Sequence[str]], scores: Mapping[str, Sequence[float]]) -> GradeSummary:
    """Summarize grades.

    Args:
        capabilities: Item id -> capabilities that it tests.
        scores: Item id -> score in each run.

    Raises:
        ValueError: Items have different numbers of runs, or none.
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
    return GradeSummary(
        total=statistics.fmean(runs),
        deviation=statistics.pstdev(runs),
        runs=runs,
        capabilities={name: 100 * statistics.fmean(row) for name, row in by_capability.items()},
        combinations={name: 100 * statistics.fmean(row) for name, row in by_combination.items()},
    )
