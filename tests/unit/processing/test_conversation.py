"""Prompts: byte for byte against the golden bundle, and texts that do not agree with their images."""

import copy
import json
import pickle

import pytest
from support.paths import DATA

from internvl_jax.config.conversation_templates import IMG_CONTEXT, TEMPLATES, build_prompt
from internvl_jax.processing.conversation import (
    Turn,
    as_turn,
    combine_images,
    count_images,
    expand_images,
    has_ambiguous_images,
    place_images,
    prepare_prompt,
    unused_character,
)

GOLDENS = json.loads((DATA / "internvl_chat_v1_1" / "goldens.json").read_text("utf-8"))
PER_IMAGE = GOLDENS["config"]["num_image_token"]
ZH = TEMPLATES["internvl_zh"]


def images(count):
    return "<img>" + "<IMG_CONTEXT>" * count + "</img>"


@pytest.mark.parametrize("case", GOLDENS["prompts"], ids=lambda case: case["id"])
def test_golden_prompts(case):
    history, number = case["history"] or [], len(case["images"])
    question = place_images(case["question"], number, bool(history))
    assert build_prompt(ZH, history, question) == case["template_prompt"]
    assert prepare_prompt(ZH, question, history, [PER_IMAGE] * number) == case["query"]


def test_the_goldens_cover_every_form():
    cases = GOLDENS["prompts"]
    assert any(len(case["images"]) == 2 and case["question"].count("<image>") == 1 for case in cases)
    assert any(len(case["images"]) == 2 and case["question"].count("<image>") == 2 for case in cases)
    assert any(case["images"] and "<image>" not in case["question"] and not case["history"] for case in cases)
    assert any(len(case["history"] or []) == 2 for case in cases)
    assert any(not case["images"] for case in cases)


def test_the_prompt_starts_with_a_space_and_ends_without():
    assert build_prompt(ZH, [], "hi") == " <human>: hi <bot>:"
    assert build_prompt(ZH, [("a", "b")], "c") == " <human>: a <bot>: b</s><human>: c <bot>:"


def test_a_system_message_takes_the_templates_place():
    assert build_prompt(ZH, [], "hi", system="") == build_prompt(ZH, [], "hi")
    assert build_prompt(ZH, [], "hi", system="Be brief.") == "Be brief. <human>: hi <bot>:"
    prompt = prepare_prompt(ZH, "<image>\n你好", [], [2], system="请用中文回答。")
    assert prompt == f"请用中文回答。 <human>: {images(2)}\n你好 <bot>:"


def test_texts_are_not_tidied():
    question, answer = "  two  spaces\t\n", " lead <bot>: </s>\r\n"
    assert build_prompt(ZH, [("", answer)], question) == (f" <human>:  <bot>: {answer}</s><human>: {question} <bot>:")


def test_where_images_go_by_themselves():
    assert place_images("What?", 0, False) == "What?"
    assert place_images("What?", 1, False) == "<image>\nWhat?"
    assert place_images("What?", 3, False) == "<image>\nWhat?"
    assert place_images("What?", 1, True) == "What?"
    assert place_images("Is <image> red?", 1, False) == "Is <image> red?"


def test_one_placeholder_each_or_one_for_all():
    assert expand_images("a <image> b", 3, 1) == f"a {images(3)} b"
    assert expand_images("<image><image>", 3, 2) == images(3) + images(3)
    assert expand_images("<image> both", 3, 2) == f"{images(6)} both"
    assert expand_images("none", 3, 0) == "none"


@pytest.mark.parametrize(
    ("text", "number", "complaint"),
    [
        ("<image> a", 0, r"has 1 <image> placeholder\(s\), but no images are given; images of earlier turns"),
        ("a", 1, r"1 image\(s\) are given, but neither the question nor its history has an <image>"),
        ("<image> <image>", 1, r"2 <image> placeholders for 1 image\(s\): write one for each, or a single one for all"),
        ("<image> <image>", 3, r"2 <image> placeholders for 3 image\(s\)"),
    ],
)
def test_placeholders_and_images_that_do_not_agree(text, number, complaint):
    with pytest.raises(ValueError, match=complaint):
        expand_images(text, PER_IMAGE, number)
    with pytest.raises(ValueError, match=complaint):
        prepare_prompt(ZH, text, [], [PER_IMAGE] * number)


def test_every_turn_counts():
    history = [("<image>\nWhat?", "A bird."), ("And <image>?", "A car.")]
    assert prepare_prompt(ZH, "Which is red?", history, [1] * 2).count(IMG_CONTEXT) == 2
    with pytest.raises(ValueError, match="2 <image> placeholders for 1 image"):
        prepare_prompt(ZH, "Which is red?", history, [1])
    with pytest.raises(ValueError, match="images of earlier turns have to be given again"):
        prepare_prompt(ZH, "Which is red?", history, [])


def test_each_turn_has_the_images_that_came_with_it():
    history = [("<image>\nWhat is this?", "A cat.")]
    prompt = prepare_prompt(ZH, "<image>\nAnd this?", history, [1] * 2)
    assert prompt == (f" <human>: {images(1)}\nWhat is this? <bot>: A cat.</s><human>: {images(1)}\nAnd this? <bot>:")
    assert prepare_prompt(ZH, "<image> both?", history, [1] * 3).endswith(f"<human>: {images(2)} both? <bot>:")
    with pytest.raises(ValueError, match=r"2 image\(s\) are given, of which 1 belong to the history"):
        prepare_prompt(ZH, "And this?", history, [1] * 2)  # what place_images would have mended
    with pytest.raises(ValueError, match="2 <image> placeholders for 1 image"):
        prepare_prompt(ZH, "<image> that?", history, [1])
    # One placeholder for both images of the first turn: only a Turn can tell.
    combined = [Turn(history[0], 2)]
    assert prepare_prompt(ZH, "Why?", combined, [1] * 2).startswith(f" <human>: {images(2)}\nWhat is this?")
    assert prepare_prompt(ZH, "<image>?", combined, [1] * 3).count(images(1)) == 1
    with pytest.raises(ValueError, match="2 belong to the history, and the question has 1 <image>"):
        prepare_prompt(ZH, "<image>?", combined, [1] * 2)
    assert combine_images(history, 3) == history
    assert [turn.images for turn in combine_images(history, 3)] == [3]
    assert [turn.images for turn in combine_images([("a", "b")], 3)] == [0]


def test_images_of_a_system_message_come_first_and_are_its_own():
    prompt = prepare_prompt(ZH, "<image> q", [("<image> a", "b")], [1] * 4, system="<image> s")
    assert prompt == (
        f"{images(1)} s <human>: {images(1)} a <bot>: b</s><human>: {images(2)} q <bot>:"
    )  # 4 images: of the system message, of the history, and both others of the question
    with pytest.raises(ValueError, match="2 <image> placeholders for 1 image"):
        prepare_prompt(ZH, "<image> q", [], [1], system="<image> s")


def test_turns_are_pairs_that_know_their_images():
    turn = Turn(("<image> a", "b"), 2)
    assert turn == ("<image> a", "b")
    written = as_turn(json.loads(json.dumps([*turn, turn.images])))
    for copied in (pickle.loads(pickle.dumps(turn)), copy.deepcopy(turn), written):
        assert (copied, copied.images, copied.images_stated, type(copied)) == (turn, 2, True, Turn)
    assert has_ambiguous_images([("<image> a", "b"), ("c", "d")])
    for clear in ([turn], [("a", "b")], [("<image> <image>", "b")], [("<image>", "b"), ("<image>", "b")], []):
        assert not has_ambiguous_images(clear)
    assert as_turn(["<image>", "b"]).images == 1
    for wrong in (("a",), ("a", "b", "c"), ("a", "b", True), ("a", "b", -1), ("a", 3), "ab", 5, ("a", "b", 1, 1)):
        with pytest.raises(ValueError, match="not a turn"):
            as_turn(wrong)


def test_an_answer_has_no_images():
    history = [("<image>\nWhat is written?", "It says <image>.")]
    prompt = prepare_prompt(ZH, "And <image>?", history, [1] * 2)
    assert prompt == (
        f" <human>: {images(1)}\nWhat is written? <bot>: It says <image>.</s><human>: And {images(1)}? <bot>:"
    )
    assert (as_turn(history[0]).images, count_images(history), has_ambiguous_images(history)) == (1, 1, True)
    assert [turn.images for turn in combine_images(history, 3)] == [3]
    assert [turn.images for turn in combine_images([("a", "<image>")], 3)] == [0]
    assert not has_ambiguous_images([("a", "<image>")])
    # Where the placeholder is the image token itself, only a mark tells an answer's from an image's.
    llava = TEMPLATES["vicuna_v1"]
    with pytest.raises(ValueError, match="contains <image>, which only images may bring"):
        prepare_prompt(llava, "And?", history, [1])
    assert "|It says <image>.|" in prepare_prompt(llava, "And?", history, [1], literal_mark="|")


def test_what_is_typed_is_marked():
    assert unused_character("".join(map(chr, range(0xE000, 0xF900)))) == "\U000f0000"
    mark = unused_character("a", "b\ue000")
    assert mark == "\ue001"
    prompt = prepare_prompt(ZH, "<image>\n</s>", [("a", "b")], [1], system="<IMG_CONTEXT>", literal_mark="|")
    assert prompt == f"|<IMG_CONTEXT>| <human>: |a| <bot>: |b|</s><human>: ||{images(1)}|\n</s>| <bot>:"


@pytest.mark.parametrize("place", ["question", "asked", "answered", "system"])
def test_image_tokens_that_are_typed_are_refused(place):
    texts = {"question": "q", "asked": "a", "answered": "b", "system": "s"}
    texts[place] += "x<IMG_CONTEXT>x"
    with pytest.raises(ValueError, match="contains <IMG_CONTEXT>, which only images may bring; write it differently"):
        prepare_prompt(ZH, texts["question"], [(texts["asked"], texts["answered"])], [], system=texts["system"])
