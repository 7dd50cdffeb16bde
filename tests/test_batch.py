"""Batch inference over a JSONL file: what is refused, what is resumed, how several processes share."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from internvl_jax import batch, distributed
from internvl_jax.batch import BatchError
from internvl_jax.sharding import MeshError

IMAGES = Path(__file__).parent / "data" / "internvl_chat_v1_1" / "images"


class Parrot:
    """Answers as Chat.batch_chat does, and remembers the batches."""

    def __init__(self, name="parrot", broken="", pause=0.0):
        self.name, self.broken, self.pause, self.batches = name, broken, pause, []

    def batch_chat(self, questions, images, **generation):
        if self.broken and self.broken in questions:
            raise ValueError(f"question {questions.index(self.broken) + 1}: unreadable")
        time.sleep(self.pause)
        self.batches.append((questions, images, generation))
        return [
            SimpleNamespace(text=f"{q}! ü", finish_reason="stop", prompt_tokens=len(q), tokens=[1, 2])
            for q in questions
        ]


def write(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def questions(tmp_path):
    shutil.copy(IMAGES / "rgb.png", tmp_path / "a.png")
    rows = [{"question": f"q{n}", "id": f"id{n}"} for n in range(7)]
    rows[2] = {"question": "q2", "images": ["a.png", str(IMAGES / "gray.png")], "answer": "ignored"}
    return write(tmp_path / "questions.jsonl", rows)


def test_answers_in_order(questions, tmp_path):
    out, seen, parrot = tmp_path / "new" / "answers.jsonl", [], Parrot()
    work = batch.prepare(questions, out)
    summary = batch.run(parrot, work, size=3, progress=lambda *step: seen.append(step), max_new_tokens=5)
    answers = read(out)
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
    assert (summary.answered, summary.found, summary.failed, summary.new_tokens) == (7, 0, 0, 14)
    first, _, last = parrot.batches
    assert first[1:] == ([[], [], [tmp_path / "a.png", IMAGES / "gray.png"]], {"max_new_tokens": 5})
    assert last[0] == ["q6"] * 3  # filled up: a batch of one would compile again


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_a_killed_run_goes_on(questions, tmp_path, cut):
    out = tmp_path / "answers.jsonl"
    batch.run(Parrot(), batch.prepare(questions, out), size=2)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:4]) + lines[4][:cut])
    work = batch.prepare(questions, out)
    assert work.pending == [4, 5, 6]
    summary = batch.run(Parrot(), work, size=2)
    assert (summary.answered, summary.found) == (3, 4)
    assert out.read_bytes() == whole
    again = Parrot()
    batch.run(again, batch.prepare(questions, out), size=2)
    assert again.batches == []
    assert out.read_bytes() == whole


def test_killed_for_real(tmp_path):
    """SIGKILL in the middle, twice: nothing is repeated, nothing is lost."""
    questions = write(tmp_path / "questions.jsonl", [{"question": f"q{n}"} for n in range(60)])
    out = tmp_path / "answers.jsonl"
    program = (
        "import sys; from pathlib import Path; from test_batch import Parrot; from internvl_jax import batch\n"
        f"work = batch.prepare(Path({str(questions)!r}), Path({str(out)!r}))\n"
        "batch.run(Parrot(pause=0.02), work, size=2)"
    )
    for _ in range(2):
        before = out.stat().st_size if out.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parent)
        while process.poll() is None and (not out.exists() or out.stat().st_size < before + 500):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert 0 < len(out.read_text().splitlines()) < 60
    batch.run(Parrot(), batch.prepare(questions, out), size=2)
    assert [answer["id"] for answer in read(out)] == list(range(1, 61))


def test_a_question_that_fails_spoils_no_other(questions, tmp_path):
    out = tmp_path / "answers.jsonl"
    summary = batch.run(Parrot(broken="q4"), batch.prepare(questions, out), size=3)
    answers = read(out)
    assert summary.failed == 1
    assert answers[4] == {"id": "id4", "question": "q4", "error": "question 1: unreadable", "model": "parrot"}
    assert [a["answer"] for a in answers if "answer" in a] == [f"q{n}! ü" for n in (0, 1, 2, 3, 5, 6)]


def test_malformed_lines_are_listed_before_work(tmp_path):
    rows = [
        {"question": "fine"},
        "{",
        "[1]",
        {"question": " "},
        {"questions": "x"},
        {"question": "x", "images": "a.png"},
        {"question": "x", "images": ["none.png"]},
        {"question": "x", "image": "a.png"},
        {"question": "x", "id": 1.5},
        {"question": "x", "id": 1},
        {"question": "<image> and <image>", "images": [str(IMAGES / "rgb.png")]},
    ]
    path, out = write(tmp_path / "questions.jsonl", rows), tmp_path / "answers.jsonl"
    with pytest.raises(BatchError) as raised:
        batch.prepare(path, out)
    listed = str(raised.value).splitlines()[1:]
    words = [
        "2: not JSON (",
        "3: not a JSON object, but list",
        '4: "question" must be a text',
        '5: "question" must be a text',
        '6: "images" must be a list',
        f"7: no such image: {tmp_path / 'none.png'}",
        '8: "image" is not read: write "images"',
        '9: "id" must be',
        "10: the id 1 is that of line 1 too",
        "11: ",
    ]
    assert len(listed) == len(words)
    for line, word in zip(listed, words):
        assert line.startswith(f"  {path}:{word}")
    assert not out.exists()
    with pytest.raises(BatchError, match="has no questions"):
        batch.prepare(write(path, []), out)
    with pytest.raises(FileNotFoundError):
        batch.prepare(tmp_path / "absent.jsonl", out)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BatchError, match="not a text file in UTF-8"):
        batch.prepare(path, out)


def test_answers_of_something_else_are_refused(questions, tmp_path):
    out = write(tmp_path / "answers.jsonl", [{"id": "id0", "question": "another"}])
    with pytest.raises(BatchError, match=r"answers.jsonl:1: answers no question of this file \(id 'id0'\)"):
        batch.prepare(questions, out)
    write(out, ["not json"])
    with pytest.raises(BatchError, match=r"answers.jsonl:1: not JSON"):
        batch.prepare(questions, out)
    write(out, [{"id": "id0", "question": "q0", "answer": "x", "model": "other"}])
    with pytest.raises(BatchError, match="has answers of other, not parrot"):
        batch.run(Parrot(), batch.prepare(questions, out))
    with pytest.raises(BatchError, match="is a directory"):
        batch.prepare(questions, tmp_path)
    with pytest.raises(BatchError, match="at least one question, not 0"):
        batch.run(Parrot(), batch.prepare(questions, tmp_path / "new.jsonl"), size=0)


def test_meshes(questions, tmp_path, monkeypatch):
    with pytest.raises(MeshError, match="needs 1000 devices: use"):
        batch.prepare(questions, tmp_path / "a.jsonl", "tensor=1000")
    assert batch.prepare(questions, tmp_path / "a.jsonl", "tensor=1").mesh.size == 1
    monkeypatch.setattr(batch.jax, "local_devices", lambda: list(range(4)))
    monkeypatch.setattr(batch.jax, "devices", lambda: list(range(16)))
    monkeypatch.setattr(batch.jax, "process_count", lambda: 4)
    assert batch._devices("tensor=4") == ([0, 1, 2, 3], 4)
    assert batch._devices("data=-1,tensor=2")[1] == 4
    assert batch._devices("data=2,tensor=8")[1] == 1
    with pytest.raises(MeshError, match=r"needs 8 devices: use at most 4 \(a model on every process\) or all 16"):
        batch._devices("tensor=8")


def test_every_process_takes_its_share(questions, tmp_path, monkeypatch):
    """Two of three processes, one after the other: the third is the end of the last round and has nothing to do."""
    shares = []
    for number in range(3):
        monkeypatch.setattr(batch.jax, "process_index", lambda number=number: number)
        parrot = Parrot()
        work = batch.prepare(questions, tmp_path / f"{number}.jsonl")
        batch.run(parrot, batch.Work(**{**vars(work), "replicas": 3}), size=2)
        shares.append([sorted(set(questions)) for questions, *_ in parrot.batches])
    assert shares == [[["q0", "q1"], ["q6"]], [["q2", "q3"]], [["q4", "q5"]]]


def test_two_processes(tmp_path):
    """A model on each process, then one over both: the answers are those of one process."""
    from test_distributed import make_model, run_two

    from internvl_jax.loading import load

    make_model(tmp_path / "model")
    rows = [{"question": f"Question number {n}?"} for n in range(3)]
    rows[1]["images"] = [str(IMAGES / "rgb.png")]
    questions = write(tmp_path / "questions.jsonl", rows)
    batch.run(
        load(tmp_path / "model", dtype="float32"),
        batch.prepare(questions, tmp_path / "alone.jsonl"),
        size=2,
        max_new_tokens=4,
    )
    run_two("answers", tmp_path, devices=1)
    alone = read(tmp_path / "alone.jsonl")
    assert [answer["id"] for answer in alone] == [1, 2, 3]
    assert len({answer["answer"] for answer in alone}) > 1
    assert read(tmp_path / "each.jsonl") == read(tmp_path / "both.jsonl") == alone


def test_exchange_alone():
    assert distributed.exchange(b"x") == [b"x"]
    with pytest.raises(KeyError), distributed.all_or_none():
        raise KeyError("own errors keep their kind")
