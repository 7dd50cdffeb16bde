"""OpenAI's API on nano, driven by the official client."""

import io
import json
import re

import numpy as np
import openai
import pytest
from PIL import Image
from support.paths import DATA, ROOT
from support.server_cases import ROOM, data_uri, serving, user
from support.serving_cases import IMAGES, SIZES

import internvl_jax
from internvl_jax.serving.engine import Engine
from internvl_jax.serving.settings import EngineSettings

SHAPES, WORD = data_uri("shapes.png"), data_uri("word.png")
QUESTION = "How many shapes are there?"


@pytest.fixture(scope="module")
def chat():
    return internvl_jax.load()


@pytest.fixture(scope="module")
def server(chat):
    with serving(chat, Engine(chat, EngineSettings(**SIZES))) as server:
        yield server
        assert server.service.engine.compiles == 0


@pytest.fixture(scope="module")
def create(server):
    def create(messages, **options):
        messages = [user(messages)] if isinstance(messages, str) else messages
        return server.client.chat.completions.create(model="nano", messages=messages, **options)

    return create


def streamed(chunks):
    """Text, finish reason and usage of a stream of one choice."""
    text, reason, usage = "", None, None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return text, reason, usage


CONVERSATIONS = {
    "text": ([user("Hello")], ("Hello", [], [])),
    "image": ([user(QUESTION, SHAPES)], (QUESTION, ["shapes.png"], [])),
    "two images": ([user("What is this?", SHAPES, WORD)], ("What is this?", ["shapes.png", "word.png"], [])),
    "history": (
        [user(QUESTION, SHAPES), user("5", role="assistant"), user("Is there a circle?")],
        ("Is there a circle?", ["shapes.png"], [(QUESTION, "5", 1)]),
    ),
    "an image later": (
        [user("Hello"), user("Hello!", role="assistant"), user(QUESTION, SHAPES)],
        (QUESTION, ["shapes.png"], [("Hello", "Hello!")]),
    ),
    "images in two turns": (
        [user(QUESTION, SHAPES), user("5", role="assistant"), user("What word is this?", WORD)],
        ("What word is this?", ["shapes.png", "word.png"], [(QUESTION, "5", 1)]),
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_answers_and_usage_are_those_of_a_chat(create, chat, name):
    messages, (question, images, history) = CONVERSATIONS[name]
    history = [("<image>\n" + turn[0], *turn[1:]) if len(turn) == 3 else turn for turn in history]
    expected = chat.chat(question, [IMAGES / image for image in images], history, max_new_tokens=40)
    answer = create(messages, max_tokens=40)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == len(expected.tokens)
    assert answer.usage.total_tokens == expected.prompt_tokens + len(expected.tokens)


def test_a_system_message_is_that_of_a_chat(create, chat):
    expected = chat.chat(QUESTION, IMAGES / "shapes.png", system="Be brief.", max_new_tokens=30)
    for role in ("system", "developer"):
        answer = create([user("Be brief.", role=role), user(QUESTION, SHAPES)], max_tokens=30)
        assert answer.choices[0].message.content == expected.text
        assert answer.usage.prompt_tokens == expected.prompt_tokens


def test_an_image_after_the_text_stands_before_it_and_one_among_texts_where_it_is(create, chat):
    def image(url):
        return {"type": "image_url", "image_url": {"url": url}}

    def text(words):
        return {"type": "text", "text": words}

    after = create([{"role": "user", "content": [text(QUESTION), image(SHAPES)]}], max_tokens=10)
    assert after.usage.prompt_tokens == create([user(QUESTION, SHAPES)], max_tokens=10).usage.prompt_tokens
    among = create([{"role": "user", "content": [text("First"), image(SHAPES), text("then this")]}], max_tokens=10)
    expected = chat.chat("First\n<image>\nthen this", IMAGES / "shapes.png", max_new_tokens=10)
    assert among.choices[0].message.content == expected.text
    assert among.usage.prompt_tokens == expected.prompt_tokens


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 7}, {"stop": ["i"]}])
def test_a_streamed_answer_is_the_unstreamed_one(create, options):
    for messages in ([user("What is in this picture?", SHAPES)], [user("Hello")]):
        whole = create(messages, max_tokens=24, **options)
        stream = create(messages, max_tokens=24, stream=True, stream_options={"include_usage": True}, **options)
        text, reason, usage = streamed(stream)
        assert text == whole.choices[0].message.content
        assert reason == whole.choices[0].finish_reason
        assert usage.completion_tokens == whole.usage.completion_tokens
        assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_usage_is_streamed_only_where_it_is_asked_for(create):
    assert all(chunk.usage is None and chunk.choices for chunk in create("Hello", stream=True))


def test_choices_are_the_answers_of_consecutive_seeds(create):
    options = {
        "temperature": 2.0,
        "max_tokens": 40,
        "extra_body": {"min_tokens": 40},
    }  # nano is certain of short answers
    several = create("Hello", n=3, seed=5, **options)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in several.choices]
    assert texts == [create("Hello", seed=5 + at, **options).choices[0].message.content for at in range(3)]
    assert len(set(texts)) > 1
    parts = {0: "", 1: "", 2: ""}
    for chunk in create("Hello", n=3, seed=5, stream=True, **options):
        for choice in chunk.choices:
            parts[choice.index] += choice.delta.content or ""
    assert list(parts.values()) == texts


def test_without_a_seed_answers_differ(create):
    options = {"temperature": 2.0, "max_tokens": 40, "extra_body": {"min_tokens": 40}}
    texts = {create("Hello", **options).choices[0].message.content for _ in range(6)}
    assert len(texts) > 1


def test_penalties_change_the_answer(create):
    options = {"max_tokens": 60, "extra_body": {"min_tokens": 60}}
    plain = create("Hello", **options).choices[0].message.content
    for name in ("presence_penalty", "frequency_penalty"):
        assert create("Hello", **{name: 2.0}, **options).choices[0].message.content != plain


def test_limits_by_both_names(create):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = create("Hello", **{name: 3})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 3


def test_logprobs(create, chat):
    answer = create("Hello", logprobs=True, top_logprobs=3, max_tokens=6)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob, abs=1e-6)
        assert bytes(token.bytes).decode() == token.token
    assert "".join(token.token for token in content).strip().startswith(answer.choices[0].message.content)
    ids = chat.prompts.build(["Hello"]).input_ids
    logits = chat.logits(ids)[0, -1].astype(np.float64)
    assert content[0].logprob == pytest.approx(float(logits.max() - np.log(np.exp(logits).sum())), abs=1e-3)
    chunks = list(create("Hello", logprobs=True, top_logprobs=3, max_tokens=6, stream=True))
    parts = [token for chunk in chunks for one in chunk.choices if one.logprobs for token in one.logprobs.content]
    assert [token.token for token in parts] == [token.token for token in content]


def test_completions(server, chat):
    prompt = " <human>: Hello <bot>:"
    expected = chat.chat("Hello", max_new_tokens=20)
    answer = server.client.completions.create(model="nano", prompt=prompt, max_tokens=20, logprobs=2)
    assert answer.choices[0].text == expected.text
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.completion_tokens
    chunks = server.client.completions.create(model="nano", prompt=prompt, max_tokens=20, stream=True)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == expected.text
    two = server.client.completions.create(model="nano", prompt=[prompt, prompt], max_tokens=5)
    assert len(two.choices) == 2
    assert two.choices[0].text == two.choices[1].text


@pytest.mark.parametrize("text", ["</s>", "<IMG_CONTEXT>", "<image>", "<img>", "a <image> b </s>"])
def test_typed_special_tokens_are_text(server, create, chat, text):
    """They neither end a turn nor take an image's place, in a question, an answer, a system message or a prompt."""
    special = [chat.tokenizer.token_to_id(one) for one in ("</s>", "<IMG_CONTEXT>", "<img>", "</img>")]

    def tokens(**body):
        return server.client._client.post(f"{server.url}/tokenize", json=body).json()["tokens"]

    def count(ids):
        return [ids.count(one) for one in special]

    for conversation in ([user("What?", SHAPES)], [user("Hi"), user("Ho", role="assistant"), user("What?", SHAPES)]):
        expected = count(tokens(messages=conversation))
        assert expected[1] == chat.config.tokens_per_image
        for at, message in enumerate(conversation):
            typed = [*conversation]
            content = message["content"]
            if isinstance(content, str):
                typed[at] = {**message, "content": f"{content} {text}"}
            else:
                typed[at] = {**message, "content": [*content[:-1], {"type": "text", "text": text}]}
            assert count(tokens(messages=typed)) == expected
    assert count(tokens(prompt=text)) == [0, 0, 0, 0]
    assert (
        text
        in server.client._client.post(f"{server.url}/detokenize", json={"tokens": tokens(prompt=text)}).json()["prompt"]
    )
    assert create([user(text, role="system"), user(f"{text} {text}")], max_tokens=2).usage.completion_tokens == 2


def test_tokenize_counts_as_usage_does(server, create):
    messages = [user("Be brief.", role="system"), user(QUESTION, SHAPES)]
    counted = server.client._client.post(f"{server.url}/tokenize", json={"messages": messages}).json()
    assert counted["count"] == len(counted["tokens"]) == create(messages, max_tokens=1).usage.prompt_tokens
    assert counted["max_model_len"] == ROOM


def test_a_second_question_about_an_image_finds_it_in_the_cache(server, create):
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40), (9, 200, 30)).save(buffer, "PNG")
    before = server.service.engine.stats
    for question in (QUESTION, "Is there a circle?"):
        create([user(question, data_uri(buffer.getvalue()))], max_tokens=2)
    after = server.service.engine.stats
    assert after.image_queries - before.image_queries == 2
    assert after.image_hits - before.image_hits == 1


SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "maximum": 99}},
    "required": ["count"],
    "additionalProperties": False,
}


def test_structured_output(create):
    named = {"name": "count", "schema": SCHEMA}
    reply = create([user(QUESTION, SHAPES)], response_format={"type": "json_schema", "json_schema": named})
    assert json.loads(reply.choices[0].message.content)["count"] <= 99
    for form, check in (
        ({"choice": ["three", "four"]}, lambda text: text in ("three", "four")),
        ({"regex": "[0-9]{2}"}, lambda text: len(text) == 2 and text.isdigit()),
        ({"json": SCHEMA}, lambda text: "count" in json.loads(text)),
    ):
        reply = create([user(QUESTION, SHAPES)], extra_body={"structured_outputs": form}, max_tokens=40)
        assert check(reply.choices[0].message.content), form


BAD = {
    "a regex": (
        {"extra_body": {"structured_outputs": {"regex": "[a"}}}, openai.BadRequestError, "invalid_request", None,
    ),
    "two forms": (
        {"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}},
        openai.BadRequestError, "invalid_value", None,
    ),
    "a schema without a schema": (
        {"response_format": {"type": "json_schema"}}, openai.BadRequestError, "invalid_value", "response_format",
    ),
    "no such model": ({"model": "gpt"}, openai.NotFoundError, "model_not_found", "model"),
    "unknown field": ({"extra_body": {"logit_bias": {}}}, openai.BadRequestError, "unknown_parameter", "logit_bias"),
    "tools": ({"tools": [{}]}, openai.BadRequestError, "unknown_parameter", "tools"),
    "wrong type": ({"temperature": "warm"}, openai.BadRequestError, "invalid_value", "temperature"),
    "number as text": ({"max_tokens": "5"}, openai.BadRequestError, "invalid_value", "max_tokens"),
    "temperature": ({"temperature": 3}, openai.BadRequestError, "invalid_value", "temperature"),
    "top_p": ({"top_p": 0}, openai.BadRequestError, "invalid_value", "top_p"),
    "n": ({"n": 9}, openai.BadRequestError, "invalid_value", "n"),
    "max_tokens 0": ({"max_tokens": 0}, openai.BadRequestError, "invalid_value", "max_tokens"),
    "max_tokens": ({"max_tokens": ROOM}, openai.BadRequestError, "context_length_exceeded", "messages"),
    "two limits": ({"max_tokens": 5, "max_completion_tokens": 6}, openai.BadRequestError, "invalid_value", None),
    "stops": ({"stop": [""]}, openai.BadRequestError, "invalid_value", None),
    "top_logprobs alone": ({"top_logprobs": 3}, openai.BadRequestError, "invalid_value", None),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 21}, openai.BadRequestError, "invalid_value", "top_logprobs"),
    "response_format": (
        {"response_format": {"type": "grammar"}}, openai.BadRequestError, "invalid_value", "response_format.type",
    ),
    "no messages": ({"messages": []}, openai.BadRequestError, "invalid_value", "messages"),
    "a role": ({"messages": [user("x", role="tool")]}, openai.BadRequestError, "invalid_value", "messages.0.role"),
    "two questions": (
        {"messages": [user("x"), user("y")]}, openai.BadRequestError, "invalid_prompt", "messages.1.role",
    ),
    "an answer last": (
        {"messages": [user("x"), user("y", role="assistant")]}, openai.BadRequestError, "invalid_prompt", "messages",
    ),
    "empty": ({"messages": [user(" ")]}, openai.BadRequestError, "invalid_prompt", "messages"),
    "a long prompt": (
        {"messages": [user("word " * ROOM)]}, openai.BadRequestError, "context_length_exceeded", "messages",
    ),
    "a longer prompt": (
        {"messages": [user("word " * 40 * ROOM)]}, openai.BadRequestError, "context_length_exceeded", "messages",
    ),
    "images": (
        {"messages": [user("x", *[SHAPES] * 17)]}, openai.BadRequestError, "too_many_images", "messages",
    ),
    "an image of the assistant": (
        {"messages": [user("x"), user("y", SHAPES, role="assistant"), user("z")]},
        openai.BadRequestError, "invalid_prompt", "messages.1.content",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(create, server, name):
    options, kind, code, param = BAD[name]
    given = {"model": "nano", "messages": [user("Hello")], **options}
    with pytest.raises(kind) as caught:
        server.client.chat.completions.create(**given)
    error = caught.value.body
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert "0x" not in error["message"]
    assert "/" not in error["message"]


def test_null_is_the_default(create):
    """A message that the client dumps, with its nulls, can be sent back."""
    first = create("Hello", max_tokens=4)
    answer = first.choices[0].message.model_dump()
    assert None in answer.values()
    assert create([user("Hello"), answer, user("Hello")], max_tokens=4, stop=None, seed=None).choices


def test_other_bad_bodies(server):
    post = server.client._client.post
    url = f"{server.url}/v1/chat/completions"
    headers = {"Content-Type": "application/json"}
    for body, code in ((b"{", "invalid_json"), (b"[" * 100_000, "invalid_json"), (b"[]", "invalid_value")):
        answer = post(url, content=body, headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == code
    lone = b'{"model": "nano", "messages": [{"role": "user", "content": "\\ud800"}]}'
    assert post(url, content=lone, headers=headers).status_code == 400
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert post(url, content=b"{}", headers={"Content-Type": kind}).status_code == 415
    assert server.client._client.get(url).status_code == 405
    assert server.client._client.get(f"{server.url}/nothing").json()["error"]["code"] == "not_found"


def test_small_endpoints(server):
    get = server.client._client.get
    assert get(f"{server.url}/health").status_code == 200
    assert get(f"{server.url}/ready").status_code == 200
    assert get(f"{server.url}/version").json() == {"version": internvl_jax.__version__}
    (model,) = server.client.models.list().data
    assert model.id == "nano"
    assert server.client.models.retrieve("nano").id == "nano"
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("other")
    assert get(f"{server.url}/health").headers["x-request-id"] != get(f"{server.url}/health").headers["x-request-id"]


def test_another_name_for_this_machine_is_refused(server):
    """A page of another site whose name resolves to 127.0.0.1 gets nothing."""
    answer = server.client._client.get(f"{server.url}/v1/models", headers={"Host": "evil.example"})
    assert answer.status_code == 400


def test_metrics(server, create):
    def values():
        lines = server.client._client.get(f"{server.url}/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    def grown(name, labels='model_name="nano"'):
        key = f"internvl_jax_{name}{{{labels}}}"
        return after[key] - before.get(key, 0)

    before = values()
    answer = create([user(QUESTION, SHAPES)], max_tokens=3)
    list(create("Hello", stream=True))
    with pytest.raises(openai.BadRequestError):
        create([])
    after = values()
    assert grown("prompt_tokens_total") > answer.usage.prompt_tokens
    assert grown("generation_tokens_total") > answer.usage.completion_tokens
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time"):
        assert grown(f"{name}_seconds_count") == 2
    assert grown("request_decode_time_seconds_count") == 2
    assert grown("inter_token_latency_seconds_count") > 2
    assert grown("mm_cache_queries_total") == 1
    assert grown("prefix_cache_queries_total") > 0
    assert grown("request_success_total", 'finished_reason="stop",model_name="nano"') == 2
    assert grown("request_refused_total", 'model_name="nano",status="400"') == 1
    assert after['internvl_jax_num_requests_running{model_name="nano"}'] == 0
    assert after['internvl_jax_num_requests_waiting{model_name="nano"}'] == 0
    assert after['internvl_jax_kv_cache_usage_perc{model_name="nano"}'] == 0


def test_the_dashboard_shows_metrics_that_exist(server):
    dashboard = (ROOT / "tpu_scripts" / "manifests" / "grafana_dashboard.json").read_text()
    text = server.service.metrics.page().decode()
    there = set(re.findall(r"^# TYPE (\S+)", text, re.M)) | set(re.findall(r"^(internvl_jax\w+)\{", text, re.M))
    shown = set(re.findall(r"internvl_jax_\w+", dashboard))
    assert len(shown) > 15
    assert shown <= there, shown - there


@pytest.mark.parametrize(
    "checkpoint",
    [
        "llava_1_5/original",
        pytest.param("internvl2_5_qwen2/checkpoint", marks=pytest.mark.long),  # tiles: in the engine's tests
        pytest.param("llava_1_5/hf", marks=pytest.mark.long),
        pytest.param("internvl_chat_v1_0/checkpoint", marks=pytest.mark.long),
        pytest.param("internvl_chat_v1_1/checkpoint", marks=pytest.mark.long),
    ],
)
def test_the_other_systems_are_served(checkpoint):
    pytest.importorskip("torch")
    chat = internvl_jax.load(DATA / checkpoint)
    expected = chat.chat(QUESTION, [IMAGES / "shapes.png"], max_new_tokens=12)
    room = -(-(expected.prompt_tokens + 12) // 32) * 32
    with serving(chat, Engine(chat, EngineSettings(**{**SIZES, "rows": 1, "slots": room})), room=room) as server:
        question = user(QUESTION, SHAPES)
        answer = server.client.chat.completions.create(model="nano", messages=[question], max_tokens=12)
        assert answer.choices[0].message.content == expected.text
        assert answer.usage.prompt_tokens == expected.prompt_tokens
        assert server.service.engine.compiles == 0
