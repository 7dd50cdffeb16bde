"""Other ways to ask nano's questions, and to greet it; descriptions of what is in an image.

The last stage of training mixes these with the questions as render.py asks them, so that nano also answers questions
with "colour", in lower case, or without the question mark. The tokenizer was made before them, from render.py alone,
and spells their words in letters and bytes.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace

import numpy as np

from internvl_jax.nano.render import (
    COLOURS,
    GREETINGS,
    KINDS,
    SHAPES,
    SPLITS,
    WORDS,
    QAPair,
    Sample,
    heldout_questions,
    make_sample,
)

QUESTIONS = 3  # per image
FIRST = 120_000  # phrased samples have images of their own: the first stages use those before
LANGUAGES = ("en", "zh")
EXTRA_KINDS = ("rephrased", "describe", "presence")  # of `heldout_phrased`, beside those of render.py
PUNCTUATION = ".?!。？！"

# What the slots of a template stand for.
SLOTS = {
    "en": {
        "shape": tuple(SHAPES),
        "color": tuple(COLOURS),
        "hue": ("color", "colour"),
        "image": ("the image", "this image", "the picture", "this picture", "the photo", "this photo"),
    },
    "zh": {
        "shape": tuple(SHAPES.values()),
        "color": tuple(zh for _, zh in COLOURS.values()),
        "image": ("图", "图片", "图像", "这张图", "这张图片"),
    },
}


@dataclass(frozen=True)
class Form:
    """One question in several phrasings.

    Attributes:
        kind: One of `render.KINDS` or `EXTRA_KINDS`, or "greeting".
        en: English templates, with slots of `SLOTS`. The first is the question as render.py asks it, where it does.
        zh: Chinese templates likewise.
    """

    kind: str
    en: tuple[str, ...]
    zh: tuple[str, ...]

    def templates(self, language: str) -> tuple[str, ...]:
        """The templates in a language, "en" or "zh"."""
        return self.en if language == "en" else self.zh


FORMS = (
    Form(
        "count",
        ("How many shapes are there?", "How many shapes?", "How many shapes are there in {image}?",
         "How many shapes are in {image}?", "How many shapes do you see?", "How many shapes can you see?",
         "Count the shapes."),
        ("图中有几个图形？", "有几个图形？", "{image}里有几个图形？", "{image}中有几个图形？", "图中有多少个图形？",
         "有多少个图形？", "{image}里有多少个图形？"),
    ),
    Form(
        "count",
        ("How many {shape}s are there?", "How many {shape}s?", "How many {shape}s are there in {image}?",
         "How many {shape}s are in {image}?", "How many {shape}s do you see?", "How many {shape}s can you see?",
         "Count the {shape}s."),
        ("图中有几个{shape}？", "有几个{shape}？", "{image}里有几个{shape}？", "{image}中有几个{shape}？",
         "图中有多少个{shape}？", "有多少个{shape}？", "{image}里有多少个{shape}？"),
    ),
    Form(
        "color",
        ("What color is the {shape}?", "What {hue} is the {shape}?", "Which {hue} is the {shape}?",
         "What is the {hue} of the {shape}?", "What {hue} is the {shape} in {image}?",
         "What {hue} does the {shape} have?"),
        ("{shape}是什么颜色？", "{shape}是什么颜色的？", "{shape}的颜色是什么？", "这个{shape}是什么颜色？",
         "{image}里的{shape}是什么颜色？", "{image}中的{shape}是什么颜色？"),
    ),
    Form(
        "shape",
        ("What shape is {color}?", "Which shape is {color}?", "What is {color}?", "What shape is the {color} one?",
         "What shape is {color} in {image}?"),
        ("什么形状是{color}的？", "哪个形状是{color}的？", "{color}的是什么形状？", "{color}的图形是什么形状？",
         "{color}的是什么？"),
    ),
    Form(
        "place",
        ("Where is the {color} {shape}?", "Where's the {color} {shape}?", "Where is the {color} {shape} in {image}?",
         "Where do you see the {color} {shape}?", "Where in {image} is the {color} {shape}?"),
        ("{color}的{shape}在哪里？", "{color}的{shape}在哪儿？", "{color}{shape}在哪里？",
         "{color}的{shape}在什么位置？", "{color}的{shape}在{image}的哪里？"),
    ),
    Form(
        "exists",
        ("Is there a {color} {shape}?", "Is there a {color} {shape} in {image}?", "Is there a {color} {shape} here?",
         "Do you see a {color} {shape}?", "Can you see a {color} {shape}?", "Are there any {color} {shape}s?"),
        ("图中有{color}的{shape}吗？", "有{color}的{shape}吗？", "{image}里有{color}的{shape}吗？",
         "{image}中有{color}的{shape}吗？", "有没有{color}的{shape}？", "图中有没有{color}的{shape}？"),
    ),
    Form(
        "presence",
        ("Is there a {shape}?", "Is there a {shape} in {image}?", "Is there a {shape} here?", "Do you see a {shape}?",
         "Can you see a {shape}?", "Are there any {shape}s?"),
        ("图中有{shape}吗？", "有{shape}吗？", "{image}里有{shape}吗？", "{image}中有{shape}吗？", "有没有{shape}？",
         "图中有没有{shape}？"),
    ),
    Form(
        "digits",
        ("What number is written here?", "Which number is written here?", "What number is this?",
         "What number is in {image}?", "What number do you see?", "What is the number?", "What is written here?",
         "Read the number."),
        ("图中写的数字是多少？", "图中的数字是多少？", "{image}里的数字是多少？", "这是什么数字？", "这个数字是多少？",
         "图中写的是什么数字？", "图中写了什么？", "写的是什么？"),
    ),
    Form(
        "word",
        ("What word is written here?", "Which word is written here?", "What word is this?", "What word is in {image}?",
         "What word do you see?", "What is the word?", "What is written here?", "Read the word.", "What does it say?"),
        ("图中写的是什么单词？", "图中的单词是什么？", "{image}里的单词是什么？", "这是什么单词？", "这个单词是什么？",
         "写的是什么单词？", "图中写了什么？", "写的是什么？"),
    ),
    Form(
        "describe",
        ("What is in {image}?", "What's in {image}?", "What is this?", "What's this?", "What do you see?",
         "What can you see?", "What do you see in {image}?", "What is shown in {image}?", "What does {image} show?",
         "Describe {image}.", "Please describe {image}.", "Describe {image} in detail."),
        ("图中有什么？", "{image}里有什么？", "{image}中有什么？", "{image}里是什么？", "这是什么？", "你看到了什么？",
         "你看到什么？", "描述{image}。", "请描述{image}。", "描述一下{image}。", "请描述一下{image}。",
         "详细描述{image}。"),
    ),
    Form("greeting", ("Hello, who are you?", "Hi, who are you?"), ("你好，你是谁？", "你好，请问你是谁？")),
    Form(
        "greeting",
        ("Who are you?", "What are you?", "What is your name?", "What's your name?"),
        ("你是谁？", "你是什么？", "你叫什么？", "你叫什么名字？"),
    ),
    Form(
        "greeting",
        ("Hello!", "Hello.", "Hi!", "Hi there!", "Hey!", "Hello there!", "Hello nano!", "Good morning!"),
        ("你好！", "您好！", "你好。", "嗨！", "哈喽！", "早上好！"),
    ),
    Form(
        "greeting",
        ("What can you do?", "What do you do?", "What can I ask?", "What can I ask you?", "How can you help me?",
         "Help!"),
        ("你会做什么？", "你能做什么？", "你可以做什么？", "我可以问什么？", "我能问你什么？", "你会什么？"),
    ),
)  # fmt: skip
DESCRIPTION = next(form for form in FORMS if form.kind == "describe")
PRESENCE = next(form for form in FORMS if form.kind == "presence")
HELLO = {"en": "Hello!", "zh": "你好！"}


def template_pattern(template: str, language: str) -> str:
    """Return a regular expression of the questions of a template, with a group for each slot in order."""
    slots = {name: f"({'|'.join(values)})" for name, values in SLOTS[language].items()}
    return re.sub(r"\\{(\w+)\\}", lambda found: slots[found[1]], re.escape(template))


def rephrase(question: QAPair, rng: np.random.Generator, *, always: bool = False) -> QAPair:
    """Return the question of render.py in a random phrasing and spelling, or half of the time as it is.

    Args:
        question: A question as render.py asks it.
        rng: Random stream.
        always: Draw a phrasing every time; it may still be the question's own.
    """
    if not always and rng.random() < 0.5:
        return question
    for form in FORMS:
        own, *_ = templates = form.templates(question.language)
        found = re.fullmatch(template_pattern(own, question.language), question.text)
        if found is not None:
            slots = dict(zip(re.findall(r"{(\w+)}", own), found.groups()))
            return replace(question, text=_ask(templates, question.language, slots, rng))
    raise ValueError(f"{question.text!r} is not a question of render.py")


def _ask(templates: tuple[str, ...], language: str, slots: dict[str, str], rng: np.random.Generator) -> str:
    """One of the templates with its slots filled, as people may type it."""
    text = templates[rng.integers(len(templates))]
    drawn = {name: values[rng.integers(len(values))] for name, values in SLOTS[language].items()}
    text = text.format(**{**drawn, **slots})
    if rng.random() < 0.3:
        text = text.rstrip(PUNCTUATION)
    elif language == "zh" and rng.random() < 0.2:
        text = text.replace("？", "?").replace("！", "!")
    return text.lower() if rng.random() < 0.3 else text


def describe(contents: tuple[int, ...], language: str) -> str:
    """Return what is in an image, in a few words: more than the number of shapes is too much for so small a model.

    Args:
        contents: Class labels of the image, described by `render.CONTENTS`.
        language: "en" or "zh".
    """
    digits, word = [label - 1 for label in contents[18:20] if label], contents[20]
    if word:
        return f"{'the word' if language == 'en' else '单词'} {WORDS[word - 1]}"
    if digits:
        return f"{'the number' if language == 'en' else '数字'} {''.join(map(str, digits))}"
    count = sum(label > 0 for label in contents[:9])
    return f"{count} shape{'s' * (count > 1)}" if language == "en" else f"{count}个图形"


def description(contents: tuple[int, ...], language: str, rng: np.random.Generator) -> QAPair:
    """Return a question for what is in the image, in a random phrasing."""
    text = _ask(DESCRIPTION.templates(language), language, {}, rng)
    return QAPair("describe", language, text, describe(contents, language), 0.0)


def presence(contents: tuple[int, ...], language: str, rng: np.random.Generator) -> QAPair:
    """Return a question whether there is some shape in an image of shapes, in a random phrasing."""
    present = [shape for number, shape in enumerate(SHAPES, 1) if number in contents[:9]]
    absent = [shape for shape in SHAPES if shape not in present]
    pool = absent if absent and rng.random() < 0.5 else present
    shape = pool[rng.integers(len(pool))]
    slots = {"shape": shape if language == "en" else SHAPES[shape]}
    answer = {"en": ("no", "yes"), "zh": ("没有", "有")}[language][pool is present]
    text = _ask(PRESENCE.templates(language), language, slots, rng)
    return QAPair("presence", language, text, answer, 1 / 2)


def greeting(rng: np.random.Generator) -> QAPair:
    """Return a greeting in a random phrasing."""
    text, answer = GREETINGS[rng.integers(len(GREETINGS))]
    return rephrase(QAPair("greeting", "en" if text.isascii() else "zh", text, answer, 0.0), rng, always=True)


def phrased_sample(split: str, index: int) -> Sample:
    """Return a sample with rephrased questions, often a description or a question for a shape, sometimes a greeting.

    A few samples have no image: a greeting, or a question for a description, which is answered as "Hello!" is.
    """
    sample = make_sample(split, FIRST + index, questions=QUESTIONS)
    rng = np.random.default_rng((len(SPLITS) + SPLITS[split], index))
    if sample.image is None or rng.random() < 0.05:
        asked = greeting(rng)
        if rng.random() < 0.2:
            asked = description(sample.contents, asked.language, rng)
            asked = replace(asked, kind="greeting", answer=dict(GREETINGS)[HELLO[asked.language]])
        return Sample(None, (asked,))
    questions = [rephrase(question, rng) for question in sample.questions]
    if rng.random() < 0.5:
        questions.append(description(sample.contents, LANGUAGES[rng.integers(2)], rng))
    if any(sample.contents[:9]) and rng.random() < 0.3:
        questions.append(presence(sample.contents, LANGUAGES[rng.integers(2)], rng))
    if rng.random() < 0.04:
        questions.append(greeting(rng))
    order = rng.permutation(len(questions))
    # The last questions are the added ones: where there are too many, they replace others.
    kept = [i for i in order if len(questions) - i <= QUESTIONS]
    return replace(sample, questions=tuple(questions[i] for i in kept))


def heldout_phrased(kind: str, language: str, count: int) -> list[tuple[np.ndarray, QAPair]]:
    """Return `count` held-out images with one question each.

    Args:
        kind: One of `EXTRA_KINDS`; "rephrased" are the questions of `render.KINDS` in turn, in other words than there.
        language: "en" or "zh".
        count: Number of questions.
    """
    rng = np.random.default_rng((2 * len(SPLITS), EXTRA_KINDS.index(kind), LANGUAGES.index(language)))
    if kind == "rephrased":
        pools = [heldout_questions(own, language, -(-count // len(KINDS))) for own in KINDS]
        asked = [pools[number % len(KINDS)][number // len(KINDS)] for number in range(count)]
        return [(image, _reworded(question, rng)) for image, question in asked]
    ask, seen = (description, slice(0, None)) if kind == "describe" else (presence, slice(0, 9))
    samples = (make_sample("heldout", index) for index in itertools.count())
    drawn = ((sample.image, sample.contents) for sample in samples if sample.image is not None)
    wanted = ((image, contents) for image, contents in drawn if any(contents[seen]))
    return [(image, ask(contents, language, rng)) for image, contents in itertools.islice(wanted, count)]


def _reworded(question: QAPair, rng: np.random.Generator) -> QAPair:
    asked = question
    while asked.text == question.text:
        asked = rephrase(question, rng, always=True)
    return replace(asked, kind="rephrased")
