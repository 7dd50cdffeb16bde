"""The `eval` commands of `internvl-jax`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from internvl_jax.cli import options
from internvl_jax.evaluation.benchmark_table import BEAMS, BENCHMARKS
from internvl_jax.evaluation.datasets.data_folder import DataFolder
from internvl_jax.evaluation.datasets.items import Codebase, EvaluationError, Item
from internvl_jax.evaluation.datasets.records import json_object
from internvl_jax.evaluation.predictions import read_predictions
from internvl_jax.evaluation.scoring import Score
from internvl_jax.evaluation.submissions import import_openpyxl, write_apart
from internvl_jax.utils import files
from internvl_jax.utils.progress import counting, err, print_json, progress_bar

if TYPE_CHECKING:
    from internvl_jax.evaluation.benchmark_run import Plan

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
    _add_submit(parts)
    table = parts.add_parser(
        "table", help="the results table: published figures beside those of runs", description="Prints Markdown."
    )
    table.add_argument("runs", type=options.path, nargs="*", metavar="RUN", help="directories of finished runs")
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
    one.add_argument("--data", type=options.path, required=True, metavar="DIR", help=DATA_HELP)
    one.add_argument("--checkpoint", type=options.path, metavar="DIR", help="as for chat; default: nano")
    one.add_argument("--out", type=options.path, metavar="DIR", help="the run's directory (runs/BENCHMARK-MODEL)")
    one.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    one.add_argument("--limit", type=options.count, metavar="N", help="the first N questions only")
    one.add_argument("--batch", type=int, default=8, metavar="N", help="questions at once, per model (8)")
    one.add_argument("--mesh", metavar="SPEC", help="as for batch")
    one.add_argument("--dtype", choices=["float32", "bfloat16"], help="as for chat")
    one.add_argument(
        "--num-beams",
        type=options.count,
        metavar="N",
        help=f"default: as for the published figures, {BEAMS} for V1-1, 1 for V1-0 and LLaVA",
    )
    one.add_argument("--max-new-tokens", type=options.count, metavar="N", help="default: as for the published figures")


def _add_score(parts: argparse._SubParsersAction) -> None:
    score = parts.add_parser(
        "score",
        help="score a file of predictions",
        description="Reads a benchmark's files and somebody's predictions (JSON lines with an id and an answer, or one "
        "JSON object {id: answer}) and prints the score.",
    )
    _add_answers(score, list(BENCHMARKS))
    score.add_argument("--json", action="store_true", help="print one JSON object, with the points of every question")
    score.set_defaults(run=_score)


def _add_submit(parts: argparse._SubParsersAction) -> None:
    submit = parts.add_parser(
        "submit",
        help="write the file to hand in from a file of predictions",
        description="Reads a benchmark's files and somebody's predictions, as `eval score` does, and writes what a "
        "server or a judge scores: the same files that a run writes.",
    )
    _add_answers(submit, [name for name, benchmark in BENCHMARKS.items() if benchmark.submit is not None])
    submit.add_argument("--out", type=options.path, metavar="DIR", help="where to write (runs/BENCHMARK-submission)")
    submit.set_defaults(run=_submit)


def _add_answers(parser: argparse.ArgumentParser, names: list[str]) -> None:
    parser.add_argument("benchmark", choices=names, metavar="BENCHMARK", help=", ".join(names))
    parser.add_argument("--predictions", type=options.path, required=True, metavar="FILE", help="JSONL or JSON")
    parser.add_argument("--data", type=options.path, required=True, metavar="DIR", help=DATA_HELP)
    parser.add_argument(
        "--codebase",
        choices=["internvl", "llava"],
        default="internvl",
        help="whose rules read the answers: V1-1's scripts (internvl, the default), or LLaVA's, for LLaVA-1.5 and V1-0",
    )


def _add_judge(parts: argparse._SubParsersAction) -> None:
    judge = parts.add_parser(
        "judge",
        help="have a run of mm-vet graded by an OpenAI-compatible server",
        description="Grades the answers of a finished run of mm-vet with MM-Vet's own few-shot prompt and puts the "
        "score into its report. The published figures were graded by gpt-4-0613: the report says whether yours was.",
    )
    judge.add_argument("directory", type=options.path, metavar="RUN", help="the run's directory")
    judge.add_argument("--data", type=options.path, required=True, metavar="DIR", help="the folder with mm-vet.json")
    judge.add_argument(
        "--prompt",
        type=options.path,
        required=True,
        metavar="FILE",
        help="mm-vet_evaluator.py, which comes with MM-Vet",
    )
    judge.add_argument("--url", required=True, metavar="URL", help="of the server, up to /v1")
    judge.add_argument("--model", required=True, metavar="NAME", help="the judge")
    judge.add_argument(
        "--key-variable", default="OPENAI_API_KEY", metavar="NAME", help="the environment variable with the key"
    )
    judge.add_argument("--runs", type=int, default=1, metavar="N", help="gradings of every answer (1)")
    judge.set_defaults(run=_judge)


def _run(args: argparse.Namespace, name: str, join: Callable[[argparse.Namespace], None]) -> int:
    from internvl_jax.config import ChatConfig
    from internvl_jax.evaluation.benchmark_run import plan
    from internvl_jax.inference.loading import NANO
    from internvl_jax.parallel import distributed
    from internvl_jax.processing.images import load_processor

    if args.batch < 1:
        raise EvaluationError(f"--batch must be at least 1, not {args.batch}")
    directory = NANO if args.checkpoint is None else args.checkpoint.expanduser()
    config = ChatConfig.from_file(directory)
    if load_processor(directory, config) is None:  # which would be every question's error
        lacks = "vision tower" if config.vision is None else "preprocessor_config.json: put it beside its config.json"
        raise EvaluationError(f"{directory} has no {lacks}")
    codebase: Codebase = "llava" if config.template == "vicuna_v1" else "internvl"
    model = "nano" if args.checkpoint is None else directory.resolve().name
    join(args)
    out = (args.out or files.resolve(f"runs/{name}-{model}")).resolve()  # two names of one directory have one claim
    first = distributed.is_first()
    with ExitStack() as held:
        with distributed.all_or_none():
            if first:
                held.enter_context(files.claim(out))
        options = {name: getattr(args, name) for name in ("limit", "resume", "num_beams", "max_new_tokens")}
        precision = {key: getattr(args, key) for key in ("dtype", "quantize", "cache_dtype")}
        for turn in (True, False):  # process 0 first: where all write to one disk, the others find its files
            with distributed.all_or_none():
                if first == turn:
                    made = plan(
                        name, codebase, args.data, out, model=model, precision=precision, first=first, **options
                    )
        return _answer(args, made)


def _answer(args: argparse.Namespace, made: Plan) -> int:
    from internvl_jax.evaluation.answering import answer, prepare
    from internvl_jax.evaluation.run_report import result
    from internvl_jax.inference.loading import load
    from internvl_jax.parallel import distributed

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
    try:
        with counting() as progress:
            done = answer(chat, made, work, size=args.batch, progress=progress)
    except KeyboardInterrupt:
        err.print(f"{made.out} keeps what was answered: --resume goes on with it")
        raise
    if distributed.is_first():
        print((made.out / "report.md").read_text(encoding="utf-8"), end="")
        asked = f"{done.answered} answered in {done.seconds:.0f} s" if done.answered else "nothing was asked"
        there = f", {done.found} answers were there already" if done.found else ""
        err.print(f"{made.out}: {asked}{there}; {result(json_object(made.out / 'report.json'))}")
    return 1 if done.failed else 0


def _score(args: argparse.Namespace) -> int:
    benchmark = BENCHMARKS[args.benchmark]
    if benchmark.score is None:
        raise EvaluationError(
            f"{benchmark.title} is scored by a server or a judge: its answers are not in its files; "
            f"`eval submit {args.benchmark}` writes the file to hand in"
        )
    with counting() as progress:
        items, given = _answers(args)
        answers = _Watched(given, progress)
        score = benchmark.score(items, answers, args.codebase)
    if args.json:
        values = {"benchmark": args.benchmark, "title": benchmark.title, "questions": len(items), **vars(score)}
        print_json(values)
    else:
        print("\n".join(lines(benchmark.title, len(items), score)))
    return 0


def _answers(args: argparse.Namespace) -> tuple[list[Item], dict[str, str]]:
    """The benchmark's questions, and somebody's answers to all of them."""
    benchmark = BENCHMARKS[args.benchmark]
    items = benchmark.read(DataFolder(args.data, benchmark.folder), args.codebase)
    if not items:
        raise EvaluationError(f"{args.data} has no questions of {benchmark.title}")
    return items, read_predictions(args.predictions, items)


def _submit(args: argparse.Namespace) -> int:
    benchmark = BENCHMARKS[args.benchmark]
    assert benchmark.submit is not None
    if benchmark.needs_xlsx:
        import_openpyxl()
    items, answers = _answers(args)
    folder, out = (
        DataFolder(args.data, benchmark.folder),
        args.out or files.resolve(f"runs/{args.benchmark}-submission"),
    )
    for path in write_apart(benchmark.submit, items, answers, args.codebase, folder, out):
        print(path)
    return 0


class _Watched(dict[str, str]):
    """Answers that report how many of them were looked at, every thousand."""

    def __init__(self, answers: Mapping[str, str], progress: Callable[..., None]):
        super().__init__(answers)
        self._progress, self._looks = progress, 0

    def __getitem__(self, key: str) -> str:
        self._looks += 1
        if self._looks % 1000 == 0:
            self._progress(self._looks, len(self), "scoring")
        return super().__getitem__(key)


def lines(title: str, questions: int, score: Score) -> list[str]:
    """The score to read: the table's figure first."""
    shown = [f"{title}: {score.value:.2f} ({score.name}, {questions} questions)"]
    for figures in (score.figures, score.categories):
        shown += [f"  {name}: {value:.2f}" for name, value in figures.items()]
    return shown


def _table(args: argparse.Namespace) -> int:
    from internvl_jax.evaluation.run_report import table

    print("\n".join(table(args.runs)))
    return 0


def _judge(args: argparse.Namespace) -> int:
    from internvl_jax.evaluation.judge import Judge, judge_run
    from internvl_jax.evaluation.run_report import lines as report_lines

    if args.runs < 1:
        raise EvaluationError(f"--runs must be at least 1, not {args.runs}")
    judge = Judge(args.url, args.model, os.environ.get(args.key_variable))
    with counting() as progress:
        values = judge_run(args.directory, args.data, args.prompt, judge, runs=args.runs, progress=progress)
    print("\n".join(report_lines(values)))
    return 0
