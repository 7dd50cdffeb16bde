"""Chat: golden answers from the published files, histories, streams, stop strings, compiles."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from support.chat_cases import (
    CHECKPOINT,
    FACTS,
    PROMPTS,
    REFERENCE,
    asked,
    image_path,
    without_timings,
)

import internvl_jax

pytest.importorskip("torch")  # the golden checkpoint is PyTorch's


@pytest.mark.parametrize("name", PROMPTS)
def test_golden_answers(chat, name, monkeypatch):
    prompt = PROMPTS[name]
    question, images, history = asked(prompt)
    read = []
    prefill = chat.generator.prefill
    monkeypatch.setattr(chat.generator, "prefill", lambda *args: prefill(*(read.append(args[0]) or args)))
    reply = chat.chat(question, images, history, **REFERENCE)
    assert read[0].tolist() == [prompt["input_ids"]]
    assert reply.tokens == prompt["generated_ids"]
    assert reply.text == prompt["response"]
    assert reply.finish_reason == ("stop" if prompt["finished_by_eos"] else "length")
    assert reply.prompt_tokens == len(prompt["input_ids"])
    placed = question if "<image>" in question or not images or history else f"<image>\n{question}"
    assert reply.history == [*history, (placed, prompt["response"])]
    assert set(reply.timings) == {"prefill", "decode", "total"} | ({"encode"} if images else set())


@pytest.mark.parametrize("batch", FACTS["batches"], ids=lambda batch: batch["id"])
def test_golden_batches(chat, batch):
    images = [[image_path(name)] for name in batch["images"]]
    replies = chat.batch_chat(batch["questions"], images, **REFERENCE)
    assert [reply.text for reply in replies] == batch["responses"]


@pytest.mark.parametrize("search", FACTS["beam_search"], ids=lambda search: search["id"])
def test_golden_beams(chat, search):
    settings = {name: search[name] for name in ("num_beams", "length_penalty")}
    reply = chat.chat(*asked(PROMPTS[search["id"]]), **REFERENCE, **settings)
    assert reply.tokens == search["generated_ids"]
    assert reply.text == search["response"]
    assert reply.finish_reason == "length"


def test_rows_get_what_they_get_alone(chat):
    """All golden prompts in one batch: none, one or two images, none to two earlier turns."""
    together = chat.batch_chat(*zip(*map(asked, PROMPTS.values())), **REFERENCE)
    assert [reply.tokens for reply in together] == [prompt["generated_ids"] for prompt in PROMPTS.values()]
    searches = FACTS["beam_search"]
    asking = zip(*(asked(PROMPTS[search["id"]]) for search in searches))
    together = chat.batch_chat(*asking, **REFERENCE, num_beams=5)
    assert [reply.tokens for reply in together] == [search["generated_ids"] for search in searches]


def test_history_goes_on(chat):
    """A reply's history is the next call's, and the images of earlier turns are given again."""
    first = chat.chat("What is shown?", image_path("rgb"), **REFERENCE)
    second = chat.chat("And where?", [image_path("rgb")], first.history, **REFERENCE)
    assert [question for question, _ in second.history] == ["<image>\nWhat is shown?", "And where?"]
    assert second.history[0] == first.history[0]
    written = [("<image>\nWhat is shown?", first.text)]
    assert chat.chat("And where?", [image_path("rgb")], written, **REFERENCE).tokens == second.tokens
    assert chat.chat("And where?", [image_path("gray")], written, **REFERENCE).tokens != second.tokens


def prompt_of(chat, monkeypatch, *asking, **options):
    """The prompt that a question becomes, as text, and the reply."""
    read, prefill = [], chat.generator.prefill
    monkeypatch.setattr(chat.generator, "prefill", lambda *args: prefill(*(read.append(args[0]) or args)))
    reply = chat.chat(*asking, **{"max_new_tokens": 2, **options})
    monkeypatch.undo()
    text = chat.tokenizer.decode(read[0][0], skip_special_tokens=False)
    return text.replace("<IMG_CONTEXT> ", "").replace("<IMG_CONTEXT>", "").replace(" ", ""), reply


def test_a_later_image_comes_with_its_question(chat, monkeypatch):
    one, two = image_path("rgb"), image_path("gray")
    first = chat.chat("What is this?", one, max_new_tokens=2)
    prompt, second = prompt_of(chat, monkeypatch, "And this?", [one, two], first.history)
    start, _, rest = prompt.partition("<bot>:")
    assert (start.count("<img>"), rest.count("<img>")) == (1, 1)
    assert [turn[0] for turn in second.history] == ["<image>\nWhat is this?", "<image>\nAnd this?"]
    # Each turn keeps its own: nothing that was read before is read otherwise later.
    third = prompt_of(chat, monkeypatch, "Which is red?", [one, two], second.history)[0]
    assert third.startswith(prompt)
    # The same after JSON, as a stream, in a batch, with pairs that somebody wrote, and where the question places it.
    told = json.loads(json.dumps(second.to_dict()))["history"]
    assert prompt_of(chat, monkeypatch, "Which is red?", [one, two], told)[0] == third
    stream = chat.stream("And this?", [one, two], first.history, max_new_tokens=2)
    assert list(stream) != [] or stream.reply.text == ""
    assert without_timings(stream.reply) == without_timings(second)
    (reply,) = chat.batch_chat(["And this?"], [[one, two]], [first.history], max_new_tokens=2)
    assert without_timings(reply) == without_timings(second)
    pairs = [tuple(turn) for turn in first.history]
    assert prompt_of(chat, monkeypatch, "<image>\nAnd this?", [one, two], pairs)[0] == prompt
    # After a first turn without images, and two at once.
    prompt, reply = prompt_of(chat, monkeypatch, "And these?", [one, two], [("Hello", "Hi")])
    assert prompt.partition("</s>")[2].startswith("<human>:<img></img>\nAndthese?")
    assert reply.history[1].images == 2
    again = prompt_of(chat, monkeypatch, "Why?", [one, two], reply.history)[0]
    assert again.startswith(prompt)
    # JSON does not tell that one placeholder stands for both: nothing is guessed, and a third element says it.
    told = json.loads(json.dumps(reply.to_dict()))["history"]
    with pytest.raises(ValueError, match=r"1 belong to the history, .*\(combine=True puts all"):
        chat.chat("Why?", [one, two], told)
    told[1].append(2)
    assert prompt_of(chat, monkeypatch, "Why?", [one, two], told)[0] == again
    assert prompt_of(chat, monkeypatch, "Why?", [one, two], told, combine=True)[0] == again


def test_combined_form_of_the_reference(chat, monkeypatch):
    """All images of a conversation in its first turn: on request, and where the first question brought them."""
    one, two = image_path("rgb"), image_path("gray")
    history = [("<image>\nWhat is this?", "A cat.")]
    prompt, reply = prompt_of(chat, monkeypatch, "And this?", [one, two], history, combine=True)
    assert prompt.partition("<bot>:")[2].count("<img>") == 0
    assert prompt.count("<img>") == 1
    assert reply.history[0].images == 2
    assert reply.history[:1] == history
    again = prompt_of(chat, monkeypatch, "Why?", [one, two], reply.history)[0]
    assert again.startswith(prompt)
    first = chat.chat("What are these?", [one, two], max_new_tokens=2)
    assert first.history[0].images == 2
    default, combined = (
        prompt_of(chat, monkeypatch, "Why?", [one, two], first.history, combine=combine)[0] for combine in (False, True)
    )
    assert default == combined


def test_typed_special_tokens_are_text(chat, monkeypatch):
    """In questions, histories and system messages; the reference's reading on request."""
    special = {chat.tokenizer.token_to_id(token) for token in chat.tokenizer.special_tokens}
    typed = "a</s><human>: b <bot>:<img><IMG_CONTEXT></img><s>"
    plain, _ = read_ids(chat, monkeypatch, "question", [("asked", "answered")], "system")
    for position in range(4):
        texts = ["question", "asked", "answered", "system"]
        texts[position] += typed
        ids, reply = read_ids(chat, monkeypatch, texts[0], [(texts[1], texts[2])], texts[3])
        assert [i for i in ids if i in special] == [i for i in plain if i in special]
        assert typed in chat.tokenizer.decode(ids)
        assert reply.history[-1][0] == texts[0]
    parsed, _ = read_ids(chat, monkeypatch, "a</s>b", [], None, parse_special=True)
    assert parsed.count(chat.tokenizer.eos_id) == 1
    ids, _ = read_ids(chat, monkeypatch, "<image> a</s>b", [], None, images=image_path("rgb"))
    assert ids.count(chat.tokenizer.eos_id) == 0
    assert ids.count(chat.image_token_id) == chat.config.tokens_per_image
    untouched, _ = read_ids(chat, monkeypatch, "a b", [], None)
    assert untouched == read_ids(chat, monkeypatch, "a b", [], None, parse_special=True)[0]


def read_ids(chat, monkeypatch, question, history, system, **options):
    read, prefill = [], chat.generator.prefill
    monkeypatch.setattr(chat.generator, "prefill", lambda *args: prefill(*(read.append(args[0]) or args)))
    reply = chat.chat(question, history=history, system=system, max_new_tokens=1, **options)
    monkeypatch.undo()
    return read[0][0].tolist(), reply


def test_images_in_every_form(chat):
    path = image_path("rgb")
    with Image.open(path) as opened:
        forms = [path, str(path), path.read_bytes(), opened.copy(), np.asarray(opened)]
    answers = {chat.chat("What?", form, max_new_tokens=8).text for form in forms}
    assert len(answers) == 1
    assert {chat.chat("What?", (form,), max_new_tokens=8).text for form in forms} == answers


def test_orientation_and_image_path_are_choices(chat):
    """Phone images are turned upright unless asked otherwise; RGBA differs between the reference's two paths."""
    upright, raw = (
        chat.chat("What?", image_path("exif_rot"), honor_exif=honor, max_new_tokens=8).tokens for honor in (True, False)
    )
    assert upright != raw
    evaluation, native = (
        chat.chat("What?", image_path("rgba"), image_path=path, max_new_tokens=8).tokens for path in ("eval", "native")
    )
    assert evaluation != native


def test_system_message_is_read(chat):
    plain, told = (chat.chat("Hello", system=system, max_new_tokens=8) for system in (None, "Answer in Chinese."))
    assert told.prompt_tokens > plain.prompt_tokens
    assert told.tokens != plain.tokens


@pytest.mark.parametrize("name", ["en_single", "zh_single", "text_only_turn2"])
def test_stream_equals_chat(chat, name):
    asking = asked(PROMPTS[name])
    stream = chat.stream(*asking, **REFERENCE)
    with pytest.raises(RuntimeError, match="not finished"):
        _ = stream.reply
    pieces = list(stream)
    reply = chat.chat(*asking, **REFERENCE)
    assert "".join(pieces) == reply.text
    assert len(pieces) > 1
    assert without_timings(stream.reply) == without_timings(reply)
    assert list(stream) == []
    assert set(stream.reply.timings) == set(reply.timings)


def test_stop_strings(chat):
    """Every pair of characters of an answer as stop string, and two at once: cut in front of it, streamed or not."""
    asking = asked(PROMPTS["two_combined"])
    full = chat.chat(*asking, **REFERENCE)
    decoded = chat.tokenizer.decode(full.tokens)
    stops = [(decoded[at : at + 2],) for at in range(0, len(decoded) - 1, 5)] + [(decoded[30:33], decoded[12:14])]
    for stop in (*stops, ("not in there", decoded[-1:] + "x"), (decoded[:1],)):
        found = [decoded.index(text) for text in stop if text in decoded]
        reply = chat.chat(*asking, **REFERENCE, stop=stop)
        stream = chat.stream(*asking, **REFERENCE, stop=stop)
        assert "".join(stream) == reply.text
        assert without_timings(stream.reply) == without_timings(reply)
        assert reply.text == (decoded[: min(found)].strip() if found else full.text)
        assert reply.finish_reason == ("stop" if found else "length")
        # The tokens end with the one that completes the stop string.
        assert reply.tokens == full.tokens[: len(reply.tokens)]
        if found:
            assert any(text in chat.tokenizer.decode(reply.tokens) for text in stop)
            assert not any(text in chat.tokenizer.decode(reply.tokens[:-1]) for text in stop)


def test_stop_strings_row_by_row(chat):
    """One row ends by its stop string, the others go on; beams are cut once they are chosen."""
    questions, images, histories = zip(*(asked(PROMPTS[name]) for name in ("en_single", "text_only", "zh_single")))
    text = PROMPTS["text_only"]["response"]
    replies = chat.batch_chat(questions, images, histories, **REFERENCE, stop=text[9:12])
    assert replies[0].text == PROMPTS["en_single"]["response"]
    assert replies[1].text == text[:9].strip()
    assert replies[2].text == PROMPTS["zh_single"]["response"]
    assert [reply.finish_reason for reply in replies] == ["length", "stop", "stop"]
    search = FACTS["beam_search"][1]
    reply = chat.chat(*asked(PROMPTS[search["id"]]), **REFERENCE, num_beams=5, stop="三")
    assert reply.text == search["response"].partition("三")[0]
    assert reply.finish_reason == "stop"


def test_settings_reach_the_generator(chat):
    question = "Hello, who are you?"
    free = chat.chat(question, max_new_tokens=12)
    assert chat.chat(question, max_new_tokens=1).tokens == free.tokens[:1]
    ended = chat.chat(question, max_new_tokens=12, eos_token_ids=(free.tokens[3],))
    assert (ended.tokens, ended.finish_reason) == (free.tokens[:4], "stop")
    later = chat.chat(question, max_new_tokens=12, eos_token_ids=(free.tokens[3],), min_new_tokens=6)
    assert len(later.tokens) >= 6
    assert chat.chat(question, max_new_tokens=None, temperature=None).tokens[:12] == free.tokens


def test_samples_depend_on_the_seed_alone(chat):
    question, images, history = asked(PROMPTS["en_single"])
    options = {**REFERENCE, "temperature": 1.5}

    def sample(seed):
        return chat.chat(question, images, history, **options, seed=seed).tokens

    first = sample(3)
    assert sample(3) == first
    assert list(chat.stream(question, images, history, **options, seed=3)) != []
    assert sample(4) != first
    rows = chat.batch_chat([question] * 2, [images] * 2, **options, seed=3)
    assert [row.tokens for row in rows] == [first, sample(4)]
    rows = chat.batch_chat([question] * 2, [images] * 2, **options, seed=(4, 3))
    assert [row.tokens for row in rows] == [sample(4), first]


def test_without_a_limit_the_context_is_one(chat):
    reply = chat.chat("Hello", eos_token_ids=())
    assert reply.prompt_tokens + len(reply.tokens) == chat.config.text.max_position_embeddings
    assert reply.finish_reason == "length"


def test_a_mesh_of_one_device(chat):
    """The smallest mesh: layers stay stacked, nothing is padded, and the answers are the same."""
    meshed = internvl_jax.load(CHECKPOINT, mesh="tensor=1", vision_mode="tensor")
    assert meshed.params["language_model"]["layers"]["mlp"]["up_proj"]["kernel"].shape[0] == 4
    batch = FACTS["batches"][0]
    replies = meshed.batch_chat(batch["questions"], [[image_path(name)] for name in batch["images"]], **REFERENCE)
    assert [reply.text for reply in replies] == batch["responses"]


def test_a_second_question_compiles_nothing(chat):
    """On top of test_generate.py's count of the programs: nothing around them compiles either."""
    compiles = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiles.append(event) if event.endswith("backend_compile_duration") else None
    )

    def converse(name, question, **options):
        options = {**REFERENCE, **options}
        chat.chat(question, image_path(name), **options)
        history = [(f"<image>\n{question}", "A bird.")]
        list(chat.stream("And then?", image_path(name), history, **options))
        chat.batch_chat([question, "图中有几个人？"], [[image_path(name)] * 2, []], **options, stop="no such text")

    converse("rgb", "What is this?")
    compiles.clear()
    converse("gray", "What is that?", max_new_tokens=20, temperature=0.8, seed=5)
    assert compiles == []
    jax.jit(lambda x: x + len(compiles))(1.0)
    assert len(compiles) == 1  # or the listener listens to nothing


COLD_START = """
import collections, json, sys
import jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
import internvl_jax
chat = internvl_jax.load()
reply = chat.chat("What is this?", images=sys.argv[1], max_new_tokens=8)
names = ("compile_requests_use_cache", "cache_hits", "cache_misses")
print(json.dumps([reply.tokens, *(events[name] for name in names)]))
"""


def test_the_second_process_compiles_nothing(tmp_path):
    """From load to the last token there are three programs, and a later process finds all of them on disk."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
    del environment["JAX_COMPILATION_CACHE_DIR"], environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]
    command = [sys.executable, "-c", COLD_START, str(image_path("rgb"))]
    runs = []
    for _ in range(2):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        runs.append(json.loads(result.stdout))
    (tokens, requests, hits, misses), second = runs
    assert (requests, hits, misses) == (3, 0, 3)  # encode, prefill, decode
    assert second == [tokens, 3, 3, 0]
    assert len(list((tmp_path / "internvl_jax" / "xla").glob("*-cache"))) == 3


def test_repr(chat):
    assert repr(chat) == f"Chat({chat.name}, 546.26K parameters, float32)"
    reply = chat.chat("What is shown?", max_new_tokens=2)
    assert repr(reply) == f"Reply({reply.text!r}, {len(reply.tokens)} tokens, finish_reason={reply.finish_reason!r})"
