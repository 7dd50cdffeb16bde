"""What a small mistake in a reader, a scorer, a submission or a report would change."""

import json

import pytest
from support.evaluation_files import image_base64, lines, table, whole

from internvl_jax.evaluation import run_report as report
from internvl_jax.evaluation import scoring
from internvl_jax.evaluation.answering import pending_job
from internvl_jax.evaluation.benchmark_run import EvaluationOptions, RunInputs, prepare_run
from internvl_jax.evaluation.benchmark_table import BENCHMARKS
from internvl_jax.evaluation.datasets.data_folder import DataFolder
from internvl_jax.evaluation.datasets.items import EvaluationError, Item, distinct
from internvl_jax.evaluation.predictions import read_predictions
from internvl_jax.evaluation.wrong_page import wrong_page


def read(root, name, codebase="internvl"):
    return BENCHMARKS[name].read(DataFolder(root, BENCHMARKS[name].folder), codebase)


def test_halves_of_chartqa_count_alike():
    items = [Item(str(n), n, "?", None, ("1",), "human" if n == 0 else "augmented") for n in range(4)]
    score = scoring.score_chartqa(items, {"0": "1", "1": "1", "2": "x", "3": "x"}, "internvl")
    assert score.categories == {"human": 100, "augmented": pytest.approx(100 / 3)}
    assert score.value == pytest.approx((100 + 100 / 3) / 2)


def test_rotations_begin_at_a_million():
    record = {"l2-category": "logic"}
    options = {"A": "a", "B": "b"}
    items = [Item(str(n), n, "?", None, ("A",), "c", options, record) for n in (0, 1_000_000, 1, 2_000_001)]
    score = scoring.score_mmbench(items, {"0": "A", "1000000": "B", "1": "A", "2000001": "A"}, "internvl")
    assert score.value == 50
    assert score.figures["without circular evaluation"] == 100
    assert score.figures["all rows"] == 75
    assert score.figures["circular, VLMEvalKit's rules without a judge"] == 50
    assert score.categories == {"logic": 50, "c": 50}


def test_both_submissions_of_vqav2(tmp_path):
    """As it was said, and cleaned; questions that were not asked are answered with nothing."""
    lines(tmp_path / "vqav2_testdev.jsonl", [{"image": "a.jpg", "question": "q", "question_id": n} for n in (2, 1)])
    whole(
        tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": [{"question_id": n} for n in (3, 2, 1)]}
    )
    items = read(tmp_path, "vqav2-testdev")
    for codebase, said in (("internvl", "A Red!"), ("llava", "red")):
        folder = DataFolder(tmp_path, "vqav2")
        written = BENCHMARKS["vqav2-testdev"].submit(items, {"1": "A Red!", "2": "Two"}, codebase, folder, tmp_path)
        raw, clean = (json.loads(path.read_text()) for path in written)
        two = "2" if codebase == "llava" else "Two"
        assert raw == [{"question_id": n, "answer": text} for n, text in ((3, ""), (2, two), (1, said))]
        assert clean == [{"question_id": n, "answer": text} for n, text in ((3, ""), (2, "2"), (1, "red"))]
    lines(tmp_path / "vqav2_testdev.jsonl", [{"image": "a.jpg", "question": "q", "question_id": 4}])
    with pytest.raises(EvaluationError, match="has no question 4, for which there is an answer"):
        BENCHMARKS["vqav2-testdev"].submit(read(tmp_path, "vqav2-testdev"), {"4": "a"}, "internvl", folder, tmp_path)


def test_answers_by_image_and_question(tmp_path):
    """TextVQA's questions of LLaVA's file go by image: the annotation of the same question counts, in any case."""
    row = {"question_id": "img", "image": "img.jpg", "text": "What Is it?\nReference OCR token: x"}
    lines(tmp_path / "llava_textvqa_val_v051_ocr.jsonl", [row, row | {"text": "Who?\nReference OCR token: x"}])
    known = [
        {"question_id": 1, "image_id": "img", "question": "Who?", "answers": ["b"] * 10},
        {"question_id": 2, "image_id": "img", "question": "what is It?", "answers": ["a"] * 10},
    ]
    whole(tmp_path / "TextVQA_0.5.1_val.json", {"data": known})
    items = read(tmp_path, "textvqa-ocr", "llava")
    assert [(item.id, item.gold[0]) for item in items] == [("img#1", "a"), ("img#2", "b")]


def test_ten_people_no_more(tmp_path):
    lines(tmp_path / "vqav2_val.jsonl", [{"image": "a.jpg", "question": "q", "question_id": 1}])
    people = [{"question_id": 1, "answers": ["a"] * 11}]
    whole(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": people})
    with pytest.raises(EvaluationError, match="question 1 has 11 annotators' answers, not 10"):
        read(tmp_path, "vqav2-val")


def test_predictions_of_mme_as_llava_names_them(tmp_path):
    """The image's whole path, and the question without its instruction; two questions share an image."""
    items = [
        Item("", "OCR/1.png", f"{text} Please answer yes or no.", "OCR/1.png", ("yes",), "OCR")
        for text in ("Is it  here?", "Is it there?")
    ]
    items = distinct(items)
    assert [item.id for item in items] == ["OCR/1.png#1", "OCR/1.png#2"]
    asked = [("Is it there?", "No"), ("Is it here?", "Yes")]
    short = "Answer the question using a single word or phrase."
    lines(
        tmp_path / "a.jsonl",
        [{"question_id": "OCR/images/1.png", "prompt": f"{text}\n{short}", "text": said} for text, said in asked],
    )
    assert read_predictions(tmp_path / "a.jsonl", items) == {"OCR/1.png#1": "Yes", "OCR/1.png#2": "No"}


def test_ids_come_before_other_names(tmp_path):
    items = [Item("a.jpg", "a.jpg", "?", None), Item("7", 7, "?", None, aliases=("a.jpg", "b.jpg"))]
    lines(tmp_path / "a.jsonl", [{"id": "a.jpg", "answer": "first"}, {"image": "b.jpg", "answer": "second"}])
    assert read_predictions(tmp_path / "a.jsonl", items) == {"a.jpg": "first", "7": "second"}


def test_video_questions_of_seed_are_left_out(tmp_path):
    kinds = (1, 9, 10, 12)
    lines(tmp_path / "seed.jsonl", [{"question_id": str(n), "image": "a.png", "text": "q"} for n in kinds])
    truths = [{"question_id": n, "question_type_id": n, "answer": "A"} for n in kinds]
    whole(tmp_path / "SEED-Bench.json", {"question_type": {"Nine": 9}, "questions": truths})
    assert [(item.id, item.category) for item in read(tmp_path, "seed")] == [("1", "1"), ("9", "Nine")]


def test_questions_of_gqa(tmp_path):
    """Only the balanced ones; a file of balanced questions need not say so. Open and binary ones are told apart."""
    row = {"question": "q", "imageId": "n1", "answer": "red", "types": {"structural": "query"}}
    chosen = row | {"types": {"structural": "verify"}, "isBalanced": True}
    whole(tmp_path / "testdev_balanced_questions.json", {"1": row, "2": row | {"isBalanced": False}, "3": chosen})
    items = read(tmp_path, "gqa")
    assert [item.id for item in items] == ["1", "3"]
    assert scoring.score_gqa(items, {"1": "Red.", "3": "no"}, "internvl").figures == {"open": 100, "binary": 0}


def test_answers_of_ccbench_are_stripped():
    item = Item("1", 1, "?", None, ("A",), "c", {"A": "a", "B": "b"})
    for codebase, text, points in (
        ("llava", " A\n", 1),
        ("llava", "A.", 0),
        ("internvl", "A.", 1),
        ("internvl", "B", 0),
    ):
        assert scoring.score_ccbench([item], {"1": text}, codebase).points == {"1": points}


def test_an_image_of_mme_counts_with_both_questions():
    items = [Item(str(n), n, "?", None, ("yes",), "color", {}, {"pair": n // 2}) for n in range(3)]
    score = scoring.score_mme(items, {"0": "Yes", "1": "No", "2": "No"}, "internvl")
    assert score.value == 50  # half of the questions, no image: the third has no partner
    cognition = [Item("9", 9, "?", None, ("no",), "code_reasoning", {}, {"pair": n}) for n in (0, 0)]
    assert scoring.score_mme(cognition, {"9": "no"}, "internvl").figures == {"cognition": 200}


def test_several_letters_may_be_right():
    item = Item("1", "1", "?", None, ("A", "C"), "Math", {"A": "a", "B": "b", "C": "c"})
    for text, points in (("A", 1), ("C", 1), ("B", 0)):
        score = scoring.score_mmmu([item], {"1": text}, "internvl")
        assert (score.points, score.figures) == ({"1": points}, {"Science": 100 * points})


@pytest.fixture
def made(tmp_path):
    """A planned run of two questions of AI2D."""
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    row = {"image": "1.png", "answer": "A"}
    texts = ("short", "a longer question", "the longest question of all", "middling")
    rows = [row | {"question": text, "question_id": n} for n, text in enumerate(texts)]
    lines(tmp_path / "ai2diagram/test_vlmevalkit.jsonl", rows)
    return prepare_run(RunInputs("ai2d", "internvl", tmp_path, tmp_path / "run"), EvaluationOptions(num_beams=1))


def test_the_longest_prompts_come_first(made):
    assert list(pending_job(made).pending) == [2, 1, 3, 0]


def test_answers_that_are_partly_right_are_on_the_page(made):
    score = scoring.Score(50, "accuracy", {"0": 0.0, "1": 0.3, "2": 0.9999, "3": 1.0})
    page = wrong_page(made, dict.fromkeys("0123", "B <b>"), score)
    assert "3 of 4 answers not fully right" in page
    assert page.count("<section ") == page.count("B &lt;b&gt;") == page.count('<img src="data:image/jpeg') == 3
    for text in (
        "short",
        "<dt>expected</dt><dd>A</dd>",
        "<dt>answered</dt>",
        "<dd>0.30</dd>",
        "a longer question",
        "the longest question of all",
    ):
        assert text in page
    assert "middling" not in page
    (made.folder.root / "1.png").unlink()  # since it was read
    page = wrong_page(made, dict.fromkeys("0123", "B"), score)
    assert page.count("<section ") == page.count("1.png does not exist") == 3


def test_the_table_says_what_is_not_comparable(tmp_path):
    values = {
        "benchmark": "pope",
        "model": "m",
        "limit": None,
        "score": {"value": 50.04},
        "generation": {"num_beams": 5},
    }
    for name, changed, cell in (
        ("beams", {}, "| POPE | 85.9 | 87.1 | 87.2 | 87.1 | 50.0 (5 beams) |"),
        ("greedy", {"generation": {"num_beams": 1}}, "| POPE | 85.9 | 87.1 | 87.2 | 87.1 | 50.0 |"),
        ("judged", {"judge": {"same": False}}, "| POPE | 85.9 | 87.1 | 87.2 | 87.1 | 50.0 (5 beams, another judge) |"),
        ("none", {"score": None}, "| POPE | 85.9 | 87.1 | 87.2 | 87.1 |"),
    ):
        whole(tmp_path / name / "report.json", values | changed)
        assert cell in report.table([tmp_path / name])
    assert report.table([tmp_path / "none"])[-1] == f"{tmp_path / 'none'}: left out (no score)"
    whole(tmp_path / "nano" / "report.json", values | {"model": "nano"})
    for runs, notes in ((["nano"], 1), (["nano", "beams"], 1), (["beams"], 0)):
        shown = report.table([tmp_path / name for name in runs])
        assert sum("nano is a demonstration model" in line for line in shown) == notes
    whole(tmp_path / "other/report.json", {"mine": 1})
    with pytest.raises(EvaluationError, match=r"report\.json is not the report of a run: it lacks 'benchmark'"):
        report.table([tmp_path / "other"])


def test_images_that_rows_share(tmp_path):
    """A row of MMBench may name another row in place of an image."""
    row = {"index": 7, "question": "q", "A": "a", "B": "b", "answer": "A", "image": image_base64()}
    table(tmp_path / "mmbench_dev_20230712.tsv", [row, row | {"index": 1_000_007, "image": "7"}])
    first, second = read(tmp_path, "mmbench-en-dev")
    assert first.image == second.image != b""
