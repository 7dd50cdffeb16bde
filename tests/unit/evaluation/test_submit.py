"""What is handed in, from answers that exist: the same bytes as from a whole run; and what other scripts write."""

import json
import os
import time

import pytest
from support.evaluation_cases import real
from support.evaluation_files import image_base64, lines, rows, table, whole
from support.full_disk import full_disk

from internvl_jax.cli.main import main
from internvl_jax.evaluation.benchmark_table import BENCHMARKS

pytest_plugins = ["support.evaluation_runs"]

HANDED_IN = [name for name, benchmark in BENCHMARKS.items() if benchmark.submit is not None]


def submit(name, predictions, data, out, *options):
    return main(
        ["eval", "submit", name, "--predictions", str(predictions), "--data", str(data), "--output", str(out), *options]
    )


@pytest.mark.parametrize("name", HANDED_IN)
def test_the_same_bytes_as_from_a_run(run, data, tmp_path, name, capsys, monkeypatch):
    if BENCHMARKS[name].needs_xlsx:
        pytest.importorskip("openpyxl")
    if name == "mmmu-test":
        pytest.importorskip("pyarrow")
    code, made = run(name)
    assert code == 0
    expected = {
        file: (made / file).read_bytes() for file in json.loads((made / "report.json").read_text())["submission"]
    }
    answers = rows(made / "predictions.jsonl")
    as_object = {str(row["id"]): row["answer"] for row in reversed(answers)}
    (tmp_path / "answers.json").write_text("\ufeff" + json.dumps(as_object), encoding="utf-8")
    later = time.time() + 100_000  # a workbook does not say when it was written
    monkeypatch.setattr(time, "time", lambda: later)
    for number, predictions in enumerate((made / "predictions.jsonl", tmp_path / "answers.json")):
        capsys.readouterr()
        out = tmp_path / f"out{number}"
        for _ in range(2):  # once more into the same place: nothing changes
            assert submit(name, predictions, data, out) == 0
            assert capsys.readouterr().out == "".join(f"{out / file}\n" for file in expected)
            assert {path.name: path.read_bytes() for path in out.iterdir()} == expected


def test_what_a_server_scores_can_be_handed_in():
    assert {name for name, benchmark in BENCHMARKS.items() if benchmark.score is None} <= set(HANDED_IN)


@pytest.fixture
def vet(tmp_path):
    questions = [
        {"image": f"v1_{n}.png", "text": f"What {n}?", "category": "conv", "question_id": n} for n in (0, 1, 2)
    ]
    lines(tmp_path / "llava-mm-vet.jsonl", questions)
    return tmp_path


def llava(number, text):
    return {"question_id": number, "prompt": f"What {number}?", "text": text, "answer_id": "x", "metadata": {}}


def test_answers_as_llava_writes_them(vet):
    """Its ids of MM-Vet's questions are numbers; the file of another order, or of other names, is the same."""
    expected = {"v1_0": "a", "v1_1": "b\nc", "v1_2": "\ud800"}
    numbered = "".join(json.dumps(llava(n, expected[f"v1_{n}"])) + "\n" for n in (2, 0, 1))
    (vet / "numbers.jsonl").write_text(numbered)
    mixed = [{"question_id": 0, "text": "a"}, {"id": "v1_1", "answer": "b\nc"}, llava(2, "\ud800")]
    (vet / "mixed.json").write_text(json.dumps(mixed))
    for name in ("numbers.jsonl", "mixed.json"):
        assert submit("mm-vet", vet / name, vet, vet / f"out-{name}") == 0
        assert json.loads((vet / f"out-{name}/submission.json").read_text()) == expected


def test_the_real_answers_of_mm_vet(tmp_path):
    (tmp_path / "llava-mm-vet.jsonl").write_bytes(real("mmvet_questions.jsonl").read_bytes())
    expected = json.loads(real("mmvet_result.json").read_text())
    assert submit("mm-vet", real("mmvet_result.json"), tmp_path, tmp_path / "a") == 0
    lines(tmp_path / "llava.jsonl", [llava(int(name.removeprefix("v1_")), text) for name, text in expected.items()])
    assert submit("mm-vet", tmp_path / "llava.jsonl", tmp_path, tmp_path / "b") == 0
    for out in ("a", "b"):
        assert json.loads((tmp_path / out / "submission.json").read_text()) == expected


def test_missing_unknown_and_repeated_answers_are_named(vet, capsys):
    lines(vet / "a.jsonl", [llava(0, "a"), llava(7, "b"), {"id": "v1_0", "answer": "c"}])
    assert submit("mm-vet", vet / "a.jsonl", vet, vet / "out") == 2
    told = capsys.readouterr().err
    assert f"{vet / 'a.jsonl'} has no answer to 2 of 3 questions: 'v1_1', 'v1_2'" in told
    assert "a.jsonl:2: '7' is not a question of the benchmark" in told
    assert f"a.jsonl:3 answers 'v1_0', which {vet / 'a.jsonl'}:1 also answers" in told
    assert not (vet / "out").exists()
    for wrong, message in (
        ("nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("", "is a directory: --predictions names a"),
    ):
        assert submit("mm-vet", vet / wrong, vet, vet / "out") == 2
        assert message in capsys.readouterr().err
    (vet / "predictions.jsonl").touch()
    assert submit("mm-vet", vet, vet, vet / "out") == 2
    assert f"{vet} is a directory: --predictions names its predictions.jsonl" in capsys.readouterr().err


def test_ids_of_images(tmp_path):
    """VizWiz's answers go by image; where the data has numbers, LLaVA's answers by number are the same."""
    questions = [{"image": f"VizWiz_test_{n}.jpg", "text": "What?", "question_id": n} for n in (5, 6)]
    lines(tmp_path / "llava_test.jsonl", questions)
    lines(tmp_path / "numbers.jsonl", [{"question_id": n, "text": f"A {n}!"} for n in (5, 6)])
    whole(tmp_path / "images.json", [{"image": f"VizWiz_test_{n}.jpg", "answer": f"A {n}!"} for n in (6, 5)])
    for name in ("numbers.jsonl", "images.json"):
        assert submit("vizwiz-test", tmp_path / name, tmp_path, tmp_path / f"out-{name}", "--codebase", "llava") == 0
        assert json.loads((tmp_path / f"out-{name}/submission.json").read_text()) == [
            {"image": f"VizWiz_test_{n}.jpg", "answer": str(n)} for n in (5, 6)
        ]


def test_nothing_is_replaced(vet, capsys):
    lines(vet / "a.jsonl", [llava(n, "a") for n in (0, 1, 2)])
    (vet / "out").mkdir()
    (vet / "out/submission.json").write_text("mine")
    (vet / "out/notes.txt").write_text("mine")
    assert submit("mm-vet", vet / "a.jsonl", vet, vet / "out") == 2
    assert f"{vet / 'out/submission.json'} already exists with other answers" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in (vet / "out").iterdir()} == dict.fromkeys(
        ("submission.json", "notes.txt"), "mine"
    )
    assert sorted(path.name for path in vet.iterdir()) == ["a.jsonl", "llava-mm-vet.jsonl", "out"]


def test_a_full_disk(vet, capsys):
    """The error names the file, and nothing is left of it."""
    lines(vet / "a.jsonl", [llava(n, "a" * 200) for n in (0, 1, 2)])
    with full_disk(400):
        assert submit("mm-vet", vet / "a.jsonl", vet, vet / "out") == 2
    assert "submission.json" in capsys.readouterr().err
    assert sorted(os.listdir(vet)) == ["a.jsonl", "llava-mm-vet.jsonl"]


def test_workbooks_hold_any_answer(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    row = {"index": 1, "question": "q", "hint": "", "A": "a", "B": "b", "C": "", "D": "", "image": image_base64()}
    table(tmp_path / "mmbench_test_en_20231003.tsv", [row])
    (tmp_path / "a.json").write_text('{"1": "=1+1 \\u0000\\u001f\\ud800\\ufffe\\uffff \u00e9"}', encoding="utf-8")
    assert submit("mmbench-en-test", tmp_path / "a.json", tmp_path, tmp_path / "out") == 0
    (sheet,) = openpyxl.load_workbook(tmp_path / "out/submission.xlsx").worksheets
    head, cells = sheet.iter_rows(values_only=True)
    assert dict(zip(head, cells))["prediction"] == "=1+1  é"


def test_ids_that_a_server_does_not_take(tmp_path, capsys):
    lines(tmp_path / "vqav2_testdev.jsonl", [{"image": "a.jpg", "question": "q", "question_id": "x1"}])
    whole(tmp_path / "a.json", {"x1": "red"})
    assert submit("vqav2-testdev", tmp_path / "a.json", tmp_path, tmp_path / "out") == 2
    assert "x1: the question's id is 'x1', but the server expects a number" in capsys.readouterr().err


def test_submissions_are_of_some_benchmarks(tmp_path, capsys):
    with pytest.raises(SystemExit):
        submit("pope", tmp_path / "a.json", tmp_path, tmp_path / "out")
    assert "invalid choice: 'pope'" in capsys.readouterr().err
    assert main(["eval", "score", "mm-vet", "--data", str(tmp_path), "--predictions", "a.json"]) == 2
    assert "`eval submit mm-vet` writes the file to submit" in capsys.readouterr().err
