"""Every benchmark from its official files to a report, with nano; resuming, refusals, reports, the table."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from support.evaluation_cases import MMBENCH_TABLES, cases
from support.evaluation_files import FAST, rows
from support.paths import DATA

from internvl_jax.cli.main import main
from internvl_jax.evaluation.benchmark_table import BENCHMARKS
from internvl_jax.evaluation.datasets import tiny
from internvl_jax.evaluation.datasets.data_folder import DataFolder
from internvl_jax.evaluation.datasets.items import EvaluationError
from internvl_jax.evaluation.published import PUBLISHED, SYSTEMS
from internvl_jax.inference import loading
from internvl_jax.inference.chat import Chat
from internvl_jax.processing.images import ImageProcessor

IMAGES = DATA / "internvl_chat_v1_1" / "images"
V1_0 = DATA / "internvl_chat_v1_0" / "checkpoint"

pytest_plugins = ["support.evaluation_runs"]

EXTRA = {name: "openpyxl" for name, benchmark in BENCHMARKS.items() if benchmark.needs_xlsx}
EXTRA |= {"mmmu-val": "pyarrow", "mmmu-test": "pyarrow"}


def broken(value):
    """A record without one of its fields, and with each of them of another kind."""
    for key, inner in value.items():
        yield {name: other for name, other in value.items() if name != key}
        for wrong in (None, 5, [3], {}):
            if type(wrong) is not type(inner) or wrong != inner:
                yield {**value, key: wrong}
        if isinstance(inner, dict):
            yield from ({**value, key: changed} for changed in broken(inner))


def broken_files(path):
    """The texts of a file of records in which the first one is broken, or all of it."""
    text = path.read_text(encoding="utf-8")
    yield from ("", text[: len(text) // 2], "{}", "[]", "[5]")
    try:
        whole = json.loads(text)
    except ValueError:
        first, _, others = text.partition("\n")
        yield from (f"{json.dumps(changed)}\n{others}" for changed in broken(json.loads(first)))
        return
    for name, inner in whole.items() if isinstance(whole, dict) else [(None, whole)]:
        records = inner if isinstance(inner, list) else [inner]
        if isinstance(records[0], dict):
            for changed in broken(records[0]):
                new = [changed, *records[1:]] if isinstance(inner, list) else changed
                yield json.dumps({**whole, name: new} if isinstance(whole, dict) else new)
        if isinstance(whole, dict):
            yield from (json.dumps({**whole, name: wrong}) for wrong in (None, 5, "x", [], {}))


def test_whatever_is_wrong_with_a_data_file_is_told(tmp_path):
    """It is read nevertheless, or refused with the place; no other exception comes of it."""
    pytest.importorskip("sklearn")
    pytest.importorskip("pyarrow")
    tiny.write(tmp_path, 3)
    refused = []
    for path in sorted(path for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl")):
        folder = path.relative_to(tmp_path).parts[0]
        original = path.read_bytes()
        for text in broken_files(path):
            path.write_text(text, encoding="utf-8")
            for benchmark in BENCHMARKS.values():
                for codebase in ("internvl", "llava") if benchmark.folder == folder else ():
                    try:
                        items = benchmark.read(DataFolder(tmp_path, benchmark.folder), codebase)
                        for item in items:
                            benchmark.prompt(item, codebase)
                        if benchmark.score is not None:
                            benchmark.score(items, {item.id: "yes" for item in items}, codebase)
                    except EvaluationError as error:
                        refused.append(str(error))
        path.write_bytes(original)
    assert len(refused) > 500
    assert [message for message in refused if str(tmp_path) not in message] == []


def test_byte_order_marks_change_nothing(data, tmp_path):
    """In every text file of every benchmark, as Windows' editors put them there."""
    for path in data.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".tsv", ".txt"):
            copy = tmp_path / path.relative_to(data)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    for name, benchmark in BENCHMARKS.items():
        if not name.startswith("mmmu"):  # parquet
            for codebase in ("internvl", "llava"):
                items = [benchmark.read(DataFolder(root, benchmark.folder), codebase) for root in (data, tmp_path)]
                assert items[0] == items[1], name


@pytest.mark.parametrize("name", BENCHMARKS)
def test_from_file_to_report(run, data, name, capsys):
    if name in EXTRA:
        pytest.importorskip(EXTRA[name])
    benchmark = BENCHMARKS[name]
    code, out = run(name)
    printed = capsys.readouterr().out
    assert code == 0
    report = json.loads((out / "report.json").read_text())
    asked, answered = rows(out / "questions.jsonl"), rows(out / "predictions.jsonl")
    assert len(asked) == report["questions"] >= 6
    assert {row["id"] for row in answered} == {row["id"] for row in asked}
    assert len(answered) == len(asked)
    assert all(row["answer"] for row in answered) or not benchmark.min_new_tokens
    assert printed == (out / "report.md").read_text()
    assert report["published"] == PUBLISHED.get(name, {})
    for system, figure in report["published"].items():
        assert f"| {system}, published | {figure} |" in printed
    assert all((out / file).stat().st_size > 2 for file in report["submission"])
    assert bool(report["submission"]) == (benchmark.submit is not None)
    if benchmark.score is None:
        assert report["score"] is None
        assert "a server or a judge has the answers" in printed
        return
    assert f"| **nano, this run** | **{report['score']['value']:.1f}** |" in printed
    arguments = ["--predictions", str(out / "predictions.jsonl"), "--data", str(data)]
    assert main(["eval", "score", name, *arguments, "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["value"] == report["score"]["value"]
    wrong = sum(points < 1 for points in scored["points"].values())
    page = (out / "wrong.html").read_text()
    assert page.count("<section ") == wrong
    assert page.count('<img src="data:image/jpeg;base64,') == wrong
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_nano_reads_the_images(run, data):
    """Asked as it was trained to be, without an instruction, it is mostly right: no image is lost or swapped."""
    _, out = run("mm-vet")
    said = json.loads((out / "submission.json").read_text())
    facts = json.loads((data / "mm-vet/mm-vet.json").read_text())
    assert sum(said[name] == fact["answer"] for name, fact in facts.items()) >= 6


def test_beams_of_the_published_figures(run, data, tmp_path, capsys):
    arguments = ["--data", str(data), "--max-new-tokens", "4", "--limit", "2", "--batch-size", "2"]
    assert main(["eval", "pope", *arguments, "--output", str(tmp_path / "beams")]) == 0
    printed = capsys.readouterr().out
    assert "5 beams, at most 4 new tokens" in printed
    assert "**Only the first 2 questions: no figure to compare.**" in printed
    settings = json.loads((tmp_path / "beams/settings.json").read_text())
    assert settings["generation"] == {"max_new_tokens": 4, "min_new_tokens": 1, "num_beams": 5}


def test_answers_do_not_depend_on_the_batch(run):
    """One by one, by threes, and as Chat answers without the images made ready ahead."""
    answers = []
    for size in ("1", "3"):
        _, out = run("gqa", "--batch-size", size, out=f"batch{size}")
        answers.append({row["id"]: row["answer"] for row in rows(out / "predictions.jsonl")})
    assert answers[0] == answers[1]
    chat = loading.load(None)
    for row in rows(out / "questions.jsonl"):
        reply = chat.chat(row["question"], row["images"], honor_exif=False, max_new_tokens=6, min_new_tokens=1)
        assert reply.text == answers[0][row["id"]]


def test_a_stopped_run_goes_on(run, capsys):
    _, out = run("okvqa")
    whole = (out / "predictions.jsonl").read_bytes()
    value = json.loads((out / "report.json").read_text())["score"]
    lines = whole.splitlines(keepends=True)
    (out / "predictions.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    assert run("okvqa")[0] == 2
    assert "continue with --resume" in capsys.readouterr().err
    assert run("okvqa", "--resume", "--limit", "7")[0] == 2
    assert "was started with other settings (limit: not given before, 7 now): use the same" in capsys.readouterr().err
    assert run("okvqa", "--resume", "--quantize", "int8", "--num-beams", "2")[0] == 2
    assert "(num_beams: 1 before, 2 now; quantize: not given before, int8 now)" in capsys.readouterr().err
    assert (out / "predictions.jsonl").read_bytes() == b"".join(lines[:3]) + lines[3][:20]
    assert run("okvqa", "--resume")[0] == 0
    report = json.loads((out / "report.json").read_text())
    assert (report["score"], report["timing"]["answered"]) == (value, len(lines) - 3)
    assert sorted((out / "predictions.jsonl").read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_killed_run_goes_on(run, data, tmp_path):
    """Killed without warning: nothing is lost, nothing is asked twice, and the answers are those of a whole run."""
    _, whole = run("gqa", "--batch-size", "1", out="whole")
    command = [
        sys.executable,
        "-m",
        "internvl_jax.cli.main",
        "eval",
        "gqa",
        "--data",
        str(data),
        *FAST,
        "--batch-size",
        "1",
    ]
    predictions = tmp_path / "killed" / "predictions.jsonl"
    with subprocess.Popen([*command, "--output", str(tmp_path / "killed")], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (predictions.exists() and predictions.stat().st_size):
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    before = predictions.read_bytes()
    code, out = run("gqa", "--batch-size", "1", "--resume", out="killed")
    assert code == 0
    assert predictions.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    report = json.loads((out / "report.json").read_text())
    answered = before.count(b"\n")
    assert report["timing"]["answered"] == len(rows(whole / "predictions.jsonl")) - answered > 0
    assert rows(predictions) == rows(whole / "predictions.jsonl")
    assert report["score"] == json.loads((whole / "report.json").read_text())["score"]


def test_an_interrupted_run_says_how_to_go_on(run, monkeypatch, capsys):
    from internvl_jax.inference import offline

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(offline, "append_answers", interrupt)
    code, out = run("gqa")
    assert code == 130
    assert f"{out} keeps its answers: --resume continues\ninterrupted\n" in capsys.readouterr().err


def test_answers_with_separators_of_lines(run, capsys):
    """Unicode has line breaks that are none in JSON lines."""
    _, out = run("gqa")
    first, *others = rows(out / "predictions.jsonl")
    lines = [{**first, "answer": "red\u2028blue\x85green"}, *others]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (out / "predictions.jsonl").write_text(text, encoding="utf-8")
    assert run("gqa", "--resume")[0] == 0
    assert json.loads((out / "report.json").read_text())["timing"]["answered"] == 0


def test_images_that_are_missing_or_broken(run, data, capsys, tmp_path):
    image = data / "vizwiz/val/VizWiz_val_00000001.jpg"
    content = image.read_bytes()
    try:
        image.unlink()
        assert run("vizwiz-val")[0] == 2
        assert "'VizWiz_val_00000001.jpg': no image VizWiz_val_00000001.jpg in" in capsys.readouterr().err
        image.write_bytes(content[: len(content) // 2])
        code, out = run("vizwiz-val")
    finally:
        image.write_bytes(content)
    assert code == 1
    report = json.loads((out / "report.json").read_text())
    assert (report["failed"], report["score"]) == (["VizWiz_val_00000001.jpg"], None)
    assert "1 questions could not be answered (VizWiz_val_00000001.jpg)" in (out / "report.md").read_text()
    told = {row["id"]: row for row in rows(out / "predictions.jsonl")}["VizWiz_val_00000001.jpg"]
    assert "damaged or truncated" in told["error"]
    assert run("vizwiz-val", "--resume")[0] == 0  # with the image mended
    report = json.loads((out / "report.json").read_text())
    assert (report["failed"], report["timing"]["answered"]) == ([], 1)
    assert len(rows(out / "predictions.jsonl")) == report["questions"]


def test_table(run, tmp_path, capsys):
    run("gqa", out="gqa")
    run("pope", "--limit", "2", out="part")
    capsys.readouterr()
    assert main(["eval", "table", str(tmp_path / "gqa"), str(tmp_path / "part")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "| | " + " | ".join(SYSTEMS) + " | nano, here |"
    value = json.loads((tmp_path / "gqa/report.json").read_text())["score"]["value"]
    assert f"| GQA test-dev | 63.3 | 63.9 | 64.1 | 62.5 | {value:.1f} |" in printed
    assert "| POPE | 85.9 | 87.1 | 87.2 | 87.1 |  |" in printed
    assert printed[-1] == f"{tmp_path / 'part'}: left out (the first 2 questions only)"
    assert main(["eval", "table", str(tmp_path / "gqa"), str(tmp_path / "gqa")]) == 2
    assert "is named twice" in capsys.readouterr().err
    shutil.copytree(tmp_path / "gqa", tmp_path / "again")
    assert main(["eval", "table", str(tmp_path / "gqa"), str(tmp_path / "again")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith(" | nano, here | nano (2), here |")
    assert f"| GQA test-dev | 63.3 | 63.9 | 64.1 | 62.5 | {value:.1f} | {value:.1f} |" in printed
    assert main(["eval", "table", str(tmp_path)]) == 2
    assert "has no report.json" in capsys.readouterr().err


@pytest.mark.parametrize("mesh", [pytest.param(None, marks=pytest.mark.long), "data=2"])
def test_two_processes(run, data, tmp_path, mesh):
    """A model on each, or one over both; one file of answers: that of one process."""
    from support.processes import free_port

    _, alone = run("gqa", out="alone")
    command = [sys.executable, "-m", "internvl_jax.cli.main", "eval", "gqa", "--data", str(data), *FAST]
    command += [] if mesh is None else ["--mesh", mesh]
    command += ["--output", str(tmp_path / "both"), "--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2"]
    processes = [
        subprocess.Popen(
            [*command, "--process-id", str(number)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert ["# GQA test-dev: nano" in out for out, _ in outputs] == [True, False]
    assert rows(tmp_path / "both/predictions.jsonl") == rows(alone / "predictions.jsonl")
    scores = [json.loads((out / "report.json").read_text())["score"] for out in (alone, tmp_path / "both")]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("name", ["scienceqa", "pope"])
def test_llava_codebase(data, tmp_path, name, monkeypatch):
    """A model of LLaVA's code is asked with its prompts, greedily, and padded where its script pads."""
    pytest.importorskip("torch")
    with_processor, chats = Chat.with_processor, []

    def remember(chat, processor):
        chats.append(with_processor(chat, processor))
        return chats[0]

    monkeypatch.setattr(Chat, "with_processor", remember)
    arguments = ["--data", str(data), "--checkpoint", str(V1_0), "--output", str(tmp_path), "--quantize", "int8"]
    assert main(["eval", name, *arguments, "--max-new-tokens", "2", "--batch-size", "8"]) == 0
    assert chats[0].processor.pad_to_square == BENCHMARKS[name].pad == (name == "pope")
    assert chats[0].processor.center_crop
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["numbers"] == "float32, int8 weights"
    assert (report["codebase"], report["generation"]) == ("llava", {"max_new_tokens": 2, "num_beams": 1})
    asked = rows(tmp_path / "questions.jsonl")
    if name == "scienceqa":
        assert sum(not row["images"] for row in asked) == 1  # LLaVA's file has questions without an image
        assert asked[1]["question"].startswith("Context: Look at the picture.\nWhat")
    else:
        assert all(row["question"].endswith("in the image?\n" + tiny.SHORT) for row in asked)


def test_models_that_see_nothing_are_refused(data, tmp_path, capsys):
    """Before anything is loaded, not question by question."""
    model = tmp_path / "model"
    shutil.copytree(V1_0.parent / "InternViT-6B-224px", tmp_path / "InternViT-6B-224px")
    shutil.copytree(V1_0, model, ignore=shutil.ignore_patterns("*.bin"))
    (tmp_path / "InternViT-6B-224px" / "preprocessor_config.json").unlink()
    command = ["eval", "pope", "--data", str(data), "--output", str(tmp_path / "run"), "--checkpoint", str(model)]
    for message in ("has no preprocessor_config.json: put it beside", "nowhere/config.json does not exist"):
        assert main(command) == 2
        assert message in capsys.readouterr().err
        command[-1] = str(tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="2"):
        main([*command[:-2], "--batch-size", "0"])
    assert "--batch-size: must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("padded", [True, False])
def test_images_made_ready_are_the_same(padded):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for crop in (True, False):
        processor = ImageProcessor(56, mean, std, pad_to_square=padded, center_crop=crop)
        for path in sorted(IMAGES.iterdir()):
            image = Image.open(path)
            np.testing.assert_array_equal(processor(processor.scaled(image)), processor(image))


def submitted(name, codebase, case, folder, out, change=lambda record: record):
    """What is written for a replayed script's answers."""
    benchmark = BENCHMARKS[name]
    where = DataFolder(folder, benchmark.folder)
    items = benchmark.read(where, codebase)
    answers = {item.id: c["response"] for item, c in zip(items, case["cases"], strict=True)}
    out.mkdir()
    return benchmark.submit(items, answers, codebase, where, out)


def test_submissions_equal_the_scripts(tmp_path):
    from support.evaluation_files import lines, whole

    v1_1 = {item["benchmark"]: item for item in cases("pipeline_internvl_v1_1")["items"]}
    llava = {item["benchmark"]: item for item in cases("pipeline_llava_v1_0")["items"]}

    def records(case):
        return [c["record"] for c in case["cases"]]

    case = llava["vqav2_testdev"]
    lines(tmp_path / "a/llava_vqav2_mscoco_test-dev2015.jsonl", records(case))
    lines(tmp_path / "a/llava_vqav2_mscoco_test2015.jsonl", [{"question_id": n} for n in case["full_test_ids"]])
    path, clean = submitted("vqav2-testdev", "llava", case, tmp_path / "a", tmp_path / "a/out")
    assert json.loads(path.read_text()) == case["submission"] == json.loads(clean.read_text())
    case = v1_1["vqav2_testdev"]
    lines(tmp_path / "b/vqav2_testdev.jsonl", records(case))
    path, _ = submitted("vqav2-testdev", "internvl", case, tmp_path / "b", tmp_path / "b/out")
    expected = [{k: row[k] for k in ("question_id", "answer")} for row in case["output_records"]]
    assert json.loads(path.read_text()) == expected
    for number, (codebase, case, file) in enumerate(
        (("llava", llava["vizwiz_test"], "llava_test.jsonl"), ("internvl", v1_1["vizwiz_test"], "vizwiz_test.jsonl"))
    ):
        folder = tmp_path / f"vizwiz{number}"
        lines(folder / file, records(case))
        (path,) = submitted("vizwiz-test", codebase, case, folder, folder / "out")
        assert json.loads(path.read_text()) == case["submission" if codebase == "llava" else "output_records"]
    case = v1_1["docvqa_test"]
    lines(tmp_path / "d/test.jsonl", records(case))
    (path,) = submitted("docvqa-test", "internvl", case, tmp_path / "d", tmp_path / "d/out")
    assert json.loads(path.read_text()) == case["output_records"]
    case = v1_1["mmvet"]
    lines(tmp_path / "m/llava-mm-vet.jsonl", records(case))
    (path,) = submitted("mm-vet", "internvl", case, tmp_path / "m", tmp_path / "m/out")
    assert json.loads(path.read_text()) == case["output_json"]
    case = v1_1["gqa_testdev_llava"]
    questions = {
        r["question_id"]: {
            "question": r["question"],
            "imageId": "n1",
            "answer": r["answer"],
            "types": {"structural": "query"},
        }
        for r in records(case)
    }
    whole(tmp_path / "g/testdev_balanced_questions.json", questions)
    (path,) = submitted("gqa", "internvl", case, tmp_path / "g", tmp_path / "g/out")
    assert json.loads(path.read_text()) == case["converted_predictions"]


@pytest.mark.parametrize(("key", "name", "codebase"), MMBENCH_TABLES)
def test_tables_to_hand_in_equal_the_scripts(tmp_path, key, name, codebase):
    openpyxl = pytest.importorskip("openpyxl")
    from support.evaluation_files import table

    bundle = "pipeline_internvl_v1_1" if codebase == "internvl" else "pipeline_llava_v1_0"
    case = {item["benchmark"]: item for item in cases(bundle)["items"]}[key]
    file = "CCBench_legacy" if key == "ccbench_dev_cn" else key
    table(tmp_path / f"{file}.tsv", [c["record"] for c in case["cases"]], case["tsv_columns"])
    (path,) = submitted(name, codebase, case, tmp_path, tmp_path / "out")
    (sheet,) = openpyxl.load_workbook(path).worksheets
    head, *body = sheet.iter_rows(values_only=True)
    assert list(head) == case["xlsx_columns"]
    assert [dict(zip(head, row)) for row in body] == case["xlsx_rows"]
