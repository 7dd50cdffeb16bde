"""nano knows which questions it was trained on."""

import pytest

from internvl_jax.nano import questions
from internvl_jax.nano.render import make_sample


def test_every_training_question_is_answerable():
    for split in ("train", "heldout"):
        for index in range(200):
            for question in make_sample(split, index, questions=20).questions:
                assert questions.answerable(question.text), question.text
                assert questions.answerable(f"<image>\n{question.text}")


def test_every_example_is_answerable():
    for pair in (*questions.EXAMPLES, questions.GREETING_EXAMPLES):
        assert all(map(questions.answerable, pair))
        assert pair[0] in questions.listed()


@pytest.mark.parametrize(
    "question",
    ["What kind of picture is this?", "How many cars are there?", "HOW MANY SHAPES ARE THERE?", "这是什么图片？"],
)
def test_other_questions_get_a_note(question):
    note = questions.advice(question, 1)
    assert "not trained on this question" in note
    assert "How many shapes are there?" in note


@pytest.mark.parametrize(
    "question",
    ["What is in this picture?", "what's in the image", "What is this?", "Describe the image", "How many shapes",
     "what color is the circle", "What colour is the star?", "Is there a circle?", "图中有什么", "这是什么?",
     "描述图片。"],
)  # fmt: skip
def test_phrasings_need_no_note(question):
    assert questions.advice(question, 1) is None
    assert "needs an image" in questions.advice(question, 0)


@pytest.mark.parametrize(
    "question", ["Hello", "hi", "Hi!", "Who are you?", "What can I ask?", "你好", "你叫什么名字？"]
)
def test_greetings_need_no_image(question):
    assert questions.advice(question, 0) is None
    assert questions.advice(question, 1) is None


def test_questions_about_images_need_one():
    assert "needs an image" in questions.advice("How many shapes are there?", 0)
    assert questions.advice("How many shapes are there?", 1) is None
    assert questions.advice("Who are you?", 0) is None
