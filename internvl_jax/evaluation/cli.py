"""The `eval` commands of `internvl-jax`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from internvl_jax.evaluation.benchmarks import BEAMS, BENCHMARKS
from internvl_jax.evaluation.items import Codebase, EvaluationError, Folder
from internvl_jax.evaluation.predictions import read_predictions
from internvl_jax.evaluation.scoring import Score
from internvl_jax.progress import counting, err, progress_bar

DATA_HELP = "the folder with the benchmark's files, or the reference's data folder around it"


def add_parser(
    commands: argparse._SubParsersAction,
    add_shared: Callable[[argparse.ArgumentParser], None],
    join: Callable[[argparse.Namespace], None],
) -> None:
    """Add `eval` to the commands. add_shared: adds the options about weights and processes; join: joins the latter."""
    parser = commands.add_parser(
        "eval",
        help="run a benchmark, score predictions, print the results table",
        description="Runs a benchmark with the prompts, settings and scorer of the published figures, scores "
        "predictions that somebody made, or prints the results table. docs/evaluation.md says where each benchmark's "
        "files come from and how they lie in the data folder.",
    )
    parser.set_defaults(run=lambda args: parser.print_help() or 0)
    parts = parser.add_subparsers(title="commands", metavar="COMMAND", help="a benchmark, or what to do")
    _add_score(parts)
    table = parts.add_parser(
        "table", help="the results table: published figures beside those of runs", description="Prints Markdown."
    )
    table.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="directories of finished runs")
    table.set_defaults(run=_table)
    _add_judge(parts)
    for name, benchmark in BENCHMARKS.items():
        one = parts.add_parser(
            name,
            help=benchmark.title,
            description=f"{benchmark.title}: answers every question and writes predictions.jsonl as they come, then "
            "report.md, report.json, wrong.html and what is to be handed in. Exit code 1: some questions got an error.",
        )
        _add_run_options(one)
        add_shared(one)
        one.set_defaults(run=lambda args, name=name: _run(args, name, join))


def _add_run_options(one: argparse.ArgumentParser) -> None:
    one.add_argument("--data", type=Path, required=True, metavar="DIR", help=DATA_HELP)
    one.add_argument("--checkpoint", type=Path, metavar="DIR", help="as for chat; default: nano")
    one.add_argument("--out", type=Path, metavar="DIR", help="the run's directory (runs/BENCHMARK-MODEL)")
    one.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    one.add_argument("--limit", type=int, metavar="N", help="the first N questions only")
    one.add_argument("--batch", type=int, default=8, metavar="N", help="questions at once, per model (8)")
    one.add_argument("--mesh", metavar="SPEC", help="as for batch")
    one.add_argument("--dtype", choices=["float32", "bfloat16"], help="as for chat")
    one.add_argument(
        "--num-beams",
        type=int,
        metavar="N",
        help=f"default: as for the published figures, {BEAMS} for V1-1, 1 for V1-0 and LLaVA",
    )
    one.add_argument("--max-new-tokens", type=int, metavar="N", help="default: as for the published figures")


def _add_score(parts: argparse._SubParsersAction) -> None:
    score = parts.add_parser(
        "score",
        help="score a file of predictions",
        description="Reads a benchmark's files and somebody's predictions (JSON lines with an id and an answer, or one "
        "JSON object {id: answer}) and prints the score.",
    )
    score.add_argument("benchmark", choices=BENCHMARKS, metavar="BENCHMARK", help=", ".join(BENCHMARKS))
    score.add_argument("--predictions", type=Path, required=True, metavar="FILE", help="JSONL or JSON")
    score.add_argument("--data", type=Path, required=True, metavar="DIR", help=DATA_HELP)
    score.add_argument(
        "--codebase",
        choices=["internvl", "llava"],
        default="internvl",
        help="whose rules read the answers: V1-1's scripts (internvl, the default), or LLaVA's, for LLaVA-1.5 and V1-0",
    )
    score.add_argument("--json", action="store_true", help="print one JSON object, with the points of every question")
    score.set_defaults(run=_score)


def _add_judge(parts: argparse._SubParsersAction) -> None:
    judge = parts.add_parser(
        "judge",
        help="have a run of mm-vet graded by an OpenAI-compatible server",
        description="Grades the answers of a finished run of mm-vet with MM-Vet's own few-shot prompt and puts the "
        "score into its report. The published figures were graded by gpt-4-0613: the report says whether yours was.",
    )
    judge.add_argument("directory", type=Path, metavar="RUN", help="the run's directory")
    judge.add_argument("--data", type=Path, required=True, metavar="DIR", help="the folder with mm-vet.json")
    judge.add_argument(
        "--prompt", type=Path, required=True, metavar="FILE", help="mm-vet_evaluator.py, which comes with MM-Vet"
    )
    judge.add_argument("--url", required=True, metavar="URL", help="of the server, up to /v1")
    judge.add_argument("--model", required=True, metavar="NAME", help="the judge")
    judge.add_argument(
        "--key-variable", default="OPENAI_API_KEY", metavar="NAME", help="the environment variable with the key"
    )
    judge.add_argument("--runs", type=int, default=1, metavar="N", help="gradings of every answer (1)")
    judge.set_defaults(run=_judge)


def _run(args: argparse.Namespace, name: str, join: Callable[[argparse.Namespace], None]) -> int:
    from internvl_jax import distributed
    from internvl_jax.config import ChatConfig
    from internvl_jax.evaluation.plan import plan
    from internvl_jax.evaluation.run import answer, prepare
    from internvl_jax.loading import NANO, load
    from internvl_jax.sampling import GenerationConfig

    directory = NANO if args.checkpoint is None else args.checkpoint.expanduser()
    codebase: Codebase = "llava" if ChatConfig.from_file(directory).template == "vicuna_v1" else "internvl"
    model = "nano" if args.checkpoint is None else directory.resolve().name
    join(args)
    with distributed.all_or_none():
        made = plan(
            name,
            codebase,
            args.data,
            args.out or Path("runs") / f"{name}-{model}",
            limit=args.limit,
            resume=args.resume,
            num_beams=args.num_beams,
            max_new_tokens=args.max_new_tokens,
        )
    settings: dict[str, Any] = dict(made.generation)
    GenerationConfig(**settings)
    work = prepare(made, args.mesh)
    with progress_bar() as progress:
        chat = load(
            args.checkpoint,
            mesh=work.mesh,
            dtype=args.dtype,
            quantize=args.quantize,
            cache_dtype=args.cache_dtype,
            progress=progress,
        )
    chat.check_ready()
    with counting() as progress:
        done = answer(chat, made, work, size=args.batch, progress=progress)
    if distributed.is_first():
        print((made.out / "report.md").read_text(encoding="utf-8"), end="")
        failed = f", {done.failed} with an error" if done.failed else ""
        err.print(
            f"{made.out}: {done.answered} answered in {done.seconds:.0f} s{failed}; {done.found} were there already"
        )
    return 1 if done.failed else 0


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


def _table(args: argparse.Namespace) -> int:
    from internvl_jax.evaluation.report import table

    print("\n".join(table(args.runs)))
    return 0


def _judge(args: argparse.Namespace) -> int:
    from internvl_jax.evaluation.judge import Judge, judge_run
    from internvl_jax.evaluation.report import lines as report_lines

    if args.runs < 1:
        raise EvaluationError(f"--runs must be at least 1, not {args.runs}")
    judge = Judge(args.url, args.model, os.environ.get(args.key_variable))
    with counting() as progress:
        values = judge_run(args.directory, args.data, args.prompt, judge, runs=args.runs, progress=progress)
    print("\n".join(report_lines(values)))
    return 0
