"""Labels against those of the original code, and what they must be where it has none."""

import numpy as np
import pytest
from support.golden import DATA, bundle

from internvl_jax.config.conversation_templates import TEMPLATES, Template
from internvl_jax.data import labels
from internvl_jax.data.batch import IGNORED
from internvl_jax.data.labels import SampleError
from internvl_jax.processing.conversation import prepare_prompt
from internvl_jax.processing.tokenizer import load_tokenizer

ZH = TEMPLATES["internvl_zh"]
ARRAYS, FACTS = bundle("internvl_chat_v1_1")
TOKENS = 16  # per image


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not_legacy"])
def tokenizer(request):
    return load_tokenizer(DATA / "internvl_chat_v1_1" / "checkpoint", legacy=request.param)


def make(conversations, tokenizer, images=0, template=ZH, **options):
    turns = labels.place_training_images(labels.read_turns(conversations), images, **options)
    return labels.build(turns, template, tokenizer, TOKENS)


def talk(*texts):
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


@pytest.mark.parametrize("sample", FACTS["train_samples"], ids=lambda sample: sample["id"])
def test_golden(sample, tokenizer):
    expected = sample[f"legacy_{tokenizer.legacy}".lower()]
    ids, made = make(sample["conversations"], tokenizer, len(sample["images"]))
    assert ids.dtype == made.dtype == np.int32
    assert ids.tolist() == expected["input_ids"]
    assert made.tolist() == expected["labels"]


def test_golden_batch():
    own = load_tokenizer(DATA / "internvl_chat_v1_1" / "checkpoint")
    for row, sample in enumerate(FACTS["train_samples"]):
        ids, made = make(sample["conversations"], own, len(sample["images"]))
        assert np.array_equal(ARRAYS["train/input_ids"][row, : len(ids)], ids)
        assert np.array_equal(ARRAYS["train/labels"][row, : len(ids)], made)
        assert np.all(ARRAYS["train/labels"][row, len(ids) :] == IGNORED)


TRICKY = [
    ("Hi", "yes"),
    ("  blanks  ", "  before and after  "),
    ("", ""),
    ("a</s>b <s> c", "the </s> in the middle"),
    ("line\nbreak\n", "\nbreak first\n\n"),
    ("你好", "图中有三个人。"),
    ("<ref>car</ref>", "<box>[[1, 2, 3, 4]]</box> and <img> typed"),
    ("<human>: who?", "<bot>: me"),
    ("emoji 🙂", "🙂🙂 \u3000 wide blank"),
]


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_ids_are_those_of_the_whole_text_and_answers_follow_what_chat_sends(tokenizer, count):
    rng = np.random.default_rng(count)
    turns = [TRICKY[i] for i in rng.permutation(len(TRICKY))[:count]]
    turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
    ids, made = make(talk(*(text for turn in turns for text in turn)), tokenizer, 1)
    starts = []
    for number, (question, answer) in enumerate(turns):
        prompt = tokenizer.encode(prepare_prompt(ZH, question, turns[:number], [TOKENS]))
        whole = prepare_prompt(ZH, question, turns[:number], [TOKENS]) + f" {answer}</s>"
        assert ids[: len(prompt)].tolist() == prompt  # what a chat sends
        starts.append((len(prompt), len(tokenizer.encode(whole))))
    assert ids.tolist() == tokenizer.encode(whole)
    expected = np.full(len(ids), IGNORED)
    for first, last in starts:
        expected[first:last] = ids[first:last]
    assert np.array_equal(made, expected)


def test_template_whose_answers_end_with_a_plain_text(tokenizer):
    template = Template("Be kind.", " ", "USER: ", " ", "ASSISTANT:", " ", "\n")
    ids, made = make(talk("one", "two", "three", "four"), tokenizer, template=template)
    text = "Be kind. USER: one ASSISTANT: two\nUSER: three ASSISTANT: four\n"
    assert ids.tolist() == tokenizer.encode(text)
    assert tokenizer.decode(made[made != IGNORED]).split() == ["two", "four"]


@pytest.mark.parametrize(
    ("conversations", "message"),
    [
        (None, "must be a list"),
        ([], "no question"),
        (talk("only a question"), "no answer"),
        ([{"from": "gpt", "value": "hello"}], "no question"),
        ([{"from": "system", "value": "x"}, *talk("a", "b")], "human or gpt"),
        ([{"from": "human", "value": 3}], "a text"),
        (talk("a", "b") + talk("c", "d")[1:], "two turns of gpt"),
        (talk("a <IMG_CONTEXT>", "b"), "only images may bring"),
    ],
)
def test_conversations_that_are_refused(conversations, message, tokenizer):
    with pytest.raises(SampleError, match=message) as caught:
        make(conversations, tokenizer)
    assert caught.value.kind == "conversation"


def test_a_greeting_before_the_first_question_is_dropped(tokenizer):
    greeted = [{"from": "gpt", "value": "Hello!"}, *talk("a", "b")]
    assert make(greeted, tokenizer)[0].tolist() == make(talk("a", "b"), tokenizer)[0].tolist()


def test_placeholders(tokenizer):
    plain, placed = talk("What?", "A cat."), talk("<image>\nWhat?", "A cat.")
    assert make(plain, tokenizer, 1)[0].tolist() == make(placed, tokenizer, 1)[0].tolist()
    at_the_end = talk("What?\n<image>", "A cat.")
    assert make(at_the_end, tokenizer, 1, first=True)[0].tolist() == make(placed, tokenizer, 1)[0].tolist()
    assert make(at_the_end, tokenizer, 1)[0].tolist() != make(placed, tokenizer, 1)[0].tolist()
    later = talk("Hi", "Hello.", "<image> and this?", "A dog.")
    image = tokenizer.token_to_id("<IMG_CONTEXT>")
    assert np.sum(make(later, tokenizer, 1)[0] == image) == TOKENS
    assert np.sum(make(talk("<image><image>?", "Two."), tokenizer, 2)[0] == image) == 2 * TOKENS
    for conversations, images in [(placed, 0), (placed, 2), (plain, 2), (talk("<image><image>", "x"), 1)]:
        with pytest.raises(SampleError, match="placeholder") as caught:
            make(conversations, tokenizer, images)
        assert caught.value.kind == "placeholders"
    with pytest.raises(SampleError, match="belongs in questions"):
        make(talk("What?", "<image>"), tokenizer, 1)


def test_truncation(tokenizer):
    image = tokenizer.token_to_id("<IMG_CONTEXT>")
    ids, made = make(talk("<image>\nWhat?", "A red bird."), tokenizer, 1)
    kept, kept_labels, cut = labels.truncate(ids, made, len(ids), image)
    assert not cut
    assert np.array_equal(kept, ids)
    assert np.array_equal(kept_labels, made)
    kept, kept_labels, cut = labels.truncate(ids, made, len(ids) - 2, image)
    assert cut
    assert np.array_equal(kept, ids[:-2])
    assert np.array_equal(kept_labels, made[:-2])
    first_answer = int(np.argmax(made != IGNORED))
    with pytest.raises(SampleError, match="no answer within") as caught:
        labels.truncate(ids, made, first_answer, image)
    assert caught.value.kind == "no supervised token"
    with pytest.raises(SampleError, match="image tokens") as caught:
        labels.truncate(ids, made, 12, image)
    assert caught.value.kind == "truncated image"


def test_the_first_token_that_is_cut_may_be_an_images():
    ids, made = np.asarray([5, 6, 7, 9]), np.asarray([IGNORED, 6, 7, IGNORED])
    with pytest.raises(SampleError, match="truncating 4 tokens to 3 would cut off image tokens"):
        labels.truncate(ids, made, 3, 9)
    assert labels.truncate(ids, made, 3, 8)[2]


def test_a_first_token_is_never_learned():
    with pytest.raises(SampleError, match="there is no answer in it"):
        labels.truncate(np.asarray([5, 6]), np.asarray([5, IGNORED]), 2, 9)


def test_only_a_single_image_finds_its_own_place():
    with pytest.raises(SampleError, match=r"0 <image> placeholder\(s\) for 2 image\(s\)"):
        labels.place_training_images([("Q?", "A.")], 2)
    assert labels.place_training_images([("Q?", "A.")], 1) == [("<image>\nQ?", "A.")]
