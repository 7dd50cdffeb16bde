"""The engine on nano: answers are those of a chat, alone and among others, and nothing is lost, mixed up or leaked."""

import itertools
import json
import random
import re
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
from support.newer_cases import Bundle
from support.serving_cases import IMAGES, Answer, ask, make_engine, make_request

import internvl_jax
from internvl_jax.inference.generation.sampling import GenerationConfig
from internvl_jax.inference.prompts import AskOptions
from internvl_jax.serving import programs
from internvl_jax.serving.caches import make_images
from internvl_jax.serving.engine import Engine
from internvl_jax.serving.requests import EngineStopped, QueueFull, Request
from internvl_jax.serving.settings import EngineSettings
from internvl_jax.serving.structured import Grammar, GrammarCompiler

QUESTIONS = [
    ("How many shapes are there?", ("shapes.png",)),
    ("Is there a circle?", ("shapes.png",)),
    ("What is in this image?", ("word.png",)),
    ("图片里有什么？", ("shapes.png",)),
    ("What word is this?", ("word.png",)),
    ("Hello", ()),
    ("What is this?", ()),
]


@pytest.fixture(scope="module")
def chat():
    return internvl_jax.load()


@pytest.fixture(scope="module")
def engine(chat):
    engine = make_engine(chat)
    engine.start()
    yield engine
    assert engine.close(10)


names = map("request-{}".format, itertools.count())


def idle(engine):
    """Wait until the engine holds nothing."""
    deadline = time.monotonic() + 30
    while engine.stats.running or engine.stats.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_answers_are_those_of_a_chat_under_random_arrivals(engine, chat):
    """Greedy and sampled, with images and without, more requests than rows, over several turns of the ring."""
    draw = random.Random(0)
    cases = [(*one, {"temperature": 0.9, "seed": seed} if seed % 2 else {}) for seed in range(8) for one in QUESTIONS]
    draw.shuffle(cases)
    expected = {}
    for question, images, settings in cases:
        key = (question, tuple(settings.items()))
        paths = [IMAGES / image for image in images]
        expected[key] = expected.get(key) or chat.chat(question, paths, max_new_tokens=40, **settings)
    answers = []
    for question, images, settings in cases:
        answers.append(
            (ask(engine, next(names), question, images, **settings), expected[question, tuple(settings.items())])
        )
        time.sleep(draw.choice([0, 0, 0.005, 0.03]))
    for answer, reply in answers:
        answer.wait()
        assert (answer.text, answer.tokens, answer.last.finish_reason) == (
            reply.text,
            reply.tokens,
            reply.finish_reason,
        )
        assert answer.last.timings.prompt_tokens == reply.prompt_tokens
        assert answer.last.timings.generated_tokens == len(reply.tokens)
    assert engine.compiles == 0


def test_logprobs_are_those_of_the_logits(engine, chat):
    answer = ask(engine, next(names), *QUESTIONS[2], logprobs=3).wait()
    request = make_request(chat, "", *QUESTIONS[2])
    ids = np.asarray([*request.input_ids, *answer.tokens])[None]
    logits = chat.logits(ids, np.stack([image.pixel_values for image in request.images]))[
        0, len(request.input_ids) - 1 :
    ]
    expected = jax.nn.log_softmax(logits[: len(answer.tokens)])
    for one, row in zip(answer.logprobs, expected, strict=True):
        assert one.logprob == pytest.approx(float(row[one.token]), abs=1e-4)
        assert [token for token, _ in one.top] == np.argsort(-row)[:3].tolist()
        assert [value for _, value in one.top] == pytest.approx(np.sort(row)[::-1][:3].tolist(), abs=1e-3)
    assert [one.token for one in answer.logprobs] == answer.tokens


def test_penalties(engine, chat):
    """In one row only; the same as offline."""
    settings = {"frequency_penalty": 5.0, "presence_penalty": 20.0}
    plain = ask(engine, next(names), "Hello")
    answer = ask(engine, next(names), "Hello", **settings).wait()
    reply = chat.chat("Hello", max_new_tokens=40, **settings)
    assert answer.tokens == reply.tokens
    assert plain.wait().tokens == chat.chat("Hello", max_new_tokens=40).tokens != answer.tokens


def test_stop_strings_and_limits(engine, chat):
    whole = chat.chat("Hello", max_new_tokens=40).text
    stopped = ask(engine, next(names), "Hello", stop=("shapes, w",)).wait()
    assert (stopped.text, stopped.last.finish_reason) == (whole[: whole.index("shapes, w")].strip(), "stop")
    assert stopped.tokens == chat.chat("Hello", max_new_tokens=40, stop=("shapes, w",)).tokens
    assert not any(output.text.endswith("shapes,") for output in stopped.outputs)  # may be the stop's beginning
    short = ask(engine, next(names), "Hello", max_new_tokens=3).wait()
    assert (short.last.finish_reason, len(short.tokens)) == ("length", 3)


def test_prefixes_and_images_are_cached(chat):
    """The same answers with cached blocks; an image's block only with the same image, and nothing across salts."""
    engine = make_engine(chat, chunk=16)
    engine.start()
    texts = {}
    for name, images, salt in (
        ("first", ("shapes.png",), ""), ("again", ("shapes.png",), ""),
        ("other image", ("word.png",), ""), ("other tenant", ("shapes.png",), "tenant"),
    ):  # fmt: skip
        answer = ask(engine, name, "What is in this image?", images, salt=salt).wait()
        texts[name] = (answer.text, answer.last.timings.cached_tokens)
    cached = {name: tokens for name, (_, tokens) in texts.items()}
    assert cached == {"first": 0, "again": 32, "other image": 0, "other tenant": 0}
    assert texts["first"][0] == texts["again"][0] == texts["other tenant"][0] != texts["other image"][0]
    assert texts["other image"][0] == chat.chat("What is in this image?", IMAGES / "word.png").text
    stats = engine.stats
    assert (stats.image_queries, stats.image_hits) == (4, 1)
    assert stats.prefix_hits == 32
    assert engine.compiles == 0
    assert engine.close(10)


def test_text_before_an_image_is_shared(chat):
    engine = make_engine(chat, chunk=8)
    engine.start()
    for name, images, expected in (("a", ("shapes.png",), 0), ("b", ("word.png",), 16)):
        request = make_request(chat, name, "Look at this image, please: <image> How many shapes are there?", images)
        answer = Answer()
        engine.submit(request, answer)
        before = request.input_ids.index(chat.image_token_id)
        assert answer.wait().last.timings.cached_tokens == (before // 8 * 8 if expected else 0)
    assert engine.close(10)


def test_a_request_that_fails_fails_alone(engine, chat):
    broken = np.full((1, 3, 112, 112), np.nan, np.float32)
    others = [ask(engine, next(names), *QUESTIONS[0]) for _ in range(2)]
    answer = ask(engine, next(names), *QUESTIONS[0], pixels=broken).wait()
    assert answer.last.finish_reason == "error"
    assert "not finite" in answer.last.error
    others.append(ask(engine, next(names), *QUESTIONS[0]))
    assert [one.wait().text for one in others] == ["5"] * 3


def test_cancelled_requests_leave_nothing(engine, chat):
    """While they wait, are read, and are answered; hundreds of times."""
    draw = random.Random(1)
    answers = []
    for number in range(300):
        question, images = draw.choice(QUESTIONS)
        name = f"cancelled-{number}"
        answers.append(ask(engine, name, question, images, max_new_tokens=100, min_new_tokens=100))
        if number % 3 == 0:
            time.sleep(0.002)
        engine.cancel(name)
    assert {answer.wait().last.finish_reason for answer in answers} <= {"cancelled", "length"}
    idle(engine)
    assert engine.stats.cache_usage == 0
    assert ask(engine, next(names), *QUESTIONS[0]).wait().text == "5"
    engine.cancel("unknown")
    assert engine.compiles == 0


def test_a_late_cancel_does_not_reach_the_next_request_of_that_name(engine, chat):
    """A client that hangs up on its last output has nothing to cancel any more."""
    first, again, other = Answer(), Answer(), Answer()
    request = make_request(chat, "late", "Hello", max_new_tokens=40, min_new_tokens=40)

    def hang_up(output):
        first(output)
        if output.finish_reason is not None:
            engine.cancel("late")

    def ask_again(output):  # in the same round, as this row comes after the first one
        other(output)
        if first.outputs and first.last.finish_reason is not None and "late" not in asked:
            asked.add("late")
            engine.submit(request, again)

    asked = set()
    longer = make_request(chat, "beside-late", "Hello", max_new_tokens=80, min_new_tokens=80)
    engine.submit(request, hang_up)
    engine.submit(longer, ask_again)
    other.wait()
    assert again.wait().last.finish_reason == "length"
    assert again.tokens == first.tokens


def test_deadlines(engine):
    answer = ask(engine, next(names), "Hello", deadline=time.monotonic(), min_new_tokens=40).wait()
    assert answer.last.finish_reason == "deadline"


def test_a_receiver_that_raises_loses_its_request_only(engine, caplog):
    def broken(output):
        raise RuntimeError("the client is gone")

    engine.submit(make_request(engine.chat, next(names), "Hello"), broken)
    assert ask(engine, next(names), *QUESTIONS[0]).wait().text == "5"
    idle(engine)
    assert "its receiver failed" in caplog.text


def test_the_device_fails(chat, monkeypatch, caplog):
    """What runs ends with an error; what comes after is answered."""
    engine = make_engine(chat, rows=2)
    real, calls = programs.decode_step, itertools.count()

    def failing(*args, **options):
        if next(calls) == 1:
            raise RuntimeError("out of memory")
        return real(*args, **options)

    monkeypatch.setattr(programs, "decode_step", failing)
    engine.start()
    answers = [ask(engine, next(names), "Hello") for _ in range(2)]
    assert {answer.wait().last.finish_reason for answer in answers} == {"error", "stop"} or all(
        answer.last.finish_reason == "error" for answer in answers
    )
    assert ask(engine, next(names), *QUESTIONS[0]).wait().text == "5"
    assert "out of memory" in caplog.text
    assert engine.close(10)


def test_what_is_refused(chat):
    engine = make_engine(chat, rows=1, max_waiting=2, slots=96)
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens; with 90 new ones it exceeds the 96"):
        ask(engine, "long", "Hello", max_new_tokens=90)
    with pytest.raises(ValueError, match="no beam search"):
        ask(engine, "beams", "Hello", num_beams=2)
    with pytest.raises(ValueError, match="logprobs must be 0 to 20"):
        ask(engine, "logprobs", "Hello", logprobs=21)
    with pytest.raises(ValueError, match="at most 8"):
        ask(engine, "ends", "Hello", eos_token_ids=tuple(range(9)))
    request = make_request(chat, "images", *QUESTIONS[0])
    with pytest.raises(ValueError, match="image"):
        engine.submit(replace(request, images=()), print)
    waiting = [ask(engine, f"waiting-{number}", "Hello") for number in range(2)]
    with pytest.raises(ValueError, match="there is a request 'waiting-0' already"):
        ask(engine, "waiting-0", "Hello")
    with pytest.raises(QueueFull, match="2 requests are waiting already"):
        ask(engine, "third", "Hello")
    engine.start()
    assert engine.close(10)  # after those that wait are answered
    assert [answer.wait().last.finish_reason for answer in waiting] == ["stop"] * 2
    with pytest.raises(EngineStopped):
        ask(engine, "late", "Hello")


def test_closing_with_a_limit_cancels(chat):
    engine = make_engine(chat, rows=1)
    engine.start()
    answers = [ask(engine, f"slow-{number}", "Hello", max_new_tokens=100, min_new_tokens=100) for number in range(40)]
    assert not engine.close(0.01)
    assert {answer.wait().last.finish_reason for answer in answers} <= {"length", "cancelled"}
    assert answers[-1].last.finish_reason == "cancelled"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 0}, "rows must be at least 1"),
        ({"slots": 100, "chunk": 64}, "must be a multiple of chunk"),
        ({"slots": 1 << 20}, "exceed the model's context"),
    ],
)
def test_sizes_that_do_not_fit(chat, settings, message):
    with pytest.raises(ValueError, match=message):
        Engine(chat, EngineSettings(**settings))


@pytest.mark.parametrize(
    "options", [{"cache_dtype": "int8"}, pytest.param({"quantize": "int8"}, marks=pytest.mark.long)]
)
def test_quantized(options):
    chat = internvl_jax.load(**options)
    engine = make_engine(chat, rows=2)
    engine.start()
    answers = [ask(engine, f"{number}", *QUESTIONS[number]) for number in (0, 2, 5)]
    expected = [chat.chat(question, [IMAGES / image for image in images]).text for question, images in
                (QUESTIONS[0], QUESTIONS[2], QUESTIONS[5])]  # fmt: skip
    assert [answer.wait().text for answer in answers] == expected
    assert engine.compiles == 0
    assert engine.close(10)


def test_prompts_of_tokens_only(engine):
    """Without text around them: what the server's completions send."""
    ids = tuple(engine.chat.tokenizer.encode("Hello"))
    answer = Answer()
    engine.submit(Request(next(names), ids, generation=GenerationConfig(max_new_tokens=4)), answer)
    assert len(answer.wait().tokens) <= 4


def test_images_in_tiles():
    """A model that cuts images into tiles: each tile is an image of the prompt."""
    bundle = Bundle("internvl2_5_qwen2")
    chat = internvl_jax.load(bundle.directory)
    engine = make_engine(chat, rows=2, slots=256)
    engine.start()
    expected, answers = [], []
    for name in ("en_single", "two_separate", "text_only", "zh_single"):
        prompt = bundle.prompts[name]
        question, images, history, options = bundle.asked(prompt)
        batch = chat.prompts.build([question], [images], [history], AskOptions(**options))
        pixels = () if batch.pixel_values is None else batch.pixel_values
        gen = GenerationConfig(max_new_tokens=16, eos_token_ids=chat.eos_token_ids)
        answers.append(Answer())
        engine.submit(Request(name, tuple(prompt["input_ids"]), make_images(pixels, chat.name), gen), answers[-1])
        expected.append(prompt["generated_ids"])
    assert [answer.wait().tokens for answer in answers] == expected
    assert engine.compiles == 0
    assert engine.close(10)


GRAMMARS = [
    Grammar(choice=("three", "four", "a circle")),
    Grammar(regex="[0-9]{2}-[a-z]{3}"),
    Grammar(json_schema={"type": "object", "properties": {"count": {"type": "integer", "maximum": 99}},
                         "required": ["count"], "additionalProperties": False}),
]  # fmt: skip


def fits(grammar, text):
    if grammar.choice is not None:
        return text in grammar.choice
    if grammar.regex is not None:
        return re.fullmatch(grammar.regex, text) is not None
    value = json.loads(text)
    return list(value) == ["count"] and value["count"] <= 99


def test_structured_output(engine, chat):
    """Answers follow their grammars, beside others without one, which they do not change."""
    pytest.importorskip("llguidance")
    plain = [ask(engine, next(names), "Hello") for _ in range(2)]
    answers = [ask(engine, next(names), *QUESTIONS[0], grammar=grammar) for grammar in GRAMMARS]
    plain.append(ask(engine, next(names), "Hello"))
    for grammar, answer in zip(GRAMMARS, answers):
        assert answer.wait().last.finish_reason == "stop", answer.text
        assert fits(grammar, answer.text), answer.text
    expected = chat.chat("Hello", max_new_tokens=40).text
    assert [answer.wait().text for answer in plain] == [expected] * 3
    assert engine.compiles == 0


@pytest.mark.parametrize("name", ["internvl2_5_qwen2", "internvl2_internlm2"])
def test_structured_output_of_other_tokenizers(name):
    pytest.importorskip("llguidance")
    bundle = Bundle(name)
    chat = internvl_jax.load(bundle.directory)
    compiler = GrammarCompiler(chat.tokenizer, chat.config.text.vocab_size, chat.eos_token_ids)
    text = "grün 绿".encode()
    matcher, written = compiler.matcher(Grammar(choice=("rot", "grün 绿"))), b""

    def allowed():
        return np.flatnonzero(np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")).tolist()

    while written != text:  # one of the tokens that are allowed goes on with this choice
        fitting = [token for token in allowed() if text.startswith(written + chat.tokenizer.token_bytes(token))]
        assert matcher.advance(fitting[:1])
        written += chat.tokenizer.token_bytes(fitting[0])
    assert allowed() == list(chat.eos_token_ids)


def test_grammars_that_cannot_be_used(engine):
    pytest.importorskip("llguidance")
    for grammar in (Grammar(regex="[a"), Grammar(json_schema={"type": "nothing"})):
        with pytest.raises(ValueError, match="the grammar cannot be used"):
            ask(engine, next(names), "Hello", grammar=grammar)
    with pytest.raises(ValueError, match="a JSON schema, a regular expression or a list"):
        Grammar()
    with pytest.raises(ValueError, match="not empty"):
        Grammar(choice=())
