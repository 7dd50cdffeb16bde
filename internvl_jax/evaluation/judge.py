"""A judge for MM-Vet behind any OpenAI-compatible server, and the grades that it gives, kept as they come."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from internvl_jax.evaluation import mmvet
from internvl_jax.evaluation.items import EvaluationError, Folder, json_object, need
from internvl_jax.evaluation.report import save

TRIES = 6  # at a server that is busy, each after twice the pause of the one before
PAUSE = 2.0  # seconds
TIMEOUT = 120.0


class Judge:
    """Asks one model of a server. `models` collects what the server says it is."""

    def __init__(self, url: str, model: str, key: str | None):
        self.url, self.model, self.key = f"{url.rstrip('/')}/chat/completions", model, key
        self.models: set[str] = set()

    def __call__(self, message: str, temperature: float, max_tokens: int) -> str:
        """The reply to one message. Raises EvaluationError when the server refuses, or stays busy."""
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
                    raise EvaluationError(f"{self.url} refuses: {reason}, {error.read()[:300]!r}") from None
            except (urllib.error.URLError, TimeoutError) as error:
                reason = str(error)
            if number + 1 < TRIES:
                time.sleep(PAUSE * 2**number)
        raise EvaluationError(f"{self.url} does not answer ({reason}); the grades so far are kept: begin again later")

    def _read(self, answer: bytes) -> str:
        try:
            values = json.loads(answer)
            reply = values["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise EvaluationError(f"{self.url} sent no chat completion: {answer[:300]!r}") from None
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
    """Grade the answers of an MM-Vet run and put the score into its report, which is returned.

    prompt: mm-vet_evaluator.py, or a text with its few-shot prompt. Grades are appended to grades.jsonl as they come:
    an interrupted grading goes on where it was. Those of another model are refused.
    """
    values = json_object(directory / "report.json") if (directory / "report.json").exists() else {}
    if values.get("benchmark") != "mm-vet" or not (directory / "submission.json").exists():
        raise EvaluationError(f"{directory} is no finished run of mm-vet: only its answers are graded by a judge")
    few_shot = mmvet.read_prompt(prompt)
    answers = json_object(directory / "submission.json")
    facts = json_object(Folder(data, "mm-vet").find("mm-vet.json"))
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
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "replies": grade.replies}) + "\n")
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
    told = "the judge of the published figures" if same else f"not by {mmvet.PUBLISHED_JUDGE}: no figure to compare"
    values["judge"] = {"models": sorted(models), "comparable": f"Graded by {', '.join(sorted(models))}, {told}."}
    save(directory, values)
    return values


def _rows(path: Path) -> list[dict[str, Any]]:
    """Grades so far; a last line that was cut off is forgotten, and removed."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        os.truncate(path, len(whole.encode()))
    return [json.loads(line) for line in whole.splitlines()]


def _read_grades(path: Path, model: str) -> dict[tuple[str, int], float]:
    rows = _rows(path)
    other = next((row["asked"] for row in rows if row["asked"] != model), None)
    if other is not None:
        raise EvaluationError(f"{path} has grades by {other}, not {model}: remove it to grade anew")
    return {(row["id"], row["run"]): row["score"] for row in rows}


def _models(path: Path) -> set[str]:
    return {model for row in _rows(path) for model in row["model"]}
