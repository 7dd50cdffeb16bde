"""Other phrasings of nano's questions: what they ask, what they are answered, and what the shipped model answers."""

import re
from pathlib import Path

import numpy as np
import pytest

import internvl_jax
from internvl_jax.config import load_config
from internvl_jax.data.annotations import Corpus, read_meta
from internvl_jax.data.samples import Sample, SampleMaker
from internvl_jax.nano import dataset, phrasings, questions, render, train
from internvl_jax.processing.images import load_processor
from internvl_jax.processing.tokenizer import load_tokenizer

NANO = Path(internvl_jax.__file__).parent / "nano" / "model"
IMAGES = NANO.parent / "images"
COLORS = {name: chinese for name, (_, chinese) in render.COLOURS.items()}


@pytest.fixture(scope="module")
def chat():
    return internvl_jax.load()


def named(text):
    """The shapes and colors that a text names, in order."""
    words = [*render.SHAPES, *render.SHAPES.values(), *COLORS, *COLORS.values()]
    return re.findall("|".join(words), text)


def drawn(contents):
    """Place, color and shape of what is in an image, in reading order."""
    places, shapes, colors = list(render.PLACES), list(render.SHAPES), list(render.COLOURS)
    return [
        (places[cell], colors[contents[9 + cell] - 1], shapes[contents[cell] - 1])
        for cell in range(9)
        if contents[cell]
    ]


def test_rephrased_questions_ask_for_the_same():
    rng = np.random.default_rng(0)
    spellings = {}
    for index in range(150):
        for question in render.make_sample("train", index, questions=20).questions:
            other = phrasings.rephrase(question, rng, always=True)
            assert named(other.text) == named(question.text)
            assert (other.kind, other.language, other.answer) == (question.kind, question.language, question.answer)
            spellings.setdefault((question.kind, question.language), set()).add(other.text)
            kept = phrasings.rephrase(question, rng)
            assert questions.answerable(kept.text)
    assert all(len(spellings[kind, language]) > 8 for kind in render.KINDS for language in phrasings.LANGUAGES)
    everything = set().union(*spellings.values())
    assert {"what colour is the star", "有几个图形"} <= {text.rstrip("?？").lower() for text in everything}
    with pytest.raises(ValueError, match="not a question of render"):
        phrasings.rephrase(render.QAPair("count", "en", "How many cars are there?", "0", 0.0), rng, always=True)


def test_descriptions_and_presence_fit_what_is_drawn():
    rng = np.random.default_rng(0)
    answers = set()
    for index in range(200):
        contents = render.make_sample("train", index).contents
        seen = drawn(contents)
        english, chinese = (phrasings.describe(contents, language) for language in phrasings.LANGUAGES)
        if not seen:
            continue
        assert english == ("1 shape" if len(seen) == 1 else f"{len(seen)} shapes")
        assert chinese == f"{len(seen)}个图形"
        question = phrasings.presence(contents, "en", rng)
        answers.add(question.answer)
        assert question.answer == ("yes" if named(question.text)[0] in {shape for *_, shape in seen} else "no")
        question = phrasings.presence(contents, "zh", rng)
        assert question.answer == ("有" if named(question.text)[0] in {render.SHAPES[s] for *_, s in seen} else "没有")
    assert answers == {"yes", "no"}
    labels = [0] * len(render.CONTENTS)
    labels[18], labels[19] = 5, 8
    assert [phrasings.describe(tuple(labels), x) for x in phrasings.LANGUAGES] == ["the number 47", "数字 47"]
    labels[18:] = [0, 0, 1]
    assert [phrasings.describe(tuple(labels), x) for x in phrasings.LANGUAGES] == ["the word open", "单词 open"]


def test_the_tokenizer_spells_every_phrasing():
    tokenizer = load_tokenizer(NANO)
    for form in phrasings.FORMS:
        for language in phrasings.LANGUAGES:
            for template in form.templates(language):
                for image in phrasings.SLOTS[language]["image"]:
                    text = template.replace("{image}", image)
                    for spelled in (text, text.lower()):
                        tokens = tokenizer.encode(spelled)
                        assert tokenizer.unk_id not in tokens
                        assert tokenizer.decode(tokens, skip_special_tokens=True) == spelled


def test_phrased_samples_fit_a_row_of_the_fourth_stage(tmp_path):
    """Samples are functions of their number, in the documented format, with images that the first stages do not use."""
    count = 80
    meta = dataset.write(tmp_path / "data", count, make=phrasings.phrased_sample)
    (stage,) = train.make_stages()[3:]
    config, tokenizer = load_config(NANO), load_tokenizer(NANO)
    maker = SampleMaker.for_model(
        config, tokenizer, load_processor(NANO, config), max_length=stage.layout.max_length, image_slots=1,
        image_labels=21,
    )  # fmt: skip
    corpus = Corpus(read_meta(meta))
    kinds = set()
    for number in range(count):
        sample = phrasings.phrased_sample("train", number)
        assert sample.questions == phrasings.phrased_sample("train", number).questions
        assert 1 <= len(sample.questions) <= phrasings.QUESTIONS
        assert all(questions.answerable(question.text) for question in sample.questions)
        kinds |= {question.kind for question in sample.questions}
        made = maker(corpus[number], np.random.default_rng(0))
        assert isinstance(made, Sample)
        assert not made.truncated
        if sample.image is not None:
            assert sample.contents == render.make_sample("train", phrasings.FIRST + number).contents
    assert kinds == {*render.KINDS, *phrasings.EXTRA_KINDS, "greeting"} - {"rephrased"}
    assert phrasings.FIRST >= dataset.SAMPLES


@pytest.mark.parametrize("kind", phrasings.EXTRA_KINDS)
def test_held_out_phrasings(kind):
    for language in phrasings.LANGUAGES:
        asked = phrasings.heldout_phrased(kind, language, 21)
        assert len(asked) == 21
        for image, question in asked:
            assert image.shape == (render.SIZE, render.SIZE, 3)
            assert (question.kind, question.language) == (kind, language)
            assert questions.answerable(question.text)
    if kind == "rephrased":
        own = {q.text for k in render.KINDS for _, q in render.heldout_questions(k, "zh", 3)}
        assert not own & {question.text for _, question in asked}
