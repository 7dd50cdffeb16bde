"""Batch inference: order, resuming, errors, settings, and how processes share the work."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jax
import pytest
from support.parrot import Parrot, read_lines, write_lines
from support.paths import DATA

from internvl_jax.cli import main
from internvl_jax.inference import offline
from internvl_jax.inference.offline import BatchError
from internvl_jax.parallel.mesh import MeshError

IMAGES = DATA / "internvl_chat_v1_1" / "images"
SIX = [{"question": f"q{n}"} for n in range(6)]


@pytest.fixture
def questions(tmp_path):
    shutil.copy(IMAGES / "rgb.png", tmp_path / "a.png")
    rows = [{"question": f"q{n}", "id": f"id{n}"} for n in range(7)]
    rows[2] = {"question": "q2", "images": ["a.png", str(IMAGES / "gray.png")], "answer": "ignored"}
    return write_lines(tmp_path / "questions.jsonl", rows)


def test_answers_in_order(questions, tmp_path):
    out, seen, parrot = tmp_path / "new" / "answers.jsonl", [], Parrot()
    job = offline.prepare(questions, out)
    summary = offline.run(parrot, job, batch_size=3, progress=lambda *step: seen.append(step), max_new_tokens=5)
    answers = read_lines(out)
    assert [answer["id"] for answer in answers] == ["id0", "id1", 3, "id3", "id4", "id5", "id6"]
    assert answers[0] == {
        "id": "id0",
        "question": "q0",
        "answer": "q0! ü",
        "finish_reason": "stop",
        "prompt_tokens": 2,
        "new_tokens": 2,
        "model": "parrot",
    }
    assert seen == [(3, 7, "answering"), (6, 7, "answering"), (7, 7, "answering")]
    assert (summary.answered, summary.resumed, summary.failed, summary.new_tokens) == (7, 0, 0, 14)
    first, _, last = parrot.batches
    assert first[1:] == ([[], [], [tmp_path / "a.png", IMAGES / "gray.png"]], {"max_new_tokens": 5})
    assert last[0] == ["q6"] * 3  # filled up: a batch of one would compile again


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_a_killed_run_is_resumed(questions, tmp_path, cut):
    out = tmp_path / "answers.jsonl"
    offline.run(Parrot(), offline.prepare(questions, out), batch_size=2)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:4]) + lines[4][:cut])
    job = offline.prepare(questions, out)
    assert job.pending == [4, 5, 6]
    summary = offline.run(Parrot(), job, batch_size=2)
    assert (summary.answered, summary.resumed) == (3, 4)
    assert out.read_bytes() == whole
    again = Parrot()
    offline.run(again, offline.prepare(questions, out), batch_size=2)
    assert again.batches == []
    assert out.read_bytes() == whole


def test_sigkill_loses_and_repeats_nothing(tmp_path):
    """SIGKILL in the middle, twice: nothing is repeated, nothing is lost."""
    questions = write_lines(tmp_path / "questions.jsonl", [{"question": f"q{n}"} for n in range(60)])
    out = tmp_path / "answers.jsonl"
    program = (
        "import sys; from pathlib import Path; from support.parrot import Parrot\n"
        "from internvl_jax.inference import offline\n"
        f"job = offline.prepare(Path({str(questions)!r}), Path({str(out)!r}))\n"
        "offline.run(Parrot(pause=0.02), job, batch_size=2)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for _ in range(2):
        before = out.stat().st_size if out.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", program], env=environment)
        while process.poll() is None and (not out.exists() or out.stat().st_size < before + 500):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert 0 < len(out.read_text().splitlines()) < 60
    offline.run(Parrot(), offline.prepare(questions, out), batch_size=2)
    assert [answer["id"] for answer in read_lines(out)] == list(range(1, 61))


def test_a_failed_question_affects_no_other(questions, tmp_path):
    out = tmp_path / "answers.jsonl"
    summary = offline.run(Parrot(broken="q4"), offline.prepare(questions, out), batch_size=3)
    answers = read_lines(out)
    assert summary.failed == 1
    assert answers[4] == {"id": "id4", "question": "q4", "error": f"{questions}:5: unreadable", "model": "parrot"}
    assert [a["answer"] for a in answers if "answer" in a] == [f"q{n}! ü" for n in (0, 1, 2, 3, 5, 6)]


def test_a_reply_with_an_error_gives_an_error_line(questions, tmp_path):
    class Diverged(Parrot):
        def batch_chat(self, questions, images, **options):
            replies = super().batch_chat(questions, images, **options)
            errors = ["not finite" if question == "q4" else None for question in questions]
            return [replace(reply, error=error) for reply, error in zip(replies, errors)]

    out = tmp_path / "answers.jsonl"
    parrot = Diverged()
    summary = offline.run(parrot, offline.prepare(questions, out), batch_size=4)
    answers = read_lines(out)
    assert (summary.answered, summary.failed, summary.new_tokens) == (7, 1, 12)
    assert answers[4]["error"].endswith("not finite")
    assert "answer" not in answers[4]
    assert [a["answer"] for a in answers if "answer" in a] == [f"q{n}! ü" for n in (0, 1, 2, 3, 5, 6)]
    assert len(parrot.batches) == 2  # nothing was asked again


def test_failed_questions_are_retried(tmp_path, logged):
    """Their lines go, the order of the questions stays, and the exit code tells the truth."""
    questions, out = write_lines(tmp_path / "questions.jsonl", SIX), tmp_path / "answers.jsonl"
    for again in range(2):
        assert offline.run(Parrot(broken="q1"), offline.prepare(questions, out), batch_size=4).failed == 1
        assert [answer["id"] for answer in read_lines(out)] == [1, 2, 3, 4, 5, 6]
        assert logged == [f"{questions}:2: unreadable"] * (again + 1)
    job = offline.prepare(questions, out)
    assert job.pending == [1]
    assert "error" in read_lines(out)[1]  # nothing is lost before something new is there
    summary = offline.run(Parrot(), job, batch_size=4)
    assert (summary.answered, summary.resumed, summary.failed) == (1, 5, 0)
    assert [answer["answer"] for answer in read_lines(out)] == [f"q{n}! ü" for n in range(6)]


def test_settings_of_single_questions(tmp_path, logged):
    shutil.copy(IMAGES / "rgb.png", tmp_path / "a.png")
    rows = [
        {"question": "q0", "max_new_tokens": 3, "image": "a.png", "images": None},
        {"question": "q1", "history": [["q", "a", 0]], "image": ""},
        {"question": "q2", "max_new_tokens": 3, "image": ["a.png"], "note": 1, "answer": "x"},
        {"question": "q3", "system": "Be brief.", "temperature": None},
        {"question": "q4", "temperature": 1, "seed": 7, "note": 2},
        {"question": "q5", "temperature": 1},
    ]
    questions, out, parrot = write_lines(tmp_path / "questions.jsonl", rows), tmp_path / "answers.jsonl", Parrot()
    offline.run(parrot, offline.prepare(questions, out), batch_size=6, max_new_tokens=9, seed=100)
    assert [answer["id"] for answer in read_lines(out)] == [1, 2, 3, 4, 5, 6]
    asked = [(list(dict.fromkeys(texts)), images[0], options) for texts, images, options in parrot.batches]
    image, seeds = [tmp_path / "a.png"], (7, 105, 105, 105, 105, 105)
    assert asked == [
        (["q0", "q2"], image, {"max_new_tokens": 3, "seed": 100}),
        (["q1"], [], {"max_new_tokens": 9, "seed": 100, "histories": [(("q", "a"),)] * 6}),
        (["q3"], [], {"max_new_tokens": 9, "seed": 100, "system": "Be brief."}),
        (["q4", "q5"], [], {"max_new_tokens": 9, "temperature": 1, "seed": seeds}),
    ]
    assert logged == [f"{questions}: ignored fields: 'answer' (line 3), 'note' (line 3 and 1 more)"]


def test_contradicting_settings(tmp_path, logged):
    questions = write_lines(tmp_path / "questions.jsonl", [{"question": "a"}, {"question": "b", "temperature": 1}])
    with pytest.raises(BatchError, match=r"questions\.jsonl:2: beam search does not sample"):
        offline.run(Parrot(), offline.prepare(questions, tmp_path / "a.jsonl"), num_beams=2)
    questions = write_lines(tmp_path / "questions.jsonl", [{"question": "a", "top_p": 0.5}])
    offline.run(Parrot(), offline.prepare(questions, tmp_path / "a.jsonl"))
    assert logged == [f"{questions}:1: top_p, top_k, seed are ignored at temperature 0"]


def test_samples_do_not_depend_on_the_batch(tmp_path):
    """A resumed run gives the answers of an uninterrupted one."""
    questions = write_lines(tmp_path / "questions.jsonl", SIX)
    seeds = []
    for broken, size in (("", 4), ("q1", 2)):
        parrot, out = Parrot(broken=broken), tmp_path / f"{size}.jsonl"
        offline.run(parrot, offline.prepare(questions, out), batch_size=size, temperature=1.0, seed=3)
        parrot.broken = ""
        offline.run(parrot, offline.prepare(questions, out), batch_size=size, temperature=1.0, seed=3)
        seeds.append({q: seed for texts, _, options in parrot.batches for q, seed in zip(texts, options["seed"])})
    assert seeds[0] == seeds[1] == {f"q{n}": 3 + n for n in range(6)}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "needs more memory than there is"),
        (TypeError("odd"), "TypeError: odd"),
        (ValueError("row 0: 9 prompt tokens exceed"), "9 prompt tokens exceed"),
        (PermissionError(13, "Permission denied", "a.png"), "PermissionError: [Errno 13] Permission denied: 'a.png'"),
    ],
)
def test_an_error_of_one_question_fails_that_question(tmp_path, error, reason):
    class Fails(Parrot):
        def batch_chat(self, questions, images, **options):
            if "q1" in questions:
                raise error
            return super().batch_chat(questions, images, **options)

    questions, out = write_lines(tmp_path / "questions.jsonl", SIX), tmp_path / "answers.jsonl"
    assert offline.run(Fails(), offline.prepare(questions, out), batch_size=4).failed == 1
    assert read_lines(out)[1]["error"] == f"{questions}:2: {reason}"


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB"),
        jax.errors.JaxRuntimeError("INTERNAL: a core was lost"),
        ModuleNotFoundError("No module named 'torch'", name="torch"),
    ],
    ids=str,
)
def test_system_errors_end_the_run(tmp_path, error):
    class Fails(Parrot):
        def batch_chat(self, questions, images, **options):
            if "q4" in questions:
                raise error
            return super().batch_chat(questions, images, **options)

    questions, out = write_lines(tmp_path / "questions.jsonl", SIX), tmp_path / "answers.jsonl"
    with pytest.raises(type(error)):
        offline.run(Fails(), offline.prepare(questions, out), batch_size=2)
    assert [answer["id"] for answer in read_lines(out)] == [1, 2, 3, 4]


def test_the_command(tmp_path, monkeypatch, capsys):
    """Every setting that chat has; exit code 1 while a question has an error."""
    parrot = Parrot(broken="q1")
    monkeypatch.setattr("internvl_jax.inference.loading.load", lambda *_, **__: parrot)
    monkeypatch.chdir(write_lines(tmp_path / "in/questions.jsonl", SIX).parent)
    argv = ["batch", "../in/questions.jsonl", "--output", "../new/../answers.jsonl", "--max-new-tokens", "5"]
    argv += ["--top-k", "2", "--num-beams", "1", "--system", "Be brief.", "--ignore-exif", "--stop", "."]
    for broken, code in (("q1", 1), ("q1", 1), ("", 0), ("", 0)):
        parrot.broken = broken
        assert main.main(argv) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert ("/in/questions.jsonl:2: unreadable" in err) == bool(broken)
        assert "--top-k: ignored at temperature 0" in err
    assert len(read_lines(tmp_path / "answers.jsonl")) == 6
    settings = {"max_new_tokens": 5, "top_k": 2, "num_beams": 1, "stop": ["."]}
    assert parrot.batches[0][2] == {**settings, "system": "Be brief.", "honor_exif": False}
    with pytest.raises(SystemExit):
        main.main([*argv, "--batch-size", "0"])
    assert main.main(["batch", "questions.jsonl", "--output", "/dev/null"]) == 2
    assert "/dev/null is not a regular file" in capsys.readouterr().err


def test_meshes(questions, tmp_path, monkeypatch):
    with pytest.raises(MeshError, match="needs 1000 devices: use"):
        offline.prepare(questions, tmp_path / "a.jsonl", "tensor=1000")
    assert offline.prepare(questions, tmp_path / "a.jsonl", "tensor=1").mesh.size == 1
    monkeypatch.setattr(offline.jax, "local_devices", lambda: list(range(4)))
    monkeypatch.setattr(offline.jax, "devices", lambda: list(range(16)))
    monkeypatch.setattr(offline.jax, "process_count", lambda: 4)
    assert offline.model_devices("tensor=4") == ([0, 1, 2, 3], 4)
    assert offline.model_devices("data=-1,tensor=2")[1] == 4
    assert offline.model_devices("data=2,tensor=8")[1] == 1
    with pytest.raises(MeshError, match=r"needs 8 devices: use at most 4 \(a model on every process\) or all 16"):
        offline.model_devices("tensor=8")


def test_every_process_takes_its_share(questions, tmp_path, monkeypatch):
    """Two of three processes, one after the other: the third is the end of the last round and has nothing to do."""
    shares = []
    for number in range(3):
        monkeypatch.setattr(offline.jax, "process_index", lambda number=number: number)
        parrot = Parrot()
        job = offline.prepare(questions, tmp_path / f"{number}.jsonl")
        offline.run(parrot, offline.BatchJob(**{**vars(job), "replicas": 3}), batch_size=2)
        shares.append([sorted(set(questions)) for questions, *_ in parrot.batches])
    assert shares == [[["q0", "q1"], ["q6"]], [["q2", "q3"]], [["q4", "q5"]]]
