"""Odd rows of the benchmarks' files: asked as the reference asks them, or refused, all of them by name."""

import base64

import pytest
from support.evaluation_files import image_base64, lines, mme_files, table

from internvl_jax.evaluation.benchmark_table import BENCHMARKS
from internvl_jax.evaluation.datasets.data_folder import DataFolder
from internvl_jax.evaluation.datasets.items import EvaluationError
from internvl_jax.evaluation.scorers.yes_no import COGNITION, PERCEPTION


def load(root, name):
    return BENCHMARKS[name].read(DataFolder(root, BENCHMARKS[name].folder), "internvl")


def test_tables_that_are_refused(tmp_path):
    good = {"index": 1, "question": "q", "A": "a", "B": "b", "answer": "A", "image": image_base64()}
    path = tmp_path / "mmbench_dev_20230712.tsv"
    for changed, message in (
        ({"answer": "D"}, "row 1: the answer is 'D', and the options are A, B"),
        ({"index": "x"}, "row 1: the index is 'x', not a number"),
        ({"image": "???"}, "row 1: the image is not base64"),
    ):
        table(path, [good | changed])
        with pytest.raises(EvaluationError, match=message):
            load(tmp_path, "mmbench-en-dev")
    table(path, [good, good])
    with pytest.raises(EvaluationError, match="has the index 1 more than once"):
        load(tmp_path, "mmbench-en-dev")
    path.write_text("index\tquestion\n1\tq\n")
    with pytest.raises(EvaluationError, match="no column A, B, image"):
        load(tmp_path, "mmbench-en-dev")
    table(path, [good])
    path.write_text(path.read_text() + "1000001\tcut off\n")
    with pytest.raises(EvaluationError, match=r"row 2 does not have as many fields"):
        load(tmp_path, "mmbench-en-dev")


MISSING = ("None", "N/A", "NA", "n/a", "null", "NULL", "nan", "NaN", "#N/A", "<NA>", "-nan", "")


@pytest.mark.parametrize("file", ["mmbench_dev_20230712", "mmbench_dev_cn_20231003", "CCBench_legacy"])
@pytest.mark.parametrize("text", MISSING)
def test_options_that_spell_a_missing_value(tmp_path, text, file, logged):
    """The reference's pandas reads them as missing: the row is asked without them, and its letter still counts."""
    good = {"index": 1, "question": "How many?", "A": "One", "B": "Two", "C": "Three", "answer": "A"}
    good |= {"image": image_base64(), "category": "c"}
    table(tmp_path / f"{file}.tsv", [good, good | {"index": 2, "A": text}, good | {"index": 3, "A": "none"}])
    name = {"mmbench_dev_20230712": "mmbench-en-dev", "CCBench_legacy": "ccbench"}.get(file, "mmbench-cn-dev")
    items = load(tmp_path, name)
    assert [list(item.options) for item in items] == [list("ABC"), list("BC"), list("ABC")]
    assert "\nA." not in BENCHMARKS[name].prompt(items[1], "internvl")
    assert BENCHMARKS[name].prompt(items[1], "internvl").startswith("How many?\nB. Two\nC. Three")
    assert [item.gold for item in items] == [("A",)] * 3
    score = BENCHMARKS[name].score(items, {"1": "A", "2": "A", "3": "B"}, "internvl")
    assert score.points == {"1": 1.0, "2": 1.0, "3": 0.0}
    (message,) = logged
    assert f"options that the reference reads as missing values are left out of the prompts: {tmp_path}" in message
    assert f"row 2: A is {text!r}, the answer" in message
    items = BENCHMARKS[name].read(
        DataFolder(tmp_path, "mmbench"), "llava"
    )  # whose script stops at the first that is missing
    assert [list(item.options) for item in items] == [list("ABC"), [], []]


def test_missing_values_of_a_table_are_handed_in_as_empty_cells(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    row = {
        "index": 1,
        "question": "q",
        "hint": "NA",
        "A": "None",
        "B": "b",
        "C": "N/A",
        "D": "d",
        "image": image_base64(),
    }
    table(tmp_path / "mmbench_test_en_20231003.tsv", [row | {"split": "nan"}])
    benchmark = BENCHMARKS["mmbench-en-test"]
    for codebase in ("internvl", "llava"):
        items = benchmark.read(DataFolder(tmp_path, "mmbench"), codebase)
        (path,) = benchmark.submit(items, {"1": "B"}, codebase, DataFolder(tmp_path, "mmbench"), tmp_path)
        (sheet,) = openpyxl.load_workbook(path).worksheets
        head, cells = sheet.iter_rows(values_only=True)
        expected = {"index": 1, "question": "q", "A": None, "B": "b", "C": None, "D": "d", "prediction": "B"}
        assert dict(zip(head, cells)) == expected | {"split": None}


def test_tables_from_editors(tmp_path):
    """A byte order mark, Windows' line ends, empty fields dropped at a line's end, base64 in lines, a blank line."""
    good = {"index": "1", "question": "q", "A": "a", "B": "b", "answer": "A", "image": image_base64(), "category": "c"}
    good |= {"comment": "", "split": ""}
    image = good["image"]
    cells = [*good.values()][:-2]
    cells[5] = f'"{image[:20]}\r\n{image[20:]}"'
    text = "\ufeff" + "\t".join(good) + "\r\n" + "\t".join(cells) + "\r\n\r\n"
    (tmp_path / "mmbench_dev_20230712.tsv").write_bytes(text.encode())
    (item,) = load(tmp_path, "mmbench-en-dev")
    assert (item.id, item.options, item.category) == ("1", {"A": "a", "B": "b"}, "c")
    assert base64.b64encode(item.image).decode() == image
    (tmp_path / "mmbench_dev_20230712.tsv").write_bytes(text.encode()[: text.index("\tc\r") + 2])
    with pytest.raises(EvaluationError, match=r"row 1 does not have as many fields .* is the file truncated"):
        load(tmp_path, "mmbench-en-dev")


def test_every_row_that_is_wrong_is_named(tmp_path):
    good = {"index": 1, "question": "q", "A": "a", "B": "b", "answer": "A", "image": image_base64()}
    changed = [good | {"index": 2, "answer": "F"}, good | {"index": 3, "image": "?"}, good | {"index": "x"}]
    table(tmp_path / "mmbench_dev_20230712.tsv", [good, *changed])
    with pytest.raises(EvaluationError, match=r"(?s)3 problems.*row 2: the answer.*row 3: the image.*row 4: the index"):
        load(tmp_path, "mmbench-en-dev")


def mmmu_file(root, rows, split="validation"):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = root / "MMMU/Math" / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


CHOICE = {"id": "validation_Math_1", "question": "<image 1> Which?", "options": "['None', 'N/A', '3']"}
CHOICE |= {"question_type": "multiple-choice", "answer": "A", "image_1": {"bytes": b"x", "path": "1.png"}}
OPEN = CHOICE | {"id": "validation_Math_2", "options": None, "question_type": "open", "answer": "[0, 1)"}


def test_odd_rows_of_mmmu(tmp_path):
    """Texts that spell a missing value are texts here; options may be numbers, an answer may look like a list."""
    numbers = CHOICE | {"id": "validation_Math_3", "options": "[1, 2.5, None]", "answer": "B"}
    several = OPEN | {"id": "validation_Math_4", "answer": "['None', '7']"}
    mmmu_file(tmp_path, [CHOICE, OPEN, numbers, several])
    items = load(tmp_path, "mmmu-val")
    assert BENCHMARKS["mmmu-val"].prompt(items[0], "internvl").startswith("<image 1> Which?\nA. None\nB. N/A\nC. 3\n")
    assert [item.gold for item in items] == [("A",), ("[0, 1)",), ("B",), ("None", "7")]
    assert items[2].options == {"A": "1", "B": "2.5", "C": "None"}
    score = BENCHMARKS["mmmu-val"].score(
        items, dict(zip((i.id for i in items), ("A", "x [0, 1)", "2.5", "8"))), "internvl"
    )
    assert list(score.points.values()) == [1, 1, 1, 0]


def test_rows_of_mmmu_that_are_refused(tmp_path):
    wrong = (CHOICE | {"options": "5"}, CHOICE | {"options": "[1"}, CHOICE | {"answer": ""}, OPEN | {"answer": None})
    mmmu_file(tmp_path, [CHOICE, *wrong, CHOICE | {"image_1": {"bytes": None, "path": "1.png"}}])
    with pytest.raises(
        EvaluationError, match=r"(?s)5 problems.*row 2.*row 3.*row 4.*no 'answer'.*row 5.*row 6.*'bytes'"
    ):
        load(tmp_path, "mmmu-val")
    (tmp_path / "MMMU/Math/validation-00000-of-00001.parquet").write_bytes(b"half")
    with pytest.raises(EvaluationError, match=r"00001\.parquet is not a readable parquet file"):
        load(tmp_path, "mmmu-val")


def test_choices_and_answers_that_spell_a_missing_value(tmp_path):
    """Only tables go through pandas: in JSON they are texts; answers that are numbers are their digits."""
    row = {"image": "1.png", "question": "Which?", "choices": ["None", "N/A"], "answer": 0}
    lines(tmp_path / "scienceqa/scienceqa_test_img.jsonl", [row])
    (item,) = load(tmp_path, "scienceqa")
    assert BENCHMARKS["scienceqa"].prompt(item, "internvl").startswith("Which?\nA. None\nB. N/A")
    row = {"image": "1.png", "question": "q", "question_id": 7}
    lines(
        tmp_path / "ai2diagram/test_vlmevalkit.jsonl", [row | {"answer": "NA"}, row | {"question_id": 8, "answer": 5}]
    )
    assert [item.gold for item in load(tmp_path, "ai2d")] == [("NA",), ("5",)]
    lines(tmp_path / "chartqa/test_human.jsonl", [row | {"answer": 2.5}])
    lines(tmp_path / "chartqa/test_augmented.jsonl", [row | {"answer": ["null", 3]}])
    assert [item.gold for item in load(tmp_path, "chartqa")] == [("2.5",), ("null", "3")]
    for wrong in (None, float("nan"), True, {}):
        lines(tmp_path / "docvqa/val.jsonl", [row | {"answer": ["a", wrong]}, row | {"answer": []}])
        with pytest.raises(
            EvaluationError, match=r"(?s)val\.jsonl:1: the answers must be strings.*val\.jsonl:2: the answers"
        ):
            load(tmp_path, "docvqa-val")


def test_lines_of_mme_may_hold_other_separators(tmp_path):
    mme_files(tmp_path, [], ("x.png", "Is it\u2028 or\x0b\x85?", "Yes"))
    text = (tmp_path / "mme/color.txt").read_text(encoding="utf-8")
    (tmp_path / "mme/color.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    items = load(tmp_path, "mme")
    assert len(items) == 2 * len(PERCEPTION + COGNITION)
    assert {item.question for item in items} == {"Is it\u2028 or\x0b\x85?", "Is it not?"}
    assert {item.record["image"] for item in items} == {"x.png"}


def test_fields_that_are_no_image(tmp_path):
    row = {"question": "q", "answer": "a", "question_id": 7}
    for wrong in (5, ["a.png"], {"a": 1}):
        lines(tmp_path / "ai2diagram/test_vlmevalkit.jsonl", [row | {"image": wrong}])
        with pytest.raises(EvaluationError, match=r"jsonl:1: 'image' must be str"):
            load(tmp_path, "ai2d")
    lines(tmp_path / "ai2diagram/test_vlmevalkit.jsonl", [row | {"image": "a.png", "question_id": [1]}])
    with pytest.raises(EvaluationError, match="'question_id' must be int or str"):
        load(tmp_path, "ai2d")
