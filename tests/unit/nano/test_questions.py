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


@pytest.mark.parametrize("question", ["What is in this picture?", "What is this?", "Hello", "How many cars are there?"])
def test_other_questions_get_a_note(question):
    note = questions.advice(question, 1)
    assert "not trained on this question" in note
    assert "How many shapes are there?" in note


def test_questions_about_images_need_one():
    assert "needs an image" in questions.advice("How many shapes are there?", 0)
    assert questions.advice("How many shapes are there?", 1) is None
    assert questions.advice("Who are you?", 0) is None
