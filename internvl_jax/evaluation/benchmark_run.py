"""The set-up of a benchmark run: questions and images are validated and written before a model is loaded.

A run's directory holds settings.json, questions.jsonl, predictions.jsonl (appended batch by batch), the images that the
data file itself contains, and at the end report.json, report.md, wrong.html and the submission.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from internvl_jax.evaluation.benchmark_table import BENCHMARKS, Benchmark
from internvl_jax.evaluation.datasets.data_folder import DataFolder, is_file
from internvl_jax.evaluation.datasets.items import Codebase, EvaluationError, Item
from internvl_jax.evaluation.datasets.records import json_object, raise_problems, read_text, records
from internvl_jax.evaluation.submissions import import_openpyxl
from internvl_jax.inference.generation.sampling import GenerationConfig
from internvl_jax.utils import files

# Files that a run, or the grading of one, writes beside its images.
WRITTEN = (
    *("settings.json", "questions.jsonl", "predictions.jsonl", "report.json", "report.md", "wrong.html"),
    *("submission.json", "submission_normalized.json", "submission.xlsx", "grades.jsonl"),
)


@dataclass(frozen=True)
class RunInputs:
    """What a run reads and where it writes.

    Attributes:
        benchmark: Key of `BENCHMARKS`.
        codebase: Whose prompts and rules apply.
        data: Folder with the benchmark's files, or the reference's data folder around it.
        output: The run's directory.
        model: Name of the model.
    """

    benchmark: str
    codebase: Codebase
    data: Path
    output: Path
    model: str = "nano"


@dataclass(frozen=True)
class EvaluationOptions:
    """How a benchmark is run. None stands for the setting of the published scores, or the checkpoint's own.

    Attributes:
        limit: Number of questions, from the first on; None for all.
        resume: Continue with the answers in the run's directory.
        num_beams: Beam search width.
        max_new_tokens: Maximum number of tokens per answer.
        dtype: Computation dtype, as `loading.load` takes it.
        quantize: Weight quantization, as `loading.load` takes it.
        cache_dtype: KV cache dtype, as `loading.load` takes it.
    """

    limit: int | None = None
    resume: bool = False
    num_beams: int | None = None
    max_new_tokens: int | None = None
    dtype: str | None = None
    quantize: str | None = None
    cache_dtype: str | None = None


@dataclass(frozen=True)
class BenchmarkRun:
    """A validated run over one benchmark.

    Attributes:
        inputs: What is read and where the run writes.
        options: How the benchmark is run.
        folder: The benchmark's files.
        items: The benchmark's items, up to `options.limit`.
        generation: Arguments of GenerationConfig.
    """

    inputs: RunInputs
    options: EvaluationOptions
    folder: DataFolder
    items: Sequence[Item]
    generation: dict[str, Any]

    @property
    def benchmark(self) -> Benchmark:
        """Entry of the benchmark table."""
        return BENCHMARKS[self.inputs.benchmark]

    @property
    def codebase(self) -> Codebase:
        """Whose prompts and rules apply."""
        return self.inputs.codebase

    @property
    def output(self) -> Path:
        """The run's directory."""
        return self.inputs.output

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that must not change when a run is resumed."""
        digest = hashlib.sha256(repr([(item.id, item.question) for item in self.items]).encode()).hexdigest()
        return {
            "benchmark": self.inputs.benchmark,
            "codebase": self.codebase,
            "model": self.inputs.model,
            "limit": self.options.limit,
            "generation": self.generation,
            "questions": digest,
            "dtype": self.options.dtype,
            "quantize": self.options.quantize,
            "cache_dtype": self.options.cache_dtype,
        }


def prepare_run(inputs: RunInputs, options: EvaluationOptions, *, is_main_process: bool = True) -> BenchmarkRun:
    """Read the benchmark and write the run's settings and questions; nothing is answered yet.

    Args:
        inputs: What to read and where to write.
        options: How to run the benchmark.
        is_main_process: Whether this is process 0, which holds the claim of the output directory and decides whether
            the run may continue there.

    Raises:
        EvaluationError: The data cannot be used, images are missing (all are listed), or the output directory has
            answers and is not to be resumed, was made with other settings, or belongs to something else.
    """
    benchmark = BENCHMARKS[inputs.benchmark]
    if options.limit is not None and options.limit < 1:
        raise EvaluationError(f"--limit must be at least 1, not {options.limit}")
    inputs = replace(inputs, data=files.resolve(inputs.data), output=files.resolve(inputs.output))
    folder = DataFolder(inputs.data, benchmark.folder)
    items = benchmark.read(folder, inputs.codebase)[: options.limit]
    if not items:
        raise EvaluationError(f"{inputs.data} has no questions of {benchmark.title}")
    generation: dict[str, Any] = dict(benchmark.generation(inputs.codebase, options.num_beams))
    if options.max_new_tokens is not None:
        generation["max_new_tokens"] = options.max_new_tokens
    GenerationConfig(**generation)  # validates the settings before anything is written
    run = BenchmarkRun(inputs, options, folder, items, generation)
    if benchmark.needs_xlsx:
        import_openpyxl()
    if is_main_process:
        _prepare_directory(run)
    run.output.mkdir(parents=True, exist_ok=True)
    files.write_text(run.output / "settings.json", json.dumps(run.settings, indent=2))
    _write_questions(run)
    return run


def _prepare_directory(run: BenchmarkRun) -> None:
    out = run.output
    if out.exists() and not out.is_dir():
        raise EvaluationError(f"{out} is a file: --output names a directory")
    for name in WRITTEN:
        files.remove_leftovers(out / name)
    for image in sorted((out / "images").glob("*.*")):
        if _UNFINISHED_IMAGE.fullmatch(image.name):
            image.unlink()
    present = [out / name for name in WRITTEN if is_file(out / name)]
    if not present:
        return
    before = json_object(out / "settings.json") if out / "settings.json" in present else {}
    if "benchmark" not in before:
        raise EvaluationError(f"{present[0]} is not from a run of `eval`: choose another directory with --output")
    answers = out / "predictions.jsonl"
    if answers not in present or not answers.stat().st_size:
        return
    if not run.options.resume:
        raise EvaluationError(f"{answers} already has answers: continue with --resume, or choose another --output")
    changed = _differences(before, run.settings)
    if changed:
        raise EvaluationError(
            f"{out} was started with other settings ({'; '.join(changed)}): use the same ones, or another --output"
        )
    _drop_errors(answers)


_UNFINISHED_IMAGE = re.compile(r"\.[0-9a-f]{24}\.(png|jpg)\.tmp-[0-9]+")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that have changed, with both values."""
    names = [name for name in now if name in before and before[name] != now[name]]
    changes = []
    for name in names:
        old, new = before[name], now[name]
        if name == "questions":  # a digest
            changes += [] if "limit" in names or "benchmark" in names else ["the data files had other questions"]
        elif isinstance(old, dict) and isinstance(new, dict):
            changes += _differences(dict.fromkeys(new) | old, dict.fromkeys(old) | new)
        else:
            changes.append(f"{name}: {_format(old)} before, {_format(new)} now")
    return changes


def _format(value: Any) -> str:
    return "not given" if value is None else str(value)


def _drop_errors(answers: Path) -> None:
    """Questions that failed are asked again: their image may have been repaired."""
    lines = read_text(answers).split("\n")
    kept = [line for line in lines if not _is_error(line)]
    if len(kept) < len(lines):
        files.write_text(answers, "\n".join(kept))


def _is_error(line: str) -> bool:
    try:
        row = json.loads(line)
    except ValueError:  # a truncated last line
        return False
    return isinstance(row, dict) and "error" in row


def _write_questions(run: BenchmarkRun) -> None:
    rows, problems = [], []
    for item in run.items:
        path = _image_path(run, item)
        if isinstance(item.image, str) and path is None:
            problems.append(f"{item.id!r}: no image {item.image} in {run.folder.root} or its subfolders")
            continue
        images = [] if path is None else [str(path)]
        rows.append({"id": item.id, "question": run.benchmark.prompt(item, run.codebase), "images": images})
    raise_problems(problems)
    files.write_text(run.output / "questions.jsonl", "".join(files.to_json(row) + "\n" for row in rows))


def _image_path(run: BenchmarkRun, item: Item) -> Path | None:
    if item.image is None:
        return None
    if isinstance(item.image, str):
        return run.folder.find_image(item.image, run.benchmark.images)
    suffix = "png" if item.image.startswith(b"\x89PNG") else "jpg"
    path = run.output / "images" / f"{hashlib.sha256(item.image).hexdigest()[:24]}.{suffix}"
    if not path.exists():  # rotations of a question share their image
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, item.image)
    return path


def read_answers(run: BenchmarkRun) -> dict[str, str | None]:
    """Return the answer to each item by its id; None where the question failed."""
    answers: dict[str, str | None] = {}
    for _, row in records(run.output / "predictions.jsonl"):
        answers[row["id"]] = row.get("answer")
    return answers
