"""Our scorers beside those of other packages, on the golden cases and on real predictions.

anls comes with the extra `test`. lmms-eval brings 48 dependencies, of which its scorers' files need one:

    pip install --no-deps lmms-eval==0.7.3 loguru && pytest tests/unit/evaluation/test_others.py
"""

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
from support.evaluation_cases import cases, pairs, real

from internvl_jax.evaluation.scorers import choices, documents, vqa, yes_no


@pytest.fixture(scope="module")
def lmms_eval():
    """A function that imports a task's file alone: the packages around it import all of their dependencies."""
    pytest.importorskip("loguru")
    found = importlib.util.find_spec("lmms_eval")
    if found is None:
        pytest.skip("lmms-eval is not installed")
    root = Path(found.origin).parent
    packages = {name: root / name for name in ("tasks", "tasks/_task_utils")}
    for name, path in packages.items():
        package = types.ModuleType(f"lmms_eval.{name.replace('/', '.')}")
        package.__path__ = [str(path)]
        sys.modules[package.__name__] = package

    def load(task):
        package = types.ModuleType(f"lmms_eval.tasks.{task}")
        package.__path__ = [str(root / "tasks" / task)]
        sys.modules[package.__name__] = package
        return importlib.import_module(f"{package.__name__}.utils")

    yield load
    for name in [name for name in sys.modules if name.startswith("lmms_eval")]:
        del sys.modules[name]


def differing(scores):
    """The cases of (ours, theirs, case) where the two are not the same."""
    return [case for ours, theirs, case in scores if ours != pytest.approx(theirs, abs=1e-9)]


def test_anls():
    """The package divides by the length of the cleaned texts, and gives nothing for a similarity of exactly one half;
    the challenge's script, and ours, do neither."""
    anls = pytest.importorskip("anls")
    scores = []
    for item, _ in pairs("anls"):
        ours = documents.anls(item["prediction"], item["answers"])
        scores.append((ours, anls.anls_score(item["prediction"], item["answers"]), item))
    others = differing(scores)
    assert (len(scores), len(others)) == (140, 18)
    for item in others:
        blanks = any(text != " ".join(text.split()) for text in (item["prediction"], *item["answers"]))
        assert blanks or documents.anls(item["prediction"], item["answers"]) == 0.5, item


def test_vqa_m4c(lmms_eval):
    task = lmms_eval("textvqa")
    scores = []
    for item, _ in pairs("vqa_accuracy_m4c"):
        doc = {"answers": list(item["gt_answers"]), "question_id": 0}
        theirs = task.textvqa_process_results(doc, [item["prediction"]])["exact_match"]
        scores.append((vqa.soft_accuracy_m4c(item["prediction"], item["gt_answers"]), theirs, item))
    assert differing(scores) == []


def test_vqa_official(lmms_eval):
    """lmms-eval cleans answers where all ten people agree, too; the challenge's toolkit, and ours, do not."""
    task = lmms_eval("vqav2")
    scores = []
    for item in cases("vqa_accuracy_official")["items"]:
        people = [answer["answer"] for answer in item["answers"]]
        doc = {"answers": [{"answer": text, "answer_id": n} for n, text in enumerate(people)], "question_id": 0}
        theirs = task.vqav2_process_results(doc, [item["prediction"]])["exact_match"]
        scores.append((vqa.soft_accuracy_official(item["prediction"], people), theirs, people))
    others = differing(scores)
    assert (len(scores), len(others)) == (120, 2)
    assert all(len(set(people)) == 1 for people in others)


def test_relaxed_accuracy(lmms_eval):
    """The reference swaps the two arguments of this function, and V1-1's published figure was made so."""
    relaxed = lmms_eval("chartqa").relaxed_correctness
    scores, straight = [], []
    for item, _ in pairs("relaxed_accuracy"):
        accepted = [item["annotation"]] if isinstance(item["annotation"], str) else item["annotation"]
        ours, answer = documents.relaxed_match(item["prediction"], accepted), item["prediction"].strip()
        scores.append((ours, any(relaxed(text, answer) for text in accepted), item))
        straight.append((ours, any(relaxed(answer, text) for text in accepted), item))
    assert differing(scores) == []
    assert len(differing(straight)) == 11


def test_pope(lmms_eval):
    """lmms-eval takes a whole answer for yes or no, and all categories together; ours hears what POPE's script hears,
    and takes the mean of the categories, as the published figures do."""
    task = lmms_eval("pope")
    by_category = {}
    for item, _ in pairs("pope"):
        answer = yes_no.pope_answer(item["response"])
        row = task.pope_process_results({"answer": item["label"], "question_id": 0}, [answer])["pope_f1_score"]
        by_category.setdefault(item["category"], []).append((row, (answer, item["label"])))
    for rows in by_category.values():
        counts, theirs = yes_no.pope_counts(pair for _, pair in rows), [row for row, _ in rows]
        assert counts.f1 == pytest.approx(task.pope_aggregate_f1_score(theirs))
        assert counts.precision == pytest.approx(task.pope_aggregate_precision(theirs))
        assert counts.recall == pytest.approx(task.pope_aggregate_recall(theirs))


def test_mme(lmms_eval):
    """Points are the same from parsed answers on; lmms-eval also hears "y", "n", and a word behind blanks."""
    task = lmms_eval("mme")
    rows, others = {}, set()
    for item, expected in pairs("mme"):
        if task.parse_pred_ans(yes_no.mme_clean(item["response"])) != expected["parsed"]:
            others.add(item["response"])
        doc = {"question_id": item["image"], "category": item["task"], "answer": item["gt"]}
        (name, row), *_ = task.mme_process_results(doc, [expected["parsed"]]).items()
        rows.setdefault(name, []).append(row)
    expected = cases("mme")["expected"]
    assert task.mme_aggregate_results(rows["mme_perception_score"]) == pytest.approx(expected["perception_total"])
    assert task.mme_aggregate_results(rows["mme_cognition_score"]) == pytest.approx(expected["cognition_total"])
    assert others == {"y", "n", "  yes"}


def test_mme_real(lmms_eval):
    """LLaVA-1.5-13B's answers: 1531.3 by lmms-eval too."""
    task = lmms_eval("mme")
    answers = {}
    for line in real("mme_answers.jsonl").read_text(encoding="utf-8").split("\n"):
        if line:
            row = json.loads(line)
            name, _, image = row["question_id"].partition("/")
            key = name, Path(image).stem, row["prompt"].partition("\n")[0].strip()
            answers[key] = row["text"]
    rows = []
    for path in sorted(real("mme_labels").glob("*.txt")):
        for line in path.read_text(encoding="utf-8").strip().split("\n"):
            image, question, label = line.split("\t")
            asked = question.replace("Please answer yes or no.", "").strip()
            doc = {"question_id": image, "category": path.stem, "answer": label}
            rows.append(task.mme_process_results(doc, [answers[path.stem, Path(image).stem, asked]]))
    perception = [row["mme_perception_score"] for row in rows if "mme_perception_score" in row]
    assert f"{task.mme_aggregate_results(perception):.1f}" == "1531.3"


def test_scienceqa_llava(lmms_eval):
    """lmms-eval takes "B.", "B.x", "b" and " B " for an answer, LLaVA's script does not; nor "The answer is B."."""
    task = lmms_eval("scienceqa")
    others = set()
    for item, expected in pairs("scienceqa_llava"):
        if item["response"] is not None:
            doc = {"choices": item["choices"], "answer": item["answer_index"]}
            theirs = task.sqa_process_results(doc, [item["response"]])["exact_match"]
            if bool(theirs) != expected["correct"]:
                others.add(item["response"])
    assert all("The answer is" in text or choices.science_letter_llava(text) == choices.FAILED for text in others)
    assert {"b", "A.x", " A ", "B."} <= others
