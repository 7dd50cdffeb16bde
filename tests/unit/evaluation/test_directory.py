"""A run's directory: whose it is, what is left of killed runs, what a full disk does, what resuming says."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from support.evaluation_files import FAST, rows, whole
from support.full_disk import full_disk

from internvl_jax.cli.main import main
from internvl_jax.evaluation import answering as runs
from internvl_jax.evaluation.benchmark_run import WRITTEN
from internvl_jax.evaluation.datasets.data_folder import is_file
from internvl_jax.evaluation.run_report import lines as report_lines
from internvl_jax.inference import chat
from internvl_jax.utils import files

pytest_plugins = ["support.evaluation_runs"]

HOLD = """
import sys
from internvl_jax.inference import chat
from internvl_jax.utils import files
with files.claim(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """Another process that writes into tmp_path/run."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        yield other
        other.stdin.close()


def test_a_run_belongs_to_one_process(run, tmp_path, held, capsys):
    code, out = run("pope")
    assert code == 2
    assert f"{out} is being written by process {held.pid}" in capsys.readouterr().err
    assert not out.exists()
    (tmp_path / "link").symlink_to("run")
    assert run("pope", out="link")[0] == 2
    assert f"{out} is being written by process {held.pid}" in capsys.readouterr().err
    arguments = ["--data", str(tmp_path), "--prompt-file", "p", "--url", "http://127.0.0.1:1", "--model", "m"]
    assert main(["eval", "judge", str(tmp_path / "link"), *arguments]) == 2
    assert f"{out} is being written by process {held.pid}" in capsys.readouterr().err


def test_what_killed_runs_left_is_removed(run, logged):
    pytest.importorskip("openpyxl")
    _, out = run("mmbench-en-dev")
    image = next((out / "images").iterdir())
    left = [files.temporary_path(path, 5) for path in (*(out / name for name in WRITTEN), image)]
    others = [out / ".notes.tmp-5", out / "images/.notes.png.tmp-5"]
    for path in (*left, *others):
        path.touch()
    assert run("mmbench-en-dev", "--resume")[0] == 0
    assert [path for path in left if path.exists()] == []
    assert all(path.exists() for path in others)
    assert sum("which an interrupted process left" in text for text in logged) == len(WRITTEN)


@pytest.mark.parametrize("name", ["report.json", "questions.jsonl", "settings.json", "predictions.jsonl"])
def test_files_of_others_are_not_replaced(run, tmp_path, name, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text('{"mine": true}')
    for options in ((), ("--resume",)):
        assert run("pope", *options)[0] == 2
        assert f"{tmp_path / 'run' / name} is not from a run of `eval`" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in (tmp_path / "run").iterdir()} == {name: '{"mine": true}'}
    (tmp_path / "file").touch()
    assert run("pope", out="file")[0] == 2
    assert "file is a file: --output names a directory" in capsys.readouterr().err


def test_a_full_disk(run, capsys):
    """The file is named, what was answered is kept, and the run goes on when there is room."""
    _, whole_run = run("pope", out="whole")
    size = (whole_run / "report.json").stat().st_size
    assert size < (whole_run / "wrong.html").stat().st_size
    with full_disk(size):
        code, out = run("pope")
    assert code == 2
    told = capsys.readouterr().err
    assert re.search(rf"{out}/\w+\.(html|jsonl)", told)
    assert [path.name for path in out.iterdir() if ".tmp" in path.name or ".part" in path.name] == []
    assert run("pope", "--resume")[0] == 0
    assert rows(out / "predictions.jsonl") == rows(whole_run / "predictions.jsonl")
    scores = [json.loads((path / "report.json").read_text())["score"] for path in (out, whole_run)]
    assert scores[0] == scores[1]


def test_the_last_line_is_the_reports(run, monkeypatch, capsys):
    """A score so far is of fewer questions: it is not what stays on the screen."""
    monkeypatch.setattr(runs, "SCORE_INTERVAL", -1e9)
    notes, note = [], runs.PartialScore.note
    monkeypatch.setattr(runs.PartialScore, "note", lambda self: notes.append(note(self)) or notes[-1])
    _, out = run("pope")
    report = json.loads((out / "report.json").read_text())
    assert all(text.endswith("so far") for text in notes)
    assert notes
    *_, last, wrong = capsys.readouterr().err.splitlines()
    assert wrong == f"wrong answers: {(out / 'wrong.html').as_uri()}"
    assert last.startswith(f"{out}: {report['questions']} answered in ")
    assert last.endswith(f"; mean F1 {report['score']['value']:.1f}")
    assert "so far" not in last


def test_a_finished_run_that_is_resumed(run, capsys):
    _, out = run("gqa")
    first = json.loads((out / "report.json").read_text())
    for _ in range(2):
        capsys.readouterr()
        assert run("gqa", "--resume")[0] == 0
        told = capsys.readouterr()
        report = json.loads((out / "report.json").read_text())
        assert report["timing"]["before"] == first["timing"]
        assert {**report, "timing": None} == {**first, "timing": None}
        assert "Nothing was asked this time: all answers were there already.\n" in told.out
        assert "0.00 questions/s" not in told.out
        assert f"{first['timing']['answered']} answered in " in told.out
        assert f"no new answers, {report['questions']} were already answered; accuracy" in told.err
    (out / "report.json").unlink()  # killed before it was written
    assert run("gqa", "--resume")[0] == 0
    report = json.loads((out / "report.json").read_text())
    assert "questions/s" not in "\n".join(report_lines(report))


def test_other_data_is_no_resume(run, data, tmp_path, capsys):
    _, out = run("gqa", "--limit", "3")
    settings = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps({**settings, "questions": "0", "model": "other"}))
    assert run("gqa", "--limit", "3", "--resume")[0] == 2
    message = "(model: other before, nano now; the data files had other questions)"
    assert message in capsys.readouterr().err
    assert run("pope", "--limit", "3", "--resume")[0] == 2
    assert "(benchmark: gqa before, pope now; " in capsys.readouterr().err


def raises(self, questions, images, **options):
    raise ValueError("its logits are not finite")


def replies(self, questions, images, **options):
    return [SimpleNamespace(error="its logits are not finite")] * len(questions)


@pytest.mark.parametrize("batch_chat", [raises, replies])
def test_rows_with_an_error_leave_no_score(run, monkeypatch, capsys, data, batch_chat):
    """Whatever is wrong with a row, answers that are not finite for example: no score, here or from its predictions."""
    monkeypatch.setattr(chat.Chat, "batch_chat", batch_chat)
    code, out = run("pope")
    assert code == 1
    report = json.loads((out / "report.json").read_text())
    assert (report["score"], len(report["failed"])) == (None, report["questions"])
    told = capsys.readouterr()
    assert f"**No score: {report['questions']} questions could not be answered" in told.out
    assert told.err.splitlines()[-1].endswith(f"; no score, {report['questions']} questions have an error")
    arguments = ["--predictions", str(out / "predictions.jsonl"), "--data", str(data)]
    assert main(["eval", "score", "pope", *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert re.search("has an error in place of an answer: .*its logits are not finite", told.err)


def test_a_lone_surrogate_is_one_rows_matter(run, data, tmp_path, capsys):
    """In questions, ids and data: files are written, the other rows are answered."""
    folder = tmp_path / "data/gqa"
    (folder / "images").mkdir(parents=True)
    for path in (data / "gqa/images").iterdir():
        (folder / "images" / path.name).write_bytes(path.read_bytes())
    questions = json.loads((data / "gqa/testdev_balanced_questions.json").read_text())
    first, second = list(questions)[:2]
    questions[first]["question"] = "What \ud800 is it?"
    questions = {f"{key}\udfff" if key == second else key: value for key, value in questions.items()}
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(questions))
    code, out = run("gqa", "--data", str(folder))
    told = rows(out / "predictions.jsonl")
    report = json.loads((out / "report.json").read_text())
    assert len(told) == report["questions"]
    assert {row["id"] for row in told if "error" in row} == set(report["failed"])
    assert set(report["failed"]) <= {first, f"{second}\udfff"}
    assert code == bool(report["failed"])
    assert (out / "report.md").read_text(encoding="utf-8")


def test_whether_a_file_is_there(tmp_path):
    """A file that cannot be looked at is not one that is missing."""
    (tmp_path / "a").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert is_file(tmp_path / "a")
    for path in ("b", "a/b", "loop", "n" * 300, "a\0b", "a\ud800", ""):
        assert not is_file(tmp_path / path)


def test_storage_errors_are_not_missing_answers(run, monkeypatch, capsys):
    """An I/O error while the answers are looked at ends the command; they are not begun anew."""
    _, out = run("gqa")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    stat = os.stat

    def failing_stat(path, *args, **options):
        if str(path).endswith("predictions.jsonl"):
            raise OSError(5, "Input/output error", str(path))
        return stat(path, *args, **options)

    for options in ((), ("--resume",)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", failing_stat)
            assert run("gqa", *options)[0] == 2
        assert "Input/output error" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("name", ["s p a c e", "ü 日本", "line\nbreak", "back\\slash", "lone\udcff"])
def test_paths(run, data, tmp_path, name, monkeypatch):
    """Any name of a directory; relative paths with `..` end up whole in the run's files."""
    (tmp_path / name).mkdir()
    os.symlink(data, tmp_path / name / "data")
    monkeypatch.chdir(tmp_path / name)
    (tmp_path / name / "inner").mkdir()
    assert main(["eval", "gqa", "--data", "inner/../data/", "--output", "inner/../out", "--limit", "2", *FAST]) == 0
    for row in rows(tmp_path / name / "out/questions.jsonl"):
        assert os.path.isabs(row["images"][0])
        assert ".." not in row["images"][0]
        assert os.path.isfile(row["images"][0])
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", f"./{name}/data", "--output", f"{name}/../handed in"]
    questions = json.loads((data / "gqa/testdev_balanced_questions.json").read_text())
    whole(tmp_path / "answers.json", {key: "red" for key, value in questions.items() if value["isBalanced"]})
    assert main(["eval", "submit", "gqa", "--predictions", f"{name}/../answers.json", *arguments]) == 0
    assert (tmp_path / "handed in/submission.json").is_file()
