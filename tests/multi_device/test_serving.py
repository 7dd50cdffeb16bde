"""The engine on a mesh gives the answers of one device."""

import pytest
from support.serving_cases import IMAGES, ask, make_engine

import internvl_jax

QUESTIONS = [("How many shapes are there?", ("shapes.png",)), ("What is in this image?", ("word.png",)), ("Hello", ())]


@pytest.mark.parametrize("mesh", ["tensor=4", "data=2,fsdp=2,tensor=2"])
def test_mesh_equals_one_device(mesh):
    single = internvl_jax.load()
    expected = [single.chat(question, [IMAGES / image for image in images]).text for question, images in QUESTIONS]
    engine = make_engine(internvl_jax.load(mesh=mesh), rows=4)
    engine.start()
    answers = [ask(engine, f"{number}", *QUESTIONS[number % 3], logprobs=number % 2 or None) for number in range(9)]
    assert [answer.wait().text for answer in answers] == expected * 3
    assert engine.compiles == 0
    assert engine.close(10)
