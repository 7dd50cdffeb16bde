"""`internvl-jax serve` as a process, with the official client."""

import contextlib
import json
import queue
import re
import signal
import subprocess
import sys
import threading

import openai
import pytest
from support.cli_cases import process
from support.paths import ROOT
from support.server_cases import data_uri, user

QUESTION = user("How many shapes are there?", data_uri("shapes.png"))


@contextlib.contextmanager
def serving(cache, *argv):
    """A server on nano that is ready; yields its process and a client."""
    server = process(
        cache, "serve", "--port", "0", "--slots", "256", "--chunk", "64", *argv,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines = queue.Queue()
    reader = threading.Thread(target=lambda: [lines.put(line) for line in server.stderr], daemon=True)
    reader.start()
    seen = ""
    try:
        while "ready after" not in seen or "listening at" not in seen:
            seen += lines.get(timeout=120)
        url = re.search(r"listening at (http://127\.0\.0\.1:\d+/)", seen).group(1)
        yield server, openai.OpenAI(base_url=f"{url}v1", api_key="secret", max_retries=0, timeout=60)
    finally:
        server.kill()
        server.wait(20)
        reader.join(20)
        server.stderr.close()


def test_it_answers_and_sigterm_lets_answers_finish(cache):
    with serving(cache) as (server, client):
        answer = client.chat.completions.create(model="nano", messages=[QUESTION])
        assert answer.choices[0].message.content == "5"
        # A long answer, which is running when the signal comes.
        stream = client.chat.completions.create(
            model="nano", messages=[QUESTION], max_tokens=180, stream=True, extra_body={"min_tokens": 180},
            stream_options={"include_usage": True},
        )  # fmt: skip
        first = next(stream)
        server.send_signal(signal.SIGTERM)
        *_, last = [first, *stream]
        assert last.usage.completion_tokens == 180
        assert server.wait(20) == 0


@pytest.mark.long
def test_it_starts_again_after_kill_9(cache):
    for _ in range(2):
        with serving(cache) as (server, client):
            assert client.chat.completions.create(model="nano", messages=[QUESTION]).choices[0].message.content == "5"
            server.kill()
            assert server.wait(20) == -signal.SIGKILL


@pytest.mark.long
def test_answers_under_load_and_faults_are_those_made_alone():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "serve_load.py"), "--clients", "6", "--seconds", "5", "--faults",
         "--json", "--", "--slots", "256", "--chunk", "64"],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["loaded"]["answers"] > 6
    assert result["loaded"]["faults"] > 0


def test_what_cannot_be_served(run, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("INTERNVL_JAX_API_KEYS", raising=False)
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text("\n \n")
    binary.write_bytes(b"\xff\xfe")
    for argv, message in (
        (("--host", "0.0.0.0"), "0.0.0.0 can be reached from other machines: give --api-key-file"),
        (("--host", "::"), ":: can be reached from other machines"),
        (("--api-key-file", empty), "has no API key"),
        (("--api-key-file", binary), "it is not UTF-8 text"),
        (("--api-key-file", tmp_path / "nowhere"), "nowhere"),
        (("--port", "70000"), "must be at most 65535"),
        (("--slots", "100", "--chunk", "64"), "slots (100) must be a multiple of chunk (64)"),
    ):
        code, out, err = run_to_end(run, capsys, "serve", *argv)
        assert (code, out) == (2, ""), argv
        assert message in err


def run_to_end(run, capsys, *argv):
    """As `run`, also where the parser ends the process."""
    try:
        return run(*argv)
    except SystemExit as ended:
        return ended.code, *capsys.readouterr()
