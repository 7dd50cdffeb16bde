"""A run's report: scores beside the published ones (JSON and Markdown), and wrong answers with their images (HTML)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from internvl_jax.evaluation.benchmark_run import BenchmarkRun
from internvl_jax.evaluation.benchmark_table import BENCHMARKS
from internvl_jax.evaluation.datasets.items import EvaluationError
from internvl_jax.evaluation.datasets.records import json_object
from internvl_jax.evaluation.published import PUBLISHED, SYSTEMS
from internvl_jax.evaluation.wrong_page import wrong_page
from internvl_jax.utils import files, formats

NANO = "nano"  # name of the bundled model
NANO_NOTE = "nano is a demonstration model of 2.2M parameters: its scores are not comparable with published ones."
CODEBASES = {"internvl": "V1-1's evaluation scripts", "llava": "LLaVA's evaluation scripts"}


@dataclass(frozen=True)
class Timing:
    """Time that a run took; of a resumed run, its last part.

    Attributes:
        answered: Number of answers.
        seconds: Seconds that they took.
        new_tokens: Generated tokens.
        batch: Questions per batch and model.
    """

    answered: int
    seconds: float
    new_tokens: int
    batch: int


def write_report(
    run: BenchmarkRun, model: str, numbers: str, answers: Mapping[str, str | None], timing: Timing
) -> dict[str, Any]:
    """Score the answers and write report.json, report.md, wrong.html and the submission.

    Args:
        run: The benchmark run.
        model: Name of the model.
        numbers: What was computed with, for example "bfloat16, int8 weights".
        answers: Answer to each item by its id; None where the question failed. Then there is no score.
        timing: Time that the answers took.

    Returns:
        The values of report.json.
    """
    items, benchmark = run.items, run.benchmark
    failed = [item.id for item in items if answers.get(item.id) is None]
    said = {item.id: text for item in items if (text := answers.get(item.id)) is not None}
    score = benchmark.score(items, said, run.codebase) if benchmark.score and not failed else None
    written = (
        benchmark.submit(items, said, run.codebase, run.folder, run.output) if benchmark.submit and not failed else []
    )
    if score is not None:
        files.write_text(run.output / "wrong.html", wrong_page(run, said, score))
    values = {
        "benchmark": run.inputs.benchmark,
        "title": benchmark.title,
        "model": model,
        "numbers": numbers,
        "codebase": run.codebase,
        "generation": run.generation,
        "questions": len(items),
        "limit": run.options.limit,
        "failed": failed,
        "score": None if score is None else {name: value for name, value in asdict(score).items() if name != "points"},
        "submission": [path.name for path in written],
        "timing": _timing(run.output, timing),
        "published": PUBLISHED.get(run.inputs.benchmark, {}),
    }
    save(run.output, values)
    return values


def _timing(directory: Path, timing: Timing) -> dict[str, Any]:
    """The timing for JSON. If nothing was answered, "before" has that of the last run that answered something."""
    values = asdict(timing)
    if not timing.answered:
        with suppress(FileNotFoundError, EvaluationError):  # no report yet, or none that is worth keeping
            before = json_object(directory / "report.json").get("timing")
            if isinstance(before, dict):
                values["before"] = before.get("before", before)
    return values


def save(directory: Path, values: Mapping[str, Any]) -> None:
    """Write report.json and report.md."""
    files.write_text(directory / "report.json", files.to_json(values, indent=2) + "\n")
    files.write_text(directory / "report.md", files.replace_surrogates("\n".join(lines(values)) + "\n"))


def lines(values: Mapping[str, Any]) -> list[str]:
    """The report in Markdown."""
    score, generation, timing = values["score"], values["generation"], values["timing"]
    name = "score" if score is None else score["name"]
    shown = [f"# {values['title']}: {values['model']}", ""]
    if values["limit"] is not None:
        shown += [f"**Only the first {values['questions']:,} questions: no figure to compare.**", ""]
    if values["failed"]:
        listed = ", ".join(values["failed"][:20])
        shown += [f"**No score: {len(values['failed'])} questions could not be answered ({listed}).**", ""]
    elif score is None:
        shown += ["No score: a server or a judge has the answers. To submit: " + ", ".join(values["submission"]), ""]
    shown += [f"| system | {name} |", "|---|---|"]
    shown += [f"| {system}, published | {figure} |" for system, figure in values["published"].items()]
    if score is not None:
        shown += [f"| **{values['model']}, this run** | **{score['value']:.1f}** |"]
    beams = generation.get("num_beams", 1)
    if values["model"] == NANO and values["published"] and score is not None:
        shown += ["", NANO_NOTE]
    shown += [
        "",
        f"{values['questions']:,} questions, prompts and rules of {CODEBASES[values['codebase']]}, "
        f"{f'{beams} beams' if beams > 1 else 'greedy'}, at most {generation['max_new_tokens']} new tokens, "
        f"{values['numbers']}.",
    ]
    if "judge" in values:
        shown += ["", values["judge"]["comparable"]]
    for title, figures in (("Figures", "figures"), ("Categories", "categories")):
        if score is not None and score[figures]:
            shown += ["", f"## {title}", "", "| | |", "|---|---|"]
            shown += [f"| {key} | {value:.1f} |" for key, value in score[figures].items()]
    asked = timing if timing["answered"] else timing.get("before", timing)
    shown.append("")
    if not timing["answered"]:
        shown.append("Nothing was asked this time: all answers were there already.")
    if asked["answered"]:
        rate = f": {formats.number(asked['answered'] / asked['seconds'])} questions/s" if asked["seconds"] else ""
        shown.append(
            f"{asked['answered']:,} answered in {formats.duration(asked['seconds'])}{rate}, "
            f"{asked['new_tokens']:,} tokens, batches of {asked['batch']}."
        )
    return shown


def result(values: Mapping[str, Any]) -> str:
    """The report's figure in a few words."""
    if values["failed"]:
        return f"no score, {len(values['failed'])} questions have an error"
    if values["score"] is None:
        return f"to submit: {', '.join(values['submission'])}"
    return f"{values['score']['name']} {values['score']['value']:.1f}"


def table(directories: Sequence[Path]) -> list[str]:
    """The results table in Markdown: published figures, then those of these runs, one column per model.

    Further runs of one model and benchmark get columns of their own, "MODEL (2)". Runs over a part of a benchmark are
    left out.

    Raises:
        EvaluationError: A directory has no report, or is named twice.
    """
    measured: dict[str, dict[str, str]] = {}  # cells by column, then by benchmark
    origin: dict[tuple[str, str], Path] = {}
    notes = []
    for directory in directories:
        try:
            values = json_object(directory / "report.json")
        except (FileNotFoundError, NotADirectoryError):
            raise EvaluationError(f"{directory} has no report.json: name directories of finished runs") from None
        if missing := [key for key in ("benchmark", "model", "limit", "score", "generation") if key not in values]:
            raise EvaluationError(f"{directory / 'report.json'} is not the report of a run: it lacks {missing[0]!r}")
        name, model = values["benchmark"], values["model"]
        if directory.resolve() in origin.values():
            raise EvaluationError(f"{directory} is named twice: name each run once")
        number = 1
        while (column := model if number == 1 else f"{model} ({number})", name) in origin:
            number += 1
        origin[column, name] = directory.resolve()
        if values["limit"] is not None or values["score"] is None:
            why = "no score" if values["score"] is None else f"the first {values['questions']:,} questions only"
            notes.append(f"{directory}: left out ({why})")
            continue
        beams = values["generation"].get("num_beams", 1)
        remarks = [f"{beams} beams"] if beams > 1 else []
        remarks += ["another judge"] if values.get("judge", {}).get("same") is False else []
        cell = f"{values['score']['value']:.1f}" + (f" ({', '.join(remarks)})" if remarks else "")
        measured.setdefault(column, {})[name] = cell
        if model == NANO and NANO_NOTE not in notes:
            notes.append(NANO_NOTE)
    rows = [name for name in BENCHMARKS if name in PUBLISHED or any(name in run for run in measured.values())]
    shown = ["| | " + " | ".join([*SYSTEMS, *(f"{model}, here" for model in measured)]) + " |"]
    shown.append("|---" * (1 + len(SYSTEMS) + len(measured)) + "|")
    for name in rows:
        published = [str(PUBLISHED.get(name, {}).get(system, "")) for system in SYSTEMS]
        shown.append(
            f"| {BENCHMARKS[name].title} | "
            + " | ".join([*published, *(run.get(name, "") for run in measured.values())])
            + " |"
        )
    return shown + ([""] + notes if notes else [])
