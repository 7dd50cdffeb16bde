"""Every scorer against the original's values, per item and overall."""

import hashlib
import statistics

import pytest
from support.evaluation_cases import cases, pairs

from internvl_jax.evaluation.scorers import choices, documents, gqa, mmmu, mmvet, vqa, yes_no

EXACT = {"rel": 0, "abs": 1e-9}


def close(value):
    return pytest.approx(value, **EXACT)


def test_contraction_table_is_whole():
    assert len(vqa.CONTRACTIONS) == 120
    assert vqa.CONTRACTIONS["dont"] == "don't"
    assert vqa.CONTRACTIONS["couldnt've"] == vqa.CONTRACTIONS["couldn'tve"] == "couldn't've"
    assert "shes" not in vqa.CONTRACTIONS


@pytest.mark.parametrize(("item", "expected"), pairs("vqa_normalize_m4c"))
def test_normalize_m4c(item, expected):
    assert vqa.normalize_m4c(item["text"]) == expected["normalized"]


def test_soft_accuracy_m4c():
    scores = []
    for item, expected in pairs("vqa_accuracy_m4c"):
        scores.append(vqa.soft_accuracy_m4c(item["prediction"], item["gt_answers"]))
        assert scores[-1] == close(expected["score"]), item
    assert statistics.fmean(scores) == close(cases("vqa_accuracy_m4c")["expected"]["overall"])


def test_soft_accuracy_official():
    bundle = cases("vqa_accuracy_official")
    expected = bundle["expected"]["official"]
    scores = {}
    for item, value in zip(bundle["items"], expected["per_item"], strict=True):
        score = 100 * vqa.soft_accuracy_official(item["prediction"], [a["answer"] for a in item["answers"]])
        assert round(score, 2) == pytest.approx(value["score_percent"], abs=1e-6), item
        for name in ("all", item["question_type"], item["answer_type"]):
            scores.setdefault(name, []).append(score)
    assert round(statistics.fmean(scores["all"]), 2) == expected["overall_percent_rounded_2"]
    for name, value in (expected["per_question_type"] | expected["per_answer_type"]).items():
        assert round(statistics.fmean(scores[name]), 2) == value, name


def test_edges_of_vqa():
    """Of more than 32 full stops the others stay; answers that differ in a tab are not the same for all ten."""
    assert vqa.normalize_m4c("b." * 40) == "b" * 32 + "b." * 8
    assert vqa.soft_accuracy_official("Red Car", ["red\tcar"] * 5 + ["red car"] * 5) == 1.0
    assert vqa.soft_accuracy_official("Red Car", ["red car"] * 10) == 0.0


def test_ten_people_are_needed():
    with pytest.raises(ValueError, match="9 annotators' answers"):
        vqa.soft_accuracy_m4c("a", ["a"] * 9)
    with pytest.raises(ValueError, match="11 annotators' answers"):
        vqa.soft_accuracy_official("a", ["a"] * 11)


def test_anls():
    scores = []
    for item, expected in pairs("anls"):
        scores.append(documents.anls(item["prediction"], item["answers"]))
        assert scores[-1] == close(expected["score"]), item
    assert statistics.fmean(scores) == close(cases("anls")["expected"]["overall"])


def test_relaxed_match():
    scores = []
    for item, expected in pairs("relaxed_accuracy"):
        accepted = [item["annotation"]] if isinstance(item["annotation"], str) else item["annotation"]
        scores.append(documents.relaxed_match(item["prediction"], accepted))
        assert scores[-1] == expected["reference"], item
    assert statistics.fmean(scores) == close(cases("relaxed_accuracy")["expected"]["overall_reference"])


def test_edges_of_relaxed_match():
    """5% is within the tolerance, of the model's answer; what is beyond is not."""
    assert documents.relaxed_match("20", ["21"])
    assert documents.relaxed_match("100", ["95"])
    assert not documents.relaxed_match("20", ["21.01"])
    assert not documents.relaxed_match("100", ["94.99"])
    assert not documents.relaxed_match("95", ["100"])  # 5 of 95


def test_exact_match():
    scores = []
    for item, expected in pairs("ai2d_exact_match"):
        accepted = [item["annotation"]] if isinstance(item["annotation"], str) else item["annotation"]
        scores.append(documents.exact_match(item["prediction"], accepted))
        assert scores[-1] == expected["score"], item
    assert statistics.fmean(scores) == close(cases("ai2d_exact_match")["expected"]["overall"])


def test_gqa():
    right, by_type = [], {}
    for item, expected in pairs("gqa"):
        assert gqa.gqa_answer(item["prediction"]) == expected["converted"]
        if item["is_balanced"]:
            correct = gqa.gqa_answer(item["prediction"]) == item["answer"]
            assert correct == expected["correct"], item
            right.append((correct, gqa.is_open(item["structural"])))
            by_type.setdefault(item["structural"], []).append(correct)
    expected = cases("gqa")["expected"]
    assert 100 * statistics.fmean(correct for correct, _ in right) == close(expected["accuracy_percent"])
    assert 100 * statistics.fmean(c for c, is_open in right if is_open) == close(expected["open_percent"])
    assert 100 * statistics.fmean(c for c, is_open in right if not is_open) == close(expected["binary_percent"])
    for name, value in expected["per_structural_type"].items():
        assert (100 * statistics.fmean(by_type[name]), len(by_type[name])) == (close(value["percent"]), value["count"])


def test_pope():
    answers = {}
    for item, expected in pairs("pope"):
        parsed = yes_no.pope_answer(item["response"])
        assert parsed == expected["parsed"], item
        answers.setdefault(item["category"], []).append((parsed, item["label"]))
    expected = cases("pope")["expected"]
    counts = {name: yes_no.pope_counts(part) for name, part in answers.items()}
    for name, values in expected["per_category"].items():
        ours = counts[name]
        assert (ours.tp, ours.fp, ours.tn, ours.fn) == tuple(values[key] for key in ("TP", "FP", "TN", "FN"))
        for key in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
            assert getattr(ours, key) == close(values[key]), (name, key)
    assert 100 * statistics.fmean(c.f1 for c in counts.values()) == close(expected["overall_f1_percent"])
    assert yes_no.pope_counts([("no", "yes")]).f1 == 0


def test_mme():
    tasks = {}
    for item, expected in pairs("mme"):
        cleaned = yes_no.mme_clean(item["response"])
        assert cleaned == expected["processed"], item
        assert yes_no.mme_answer(cleaned) == expected["parsed"], item
        tasks.setdefault(item["task"], []).append((expected["parsed"], item["gt"].lower()))
    expected = cases("mme")["expected"]
    scores = {task: yes_no.mme_task(answers) for task, answers in tasks.items()}
    for task, value in expected["task_score"].items():
        detail = expected["task_detail"][task]
        assert scores[task].points == close(value), task
        assert (scores[task].accuracy, scores[task].accuracy_plus) == (close(detail["acc"]), close(detail["acc_plus"]))
        assert scores[task].other == detail["other"]
    assert sum(scores[task].points for task in yes_no.PERCEPTION) == close(expected["perception_total"])
    assert sum(scores[task].points for task in yes_no.COGNITION) == close(expected["cognition_total"])
    with pytest.raises(ValueError, match="3 answers"):
        yes_no.mme_task([("yes", "yes")] * 3)


FUNCTIONS = {
    "mme_clean": lambda item: yes_no.mme_clean(item["response"]),
    "mcq_letter_mmbench_ccbench_mmvp_mmmu": lambda item: choices.first_letter(item["response"], item["options"]),
    "mcq_letter_scienceqa": lambda item: choices.science_letter(item["response"], item["options"]),
    "gqa_convert": lambda item: gqa.gqa_answer(item["response"]),
    "pope_yes_no": lambda item: yes_no.pope_answer(item["response"]),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_post_processing(function):
    chosen = [(item, expected) for item, expected in pairs("answer_postprocess") if item["function"] == function]
    assert len(chosen) >= 25
    for item, expected in chosen:
        assert FUNCTIONS[function](item) == expected["output"], item


def test_letters_of_hardly_any_answer():
    """Where the reference crashes: an empty answer, and two characters that begin with "("."""
    options = {"A": "a cat", "B": "a dog"}
    assert choices.first_letter("  ", options) == choices.science_letter("", options) == ""
    assert choices.science_letter("(a", options) == "(a"
    assert choices.seed_letter("") == ""


def test_scienceqa_internvl():
    right = []
    for item, expected in pairs("scienceqa_internvl"):
        letter = choices.science_letter(item["response"], dict(zip(choices.LETTERS, item["choices"])))
        assert letter == expected["extracted"], item
        right.append(letter == choices.LETTERS[item["answer_index"]])
        assert right[-1] == expected["correct"]
    assert statistics.fmean(right) == close(cases("scienceqa_internvl")["expected"]["accuracy"])


def test_scienceqa_llava():
    right, of_images = [], []
    for item, expected in pairs("scienceqa_llava"):
        parsed = choices.FAILED if item["response"] is None else choices.science_letter_llava(item["response"])
        assert parsed == expected["parsed"], item
        letters = choices.LETTERS[: len(item["choices"])]
        right.append(parsed in letters and letters.index(parsed) == item["answer_index"])
        assert right[-1] == expected["correct"], item
        if item["has_image"] and item["response"] is not None:
            of_images.append(right[-1])
    expected = cases("scienceqa_llava")["expected"]
    assert 100 * statistics.fmean(right) == close(expected["accuracy_percent"])
    assert (sum(of_images), len(of_images)) == (expected["image_correct"], expected["image_total"])


@pytest.mark.parametrize("name", ["mmbench_en", "mmbench_cn"])
def test_mmbench(name):
    strict, processed, raw = [], [], []
    for item, expected in pairs(name):
        options = {letter: item[letter] for letter in "ABCD" if item[letter] is not None}
        cell = choices.first_letter(item["response"], options)
        assert cell == expected["internvl_prediction"], item
        found, found_raw = choices.rule_match(cell, options), choices.rule_match(item["response"], options)
        assert (found, found_raw) == (expected["infer_processed_feb2024"], expected["infer_raw_feb2024"]), item
        strict.append((item["index"], cell == item["answer"]))
        processed.append((item["index"], found == item["answer"]))
        raw.append((item["index"], found_raw == item["answer"]))
    expected = cases(name)["expected"]
    assert statistics.fmean(choices.circular(strict).values()) == close(expected["circular_strict_exact_match"])
    for rows, key in ((processed, "on_processed"), (raw, "on_raw")):
        value, groups = expected[f"circular_vlmevalkit_feb2024_{key}"], choices.circular(rows)
        assert {str(index): int(right) for index, right in groups.items()} == value["hit_by_group"]
        assert statistics.fmean(groups.values()) == close(value["overall"])


def test_seed():
    right = {}
    for item, expected in pairs("seed"):
        correct = choices.seed_letter(item["prediction"]) == item["answer"]
        assert correct == expected["correct"], item
        right.setdefault(item["data_type"], []).append(correct)
    expected = cases("seed")["expected"]
    for kind in ("image", "video"):
        assert 100 * statistics.fmean(right[kind]) == close(expected[f"{kind}_percent"])


def test_mmmu():
    rows = []
    for item, expected in pairs("mmmu_val"):
        gold = [item["ground_truth"]] if isinstance(item["ground_truth"], str) else item["ground_truth"]
        if item["question_type"] == "multiple-choice":
            correct = item["prediction"] in gold
        else:
            correct = mmmu.open_match(item["prediction"], gold)
        assert correct == expected["correct"], item
        rows.append((mmmu.subject_of(item["id"]), correct))
    bundle = cases("mmmu_val")["expected"]
    assert statistics.fmean(correct for _, correct in rows) == close(bundle["overall"])
    for name, value in bundle["printed"].items():
        discipline = name.removeprefix("Overall-")
        part = [
            correct for subject, correct in rows if name in ("Overall", subject) or mmmu.SUBJECTS[subject] == discipline
        ]
        assert (len(part), round(statistics.fmean(part), 3)) == (value["num"], value["acc"]), name
    assert len(mmmu.SUBJECTS) == 30


def test_edges_of_mmmu():
    """Of several cues in the last line the one nearest to its end counts; "=" is a cue there only."""
    for answer in ("the answer is 3 + 4 = 7", "so the result is 7", "3 + 4 = 8, therefore 7", "x = 3\nthus it is 7"):
        assert mmmu.open_match(answer, ["7"]), answer
        assert not mmmu.open_match(answer, ["3"]), answer
    assert mmmu.open_match("it equals\nx = 3", ["3"])
    assert mmmu.candidate_answers("y is 2\nso x is 3 = z") == [2.0, " z", "z ", 2.0]


def test_mmvet_summary():
    bundle = cases("mmvet_aggregate")
    items, expected = bundle["items"], bundle["expected"]
    summary = mmvet.summarize(
        {item["id"]: item["capability"] for item in items}, {item["id"]: item["scores"] for item in items}
    )
    assert round(summary.total, 1) == expected["total_percent_rounded_1"]
    assert round(summary.deviation, 1) == expected["std_rounded_1"]
    assert [round(run, 1) for run in summary.runs] == expected["runs_rounded_1"]
    assert {k: round(v, 1) for k, v in summary.capabilities.items()} == expected["capability_percent_rounded_1"]
    assert {k: round(v, 1) for k, v in summary.combinations.items()} == expected["integration_percent_rounded_1"]
    with pytest.raises(ValueError, match=r"\[1, 2\] grades"):
        mmvet.summarize({"a": ["rec"], "b": ["rec"]}, {"a": [0.0], "b": [0.0, 1.0]})


def test_mmvet_judge():
    """What is sent after the few-shot prompt, at which temperatures, and what comes of the replies."""
    for item, expected in pairs("mmvet_judge"):
        replies, calls = iter(item["judge_replies_in_order"]), []

        def ask(message, temperature, max_tokens, replies=replies, calls=calls):
            calls.append((message, temperature, max_tokens))
            return next(replies)

        message = mmvet.judge_message("PROMPT", item["question"], item["ground_truth"], item["prediction"])
        grade = mmvet.grade(ask, message)
        if expected["score_is_nan"]:  # which the official evaluator accepts
            assert (grade.score, len(calls)) == (0.1, 2)
            continue
        assert (grade.score, len(grade.replies)) == (expected["score"], expected["replies_used"]), item
        for (sent, temperature, max_tokens), call in zip(calls, expected["calls"], strict=True):
            assert sent.endswith(call["content_tail"]) or call["content_tail"].endswith(sent.removeprefix("PROMPT")), (
                item
            )
            assert (temperature, max_tokens) == (call["temperature"], call["max_tokens"])


def test_mmvet_prompt_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(mmvet, "PROMPT_SHA256", hashlib.sha256(b"Compare.\n\nA | B").hexdigest())
    script, text, other = tmp_path / "mm-vet_evaluator.py", tmp_path / "prompt.txt", tmp_path / "other.txt"
    script.write_text('import nothing_that_exists\nprompt = """Compare.\n\nA | B"""\n')
    text.write_text("Compare.\n\nA | B\n")
    other.write_text("Compare well.")
    assert mmvet.read_prompt(script) == mmvet.read_prompt(text) == "Compare.\n\nA | B"
    with pytest.raises(ValueError, match=r"other\.txt does not contain MM-Vet's few-shot prompt"):
        mmvet.read_prompt(other)
