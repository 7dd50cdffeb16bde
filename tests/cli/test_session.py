"""Sessions of `internvl-jax chat`: turns, images, commands, what fails."""

import json
import re
import signal
import sys

from support.cli_cases import FACTS, IMAGE, PROMPTS, QUESTION, SEEN, TEXT

from internvl_jax.cli import runner, session
from internvl_jax.utils.progress import printable


def test_a_session(golden, chat):
    turns = PROMPTS["en_multi_turn"]["history"][0][0].removeprefix("<image>\n"), "And then?"
    lines = [
        "",
        "/help",
        "/fly",
        "/image",
        "/image nowhere.png",
        f"/image '{IMAGE}'",
        *turns,
        "<image>",
        f"/image {IMAGE}",
        QUESTION,
        "/clear",
        TEXT["question"],
        "/quit",
        "not asked",
    ]
    code, out, err = golden(stdin="\n".join(lines))
    assert code == 0
    answers = out.removesuffix("\n")
    assert answers.endswith(TEXT["response"])  # after /clear
    assert err.count("/image FILE") == 2  # for /help and for /fly
    assert "there is no command /fly; a question may begin with //" in err
    assert "error: /image needs a file: /image photo.jpg" in err
    assert "error: nowhere.png does not exist" in err
    assert "error: the text has 2 <image> placeholders for 1 image(s)" in err

    # The questions before it were one conversation, in which the second image came with the third question.
    first = golden("--json", "--image", IMAGE, turns[0])[1]
    second = chat.chat(turns[1], IMAGE, json.loads(first)["history"], max_new_tokens=32)
    third = chat.chat(QUESTION, [IMAGE] * 2, second.history, max_new_tokens=32)
    assert third.history[2][0].startswith("<image>")
    said = (json.loads(first)["answer"], second.text, third.text, TEXT["response"])
    assert answers == "\n".join(said)


def test_a_script_that_got_no_answer_fails(golden):
    assert golden(stdin="<image> what?\n/image nowhere.png\n")[:2] == (1, "")
    assert golden(stdin="bytes \udcff\n/quit\n")[:2] == (1, "")
    assert golden(stdin="\n/help\n")[0] == 0


def test_sigterm_ends_a_session_not_an_answer(golden, monkeypatch):
    def answer(*_):
        raise runner.Terminated(signal.SIGTERM)

    monkeypatch.setattr(session, "print_answer", answer)
    assert golden(stdin="Hi\nHi again\n") == (143, "", "ended by SIGTERM\n")


def test_a_session_with_beams_and_images_from_the_start(golden):
    search = FACTS["beam_search"][0]
    code, out, err = golden("--image", IMAGE, "--num-beams", 5, stdin=QUESTION + "\n")
    assert (code, out) == (0, search["response"] + "\n")
    assert "error" not in err


def test_a_question_that_begins_with_a_slash(golden, chat):
    code, out, err = golden(stdin="//image is a command?\n")
    assert code == 0
    assert out == chat.chat("/image is a command?", max_new_tokens=32).text + "\n"
    assert "no command" not in err


def test_a_full_context_hints_at_clear(golden):
    code, _, err = golden(stdin=f"{TEXT['question']}\n{'very long ' * 400}\n")
    assert code == 0
    assert "/clear begins a new conversation" in err


def test_images_before_and_after_the_question(golden, chat, capsys):
    expected = chat.chat(QUESTION, [IMAGE] * 2, max_new_tokens=32).text + "\n"
    for argv in (
        ("--image", IMAGE, IMAGE, QUESTION),
        (QUESTION, "--image", IMAGE, IMAGE),
        ("--image", IMAGE, "--image", IMAGE, QUESTION),
        ("--image", IMAGE, QUESTION, "--image", IMAGE),
    ):
        assert golden(*argv)[:2] == (0, expected), argv


def test_control_characters_of_an_answer_are_escaped(golden, chat, monkeypatch):
    raw = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
    assert raw.search(SEEN["response"])  # this one has such a character
    code, out, _ = golden("--json", "--image", IMAGE, QUESTION)
    assert (code, json.loads(out)["answer"]) == (0, SEEN["response"])
    assert not raw.search(out)
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True)
    for more in ((), ("--num-beams", "2")):
        _, out, _ = golden(*more, "--image", IMAGE, QUESTION)
        assert not raw.search(out)
        assert more or printable(SEEN["response"]) + "\n" == out
    text = "a\x1b]0;title\x07\x9b31mred\tb\nc\x7f"
    assert printable(text) == "a\\x1b]0;title\\x07\\x9b31mred\tb\nc\\x7f"
