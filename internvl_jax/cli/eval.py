"""The `eval` commands."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import fields
from typing import TYPE_CHECKING

from internvl_jax.cli import options
from internvl_jax.evaluation.benchmark_table import BEAMS, BENCHMARKS
from internvl_jax.evaluation.datasets.data_folder import DataFolder
from internvl_jax.evaluation.datasets.items import Codebase, EvaluationError, Item
from internvl_jax.evaluation.datasets.records import json_object
from internvl_jax.evaluation.predictions import read_predictions
from internvl_jax.evaluation.scoring import Score
from internvl_jax.evaluation.submissions import import_openpyxl, write_apart
from internvl_jax.utils import files, formats
from internvl_jax.utils.progress import counting, err, print_json, progress_bar

if TYPE_CHECKING:
    from internvl_jax.evaluation.benchmark_run import BenchmarkRun

DATA_HELP = "directory of the benchmark's files, or the reference's data directory that contains it"


def add_parser(commands: options.Commands) -> None:
    """Add `eval` to the commands."""
    parser = commands.add_parser(
        "eval",
        help="run a benchmark, score predictions, print the results table",
        description="Runs a benchmark with the prompts, settings and scorer of the published scores, scores existing "
        "predictions, or prints the results table. docs/evaluation.md says where each benchmark's files come from.",
    )
    parts = parser.add_subparsers(title="commands", metavar="COMMAND", help="what to do, or a benchmark to run")
    _add_score(parts)
    _add_submit(parts)
    table = parts.add_parser(
        "table",
        help="print the results table: published scores beside those of runs",
        description="Prints the published scores and those of finished runs as a Markdown table, one column per run "
        "of a model.",
    )
    table.add_argument("runs", type=options.path, nargs="*", metavar="RUN", help="directories of finished runs")
    table.set_defaults(run=_table)
    _add_judge(parts)
    for name, benchmark in BENCHMARKS.items():
        _add_benchmark(parts, name, benchmark.title)


def _add_benchmark(parts: options.Commands, name: str, title: str) -> None:
    parser = parts.add_parser(
        name,
        help=title,
        description=f"{title}: answers every question and writes predictions.jsonl, then report.md, report.json, "
        "wrong.html and the file to submit. Exit code 1: some questions failed.",
    )
    parser.add_argument("--data", type=options.path, required=True, metavar="DIR", help=DATA_HELP)
    options.add_output(parser, f"directory of the run (default: runs/{name}-MODEL)")
    parser.add_argument("--resume", action="store_true", help="resume an interrupted run")
    parser.add_argument("--limit", type=options.count, metavar="N", help="answer only the first N (default: all)")
    options.add_checkpoint(parser)
    options.add_mesh(parser, "one device per process; processes share the work")
    options.add_batch_size(parser, "questions per batch and model replica", 8)
    options.add_dtype(parser)
    options.add_quantization(parser)
    parser.add_argument(
        "--num-beams",
        type=options.count,
        metavar="N",
        help=f"beam search with N beams (default: as published, {BEAMS} for V1-1, 1 for V1-0 and LLaVA)",
    )
    parser.add_argument(
        "--max-new-tokens", type=options.count, metavar="N", help="longest answer (default: as published)"
    )
    options.add_processes(parser)
    parser.set_defaults(run=lambda args: _run(args, name))


def _add_score(parts: options.Commands) -> None:
    score = parts.add_parser(
        "score",
        help="score a file of predictions",
        description="Reads a benchmark's files and predictions (JSONL with an id and an answer, or one JSON object "
        "{id: answer}) and prints the score.",
    )
    scored = [name for name, benchmark in BENCHMARKS.items() if benchmark.score is not None]
    _add_answers(score, list(BENCHMARKS), f"{', '.join(scored)}; the others are scored by a server or a judge")
    options.add_json(score)
    score.set_defaults(run=_score)


def _add_submit(parts: options.Commands) -> None:
    names = [name for name, benchmark in BENCHMARKS.items() if benchmark.submit is not None]
    submit = parts.add_parser(
        "submit",
        help="write the submission file for a benchmark's server",
        description="Reads a benchmark's files and predictions, as `eval score` does, and writes the submission "
        "file for its server or judge, as a run does.",
    )
    _add_answers(submit, names, ", ".join(names))
    options.add_output(submit, "directory to write (default: runs/BENCHMARK-submission)")
    submit.set_defaults(run=_submit)


def _add_answers(parser: argparse.ArgumentParser, names: list[str], shown: str) -> None:
    parser.add_argument("benchmark", choices=names, metavar="BENCHMARK", help=shown)
    parser.add_argument("--predictions", type=options.path, required=True, metavar="FILE", help="JSONL or JSON")
    parser.add_argument("--data", type=options.path, required=True, metavar="DIR", help=DATA_HELP)
    parser.add_argument(
        "--codebase",
        choices=["internvl", "llava"],
        default="internvl",
        help="rules for parsing the answers: V1-1's scripts (internvl), or LLaVA's for LLaVA-1.5 and V1-0",
    )


def _add_judge(parts: options.Commands) -> None:
    judge = parts.add_parser(
        "judge",
        help="grade a run of mm-vet with an OpenAI-compatible server",
        description="Grades the answers of a finished run of mm-vet with MM-Vet's own few-shot prompt and adds the "
        "score to its report. The published scores were graded by gpt-4-0613: the report says whether yours was.",
    )
    judge.add_argument("directory", type=options.path, metavar="RUN", help="directory of the run")
    judge.add_argument("--data", type=options.path, required=True, metavar="DIR", help="directory of mm-vet.json")
    judge.add_argument(
        "--prompt-file", type=options.path, required=True, metavar="FILE", help="MM-Vet's mm-vet_evaluator.py"
    )
    judge.add_argument("--url", required=True, metavar="URL", help="address of the server, up to and including /v1")
    judge.add_argument("--model", required=True, metavar="NAME", help="name of the judge model")
    judge.add_argument(
        "--key-variable", default="OPENAI_API_KEY", metavar="NAME", help="environment variable that holds the API key"
    )
    judge.add_argument("--repeats", type=options.count, default=1, metavar="N", help="how often each answer is graded")
    judge.set_defaults(run=_judge)


def _run(args: argparse.Namespace, name: str) -> int:
    from internvl_jax.config import load_config
    from internvl_jax.evaluation.benchmark_run import EvaluationOptions, RunInputs, prepare_run
    from internvl_jax.inference.loading import NANO
    from internvl_jax.parallel import distributed
    from internvl_jax.processing.images import load_processor

    directory = args.checkpoint or NANO
    config = load_config(directory)
    if load_processor(directory, config) is None:  # which would be every question's error
        lacks = "vision tower" if config.vision is None else "preprocessor_config.json: put it beside its config.json"
        raise EvaluationError(f"{directory} has no {lacks}")
    codebase: Codebase = "llava" if config.template == "vicuna_v1" else "internvl"
    model = "nano" if args.checkpoint is None else directory.resolve().name
    options.start_processes(args)
    out = (args.output or files.resolve(f"runs/{name}-{model}")).resolve()  # two names of one directory have one claim
    first = distributed.is_process_0()
    with ExitStack() as held:
        with distributed.barrier():
            if first:
                held.enter_context(files.claim(out))
        inputs = RunInputs(name, codebase, args.data, out, model)
        evaluation = EvaluationOptions(**{field.name: getattr(args, field.name) for field in fields(EvaluationOptions)})
        for turn in (True, False):  # process 0 first: where all write to one disk, the others find its files
            with distributed.barrier():
                if first == turn:
                    run = prepare_run(inputs, evaluation, is_main_process=first)
        return _answer(args, run)


def _answer(args: argparse.Namespace, run: BenchmarkRun) -> int:
    from internvl_jax.evaluation.answering import answer_benchmark, pending_job
    from internvl_jax.evaluation.run_report import result
    from internvl_jax.inference.loading import load
    from internvl_jax.parallel import distributed

    job = pending_job(run, args.mesh)
    with progress_bar() as progress:
        loaded = options.load_options(args, images_per_call=args.batch_size)
        chat = load(args.checkpoint, loaded, mesh=job.mesh, progress=progress)
    chat.check_ready()
    try:
        with counting() as progress:
            done = answer_benchmark(chat, run, job, batch_size=args.batch_size, progress=progress)
    except KeyboardInterrupt:
        err.print(f"{run.output} keeps its answers: --resume continues")
        raise
    if distributed.is_process_0():
        print((run.output / "report.md").read_text(encoding="utf-8"), end="")
        asked = f"{done.answered:,} answered in {formats.duration(done.seconds)}" if done.answered else "no new answers"
        there = f", {done.resumed:,} were already answered" if done.resumed else ""
        err.print(f"{run.output}: {asked}{there}; {result(json_object(run.output / 'report.json'))}")
        if (run.output / "wrong.html").exists():
            err.print(f"wrong answers: {(run.output / 'wrong.html').resolve().as_uri()}")
    return 1 if done.failed else 0


def _score(args: argparse.Namespace) -> int:
    benchmark = BENCHMARKS[args.benchmark]
    if benchmark.score is None:
        raise EvaluationError(
            f"{benchmark.title} is scored by a server or a judge: its answers are not in its files; "
            f"`eval submit {args.benchmark}` writes the file to submit"
        )
    with counting() as progress:
        items, given = _answers(args)
        answers = WatchedAnswers(given, progress)
        score = benchmark.score(items, answers, args.codebase)
    if args.json:
        values = {"benchmark": args.benchmark, "title": benchmark.title, "questions": len(items), **vars(score)}
        print_json(values)
    else:
        print("\n".join(lines(benchmark.title, len(items), score)))
    return 0


def _answers(args: argparse.Namespace) -> tuple[list[Item], dict[str, str]]:
    """The benchmark's questions, and the given answers to all of them."""
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
    folder = DataFolder(args.data, benchmark.folder)
    out = args.output or files.resolve(f"runs/{args.benchmark}-submission")
    for path in write_apart(benchmark.submit, items, answers, args.codebase, folder, out):
        print(path)
    return 0


class WatchedAnswers(dict[str, str]):
    """Answers that report how many of them were read, every thousand."""

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
    shown = [f"{title}: {score.value:.1f} ({score.name}, {questions:,} questions)"]
    for figures in (score.figures, score.categories):
        shown += [f"  {name}: {value:.1f}" for name, value in figures.items()]
    return shown


def _table(args: argparse.Namespace) -> int:
    from internvl_jax.evaluation.run_report import table

    print("\n".join(table(args.runs)))
    return 0


def _judge(args: argparse.Namespace) -> int:
    from internvl_jax.evaluation.judge import Judge, judge_run
    from internvl_jax.evaluation.run_report import lines as report_lines

    judge = Judge(args.url, args.model, os.environ.get(args.key_variable))
    with counting() as progress:
        values = judge_run(args.directory, args.data, args.prompt_file, judge, runs=args.repeats, progress=progress)
    print("\n".join(report_lines(values)))
    return 0
