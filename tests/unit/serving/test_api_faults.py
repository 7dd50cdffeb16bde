"""Clients that leave, do not read or send half a body, a full queue, failures and shutdown, with a scripted engine."""

import concurrent.futures
import json
import logging
import socket
import threading
import time

import openai
import pytest
from starlette.requests import Request
from support.server_cases import ScriptedEngine, serving, user, wait_until

import internvl_jax
from internvl_jax.serving.api import security
from internvl_jax.serving.requests import EngineError, QueueFull


@pytest.fixture(scope="module")
def chat():
    return internvl_jax.load()


@pytest.fixture
def engine():
    return ScriptedEngine()


@pytest.fixture
def server(chat, engine):
    with serving(chat, engine, body_timeout=1.0, send_timeout=1.0, max_active=6, drain_timeout=5.0) as server:
        yield server


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        yield pool


def create(server, **options):
    return server.client.chat.completions.create(model="nano", messages=[user("Hello")], **options)


def metric(server, name):
    text = server.service.metrics.page().decode()
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"internvl_jax_{name}"))


class RawClient:
    """A connection that sends what it is told."""

    def __init__(self, server):
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=20)

    def send_request(self, stream=False, body=None):
        body = (
            json.dumps({"model": "nano", "messages": [user("Hello")], "stream": stream}).encode()
            if body is None
            else body
        )
        self.send_head(len(body))
        self.socket.sendall(body)

    def send_head(self, length, key=""):
        self.socket.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: " + str(length).encode() + b"\r\n\r\n"
        )

    def read(self, until=b"\r\n\r\n"):
        data = b""
        while until not in data:
            part = self.socket.recv(65536)
            if not part:
                break
            data += part
        return data

    def close(self):
        self.socket.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("said", [0, 3], ids=["before the first token", "in decode"])
def test_a_client_that_leaves_cancels_its_request(server, engine, stream, said):
    client = RawClient(server)
    client.send_request(stream)
    (name,) = engine.wait()
    for _ in range(said):
        engine.say(name, "word ")
    if stream:
        client.read()
    client.close()
    wait_until(lambda: engine.cancelled == [name])
    wait_until(server.service.idle.is_set)


def test_a_client_that_leaves_cancels_all_choices(server, engine):
    client = RawClient(server)
    client.send_request(body=json.dumps({"model": "nano", "messages": [user("Hello")], "n": 3}).encode())
    names = engine.wait(3)
    engine.finish(names[1])
    client.close()
    wait_until(lambda: sorted(engine.cancelled) == sorted([names[0], names[2]]))


def test_half_a_body_is_given_up(server, engine):
    client = RawClient(server)
    client.send_head(1000)
    client.socket.sendall(b'{"model": ')
    assert b" 408 " in client.read()
    wait_until(server.service.idle.is_set)
    other = RawClient(server)
    other.send_head(1000)
    other.socket.sendall(b'{"model": ')
    other.close()
    wait_until(server.service.idle.is_set)
    assert not engine.requests


def test_a_body_beyond_the_limit(chat, engine):
    with serving(chat, engine, max_body_bytes=10_000) as server:
        client = RawClient(server)
        client.send_head(20_000)
        client.socket.sendall(b" " * 20_000)
        answer = client.read(b"}}")
        assert b" 413 " in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_too_large"
        chunked = RawClient(server)
        chunked.socket.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b" " * 0x1000 + b"\r\n"
        )
        with_more = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
        chunked.socket.sendall(with_more * 2)
        assert b" 413 " in chunked.read()
        assert not engine.requests


def test_a_reader_that_stops_reading_is_given_up(server, engine):
    client = RawClient(server)
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.send_request(stream=True)
    (name,) = engine.wait()
    for _ in range(200):
        engine.say(name, "word " * 10_000)
    wait_until(lambda: engine.cancelled == [name])
    wait_until(server.service.idle.is_set)
    client.close()


def test_a_full_queue_is_429_with_retry_after(server, engine):
    engine.refuse = QueueFull(3, retry_after=7.2)
    with pytest.raises(openai.RateLimitError) as caught:
        create(server)
    assert caught.value.response.headers["retry-after"] == "7"
    assert caught.value.body["code"] == "queue_full"
    assert caught.value.body["type"] == "rate_limit_error"
    assert server.service.idle.is_set()


def test_choices_of_which_one_is_refused_are_all_ended(server, engine):
    submit, count = engine.submit, 0

    def second_is_refused(request, on_output):
        nonlocal count
        count += 1
        if count == 2:
            raise QueueFull(1, 1.0)
        submit(request, on_output)

    engine.submit = second_is_refused
    with pytest.raises(openai.RateLimitError):
        create(server, n=3)
    assert engine.cancelled == list(engine.requests)


def test_requests_beyond_the_limit_are_refused_before_their_bodies(server, engine, pool):
    waiting = [pool.submit(create, server) for _ in range(6)]
    names = engine.wait(6)
    client = RawClient(server)
    client.send_head(10_000_000)
    assert b" 429 " in client.read()
    for name in names:
        engine.finish(name, text="done")
    assert [one.result().choices[0].message.content for one in waiting] == ["done"] * 6


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("reason", "tokens", "status", "code"),
    [
        ("error", (), 500, "generation_failed"),
        ("deadline", (), 504, "timeout"),
        ("cancelled", (), 503, "unavailable"),
        ("stop", (), 500, "empty_answer"),
        ("length", (), 500, "empty_answer"),
    ],
)
def test_an_answer_that_is_none_is_an_error_and_no_success(server, engine, pool, stream, reason, tokens, status, code):
    def ask():
        answer = create(server, stream=stream)
        return list(answer) if stream else answer

    asked = pool.submit(ask)
    (name,) = engine.wait()
    engine.finish(name, reason, tokens=tokens, error="RuntimeError at 0x7f3a, /secret/path")
    with pytest.raises(openai.APIError) as caught:
        asked.result()
    assert caught.value.body["code"] == code
    assert "0x" not in str(caught.value)
    assert "secret" not in str(caught.value)
    if not stream:
        assert caught.value.status_code == status
    assert metric(server, "request_success_total") == 0
    assert metric(server, "request_failure_total") == 1


def test_only_the_request_that_fails_fails(server, engine, pool):
    asked = [pool.submit(create, server) for _ in range(3)]
    names = engine.wait(3)
    engine.finish(names[1], "error", tokens=())
    engine.finish(names[0], text="one")
    engine.finish(names[2], text="one")
    errors = [one.exception() for one in asked]
    assert sum(error is None for error in errors) == 2


def test_a_failed_engine_is_503(server, engine):
    engine.refuse = EngineError("device at 0x7f12 lost")
    with pytest.raises(openai.InternalServerError) as caught:
        create(server)
    assert caught.value.status_code == 503
    assert "0x" not in str(caught.value)


def test_an_internal_error_shows_nothing(server, engine, caplog):
    caplog.set_level(logging.CRITICAL)
    engine.refuse = RuntimeError("/srv/secret at 0x7f12")
    with pytest.raises(openai.InternalServerError) as caught:
        create(server)
    assert caught.value.body["code"] == "internal_error"
    assert "secret" not in str(caught.value)
    assert "0x" not in str(caught.value)
    assert server.service.idle.is_set()


def test_keys(chat, engine, pool):
    with serving(chat, engine, api_keys=("first", "second"), local_only=False) as server:
        get = server.client._client.get
        for path in ("/v1/models", "/metrics", "/version"):
            for headers in ({}, {"Authorization": "Bearer firs"}, {"Authorization": "first"}):
                answer = get(server.url + path, headers=headers)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["code"] == "invalid_api_key"
            assert get(server.url + path, headers={"Authorization": "Bearer second"}).status_code == 200
        for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
            assert server.client._client.post(server.url + path, json={}).status_code == 401
        for path in ("/", "/page/app.js", "/health", "/ready"):
            assert get(server.url + path).status_code == 200
        asked = [
            pool.submit(create, server, extra_headers={"Authorization": f"Bearer {key}"})
            for key in ("first", "second", "first")
        ]
        salts = [engine.requests[name][0].salt for name in engine.wait(3)]
        assert len(set(salts)) == 2
        assert all(len(salt) == 64 for salt in salts)
        for name in engine.wait(3):
            engine.finish(name)
        assert all(one.result() for one in asked)


def test_keys_are_compared_in_constant_time(monkeypatch):
    """Each key is compared, with a function that takes as long for any difference."""
    compared = []
    monkeypatch.setattr(security.hmac, "compare_digest", lambda one, other: bool(compared.append(1)) or one == other)

    request = Request({"type": "http", "headers": [(b"authorization", b"Bearer a")]})
    assert security.ApiKeys(["a", "b", "c"]).check(request)
    assert len(compared) == 3


def test_shutdown_finishes_answers_and_refuses_new_ones(server, engine, pool):
    asked = pool.submit(lambda: "".join(part.choices[0].delta.content or "" for part in create(server, stream=True)))
    (name,) = engine.wait()
    server.handle_exit(15, None)
    wait_until(lambda: server.service.draining)
    assert server.client._client.get(f"{server.url}/ready").status_code == 503
    assert server.client._client.get(f"{server.url}/health").status_code == 200
    with pytest.raises(openai.InternalServerError) as caught:
        create(server)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"]
    engine.say(name, "still ")
    engine.finish(name, text="here")
    assert asked.result() == "still here"
    server.thread.join(10)
    assert not server.thread.is_alive()
    assert not server.cut_off


def test_a_second_signal_ends_answers_at_once(server, engine, pool):
    asked = pool.submit(create, server)
    engine.wait()
    server.handle_exit(15, None)
    wait_until(lambda: server.service.draining)
    time.sleep(0.1)
    started = time.monotonic()
    server.handle_exit(15, None)
    with pytest.raises(openai.InternalServerError) as caught:
        asked.result()
    assert caught.value.status_code == 503
    server.thread.join(10)
    assert time.monotonic() - started < 4
    assert server.cut_off


def test_answers_that_outlast_the_shutdown_are_ended(chat, engine, pool):
    with serving(chat, engine, drain_timeout=0.3) as server:
        asked = pool.submit(create, server)
        engine.wait()
        server.handle_exit(15, None)
        with pytest.raises(openai.InternalServerError):
            asked.result()
        server.thread.join(10)
        assert server.cut_off


def test_a_server_that_warms_up_is_not_ready(chat, engine):
    gate = threading.Event()
    engine.warm_up = lambda: gate.wait(20) and 1.0
    with serving(chat, engine, ready=False) as server:
        get = server.client._client.get
        assert get(f"{server.url}/health").status_code == 200
        assert get(f"{server.url}/ready").status_code == 503
        with pytest.raises(openai.InternalServerError) as caught:
            create(server)
        assert caught.value.status_code == 503
        gate.set()
        wait_until(lambda: get(f"{server.url}/ready").status_code == 200)


def test_an_engine_that_cannot_start_ends_the_server(chat, engine, caplog):
    caplog.set_level(logging.CRITICAL)

    def fail():
        raise RuntimeError("no memory")

    engine.warm_up = fail
    with serving(chat, engine, ready=False) as server:
        server.thread.join(10)
        assert server.failed
