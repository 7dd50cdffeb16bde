"""What a run came to: figures beside the published ones (JSON and Markdown), and wrong answers with their pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from internvl_jax.evaluation.benchmark_run import Plan
from internvl_jax.evaluation.benchmark_table import BENCHMARKS
from internvl_jax.evaluation.datasets.items import EvaluationError
from internvl_jax.evaluation.datasets.records import json_object, records
from internvl_jax.evaluation.published import PUBLISHED, SYSTEMS
from internvl_jax.evaluation.scoring import Score
from internvl_jax.processing.images import load_image, to_rgb
from internvl_jax.utils import files

PICTURES = 200  # wrong answers on the page: about 20 kB each
THUMBNAIL = 320  # pixels

CODEBASES = {"internvl": "V1-1's evaluation scripts", "llava": "LLaVA's evaluation scripts"}


@dataclass(frozen=True)
class Timing:
    """Of the last part of a run that was resumed; nothing was answered where all answers were there."""

    answered: int
    seconds: float
    new_tokens: int
    batch: int


def write_report(
    made: Plan, model: str, numbers: str, answers: Mapping[str, str | None], timing: Timing
) -> dict[str, Any]:
    """Score the answers and write report.json, report.md, wrong.html and what is to be handed in; returns the first.

    numbers: what was computed with, as "bfloat16, int8 weights". Where a question could not be answered there is no
    score: the report lists those questions.
    """
    items, benchmark = made.items, made.benchmark
    failed = [item.id for item in items if answers.get(item.id) is None]
    said = {item.id: text for item in items if (text := answers.get(item.id)) is not None}
    score = benchmark.score(items, said, made.codebase) if benchmark.score and not failed else None
    written = (
        benchmark.submit(items, said, made.codebase, made.folder, made.out) if benchmark.submit and not failed else []
    )
    if score is not None:
        files.write_text(made.out / "wrong.html", _wrong_page(made, said, score))
    values = {
        "benchmark": made.name,
        "title": benchmark.title,
        "model": model,
        "numbers": numbers,
        "codebase": made.codebase,
        "generation": made.generation,
        "questions": len(items),
        "limit": made.limit,
        "failed": failed,
        "score": None if score is None else {name: value for name, value in asdict(score).items() if name != "points"},
        "submission": [path.name for path in written],
        "timing": _timing(made.out, timing),
        "published": PUBLISHED.get(made.name, {}),
    }
    save(made.out, values)
    return values


def _timing(directory: Path, timing: Timing) -> dict[str, Any]:
    """This part's; where it had nothing to answer, that of the part before stands beside it."""
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
        shown += [f"**Only the first {values['questions']} questions: no figure to compare.**", ""]
    if values["failed"]:
        listed = ", ".join(values["failed"][:20])
        shown += [f"**No score: {len(values['failed'])} questions could not be answered ({listed}).**", ""]
    elif score is None:
        shown += ["No score: a server or a judge has the answers. To hand in: " + ", ".join(values["submission"]), ""]
    shown += [f"| system | {name} |", "|---|---|"]
    shown += [f"| {system}, published | {figure} |" for system, figure in values["published"].items()]
    if score is not None:
        shown += [f"| **{values['model']}, this run** | **{score['value']:.2f}** |"]
    beams = generation.get("num_beams", 1)
    shown += [
        "",
        f"{values['questions']} questions, prompts and rules of {CODEBASES[values['codebase']]}, "
        f"{f'{beams} beams' if beams > 1 else 'greedy'}, at most {generation['max_new_tokens']} new tokens, "
        f"{values['numbers']}.",
    ]
    if "judge" in values:
        shown += ["", values["judge"]["comparable"]]
    for title, figures in (("Figures", "figures"), ("Categories", "categories")):
        if score is not None and score[figures]:
            shown += ["", f"## {title}", "", "| | |", "|---|---|"]
            shown += [f"| {key} | {value:.2f} |" for key, value in score[figures].items()]
    asked = timing if timing["answered"] else timing.get("before", timing)
    shown.append("")
    if not timing["answered"]:
        shown.append("Nothing was asked this time: all answers were there already.")
    if asked["answered"]:
        rate = f": {asked['answered'] / asked['seconds']:.2f} questions/s" if asked["seconds"] else ""
        shown.append(
            f"{asked['answered']} answered in {asked['seconds']:.0f} s{rate}, {asked['new_tokens']} tokens, batches of "
            f"{asked['batch']}."
        )
    return shown


def result(values: Mapping[str, Any]) -> str:
    """The report's figure in a few words."""
    if values["failed"]:
        return f"no score, {len(values['failed'])} questions have an error"
    if values["score"] is None:
        return f"to hand in: {', '.join(values['submission'])}"
    return f"{values['score']['name']} {values['score']['value']:.2f}"


def _wrong_page(made: Plan, answers: Mapping[str, str], score: Score) -> str:
    """The wrong answers and their pictures on one page without links."""
    wrong = [item for item in made.items if score.points[item.id] < 1]
    paths = {}
    for _, row in records(made.out / "questions.jsonl"):
        paths[row["id"]] = row["images"]
    cards = []
    for item in wrong[:PICTURES]:
        pictures = "".join(map(_thumbnail, paths[item.id]))
        cells = (
            ("question", item.question),
            ("options", "\n".join(f"{letter}. {text}" for letter, text in item.options.items())),
            ("answer", answers[item.id]),
            ("right", " | ".join(dict.fromkeys(item.gold))),
            ("points", f"{score.points[item.id]:.2f}"),
        )
        facts = "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in cells if text)
        cards.append(f"<section>{pictures}<dl><dt>id</dt><dd>{html.escape(item.id)}</dd>{facts}</dl></section>")
    title = html.escape(f"{made.benchmark.title}: {len(wrong)} of {len(made.items)} answers not fully right")
    more = f"<p>The first {PICTURES}.</p>" if len(wrong) > PICTURES else ""
    style = (
        "body{font-family:sans-serif;margin:2em}section{display:flex;gap:1em;margin:1em 0;border-top:1px solid #ccc;"
        "padding-top:1em}img{max-width:320px;align-self:flex-start}dt{color:#666;font-size:.8em}"
        "dd{margin:0 0 .5em;white-space:pre-wrap}"
    )
    return files.replace_surrogates(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"<h1>{title}</h1>{more}{''.join(cards)}</html>\n"
    )


def _thumbnail(path: str) -> str:
    try:
        image = to_rgb(load_image(path, honour_exif=False))
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=80)
    except (ValueError, OSError, MemoryError) as error:  # it was read before; the page is not worth the report
        return f"<p>{html.escape(str(error) or type(error).__name__)}</p>"
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def table(directories: Sequence[Path]) -> list[str]:
    """The results table in Markdown: published figures, then those of these runs, one column per model.

    Runs over a part of a benchmark are left out. Raises EvaluationError for a directory without a report, and for two
    runs of the same model and benchmark.
    """
    measured: dict[str, dict[str, str]] = {}
    origin: dict[tuple[str, str], Path] = {}
    notes = []
    for directory in directories:
        try:
            values = json_object(directory / "report.json")
        except (FileNotFoundError, NotADirectoryError):
            raise EvaluationError(f"{directory} has no report.json: name directories of finished runs") from None
        if missing := [key for key in ("benchmark", "model", "limit", "score", "generation") if key not in values]:
            raise EvaluationError(f"{directory / 'report.json'} is no report of a run: it has no {missing[0]!r}")
        name, model = values["benchmark"], values["model"]
        if (name, model) in origin:
            raise EvaluationError(f"{directory} and {origin[name, model]} are both {model} on {name}: name one of them")
        origin[name, model] = directory
        if values["limit"] is not None or values["score"] is None:
            why = "no score" if values["score"] is None else f"the first {values['questions']} questions only"
            notes.append(f"{directory}: left out ({why})")
            continue
        beams = values["generation"].get("num_beams", 1)
        remarks = [f"{beams} beams"] if beams > 1 else []
        remarks += ["another judge"] if values.get("judge", {}).get("same") is False else []
        cell = f"{values['score']['value']:.1f}" + (f" ({', '.join(remarks)})" if remarks else "")
        measured.setdefault(model, {})[name] = cell
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
