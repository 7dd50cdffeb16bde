"""Grading MM-Vet answers with a judge model behind an OpenAI-compatible server."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from internvl_jax.evaluation.datasets.data_folder import DataFolder
from internvl_jax.evaluation.datasets.items import EvaluationError
from internvl_jax.evaluation.datasets.records import json_object, need, records
from internvl_jax.evaluation.run_report import save
from internvl_jax.evaluation.scorers import mmvet
from internvl_jax.utils import files

TRIES = 6  # with exponential backoff
PAUSE = 2.0  # seconds before the first retry
TIMEOUT = 120.0


class Judge:
    """A judge model. `models` collects the model names that the server reports.

    Args:
        url: The server's address, up to /v1.
        model: Name of the model.
        key: API key, or None.
    """

    def __init__(self, url: str, model: str, key: str | None):
        self.url, self.model, self.key = f"{url.rstrip('/')}/chat/completions", model, key
        self.models: set[str] = set()

    def __call__(self, message: str, temperature: float, max_tokens: int) -> str:
        """Return the reply to one message.

        Raises:
            EvaluationError: The server refuses the request, or stays busy.
        """
        body = {
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "messages": [{"role": "user", "content": message}],
        }
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        for number in range(TRIES):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                    return self._read(response.read())
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}"
                if error.code != 429 and error.code < 500:
                    raise EvaluationError(f"{self.url} refuses the request: {reason}, {error.read()[:300]!r}") from None
            except (OSError, http.client.HTTPException) as error:  # refused, timed out, or truncated
                reason = str(error) or type(error).__name__
            if number + 1 < TRIES:
                time.sleep(PAUSE * 2**number)
        raise EvaluationError(f"{self.url} does not answer ({reason}); the grades so far are kept: start again later")

    def _read(self, answer: bytes) -> str:
        try:
            values = json.loads(answer)
            reply = values["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise EvaluationError(f"{self.url} did not send a chat completion: {answer[:300]!r}") from None
        self.models.add(str(values.get("model", self.model)))
        return reply or ""


def judge_run(
    directory: Path,
    data: Path,
    prompt: Path,
    judge: Judge,
    *,
    runs: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Grade the answers of an MM-Vet run and write the score into its report.

    Grades are appended to grades.jsonl one by one, so an interrupted grading can be resumed. The run's directory is
    locked meanwhile.

    Args:
        directory: The run's directory.
        data: Folder with mm-vet.json.
        prompt: mm-vet_evaluator.py, or a text file with its few-shot prompt.
        judge: The judge.
        runs: Number of gradings of each answer.
        progress: Called as progress(done, total, "grading").

    Returns:
        The values of report.json.

    Raises:
        EvaluationError: The directory is not a finished run of mm-vet, or has grades by another model.
    """
    with files.claim(directory.resolve()):  # two names of one directory have one claim
        return _judge_run(directory, data, prompt, judge, runs, progress)


def _judge_run(
    directory: Path,
    data: Path,
    prompt: Path,
    judge: Judge,
    runs: int,
    progress: Callable[[int, int, str], None] | None,
) -> dict[str, Any]:
    try:
        values, answers = (json_object(directory / name) for name in ("report.json", "submission.json"))
    except (FileNotFoundError, NotADirectoryError):
        values, answers = {}, {}
    if values.get("benchmark") != "mm-vet":
        raise EvaluationError(f"{directory} is not a finished run of mm-vet, the only benchmark with a judge")
    few_shot = mmvet.read_prompt(prompt)
    facts = json_object(DataFolder(data, "mm-vet").find("mm-vet.json"))
    missing = [name for name in answers if name not in facts]
    if missing:
        raise EvaluationError(f"mm-vet.json has no {missing[0]!r}")
    path = directory / "grades.jsonl"
    grades = _read_grades(path, judge.model)
    wanted = [(name, run) for run in range(runs) for name in answers]
    for done, (name, run) in enumerate(wanted, 1):
        if (name, run) not in grades:
            question, truth = (need(facts[name], name, field) for field in ("question", "answer"))
            grade = mmvet.grade(judge, mmvet.judge_message(few_shot, question, truth, answers[name]))
            grades[name, run] = grade.score
            row = {"id": name, "run": run, "asked": judge.model, "model": sorted(judge.models), "score": grade.score}
            files.append_text(path, json.dumps({**row, "replies": grade.replies}) + "\n")
        if progress is not None:
            progress(done, len(wanted), "grading")
    capabilities = {name: need(facts[name], name, "capability", kind=list) for name in answers}
    summary = mmvet.summarize(capabilities, {name: [grades[name, run] for run in range(runs)] for name in answers})
    values["score"] = {
        "value": summary.total,
        "name": "total",
        "figures": {"standard deviation of the runs": summary.deviation}
        | {f"run {number}": total for number, total in enumerate(summary.runs, 1)},
        "categories": summary.capabilities | summary.combinations,
    }
    models = _models(path)
    same = models == {mmvet.PUBLISHED_JUDGE}
    comparable = (
        "the judge of the published scores"
        if same
        else f"not by {mmvet.PUBLISHED_JUDGE}: not comparable with published scores"
    )
    graded = f"Graded by {', '.join(sorted(models))}, {comparable}."
    values["judge"] = {"models": sorted(models), "same": same, "comparable": graded}
    save(directory, values)
    return values


def _rows(path: Path) -> list[dict[str, Any]]:
    """The grades so far. A truncated last line is removed."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    end = data.rfind(b"\n") + 1
    if not data[end:].startswith(_BEGINNING[: len(data) - end]):
        raise EvaluationError(f"{path}: its last line is not a grade: another program may have written this file")
    rows = [row for _, row in records(path, files.decode_text(data[:end], path))] if end else []
    if end < len(data):
        os.truncate(path, end)
    return rows


_BEGINNING = b'{"id": '  # of every line of grades.jsonl


def _read_grades(path: Path, model: str) -> dict[tuple[str, int], float]:
    grades = {}
    for number, row in enumerate(_rows(path), 1):
        where = f"{path}:{number}"
        other = need(row, where, "asked")
        if other != model:
            raise EvaluationError(f"{path} has grades by {other}, not {model}: remove it to grade again")
        name, run = need(row, where, "id"), need(row, where, "run", kind=int)
        grades[name, run] = need(row, where, "score", kind=(int, float))
    return grades


def _models(path: Path) -> set[str]:
    return {model for row in _rows(path) for model in row["model"]}
