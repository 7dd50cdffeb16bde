"""MM-Vet's judge behind a server on this machine: grades, resuming, refusals."""

import hashlib
import json
import pathlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support.evaluation_files import lines, whole

from internvl_jax.cli.main import main
from internvl_jax.evaluation import judge
from internvl_jax.evaluation.run_report import table
from internvl_jax.evaluation.scorers import mmvet

PROMPT = "Compare.\n\nA | B"
FACTS = {
    "v1_0": {"question": "What is x?", "answer": "1<AND>2", "capability": ["math"]},
    "v1_1": {"question": "Where?", "answer": "left", "capability": ["rec", "spat"]},
}


@pytest.fixture
def server():
    """Replies from a list of (status, content), and remembers what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append((self.path, self.headers.get("Authorization"), body))
            status, content = server.replies.pop(0)
            if status is None:  # the connection breaks before the reply
                self.close_connection = True
                return
            text = json.dumps({"model": "gpt-4-0613", "choices": [{"message": {"content": content}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.replies = [], []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def graded(tmp_path, server, monkeypatch):
    """A finished run of two questions; calls the command."""
    monkeypatch.setattr(mmvet, "PROMPT_SHA256", hashlib.sha256(PROMPT.encode()).hexdigest())
    monkeypatch.setattr(judge, "PAUSE", 0.01)
    monkeypatch.setenv("JUDGE_KEY", "secret")
    whole(tmp_path / "mm-vet.json", FACTS)
    (tmp_path / "evaluator.py").write_text(f'prompt = """{PROMPT}"""\n')
    report = {
        "benchmark": "mm-vet",
        "title": "MM-Vet",
        "model": "nano",
        "numbers": "float32",
        "codebase": "internvl",
        "generation": {"max_new_tokens": 9, "num_beams": 1},
        "questions": 2,
        "limit": None,
        "failed": [],
        "score": None,
        "submission": ["submission.json"],
        "timing": {"answered": 2, "seconds": 1.0, "new_tokens": 3, "batch": 2},
        "published": {},
    }
    run = tmp_path / "run"
    whole(run / "report.json", report)
    whole(run / "submission.json", {"v1_0": "x is 1", "v1_1": "left"})

    def grade(*options, model="gpt-4-0613"):
        return main(
            ["eval", "judge", str(run), "--data", str(tmp_path), "--prompt-file", str(tmp_path / "evaluator.py")]
            + ["--url", f"http://127.0.0.1:{server.server_port}/v1", "--model", model, "--key-variable", "JUDGE_KEY"]
            + list(options)
        )

    grade.run = run
    return grade


def test_grades(graded, server, capsys):
    server.replies = [(200, "0.5"), (500, ""), (200, "well"), (200, "1.0"), (200, "0.0"), (200, "1")]
    assert graded("--repeats", "2") == 0
    report = json.loads((graded.run / "report.json").read_text())
    assert report["score"]["value"] == pytest.approx(100 * (0.5 + 1 + 0 + 1) / 4)
    assert report["score"]["categories"] == {"math": 25.0, "rec": 100.0, "spat": 100.0, "rec_spat": 100.0}
    assert report["judge"]["models"] == ["gpt-4-0613"]
    assert not any("another judge" in line for line in table([graded.run]))
    report["judge"]["same"] = False
    (graded.run / "report.json").write_text(json.dumps(report))
    assert any(line.endswith("62.5 (another judge) |") for line in table([graded.run]))
    assert "the judge of the published scores" in capsys.readouterr().out
    path, key, body = server.asked[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body == {
        "model": "gpt-4-0613",
        "max_tokens": 3,
        "temperature": 0.0,
        "messages": [{"role": "user", "content": f"{PROMPT}\nWhat is x? | 1 <AND> 2 | x is 1 | "}],
    }
    assert server.asked[3][2]["messages"][0]["content"].endswith("left | " + mmvet.RETRY)


def test_a_busy_server_is_asked_again(graded, server, capsys):
    """Too many requests, and connections that break; another refusal is final."""
    server.replies = [(429, ""), (None, ""), (503, ""), (200, "0.5"), (None, ""), (200, "1.0")]
    assert graded() == 0
    assert len(server.asked) == 6
    assert json.loads((graded.run / "report.json").read_text())["score"]["value"] == 75
    (graded.run / "grades.jsonl").unlink()
    capsys.readouterr()
    server.replies = [(401, "")]
    assert graded() == 2
    assert "refuses the request: 401" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "v1_0", "run": 0}\n', r"grades\.jsonl:1 has no 'asked'"),
        ("not JSON\n", r"grades\.jsonl:1: not JSON"),
        ("notes", r"grades\.jsonl: its last line is not a grade"),
    ],
)
def test_files_that_are_no_grades(graded, server, capsys, text, message):
    (graded.run / "grades.jsonl").write_text(text)
    assert graded() == 2
    assert re.search(message, capsys.readouterr().err)
    assert (graded.run / "grades.jsonl").read_text() == text
    assert server.asked == []


def test_a_storage_error_is_not_a_missing_file(graded, server, capsys, monkeypatch):
    """Grades, report and answers that cannot be read end the command; grading does not begin anew."""
    server.replies = [(200, "1"), (200, "1")]
    assert graded() == 0
    before = {path.name: path.read_bytes() for path in graded.run.iterdir()}
    read = pathlib.Path.read_bytes
    for name in ("grades.jsonl", "report.json", "submission.json"):

        def failing(path, name=name):
            if path.name == name:
                raise OSError(5, "Input/output error", str(path))
            return read(path)

        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, "read_bytes", failing)
            assert graded() == 2
        told = capsys.readouterr().err
        assert "Input/output error" in told
        assert name in told
    assert {path.name: path.read_bytes() for path in graded.run.iterdir()} == before


def test_grading_goes_on(graded, server, capsys):
    server.replies = [(200, "0.5"), (401, "")]
    assert graded() == 2
    assert "refuses the request: 401" in capsys.readouterr().err
    with open(graded.run / "grades.jsonl", "a") as file:
        file.write('{"id": "v1_1", "ru')  # cut off
    server.replies = [(200, "1.0")]
    assert graded() == 0
    assert len(server.asked) == 3
    assert json.loads((graded.run / "report.json").read_text())["score"]["value"] == 75
    capsys.readouterr()
    assert graded(model="other") == 2
    assert "has grades by gpt-4-0613, not other" in capsys.readouterr().err


def test_what_is_refused(graded, server, capsys):
    server.replies = [(503, "")] * judge.TRIES
    assert graded() == 2
    assert "does not answer (503" in capsys.readouterr().err
    lines(graded.run.parent / "evaluator.py", [{"another": "file"}])
    assert graded() == 2
    assert "does not contain MM-Vet's few-shot prompt" in capsys.readouterr().err
    (graded.run / "submission.json").unlink()
    assert graded() == 2
    assert "is not a finished run of mm-vet" in capsys.readouterr().err
