"""The `eval` commands of `internvl-jax`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from internvl_jax.evaluation.benchmarks import BENCHMARKS
from internvl_jax.evaluation.items import EvaluationError, Folder
from internvl_jax.evaluation.predictions import read_predictions
from internvl_jax.evaluation.scoring import Score


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `eval` to the commands."""
    parser = commands.add_parser(
        "eval",
        help="benchmarks: scores of predictions",
        description="Scores predictions as the reference's scripts do. docs/evaluation.md says where each benchmark's "
        "files come from and how they lie in the data folder.",
    )
    parser.set_defaults(run=lambda args: parser.print_help() or 0)
    parts = parser.add_subparsers(title="commands", metavar="COMMAND", help="what to do; each explains itself")
    score = parts.add_parser(
        "score",
        help="score a file of predictions",
        description="Reads a benchmark's files and somebody's predictions (JSON lines with an id and an answer, or one "
        "JSON object {id: answer}) and prints the score.",
    )
    score.add_argument("benchmark", choices=BENCHMARKS, metavar="BENCHMARK", help=", ".join(BENCHMARKS))
    score.add_argument("--predictions", type=Path, required=True, metavar="FILE", help="JSONL or JSON")
    score.add_argument("--data", type=Path, required=True, metavar="DIR", help="the folder with the benchmark's files")
    score.add_argument(
        "--codebase",
        choices=["internvl", "llava"],
        default="internvl",
        help="whose rules read the answers: V1-1's scripts (internvl, the default), or LLaVA's, for LLaVA-1.5 and V1-0",
    )
    score.add_argument("--json", action="store_true", help="print one JSON object, with the points of every question")
    score.set_defaults(run=_score)


def _score(args: argparse.Namespace) -> int:
    benchmark = BENCHMARKS[args.benchmark]
    if benchmark.score is None:
        raise EvaluationError(f"{benchmark.title} is scored by a server or a judge: its answers are not in its files")
    items = benchmark.read(Folder(args.data, benchmark.folder), args.codebase)
    score = benchmark.score(items, read_predictions(args.predictions, items), args.codebase)
    if args.json:
        values = {"benchmark": args.benchmark, "title": benchmark.title, "questions": len(items), **vars(score)}
        print(json.dumps(values, ensure_ascii=False))
    else:
        print("\n".join(lines(benchmark.title, len(items), score)))
    return 0


def lines(title: str, questions: int, score: Score) -> list[str]:
    """The score to read: the table's figure first."""
    shown = [f"{title}: {score.value:.2f} ({score.name}, {questions} questions)"]
    for figures in (score.figures, score.categories):
        shown += [f"  {name}: {value:.2f}" for name, value in figures.items()]
    return shown
