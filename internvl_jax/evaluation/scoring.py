"""Scores of benchmarks from items and answers. Scores are percentages, except for MME's points."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from internvl_jax.evaluation.datasets.items import Codebase, Item
from internvl_jax.evaluation.scorers import choices, documents, gqa, mmmu, vqa, yes_no

Answers = Mapping[str, str]  # item id -> answer


@dataclass(frozen=True)
class Score:
    """The score of a benchmark.

    Attributes:
        value: Score of the results table.
        name: Name of the score.
        points: Item id -> points, from 0 to 1.
        figures: Further scores by name.
        categories: Score by category.
    """

    value: float
    name: str
    points: dict[str, float]
    figures: dict[str, float] = field(default_factory=dict)
    categories: dict[str, float] = field(default_factory=dict)


def _mean_by(items: Sequence[Item], points: Mapping[str, float], key: Callable[[Item], str]) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for item in items:
        if key(item):
            groups.setdefault(key(item), []).append(points[item.id])
    return {name: 100 * fmean(values) for name, values in groups.items()}


def _mean(points: Iterable[float]) -> float:
    values = list(points)
    return 100 * fmean(values) if values else 0.0


def _plain(name: str, point: Callable[[Item, str], float], items: Sequence[Item], answers: Answers) -> Score:
    points = {item.id: float(point(item, answers[item.id])) for item in items}
    return Score(_mean(points.values()), name, points, {}, _mean_by(items, points, lambda item: item.category))


def score_vqa(items: Sequence[Item], answers: Answers, codebase: Codebase) -> Score:
    """Score by the reference's local scorer, with the score by the VQA challenge's rules as a further figure."""
    official = []

    def point(item: Item, text: str) -> float:
        official.append(vqa.soft_accuracy_official(text, item.gold))
        return vqa.soft_accuracy_m4c(text, item.gold)

    score = _plain("accuracy", point, items, answers)
    score.figures["accuracy by the VQA challenge's rules"] = _mean(official)
    return score


def score_anls(items: Sequence[Item], answers: Answers, codebase: Codebase) -> Score:
    """Score by ANLS: DocVQA and InfographicsVQA."""
    return _plain("ANLS", lambda item, text: documents.anls(text, item.gold), items, answers)


def score_exact(items: Sequence[Item], answers: Answers, codebase: Codebase) -> Score:
    """Score by equality up to case: AI2D."""
    return _plain("accuracy", lambda item, text: documents.exact_match(text, item.gold), items, answers)


def score_chartqa(items: Sequence[Item], answers: Answers, codebase: Codebase) -> Score:
    """Score ChartQA: relaxed accuracy, the unweighted mean of both halves."""
    score = _plain("relaxed accuracy", lambda item, text: documents.relaxed_match(text, item.gold), items, answers)
    return Score(fmean(score.categories.values()), score.name, score.points, score.figures, score.categories)


def score_gqa(items: Sequence[Item], answers: Answers, codebase: Codebase) -> Score:
    """Score GQA by exact match, with open and binary questions as further figures."""
    score = _plain("accuracy", lambda item, text: gqa.gqa_answer(text) == item.gold[0], items, answers)
    kinds = _mean_by(items, score.points, lambda item: "open" if gqa.is_open(item.category) else "binary")
    return Score(score.value, score.name, score.points, kinds, score.categories)


def score_scienceqa(items: Sequence[Item], answers: Answers, codebase: Codebase) -> Score:
    """Score ScienceQA on questions with an image; for LLaVA's file, accuracy on all of them is a figure."""

    def point(item: Item, text: str) -> float:
        if codebase == "llava":
            letter = choices.science_letter_llava(text)
            return letter in item.options and letter == item.gold[0]
        return choices.science_letter(text, item.options) == item.gold[0]

    score = _plain("accuracy", point, items, answers)
    if codebase == "internvl":
        return score
    with_image = [score.points[item.id] for item in items if item.image is not None]
    return Score(_mean(with_image), score.name, score.points, {"all questions": score.value}, score.categories)


def score_pope(items: Sequence[Item], answers: Answers, codebase: Codebase) -> Score:
    """Score POPE: the mean F1 of the three categories."""
    parsed: dict[str, list[tuple[str, str]]] = {}
    points = {}
    for item in items:
        answer = yes_no.pope_answer(answers[item.id])
        points[item.id] = float(answer == item.gold[0])
        parsed.setdefault(item.category, []).append((answer, item.gold[0]))
    counts = {name: yes_no.pope_counts(pairs) for name, pairs in parsed.items()}
    figures = {
        f"{name} {figure}": 100 * getattr(counts[name], figure)
        for name in counts
        for figure in ("accuracy", "precision", "recall", "yes_ratio")
    }
    categories = {name: 100 * count.f1 for name, count in counts.items()}
    return Score(fmean(categories.values()), "mean F1", points, figures, categories)


def score_mme(items: Sequence[Item], answers: Answers, codebase: Codebase) -> Score:
    """Score MME: points of perception, with those of cognition as a further figure."""
    clean = yes_no.mme_clean if codebase == "internvl" else str
    parsed: dict[tuple[str, int], list[tuple[str, str]]] = {}
    points = {}
    for item in items:
        answer = yes_no.mme_answer(clean(answers[item.id]))
        points[item.id] = float(answer == item.gold[0])
        parsed.setdefault((item.category, item.record["pair"]), []).append((answer, item.gold[0]))
    tasks: dict[str, list[tuple[str, str]]] = {}
    for (task, _), pair in parsed.items():
        if len(pair) == 2:
            tasks.setdefault(task, []).extend(pair)
    categories = {task: yes_no.mme_task(pairs).points for task, pairs in tasks.items()}
    perception = sum(categories.get(task, 0.0) for task in yes_no.PERCEPTION)
    cognition = sum(categories.get(task, 0.0) for task in yes_no.COGNITION)
    return Score(perception, "perception", points, {"cognition": cognition}, categories)


def choice_cell(item: Item, text: str, codebase: Codebase) -> str:
    """Return the submitted prediction: V1-1's script submits the letter that it parses, LLaVA's the whole answer."""
    return choices.first_letter(text, item.options) if codebase == "internvl" else text


def score_mmbench(items: Sequence[Item], answers: Answers, codebase: Codebase) -> Score:
    """Score MMBench: a question counts if it is answered correctly in every rotation of its options.

    Letters are compared for equality, as for LLaVA-1.5's published score. Further figures are the score by VLMEvalKit's
    rules, with which the server's judge begins, and the accuracy without rotations.
    """
    strict, matched, first = [], [], []
    points = {}
    for item in items:
        cell = choice_cell(item, answers[item.id], codebase)
        right = cell == item.gold[0]
        points[item.id] = float(right)
        strict.append((int(item.source_id), right))
        matched.append((int(item.source_id), choices.rule_match(cell, item.options) == item.gold[0]))
        if int(item.source_id) < choices.CIRCULAR:
            first.append(right)
    groups = {name: choices.circular(rows) for name, rows in (("strict", strict), ("rules", matched))}
    figures = {
        "circular, VLMEvalKit's rules without a judge": _mean(groups["rules"].values()),
        "without circular evaluation": _mean(first),
        "all rows": _mean(points.values()),
    }
    firsts = [item for item in items if int(item.source_id) < choices.CIRCULAR]
    passed = {item.id: float(groups["strict"][int(item.source_id)]) for item in firsts}
    kinds = _mean_by(firsts, passed, lambda item: item.record.get("l2-category", ""))
    kinds |= _mean_by(firsts, passed, lambda item: item.category)
    return Score(_mean(groups["strict"].values()), "circular accuracy", points, figures, kinds)


def score_ccbench(items: Sequence[Item], answers: Answers, codebase: Codebase) -> Score:
    """Score CCBench by equality of the letter."""
    return _plain(
        "accuracy", lambda item, text: choice_cell(item, text, codebase).strip() == item.gold[0], items, answers
    )


def score_seed(items: Sequence[Item], answers: Answers, codebase: Codebase) -> Score:
    """Score SEED-Bench by the first character."""
    return _plain("accuracy", lambda item, text: choices.seed_letter(text) == item.gold[0], items, answers)


def mmmu_answer(item: Item, text: str) -> str:
    """Return the submitted prediction: the letter for a multiple-choice question, else the answer."""
    return choices.first_letter(text, item.options) if item.options else text


def score_mmmu(items: Sequence[Item], answers: Answers, codebase: Codebase) -> Score:
    """Score MMMU, with disciplines as further figures."""

    def point(item: Item, text: str) -> float:
        answer = mmmu_answer(item, text)
        return answer in item.gold if item.options else mmmu.open_match(answer, item.gold)

    score = _plain("accuracy", point, items, answers)
    disciplines = _mean_by(items, score.points, lambda item: mmmu.SUBJECTS.get(item.category, ""))
    return Score(score.value, score.name, score.points, disciplines, score.categories)
