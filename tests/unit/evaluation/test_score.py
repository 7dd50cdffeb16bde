"""Reading data and predictions, prompts and scores: the replayed scripts, real predictions, and what is refused."""

import json

import pytest
from support.evaluation_cases import MMBENCH_TABLES, REAL, cases, real
from support.evaluation_files import lines, mme_files, table, whole

from internvl_jax.cli.eval import WatchedAnswers
from internvl_jax.cli.main import main
from internvl_jax.evaluation.benchmark_table import BENCHMARKS
from internvl_jax.evaluation.datasets.data_folder import DataFolder
from internvl_jax.evaluation.datasets.items import EvaluationError, Item
from internvl_jax.evaluation.predictions import read_predictions
from internvl_jax.evaluation.scorers import mmvet

V1_1 = {item["benchmark"]: item for item in cases("pipeline_internvl_v1_1")["items"]}
LLAVA = {item["benchmark"]: item for item in cases("pipeline_llava_v1_0")["items"]}


def replayed(case, root, name, codebase="internvl"):
    """(benchmark, items, answers, prompts) of a replayed script."""
    benchmark = BENCHMARKS[name]
    items = benchmark.read(DataFolder(root, benchmark.folder), codebase)
    assert len(items) == len(case["cases"])
    answers = {item.id: c["response"] for item, c in zip(items, case["cases"])}
    return benchmark, items, answers, [benchmark.prompt(item, codebase) for item in items]


def rows(case):
    return [c["record"] for c in case["cases"]]


VQA = {
    "textvqa_val": ("textvqa", "textvqa/textvqa_val.jsonl", "textvqa/textvqa_val_annotations.json"),
    "textvqa_val_ocr": ("textvqa-ocr", "textvqa/textvqa_val_llava.jsonl", "textvqa/textvqa_val_annotations.json"),
    "okvqa_val": ("okvqa", "okvqa/okvqa_val.jsonl", "okvqa/mscoco_val2014_annotations.json"),
    "vizwiz_val": ("vizwiz-val", "vizwiz/vizwiz_val.jsonl", "vizwiz/vizwiz_val_annotations.json"),
    "vqav2_val": ("vqav2-val", "vqav2/vqav2_val.jsonl", "vqav2/v2_mscoco_val2014_annotations.json"),
}


def check(case, prompts, expected_key="expected_question"):
    assert prompts == [c[expected_key] for c in case["cases"]]


@pytest.mark.parametrize("key", VQA)
def test_vqa_rows(tmp_path, key):
    name, questions, annotations = VQA[key]
    case = V1_1[key]
    lines(tmp_path / questions, rows(case))
    whole(tmp_path / annotations, {"annotations": case["annotations"]})
    benchmark, items, answers, prompts = replayed(case, tmp_path, name)
    check(case, prompts)
    score = benchmark.score(items, answers, "internvl")
    assert score.value == pytest.approx(100 * case["score"], abs=1e-6)
    generation = benchmark.generation("internvl", 1)
    assert {k: case["generation"][k] for k in generation} == generation


SIMPLE = {
    "ai2diagram_test": ("ai2d", "ai2diagram/test_vlmevalkit.jsonl"),
    "docvqa_val": ("docvqa-val", "docvqa/val.jsonl"),
    "infographicsvqa_val": ("infovqa-val", "infographicsvqa/val.jsonl"),
    "sqa_test": ("scienceqa", "scienceqa/scienceqa_test_img.jsonl"),
}


@pytest.mark.parametrize("key", SIMPLE)
def test_rows_of_one_file(tmp_path, key):
    name, path = SIMPLE[key]
    case = V1_1[key]
    lines(tmp_path / path, rows(case))
    benchmark, items, answers, prompts = replayed(case, tmp_path, name)
    check(case, prompts)
    score = benchmark.score(items, answers, "internvl")
    if "score" in case:
        assert score.value == pytest.approx(100 * case["score"], abs=1e-6)
    else:
        assert f"Overall ANLS: {score.value / 100:.4f}" == case["score_printed"]
    generation = benchmark.generation("internvl", 1)
    assert {k: case["generation"][k] for k in generation} == generation


def test_chartqa(tmp_path):
    halves = {half: V1_1[f"chartqa_test_{half}"] for half in ("human", "augmented")}
    for half, case in halves.items():
        lines(tmp_path / f"chartqa/test_{half}.jsonl", rows(case))
    benchmark = BENCHMARKS["chartqa"]
    items = benchmark.read(DataFolder(tmp_path, "chartqa"), "internvl")
    replayed_cases = [c for case in halves.values() for c in case["cases"]]
    assert [benchmark.prompt(item, "internvl") for item in items] == [c["expected_question"] for c in replayed_cases]
    answers = {item.id: c["response"] for item, c in zip(items, replayed_cases, strict=True)}
    score = benchmark.score(items, answers, "internvl")
    expected = {half: 100 * case["score"] for half, case in halves.items()}
    assert score.categories == pytest.approx(expected, abs=1e-6)
    assert score.value == pytest.approx(sum(expected.values()) / 2, abs=1e-6)


SERVER = {
    "vqav2_testdev": ("vqav2-testdev", "vqav2/vqav2_testdev.jsonl"),
    "vizwiz_test": ("vizwiz-test", "vizwiz/vizwiz_test.jsonl"),
    "docvqa_test": ("docvqa-test", "docvqa/test.jsonl"),
    "mmvet": ("mm-vet", "mm-vet/llava-mm-vet.jsonl"),
}


@pytest.mark.parametrize("key", SERVER)
def test_rows_that_others_score(tmp_path, key):
    name, path = SERVER[key]
    lines(tmp_path / path, rows(V1_1[key]))
    benchmark, _, _, prompts = replayed(V1_1[key], tmp_path, name)
    check(V1_1[key], prompts)
    assert benchmark.score is None
    generation = benchmark.generation("internvl", 1)
    assert {k: V1_1[key]["generation"][k] for k in generation} == generation


def gqa_file(records):
    types = {"structural": "query", "semantic": "rel"}
    return {
        str(r["question_id"]): {
            "question": r["question"],
            "imageId": r["image"].split("/")[-1].split(".")[0],
            "answer": r["answer"],
            "isBalanced": True,
            "types": types,
        }
        for r in records
    }


def test_gqa(tmp_path):
    case = V1_1["gqa_testdev_llava"]
    whole(tmp_path / "testdev_balanced_questions.json", gqa_file(rows(case)))
    benchmark, items, answers, prompts = replayed(case, tmp_path, "gqa")
    check(case, prompts)
    score = benchmark.score(items, answers, "internvl")
    assert f"Accuracy: {score.value:.2f}%" == case["score_printed"]
    assert items[0].image == "n76034513.jpg"


def pope_files(root, records, labels):
    lines(root / "pope/llava_pope_test.jsonl", records)
    for name, answers in labels.items():
        asked = [r for r in records if r["category"] == name]
        lines(
            root / f"pope/coco/coco_pope_{name}.json",
            [
                {"question_id": n, "image": r["image"], "text": r["text"].split("\n")[0], "label": label}
                for n, (r, label) in enumerate(zip(asked, answers, strict=True), 1)
            ],
        )


def test_pope(tmp_path):
    case = V1_1["pope"]
    pope_files(tmp_path, rows(case), case["labels"])
    benchmark, items, answers, prompts = replayed(case, tmp_path, "pope")
    check(case, prompts)
    score = benchmark.score(items, answers, "internvl")
    assert f"Overall F1: {score.value:.2f}" == case["score_printed"]
    path = tmp_path / "pope/coco/coco_pope_random.json"
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    with pytest.raises(EvaluationError, match="5 labels for 4 questions"):
        benchmark.read(DataFolder(tmp_path, "pope"), "internvl")


def test_mme(tmp_path):
    case = V1_1["mme"]
    mme_files(tmp_path, rows(case))
    benchmark = BENCHMARKS["mme"]
    items = benchmark.read(DataFolder(tmp_path, "mme"), "internvl")
    by_question = {(item.category, item.record["image"], item.question): item for item in items}
    for c in case["cases"]:
        item = by_question[c["record"]["task"], c["record"]["image"], c["record"]["question"]]
        assert benchmark.prompt(item, "internvl") == c["expected_question"]
        assert item.gold == (c["record"]["gt"].lower(),)


@pytest.mark.parametrize(("key", "name", "codebase"), MMBENCH_TABLES)
def test_tables(tmp_path, key, name, codebase):
    case = (V1_1 if codebase == "internvl" else LLAVA)[key]
    file = "CCBench_legacy" if key == "ccbench_dev_cn" else key
    table(tmp_path / f"{file}.tsv", rows(case), case["tsv_columns"])
    _, items, _, prompts = replayed(case, tmp_path, name, codebase)
    if codebase == "internvl":
        check(case, prompts)
    else:
        assert [f"USER: <image>\n{prompt} ASSISTANT:" for prompt in prompts] == [
            c["expected_query"][c["expected_query"].index("USER:") :] for c in case["cases"]
        ]
    assert items[0].image.startswith(b"\x89PNG")


def seed_files(root, case):
    lines(root / "SEED/seed.jsonl", rows(case))
    whole(root / "SEED/SEED-Bench.json", case["annotation"])


def test_seed(tmp_path):
    case = V1_1["SEEDv1"]
    seed_files(tmp_path, case)
    benchmark = BENCHMARKS["seed"]
    items = benchmark.read(DataFolder(tmp_path, "SEED"), "internvl")
    by_id = {str(c["record"]["question_id"]): c for c in case["cases"]}
    assert [benchmark.prompt(i, "internvl") for i in items] == [by_id[i.id]["expected_question"] for i in items]
    score = benchmark.score(items, {item.id: by_id[item.id]["response"] for item in items}, "internvl")
    assert f"{score.value:.2f}%" == case["printed"]["Image accuracy"]
    assert list(score.categories) == ["Scene Understanding"]


LLAVA_ROWS = {
    "vqav2_testdev": ("vqav2-testdev", "llava_vqav2_mscoco_test-dev2015.jsonl"),
    "vizwiz_test": ("vizwiz-test", "llava_test.jsonl"),
    "mmvet_and_llava_bench": ("mm-vet", "llava-mm-vet.jsonl"),
    "textvqa_val_ocr": ("textvqa-ocr", "llava_textvqa_val_v051_ocr.jsonl"),
}


@pytest.mark.parametrize("key", LLAVA_ROWS)
def test_llava_rows(tmp_path, key):
    """LLaVA's files hold whole prompts: what is read and asked again is the same."""
    name, file = LLAVA_ROWS[key]
    case = LLAVA[key]
    lines(tmp_path / file, rows(case))
    if "annotations" in case:
        data = [{"question_id": n, **record} for n, record in enumerate(case["annotations"], 1)]
        whole(tmp_path / "TextVQA_0.5.1_val.json", {"data": data})
    benchmark, items, answers, prompts = replayed(case, tmp_path, name, "llava")
    assert [f"USER: <image>\n{prompt} ASSISTANT:" for prompt in prompts] == [
        c["expected_query"][c["expected_query"].index("USER:") :] for c in case["cases"]
    ]
    limit = case["generation"]["max_new_tokens"]
    assert benchmark.generation("llava") == {"max_new_tokens": limit, "num_beams": 1}
    padded = case["cases"][0]["size_given_to_image_processor"] != case["cases"][0]["image_size"]
    assert benchmark.pad == padded
    if "printed" in case:
        score = benchmark.score(items, answers, "llava")
        assert f"Accuracy: {score.value:.2f}%" == case["printed"][1]


def test_llava_scienceqa(tmp_path):
    case = LLAVA["scienceqa"]
    whole(tmp_path / "llava_test_CQM-A.json", rows(case))
    whole(tmp_path / "problems.json", {r["id"]: {"choices": ["a", "b", "c", "d"], "answer": 0} for r in rows(case)})
    benchmark, items, answers, prompts = replayed(case, tmp_path, "scienceqa", "llava")
    shown = ["<image>\n" if item.image else "" for item in items]
    assert [f"USER: {image}{prompt} ASSISTANT:" for image, prompt in zip(shown, prompts)] == [
        c["expected_query"][c["expected_query"].index("USER:") :] for c in case["cases"]
    ]
    assert not benchmark.pad
    score = benchmark.score(items, answers, "llava")
    with_image = [answers[item.id] == "A" for item in items if item.image]
    assert score.value == 100 * sum(with_image) / len(with_image)


def test_llava_mme_prompt(tmp_path):
    case = LLAVA["mme"]
    asked = [c["record"]["text"] for c in case["cases"]]
    records = [
        {
            "task": "existence",
            "image": c["record"]["image"],
            "question": text.split("\n")[0] + " Please answer yes or no.",
            "gt": "Yes",
        }
        for c, text in zip(case["cases"], asked)
    ]
    mme_files(tmp_path, records)
    benchmark = BENCHMARKS["mme"]
    items = benchmark.read(DataFolder(tmp_path, "mme"), "llava")[: len(asked)]
    assert [benchmark.prompt(item, "llava") for item in items] == asked


def anchors():
    return json.loads(real("anchors.json").read_text())


def test_pope_cell():
    """What LLaVA-1.5-13B answered gives the table's 85.9."""
    expected = anchors()["pope"]
    benchmark = BENCHMARKS["pope"]
    items = benchmark.read(DataFolder(REAL, "pope"), "llava")
    score = benchmark.score(items, read_predictions(real("pope_answers.jsonl"), items), "llava")
    assert len(items) == 8910
    assert score.value == pytest.approx(expected["mean_f1_percent"], abs=1e-9)
    assert f"{score.value:.1f}" == str(expected["table"]) == "85.9"
    for name in ("adversarial", "random", "popular"):
        assert score.categories[name] == pytest.approx(100 * expected[name]["f1"], abs=1e-9)


def test_mme_cell():
    """What LLaVA-1.5-13B answered gives the table's 1531.3."""
    expected = anchors()["mme"]
    benchmark = BENCHMARKS["mme"]
    items = benchmark.read(DataFolder(REAL / "mme_labels", "mme"), "llava")
    score = benchmark.score(items, read_predictions(real("mme_answers.jsonl"), items), "llava")
    assert len(items) == 2374
    assert score.value == pytest.approx(expected["perception"], abs=1e-9)
    assert f"{score.value:.1f}" == str(expected["table"]) == "1531.3"
    assert score.figures["cognition"] == pytest.approx(expected["cognition"], abs=1e-9)
    assert score.categories == pytest.approx(expected["tasks"], abs=1e-9)


def test_mmvet_grades():
    """GPT-4's stored replies about what LLaVA-1.5-13B answered are read as the official evaluator read them.

    One run: the three runs whose totals are among the anchors were graded separately.
    """
    grades = json.loads(real("mmvet_grade_13b_1.json").read_text())
    assert len(grades) == 218
    for grade in grades.values():
        (reply,), (score,) = grade["content"], grade["score"]
        assert mmvet.grade(lambda *_, reply=reply: reply, "message") == mmvet.Grade(score, (reply,))


@pytest.fixture
def small(tmp_path):
    """Three questions of VQAv2, with what ten people said."""
    questions = [{"image": "a.jpg", "question": f"What {n}?", "question_id": n} for n in (1, 2, 3)]
    people = [{"question_id": n, "answers": [{"answer": f"thing {n}"}] * 10} for n in (1, 2, 3)]
    lines(tmp_path / "vqav2_val.jsonl", questions)
    whole(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": people})
    return tmp_path


def load(root, name="vqav2-val"):
    return BENCHMARKS[name].read(DataFolder(root, BENCHMARKS[name].folder), "internvl")


GOOD = [{"question_id": n, "answer": f"thing {n}"} for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (GOOD[:2], "no answer to 1 of 3 questions: '3'"),
        ([*GOOD, GOOD[0]], r"p\.jsonl:4 answers '1', which .*p\.jsonl:1 also answers"),
        ([*GOOD, {"question_id": 9, "answer": "x"}], r"p\.jsonl:4: '9' is not a question of the benchmark"),
        ([*GOOD[:2], {"question_id": 3}], r"p\.jsonl:3 has no 'answer' or 'text' or 'prediction'"),
        ([*GOOD[:2], {"question_id": 3, "answer": 5}], "'answer' must be str, not 5"),
        ([*GOOD[:2], {"answer": "x"}], r"p\.jsonl:3 has no 'id' or 'question_id'"),
        ([*GOOD[:2], {"id": 3, "error": "no such image"}], "'3' has an error in place of an answer: no such image"),
        ([["a"]], "not a JSON object, but list"),
        ([], "is empty"),
    ],
)
def test_predictions_that_are_refused(small, rows, message):
    lines(small / "p.jsonl", rows)
    with pytest.raises(EvaluationError, match=message):
        read_predictions(small / "p.jsonl", load(small))


def test_predictions_in_other_shapes(small):
    items = load(small)
    expected = {str(n): f"thing {n}" for n in (1, 2, 3)}
    whole(small / "list.json", [{"questionId": n, "prediction": f"thing {n}"} for n in (3, 2, 1)])
    whole(small / "map.json", expected)
    lines(small / "lines.jsonl", [{"id": str(n), "text": f"thing {n}"} for n in (1, 2, 3)])
    for name in ("list.json", "map.json", "lines.jsonl"):
        assert read_predictions(small / name, items) == expected
    (small / "half.jsonl").write_text('{"id": 1, "answer": "a"}\n{"id": 2, "ans')
    with pytest.raises(EvaluationError, match=r"half\.jsonl:2: not JSON"):
        read_predictions(small / "half.jsonl", items)
    with pytest.raises(EvaluationError, match="does not exist"):
        read_predictions(small / "none.jsonl", items)


def test_data_that_is_refused(small, tmp_path):
    whole(small / "v2_mscoco_val2014_annotations.json", {"annotations": [{"question_id": 1, "answers": ["a"] * 10}]})
    with pytest.raises(EvaluationError, match=r"(?s)2 problems.*vqav2_val.jsonl:2: question 2 has no answer"):
        load(small)
    people = [{"question_id": n, "answers": ["a"] * (9 + (n > 1))} for n in (1, 2, 3)]
    whole(small / "v2_mscoco_val2014_annotations.json", {"annotations": people})
    with pytest.raises(EvaluationError, match="question 1 has 9 annotators' answers, not 10"):
        load(small)
    with pytest.raises(EvaluationError, match=r"nor its subfolder okvqa has okvqa_val\.jsonl or "):
        load(small, "okvqa")
    with pytest.raises(EvaluationError, match="is not a directory"):
        load(small / "nowhere", "okvqa")


@pytest.mark.parametrize("name", [name for name, benchmark in BENCHMARKS.items() if benchmark.score is not None])
def test_progress_of_scoring(name):
    """No scorer looks at an answer twice, or the bar would pass its end."""
    benchmark, seen = BENCHMARKS[name], []
    items = [
        Item(str(n), n, "?", None, ("yes",) * 10, "OCR" if name == "mme" else "human", {"A": "a"}, {"pair": n // 2})
        for n in range(2000)
    ]
    answers = WatchedAnswers({item.id: "yes" for item in items}, lambda *progress: seen.append(progress))
    benchmark.score(items, answers, "internvl")
    assert seen == [(1000, 2000, "scoring"), (2000, 2000, "scoring")]


def test_command(small, capsys):
    lines(small / "p.jsonl", [*GOOD[:2], {"question_id": 3, "answer": "nothing"}])
    arguments = ["eval", "score", "vqav2-val", "--data", str(small), "--predictions", str(small / "p.jsonl")]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("VQAv2 val: 66.7 (accuracy, 3 questions)\n")
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["points"] == {"1": 1.0, "2": 1.0, "3": 0.0}
    lines(small / "p.jsonl", GOOD[:1])
    assert main(arguments) == 2
    assert "has no answer to 2 of 3 questions: '2', '3'" in capsys.readouterr().err
    assert main([*arguments[:2], "vqav2-testdev", *arguments[3:]]) == 2
    assert "VQAv2 test-dev is scored by a server or a judge" in capsys.readouterr().err
