"""Batch inference over a JSONL file: what is refused, what is resumed, how several processes share."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from support.paths import DATA

from internvl_jax.cli import main
from internvl_jax.inference import offline, offline_files
from internvl_jax.inference.offline import BatchError
from internvl_jax.parallel import distributed
from internvl_jax.parallel.mesh import MeshError
from internvl_jax.utils import files

IMAGES = DATA / "internvl_chat_v1_1" / "images"


class Parrot:
    """Answers as Chat.batch_chat does, and remembers the batches."""

    def __init__(self, name="parrot", broken="", pause=0.0):
        self.name, self.broken, self.pause, self.batches = name, broken, pause, []

    def check_ready(self):
        pass

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
    path.parent.mkdir(exist_ok=True)
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
    work = offline.prepare(questions, out)
    summary = offline.run(parrot, work, size=3, progress=lambda *step: seen.append(step), max_new_tokens=5)
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
    offline.run(Parrot(), offline.prepare(questions, out), size=2)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:4]) + lines[4][:cut])
    work = offline.prepare(questions, out)
    assert work.pending == [4, 5, 6]
    summary = offline.run(Parrot(), work, size=2)
    assert (summary.answered, summary.found) == (3, 4)
    assert out.read_bytes() == whole
    again = Parrot()
    offline.run(again, offline.prepare(questions, out), size=2)
    assert again.batches == []
    assert out.read_bytes() == whole


def test_killed_for_real(tmp_path):
    """SIGKILL in the middle, twice: nothing is repeated, nothing is lost."""
    questions = write(tmp_path / "questions.jsonl", [{"question": f"q{n}"} for n in range(60)])
    out = tmp_path / "answers.jsonl"
    program = (
        "import sys; from pathlib import Path; from test_offline import Parrot\n"
        "from internvl_jax.inference import offline as batch\n"
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
    offline.run(Parrot(), offline.prepare(questions, out), size=2)
    assert [answer["id"] for answer in read(out)] == list(range(1, 61))


def test_a_question_that_fails_spoils_no_other(questions, tmp_path):
    out = tmp_path / "answers.jsonl"
    summary = offline.run(Parrot(broken="q4"), offline.prepare(questions, out), size=3)
    answers = read(out)
    assert summary.failed == 1
    assert answers[4] == {"id": "id4", "question": "q4", "error": f"{questions}:5: unreadable", "model": "parrot"}
    assert [a["answer"] for a in answers if "answer" in a] == [f"q{n}! ü" for n in (0, 1, 2, 3, 5, 6)]


def test_a_reply_with_an_error_is_a_line_with_one(questions, tmp_path):
    class Diverged(Parrot):
        def batch_chat(self, questions, images, **generation):
            replies = super().batch_chat(questions, images, **generation)
            for question, reply in zip(questions, replies):
                reply.error = "not finite" if question == "q4" else None
            return replies

    out = tmp_path / "answers.jsonl"
    parrot = Diverged()
    summary = offline.run(parrot, offline.prepare(questions, out), size=4)
    answers = read(out)
    assert (summary.answered, summary.failed, summary.new_tokens) == (7, 1, 12)
    assert answers[4]["error"].endswith("not finite")
    assert "answer" not in answers[4]
    assert [a["answer"] for a in answers if "answer" in a] == [f"q{n}! ü" for n in (0, 1, 2, 3, 5, 6)]
    assert len(parrot.batches) == 2  # nothing was asked again


def test_malformed_lines_are_listed_before_work(tmp_path, monkeypatch):
    rows = [
        {"question": "fine"},
        "{",
        "[1]",
        {"question": " "},
        {"questions": "x"},
        {"question": "x", "images": "a.png"},
        {"question": "x", "images": ["none.png"]},
        {"question": "x", "image": 3},
        {"question": "x", "id": 1.5},
        {"question": "x", "id": 1},
        {"question": "<image> and <image>", "images": [str(IMAGES / "rgb.png")]},
        {"question": "x", "image": "a.png", "images": ["a.png"]},
        '{"question": "x", "deep": ' + "[" * 100_000,
        '{"question": "a", "question": "b"}',
        '{"question": "x", "id": NaN}',
        {"question": "x", "id": True},
        '{"question": "x", "id": 1e400}',
        {"question": "x", "images": ["a\0b"]},
        {"question": "x", "images": ["n" * 5000]},
        {"question": "x", "images": ["."]},
        {"question": "x", "history": ["a", "b"]},
        {"question": "x", "system": 1},
        '{"question": "x", "temperature": NaN}',
        '{"question": "x", "max_new_tokens": 1' + "0" * 400 + "}",
        {"question": "x", "stop": 5},
        {"question": "x", "seed": [1]},
        '{"question": "x", "id": 1' + "0" * 5000 + "}",
        '{"question": "x", "temperature": 1' + "0" * 400 + "}",
        {"question": "x", "eos_token_ids": 1.5},
        {"question": "x", "history": [["a", "b", -1]]},
    ]
    path, out = write(tmp_path / "questions.jsonl", rows), tmp_path / "answers.jsonl"
    with pytest.raises(BatchError) as raised:
        offline.prepare(path, out)
    listed = str(raised.value).splitlines()[1:]
    words = [
        "2: not JSON (",
        "3: not a JSON object, but list",
        '4: "question" must be a text',
        '5: "question" must be a text',
        '6: "images" must be a list',
        f"7: no such image: {tmp_path / 'none.png'}",
        '8: "image" must be a path or a list',
        '9: "id" must be',
        "10: the id 1 is that of line 1 too",
        "11: ",
        '12: "image" and "images" are both there',
        "13: not JSON that can be read (nested too deeply)",
        "14: the field 'question' is there twice",
        '15: "id" must be',
        '16: "id" must be',
        '17: "id" must be',
        "18: no such image: ",
        "19: no such image: ",
        f"20: no such image: {tmp_path}",
        '21: "history" must be a list of pairs',
        '22: "system" must be a text',
        "23: temperature must be a number, not nan",
        "24: max_new_tokens must be",
        "25: stop must be strings that are not empty, not 5",
        "26: seed must be a whole number",
        "27: Exceeds the limit",
        "28: temperature must be a number",
        "29: the settings of the answer are not understood",
        '30: "history" must be a list of pairs',
    ]
    assert listed.pop() == f"  and {len(words) - 20} more"
    monkeypatch.setattr(offline_files, "_SHOWN", 100)
    with pytest.raises(BatchError) as raised:
        offline.prepare(path, out)
    assert str(raised.value).splitlines()[1:21] == listed
    listed = str(raised.value).splitlines()[1:]
    assert len(listed) == len(words)
    for line, word in zip(listed, words):
        assert line.startswith(f"  {path}:{word}")
    assert not out.exists()
    with pytest.raises(BatchError, match="has no questions"):
        offline.prepare(write(path, []), out)
    with pytest.raises(FileNotFoundError):
        offline.prepare(tmp_path / "absent.jsonl", out)
    for content in (b"\xff\xfe", b'{"question": "x"}\n{"question": "\xff"}'):
        path.write_bytes(content)
        with pytest.raises(BatchError, match="not a text file in UTF-8"):
            offline.prepare(path, out)
    with pytest.raises(BatchError, match="is a directory"):
        offline.prepare(tmp_path, out)


def test_answers_of_something_else_are_refused(questions, tmp_path):
    out = write(tmp_path / "answers.jsonl", [{"id": "id0", "question": "another"}])
    with pytest.raises(BatchError, match=r"answers.jsonl:1: answers no question of this file \(id 'id0'\)"):
        offline.prepare(questions, out)
    write(out, ["not json"])
    with pytest.raises(BatchError, match=r"answers.jsonl:1: not JSON"):
        offline.prepare(questions, out)
    write(out, [{"id": "id0", "question": "q0", "answer": "x", "model": "other"}])
    with pytest.raises(BatchError, match="has answers of other, not parrot"):
        offline.run(Parrot(), offline.prepare(questions, out))
    with pytest.raises(BatchError, match="is a directory"):
        offline.prepare(questions, tmp_path)
    with pytest.raises(BatchError, match="at least one question, not 0"):
        offline.run(Parrot(), offline.prepare(questions, tmp_path / "new.jsonl"), size=0)


ERRORS = [{"question": f"q{n}"} for n in range(6)]


def test_errors_are_asked_again(tmp_path, logged):
    """Their lines go, the order of the questions stays, and the exit code tells the truth."""
    questions, out = write(tmp_path / "questions.jsonl", ERRORS), tmp_path / "answers.jsonl"
    for again in range(2):
        assert offline.run(Parrot(broken="q1"), offline.prepare(questions, out), size=4).failed == 1
        assert [answer["id"] for answer in read(out)] == [1, 2, 3, 4, 5, 6]
        assert logged == [f"{questions}:2: unreadable"] * (again + 1)
    work = offline.prepare(questions, out)
    assert work.pending == [1]
    assert "error" in read(out)[1]  # nothing is lost before something new is there
    summary = offline.run(Parrot(), work, size=4)
    assert (summary.answered, summary.found, summary.failed) == (1, 5, 0)
    assert [answer["answer"] for answer in read(out)] == [f"q{n}! ü" for n in range(6)]


@pytest.mark.parametrize(
    "content",
    ["hello", "{", '{"id": 1, "text": "mine"}', '{"id": 1, "question": "q0"}', '{"question": "q0"}', "[1]", '{"id": 9'],
)
def test_files_of_users_are_not_touched(tmp_path, content):
    questions, out = write(tmp_path / "questions.jsonl", ERRORS), tmp_path / "answers.jsonl"
    out.write_text(content)
    with pytest.raises(BatchError, match=r"answers\.jsonl:1: .*nothing was changed there; use another file"):
        offline.prepare(questions, out)
    assert out.read_text() == content
    with pytest.raises(BatchError, match="is the file of questions"):
        offline.prepare(questions, questions)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_an_answer_whose_line_has_no_end_is_kept(tmp_path, mark):
    questions, out = write(tmp_path / "questions.jsonl", ERRORS[:2]), tmp_path / "answers.jsonl"
    offline.run(Parrot(), offline.prepare(questions, out), size=1)
    whole = out.read_text(encoding="utf-8")
    out.write_text(mark + whole.splitlines()[0], encoding="utf-8")
    assert offline.run(Parrot(), offline.prepare(questions, out), size=1).found == 1
    assert out.read_text(encoding="utf-8") == whole


def test_a_line_that_was_not_finished_is_named(tmp_path, logged):
    questions, out = write(tmp_path / "questions.jsonl", ERRORS[:2]), tmp_path / "answers.jsonl"
    out.write_text('{"id": 1, "question": "q0", "answ')
    assert offline.prepare(questions, out).pending == [0, 1]
    assert logged == [f"{out}:1: the last line was not finished: its question is asked again"]


def test_answers_belong_to_one_run(tmp_path):
    questions, out = write(tmp_path / "questions.jsonl", ERRORS), tmp_path / "answers.jsonl"
    work = offline.prepare(questions, out)
    with offline.opened(questions, out) as held:
        for start in (lambda: offline.opened(questions, out).__enter__(), lambda: offline.run(Parrot(), work)):
            with pytest.raises(files.OutputInUseError, match=rf"being written by process {os.getpid()}"):
                start()
        offline.run(Parrot(), held)
    with pytest.raises(BatchError, match="has changed since it was read"):
        offline.run(Parrot(), work)
    assert len(read(out)) == 6
    assert {path.name for path in tmp_path.iterdir()} == {"questions.jsonl", "answers.jsonl"}


def test_a_link_stays_a_link(tmp_path):
    questions, out = write(tmp_path / "questions.jsonl", ERRORS), tmp_path / "there/answers.jsonl"
    link = tmp_path / "link"
    link.symlink_to(out)
    for broken in ("q0", ""):
        offline.run(Parrot(broken=broken), offline.prepare(questions, link))
    assert link.is_symlink()
    assert len(read(out)) == 6


def test_half_characters_are_their_own_questions_error(tmp_path):
    rows = [{"question": "a"}, {"question": "\ud800"}, {"question": "b", "id": "\udfff"}, {"question": "c\0"}]
    rows += [{"question": "d", "history": [["\ud800", ""]]}, {"question": "e", "system": "\ud800"}]
    questions, out = write(tmp_path / "questions.jsonl", rows), tmp_path / "answers.jsonl"
    for found in (0, 2):
        summary = offline.run(Parrot(name="par\udcffrot"), offline.prepare(questions, out))
        assert (summary.found, summary.failed) == (found, 4)
    answers = read(out)
    assert [answer["question"] for answer in answers] == [row["question"] for row in rows]
    assert [answer.get("answer") for answer in answers] == ["a! ü", None, None, "c\0! ü", None, None]
    assert answers[1]["error"].startswith(f"{questions}:2: the text has a lone surrogate")
    assert answers[2]["error"].startswith(f"{questions}:3: the id has a lone surrogate")


def test_answers_with_half_characters_are_written(tmp_path):
    class Broken(Parrot):
        def batch_chat(self, questions, images, **generation):
            return [SimpleNamespace(text="\ud800", finish_reason="stop", prompt_tokens=1, tokens=[1])]

    questions, out = write(tmp_path / "questions.jsonl", ERRORS[:1]), tmp_path / "answers.jsonl"
    offline.run(Broken(), offline.prepare(questions, out), size=1)
    assert read(out)[0]["answer"] == "\ud800"


def test_questions_bring_their_own_settings(tmp_path, logged):
    shutil.copy(IMAGES / "rgb.png", tmp_path / "a.png")
    rows = [
        {"question": "q0", "max_new_tokens": 3, "image": "a.png", "images": None},
        {"question": "q1", "history": [["q", "a", 0]], "image": ""},
        {"question": "q2", "max_new_tokens": 3, "image": ["a.png"], "note": 1, "answer": "x"},
        {"question": "q3", "system": "Be brief.", "temperature": None},
        {"question": "q4", "temperature": 1, "seed": 7, "note": 2},
        {"question": "q5", "temperature": 1},
    ]
    questions, out, parrot = write(tmp_path / "questions.jsonl", rows), tmp_path / "answers.jsonl", Parrot()
    offline.run(parrot, offline.prepare(questions, out), size=6, max_new_tokens=9, seed=100)
    assert [answer["id"] for answer in read(out)] == [1, 2, 3, 4, 5, 6]
    asked = [(list(dict.fromkeys(texts)), images[0], options) for texts, images, options in parrot.batches]
    image, seeds = [tmp_path / "a.png"], (7, 105, 105, 105, 105, 105)
    assert asked == [
        (["q0", "q2"], image, {"max_new_tokens": 3, "seed": 100}),
        (["q1"], [], {"max_new_tokens": 9, "seed": 100, "histories": [(("q", "a"),)] * 6}),
        (["q3"], [], {"max_new_tokens": 9, "seed": 100, "system": "Be brief."}),
        (["q4", "q5"], [], {"max_new_tokens": 9, "temperature": 1, "seed": seeds}),
    ]
    assert logged == [f"{questions}: fields that are not read: 'answer' (line 3), 'note' (line 3 and 1 more)"]


def test_settings_that_do_not_go_together(tmp_path, logged):
    questions = write(tmp_path / "questions.jsonl", [{"question": "a"}, {"question": "b", "temperature": 1}])
    with pytest.raises(BatchError, match=r"questions\.jsonl:2: beam search does not sample"):
        offline.run(Parrot(), offline.prepare(questions, tmp_path / "a.jsonl"), num_beams=2)
    questions = write(tmp_path / "questions.jsonl", [{"question": "a", "top_p": 0.5}])
    offline.run(Parrot(), offline.prepare(questions, tmp_path / "a.jsonl"))
    assert logged == [
        f"{questions}:1: top_p, top_k, seed are without effect, because nothing is sampled at temperature 0"
    ]


def test_samples_do_not_depend_on_the_batch(tmp_path):
    """A run that went on gives the answers that it would have given in one go."""
    questions = write(tmp_path / "questions.jsonl", ERRORS)
    seeds = []
    for broken, size in (("", 4), ("q1", 2)):
        parrot, out = Parrot(broken=broken), tmp_path / f"{size}.jsonl"
        offline.run(parrot, offline.prepare(questions, out), size=size, temperature=1.0, seed=3)
        parrot.broken = ""
        offline.run(parrot, offline.prepare(questions, out), size=size, temperature=1.0, seed=3)
        seeds.append({q: seed for texts, _, options in parrot.batches for q, seed in zip(texts, options["seed"])})
    assert seeds[0] == seeds[1] == {f"q{n}": 3 + n for n in range(6)}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "takes more memory than there is"),
        (TypeError("odd"), "TypeError: odd"),
        (ValueError("row 0: 9 prompt tokens exceed"), "9 prompt tokens exceed"),
        (PermissionError(13, "Permission denied", "a.png"), "PermissionError: [Errno 13] Permission denied: 'a.png'"),
    ],
)
def test_any_error_of_one_question_is_its_own(tmp_path, error, reason):
    class Fails(Parrot):
        def batch_chat(self, questions, images, **generation):
            if "q1" in questions:
                raise error
            return super().batch_chat(questions, images, **generation)

    questions, out = write(tmp_path / "questions.jsonl", ERRORS), tmp_path / "answers.jsonl"
    assert offline.run(Fails(), offline.prepare(questions, out), size=4).failed == 1
    assert read(out)[1]["error"] == f"{questions}:2: {reason}"


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
def test_errors_of_the_machine_end_the_run(tmp_path, error):
    class Fails(Parrot):
        def batch_chat(self, questions, images, **generation):
            if "q4" in questions:
                raise error
            return super().batch_chat(questions, images, **generation)

    questions, out = write(tmp_path / "questions.jsonl", ERRORS), tmp_path / "answers.jsonl"
    with pytest.raises(type(error)):
        offline.run(Fails(), offline.prepare(questions, out), size=2)
    assert [answer["id"] for answer in read(out)] == [1, 2, 3, 4]


def test_byte_order_marks(tmp_path):
    questions, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_bytes(b"\xef\xbb\xbf" + b'{"question": "a"}\r\n\xef\xbb\xbf{"question": "b"}\r\n')
    offline.run(Parrot(), offline.prepare(questions, out))
    assert [answer["answer"] for answer in read(out)] == ["a! ü", "b! ü"]
    out.write_bytes(b"\xef\xbb\xbf" + out.read_bytes())
    assert offline.prepare(questions, out).pending == []


def test_the_command(tmp_path, monkeypatch, capsys):
    """Every setting that chat has; exit code 1 while a question has an error."""
    parrot = Parrot(broken="q1")
    monkeypatch.setattr("internvl_jax.inference.loading.load", lambda *_, **__: parrot)
    monkeypatch.chdir(write(tmp_path / "in/questions.jsonl", ERRORS).parent)
    argv = ["batch", "../in/questions.jsonl", "--output", "../new/../answers.jsonl", "--max-new-tokens", "5"]
    argv += ["--top-k", "2", "--num-beams", "1", "--system", "Be brief.", "--ignore-exif", "--stop", "."]
    for broken, code in (("q1", 1), ("q1", 1), ("", 0), ("", 0)):
        parrot.broken = broken
        assert main.main(argv) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert ("/in/questions.jsonl:2: unreadable" in err) == bool(broken)
        assert "--top-k: ignored at temperature 0" in err
    assert len(read(tmp_path / "answers.jsonl")) == 6
    settings = {"max_new_tokens": 5, "top_k": 2, "num_beams": 1, "stop": ["."]}
    assert parrot.batches[0][2] == {**settings, "system": "Be brief.", "honour_exif": False}
    with pytest.raises(SystemExit):
        main.main([*argv, "--batch-size", "0"])
    assert main.main(["batch", "questions.jsonl", "--output", "/dev/null"]) == 2
    assert "/dev/null is not a file" in capsys.readouterr().err


def test_meshes(questions, tmp_path, monkeypatch):
    with pytest.raises(MeshError, match="needs 1000 devices: use"):
        offline.prepare(questions, tmp_path / "a.jsonl", "tensor=1000")
    assert offline.prepare(questions, tmp_path / "a.jsonl", "tensor=1").mesh.size == 1
    monkeypatch.setattr(offline.jax, "local_devices", lambda: list(range(4)))
    monkeypatch.setattr(offline.jax, "devices", lambda: list(range(16)))
    monkeypatch.setattr(offline.jax, "process_count", lambda: 4)
    assert offline._devices("tensor=4") == ([0, 1, 2, 3], 4)
    assert offline._devices("data=-1,tensor=2")[1] == 4
    assert offline._devices("data=2,tensor=8")[1] == 1
    with pytest.raises(MeshError, match=r"needs 8 devices: use at most 4 \(a model on every process\) or all 16"):
        offline._devices("tensor=8")


def test_every_process_takes_its_share(questions, tmp_path, monkeypatch):
    """Two of three processes, one after the other: the third is the end of the last round and has nothing to do."""
    shares = []
    for number in range(3):
        monkeypatch.setattr(offline.jax, "process_index", lambda number=number: number)
        parrot = Parrot()
        work = offline.prepare(questions, tmp_path / f"{number}.jsonl")
        offline.run(parrot, offline.Work(**{**vars(work), "replicas": 3}), size=2)
        shares.append([sorted(set(questions)) for questions, *_ in parrot.batches])
    assert shares == [[["q0", "q1"], ["q6"]], [["q2", "q3"]], [["q4", "q5"]]]


def test_two_processes(tmp_path):
    """A model on each process, then one over both: the answers are those of one process."""
    from support.processes import make_model, run_two

    from internvl_jax.inference.loading import load

    make_model(tmp_path / "model")
    rows = [{"question": f"Question number {n}?"} for n in range(3)]
    rows[1]["images"] = [str(IMAGES / "rgb.png")]
    questions = write(tmp_path / "questions.jsonl", rows)
    offline.run(
        load(tmp_path / "model", dtype="float32"),
        offline.prepare(questions, tmp_path / "alone.jsonl"),
        size=2,
        max_new_tokens=4,
    )
    run_two("answers", tmp_path, devices=1)
    alone = read(tmp_path / "alone.jsonl")
    assert [answer["id"] for answer in alone] == [1, 2, 3]
    assert len({answer["answer"] for answer in alone}) > 1
    assert read(tmp_path / "each.jsonl") == read(tmp_path / "both.jsonl") == alone


def test_exchange_alone():
    assert distributed.all_gather(b"x") == [b"x"]
    with pytest.raises(KeyError), distributed.barrier():
        raise KeyError("own errors keep their kind")
