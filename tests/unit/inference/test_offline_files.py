"""The files of batch inference: malformed questions, outputs of other runs, encodings, links."""

import os

import pytest
from support.parrot import Parrot, read_lines, write_lines
from support.paths import DATA

from internvl_jax.inference import offline, offline_files
from internvl_jax.inference.offline import BatchError
from internvl_jax.inference.replies import Reply
from internvl_jax.utils import files

IMAGES = DATA / "internvl_chat_v1_1" / "images"
SIX = [{"question": f"q{n}"} for n in range(6)]


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
    path, out = write_lines(tmp_path / "questions.jsonl", rows), tmp_path / "answers.jsonl"
    with pytest.raises(BatchError) as raised:
        offline.prepare(path, out)
    listed = str(raised.value).splitlines()[1:]
    words = [
        "2: not JSON (",
        "3: not a JSON object, but list",
        '4: "question" must be a non-empty string',
        '5: "question" must be a non-empty string',
        '6: "images" must be a list',
        f"7: no such image: {tmp_path / 'none.png'}",
        '8: "image" must be a path or a list',
        '9: "id" must be',
        "10: id 1 is already used on line 1",
        "11: ",
        '12: there are both "image" and "images"',
        "13: not readable as JSON (nested too deeply)",
        "14: the field 'question' occurs twice",
        '15: "id" must be',
        '16: "id" must be',
        '17: "id" must be',
        "18: no such image: ",
        "19: no such image: ",
        f"20: no such image: {tmp_path}",
        '21: "history" must be a list of pairs',
        '22: "system" must be a string',
        "23: temperature must be a number, not nan",
        "24: max_new_tokens must be",
        "25: stop must be non-empty strings, not 5",
        "26: seed must be an integer",
        "27: Exceeds the limit",
        "28: temperature must be a number",
        "29: a generation setting has the wrong type",
        '30: "history" must be a list of pairs',
    ]
    assert listed.pop() == f"  and {len(words) - 20} more"
    monkeypatch.setattr(offline_files, "MAX_PROBLEMS", 100)
    with pytest.raises(BatchError) as raised:
        offline.prepare(path, out)
    assert str(raised.value).splitlines()[1:21] == listed
    listed = str(raised.value).splitlines()[1:]
    assert len(listed) == len(words)
    for line, word in zip(listed, words):
        assert line.startswith(f"  {path}:{word}")
    assert not out.exists()
    with pytest.raises(BatchError, match="has no questions"):
        offline.prepare(write_lines(path, []), out)
    with pytest.raises(FileNotFoundError):
        offline.prepare(tmp_path / "absent.jsonl", out)
    for content in (b"\xff\xfe", b'{"question": "x"}\n{"question": "\xff"}'):
        path.write_bytes(content)
        with pytest.raises(BatchError, match="not UTF-8"):
            offline.prepare(path, out)
    with pytest.raises(BatchError, match="is a directory"):
        offline.prepare(tmp_path, out)


def test_answers_to_other_questions_or_by_other_models_are_refused(tmp_path):
    questions = write_lines(tmp_path / "questions.jsonl", [{"question": f"q{n}", "id": f"id{n}"} for n in range(7)])
    out = write_lines(tmp_path / "answers.jsonl", [{"id": "id0", "question": "another"}])
    with pytest.raises(BatchError, match=r"answers.jsonl:1: answers no question of this file \(id 'id0'\)"):
        offline.prepare(questions, out)
    write_lines(out, ["not json"])
    with pytest.raises(BatchError, match=r"answers.jsonl:1: not JSON"):
        offline.prepare(questions, out)
    write_lines(out, [{"id": "id0", "question": "q0", "answer": "x", "model": "other"}])
    with pytest.raises(BatchError, match="has answers of other, not parrot"):
        offline.run(Parrot(), offline.prepare(questions, out))
    with pytest.raises(BatchError, match="is a directory"):
        offline.prepare(questions, tmp_path)
    with pytest.raises(BatchError, match="batch size must be at least 1, not 0"):
        offline.run(Parrot(), offline.prepare(questions, tmp_path / "new.jsonl"), batch_size=0)


@pytest.mark.parametrize(
    "content",
    ["hello", "{", '{"id": 1, "text": "mine"}', '{"id": 1, "question": "q0"}', '{"question": "q0"}', "[1]", '{"id": 9'],
)
def test_other_files_are_not_touched(tmp_path, content):
    questions, out = write_lines(tmp_path / "questions.jsonl", SIX), tmp_path / "answers.jsonl"
    out.write_text(content)
    with pytest.raises(BatchError, match=r"answers\.jsonl:1: .*nothing was changed there; name another file"):
        offline.prepare(questions, out)
    assert out.read_text() == content
    with pytest.raises(BatchError, match="is the file of questions"):
        offline.prepare(questions, questions)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_an_answer_without_a_newline_is_kept(tmp_path, mark):
    questions, out = write_lines(tmp_path / "questions.jsonl", SIX[:2]), tmp_path / "answers.jsonl"
    offline.run(Parrot(), offline.prepare(questions, out), batch_size=1)
    whole = out.read_text(encoding="utf-8")
    out.write_text(mark + whole.splitlines()[0], encoding="utf-8")
    assert offline.run(Parrot(), offline.prepare(questions, out), batch_size=1).resumed == 1
    assert out.read_text(encoding="utf-8") == whole


def test_an_incomplete_last_line_is_reported(tmp_path, logged):
    questions, out = write_lines(tmp_path / "questions.jsonl", SIX[:2]), tmp_path / "answers.jsonl"
    out.write_text('{"id": 1, "question": "q0", "answ')
    assert offline.prepare(questions, out).pending == [0, 1]
    assert logged == [f"{out}:1: the last line is incomplete: its question is asked again"]


def test_only_one_run_writes_an_output(tmp_path):
    questions, out = write_lines(tmp_path / "questions.jsonl", SIX), tmp_path / "answers.jsonl"
    job = offline.prepare(questions, out)
    with offline.claim(questions, out) as held:
        for start in (lambda: offline.claim(questions, out).__enter__(), lambda: offline.run(Parrot(), job)):
            with pytest.raises(files.OutputInUseError, match=rf"being written by process {os.getpid()}"):
                start()
        offline.run(Parrot(), held)
    with pytest.raises(BatchError, match="has changed since it was read"):
        offline.run(Parrot(), job)
    assert len(read_lines(out)) == 6
    assert {path.name for path in tmp_path.iterdir()} == {"questions.jsonl", "answers.jsonl"}


def test_a_link_stays_a_link(tmp_path):
    questions, out = write_lines(tmp_path / "questions.jsonl", SIX), tmp_path / "there/answers.jsonl"
    link = tmp_path / "link"
    link.symlink_to(out)
    for broken in ("q0", ""):
        offline.run(Parrot(broken=broken), offline.prepare(questions, link))
    assert link.is_symlink()
    assert len(read_lines(out)) == 6


def test_lone_surrogates_fail_their_question_only(tmp_path):
    rows = [{"question": "a"}, {"question": "\ud800"}, {"question": "b", "id": "\udfff"}, {"question": "c\0"}]
    rows += [{"question": "d", "history": [["\ud800", ""]]}, {"question": "e", "system": "\ud800"}]
    questions, out = write_lines(tmp_path / "questions.jsonl", rows), tmp_path / "answers.jsonl"
    for found in (0, 2):
        summary = offline.run(Parrot(name="par\udcffrot"), offline.prepare(questions, out))
        assert (summary.resumed, summary.failed) == (found, 4)
    answers = read_lines(out)
    assert [answer["question"] for answer in answers] == [row["question"] for row in rows]
    assert [answer.get("answer") for answer in answers] == ["a! ü", None, None, "c\0! ü", None, None]
    assert answers[1]["error"].startswith(f"{questions}:2: the text has a lone surrogate")
    assert answers[2]["error"].startswith(f"{questions}:3: the id has a lone surrogate")


def test_answers_with_lone_surrogates_are_written(tmp_path):
    class Broken(Parrot):
        def batch_chat(self, questions, images, **options):
            return [Reply("\ud800", [1], "stop", [], 1, {})]

    questions, out = write_lines(tmp_path / "questions.jsonl", SIX[:1]), tmp_path / "answers.jsonl"
    offline.run(Broken(), offline.prepare(questions, out), batch_size=1)
    assert read_lines(out)[0]["answer"] == "\ud800"


def test_byte_order_marks(tmp_path):
    questions, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_bytes(b"\xef\xbb\xbf" + b'{"question": "a"}\r\n\xef\xbb\xbf{"question": "b"}\r\n')
    offline.run(Parrot(), offline.prepare(questions, out))
    assert [answer["answer"] for answer in read_lines(out)] == ["a! ü", "b! ü"]
    out.write_bytes(b"\xef\xbb\xbf" + out.read_bytes())
    assert offline.prepare(questions, out).pending == []
