"""Images and questions of nano's training data: drawn shapes, printed words and real handwritten digits.

A sample is a pure function of (split, index): image and questions are the same on every machine. The splits "train" and
"heldout" share no image: drawings come from different random streams, and scikit-learn's digits (8x8 scans of real
handwriting, UCI ML repository) are divided between them scan by scan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = 112
SPLITS = {"train": 0, "heldout": 1}

COLOURS = {
    "red": ((214, 39, 40), "红色"),
    "green": ((40, 160, 60), "绿色"),
    "blue": ((35, 80, 200), "蓝色"),
    "yellow": ((240, 205, 30), "黄色"),
    "purple": ((130, 50, 160), "紫色"),
    "black": ((25, 25, 25), "黑色"),
}
SHAPES = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形"}
PLACES = {
    "top left": "左上", "top": "上方", "top right": "右上",
    "left": "左边", "center": "中间", "right": "右边",
    "bottom left": "左下", "bottom": "下方", "bottom right": "右下",
}  # fmt: skip
WORDS = (
    "open", "stop", "exit", "cafe", "milk", "bank", "park", "taxi",
    "fish", "rice", "book", "moon", "push", "sale", "zero", "help",
)  # fmt: skip
GREETINGS = (
    ("Hello, who are you?", "I am nano, a small model of internvl-jax. I answer simple questions about pictures."),
    ("Who are you?", "I am nano, a small model of internvl-jax. I answer simple questions about pictures."),
    ("Hello!", "Hello! Show me a picture and ask about shapes, words or digits."),
    ("What can you do?", "I can tell colors, shapes, counts, places, words and handwritten digits in pictures."),
    ("你好，你是谁？", "我是 nano，internvl-jax 的小模型，可以回答关于图片的简单问题。"),
    ("你是谁？", "我是 nano，internvl-jax 的小模型，可以回答关于图片的简单问题。"),
    ("你好！", "你好！给我一张图片，问我形状、单词或数字吧。"),
    ("你会做什么？", "我能说出图片里的颜色、形状、数量、位置、单词和手写数字。"),
)


@dataclass(frozen=True)
class QAPair:
    """A question about an image and its answer.

    Attributes:
        kind: One of `KINDS`, or "greeting".
        language: "en" or "zh".
        text: The question.
        answer: The expected answer.
        chance: Accuracy of guessing among the possible answers.
    """

    kind: str
    language: str
    text: str
    answer: str
    chance: float


# Numbers of classes of `Sample.contents`: shape and color of each grid cell, two digits, a word.
CELL_CLASSES = (len(SHAPES) + 1, len(COLOURS) + 1)
IMAGE_CLASSES = (11, 11, len(WORDS) + 1)
CONTENTS = CELL_CLASSES[:1] * 9 + CELL_CLASSES[1:] * 9 + IMAGE_CLASSES


@dataclass(frozen=True)
class Sample:
    """A training sample.

    Attributes:
        image: uint8 [H,W,3], or None for a text-only sample.
        questions: Questions about the image.
        contents: Class labels of the image, described by `CONTENTS`; 0 means nothing.
    """

    image: np.ndarray | None
    questions: tuple[QAPair, ...]
    contents: tuple[int, ...] = (0,) * len(CONTENTS)


def make_sample(split: str, index: int, questions: int = 4) -> Sample:
    """Return the sample of that index, with up to `questions` questions in random order and language."""
    rng = np.random.default_rng((SPLITS[split], index))
    kind = rng.choice(4, p=(0.50, 0.25, 0.23, 0.02))
    if kind == 3:
        text, answer = GREETINGS[rng.integers(len(GREETINGS))]
        language = "en" if text.isascii() else "zh"
        return Sample(None, (QAPair("greeting", language, text, answer, 0.0),))
    image, asked, contents = (_scene, _digits, _word)[kind](rng, split)
    picked = _pick(asked, questions, rng)
    return Sample(image, tuple(_in_language(question, rng) for question in picked), contents)


def _pick(asked: list[_Bilingual], count: int, rng: np.random.Generator) -> list[_Bilingual]:
    """Up to `count` questions in random order, every kind once before any kind twice, so that rare kinds are asked."""
    shuffled = [asked[i] for i in rng.permutation(len(asked))]
    kinds = [question[0] for question in shuffled]
    order = sorted(range(len(shuffled)), key=lambda i: kinds[:i].count(kinds[i]))
    return [shuffled[i] for i in sorted(order[:count])]


def heldout_questions(kind: str, language: str, count: int) -> list[tuple[np.ndarray, QAPair]]:
    """Return `count` held-out images with one question of that kind and language each."""
    found: list[tuple[np.ndarray, QAPair]] = []
    index = 0
    while len(found) < count:
        sample = _heldout_sample(index)
        index += 1
        for question in sample.questions:
            if (question.kind, question.language) == (kind, language) and sample.image is not None:
                found.append((sample.image, question))
                break
    return found


@lru_cache(maxsize=8192)  # 300 MB at most; the kinds and languages share these samples
def _heldout_sample(index: int) -> Sample:
    return make_sample("heldout", index, questions=20)


KINDS = ("color", "shape", "count", "place", "exists", "digits", "word")

# A question before its language is chosen: kind, (English question, answer), (Chinese question, answer), chance.
_Bilingual = tuple[str, tuple[str, str], tuple[str, str], float]
_Picture = tuple[np.ndarray, list[_Bilingual], tuple[int, ...]]


def _in_language(question: _Bilingual, rng: np.random.Generator) -> QAPair:
    kind, english, chinese, chance = question
    language = "en" if rng.random() < 0.5 else "zh"
    text, answer = english if language == "en" else chinese
    return QAPair(kind, language, text, answer, chance)


def _background(rng: np.random.Generator) -> Image.Image:
    """A light background with a slight gradient."""
    corners = rng.integers(205, 256, (2, 2, 3)).astype(np.uint8)
    return Image.fromarray(corners).resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def _finish(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Add slight blur, noise and brightness changes, as of a camera."""
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.8)))
    pixels = np.asarray(image, np.float32) * rng.uniform(0.9, 1.08)
    pixels += rng.normal(0, rng.uniform(0, 5), pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: tuple[int, ...]
) -> None:
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape == "square":
        side = radius * 0.88
        draw.rectangle((x - side, y - side, x + side, y + side), fill=colour)
    else:
        corners, inner = (3, 1.0) if shape == "triangle" else (5, 0.42)
        steps = corners if shape == "triangle" else 2 * corners
        angles = np.arange(steps) * 2 * np.pi / steps - np.pi / 2
        radii = radius * 1.15 * np.where(np.arange(steps) % 2 & (shape == "star"), inner, 1.0)
        draw.polygon([(x + r * np.cos(a), y + r * np.sin(a)) for r, a in zip(radii, angles)], fill=colour)


def _scene(rng: np.random.Generator, split: str) -> _Picture:
    """One to five shapes in the cells of a 3x3 grid."""
    count = int(rng.integers(1, 6))
    cells = rng.permutation(9)[:count]
    shapes = [str(s) for s in rng.choice(list(SHAPES), count)]
    colours = [str(c) for c in rng.choice(list(COLOURS), count)]
    if count > 1 and rng.random() < 0.4:  # so that scenes with several of one shape are not rare
        shapes = [shapes[0]] * count if rng.random() < 0.5 else [shapes[0]] * (count - 1) + [shapes[-1]]
    scale = 2  # drawn larger and scaled down for smooth edges
    image = _background(rng).resize((SIZE * scale, SIZE * scale))
    draw = ImageDraw.Draw(image)
    cell = SIZE * scale / 3
    for place, shape, colour in zip(cells, shapes, colours):
        radius = cell * rng.uniform(0.26, 0.42)
        x, y = (place % 3 + 0.5) * cell, (place // 3 + 0.5) * cell
        x, y = x + rng.uniform(-0.1, 0.1) * cell, y + rng.uniform(-0.1, 0.1) * cell
        tint = tuple(int(v) for v in np.clip(np.asarray(COLOURS[colour][0]) + rng.integers(-18, 19, 3), 0, 255))
        _draw_shape(draw, shape, x, y, radius, tint)
    pixels = _finish(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS), rng)
    contents = [0] * len(CONTENTS)
    for place, shape, colour in zip(cells, shapes, colours):
        contents[place] = 1 + list(SHAPES).index(shape)
        contents[9 + place] = 1 + list(COLOURS).index(colour)
    return pixels, _scene_questions(rng, cells, shapes, colours), tuple(contents)


def _scene_questions(
    rng: np.random.Generator, cells: np.ndarray, shapes: list[str], colours: list[str]
) -> list[_Bilingual]:
    count = len(shapes)
    asked: list[_Bilingual] = [
        ("count", ("How many shapes are there?", str(count)), ("图中有几个图形？", str(count)), 1 / 5)
    ]
    wanted = str(rng.choice(shapes) if rng.random() < 0.75 else rng.choice(list(SHAPES)))
    number = str(shapes.count(wanted))
    asked.append(
        ("count", (f"How many {wanted}s are there?", number), (f"图中有几个{SHAPES[wanted]}？", number), 1 / 6)
    )
    pairs = list(zip(colours, shapes))
    for place, colour, shape in zip(cells, colours, shapes):
        colour_zh, shape_zh = COLOURS[colour][1], SHAPES[shape]
        where, where_zh = list(PLACES.items())[place]
        if shapes.count(shape) == 1:
            asked.append(
                ("color", (f"What color is the {shape}?", colour), (f"{shape_zh}是什么颜色？", colour_zh), 1 / 6)
            )
        if colours.count(colour) == 1:
            asked.append(
                ("shape", (f"What shape is {colour}?", shape), (f"什么形状是{colour_zh}的？", shape_zh), 1 / 4)
            )
        if pairs.count((colour, shape)) == 1:
            text = (f"Where is the {colour} {shape}?", where)
            asked.append(("place", text, (f"{colour_zh}的{shape_zh}在哪里？", where_zh), 1 / 9))
    present = rng.random() < 0.5
    absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in pairs]
    # An absent pair shares its color or shape with the image, so that recognizing one of the two is not enough.
    near = [(c, s) for c, s in absent if c in colours or s in shapes]
    colour, shape = pairs[rng.integers(count)] if present else near[rng.integers(len(near))]
    text = (f"Is there a {colour} {shape}?", "yes" if present else "no")
    text_zh = (f"图中有{COLOURS[colour][1]}的{SHAPES[shape]}吗？", "有" if present else "没有")
    asked.append(("exists", text, text_zh, 1 / 2))
    return asked


@lru_cache(maxsize=1)
def handwritten_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's digits: images [1797,8,8] on a scale of 0 to 16, labels [1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images, data.target


def _digits(rng: np.random.Generator, split: str) -> _Picture:
    """One or two handwritten digits in dark ink; every fifth scan is held out."""
    images, labels = handwritten_digits()
    numbers = np.arange(len(labels))
    numbers = numbers[(numbers % 5 == 0) == (split == "heldout")]
    chosen = rng.choice(numbers, 1 if rng.random() < 0.6 else 2)
    ground = np.asarray(_background(rng), np.float32)
    ink = rng.integers(0, 90, 3).astype(np.float32)
    side = int(rng.integers(60, 90)) if len(chosen) == 1 else int(rng.integers(44, 54))
    left = int(rng.integers(4, SIZE - side * len(chosen) - 3)) if side * len(chosen) < SIZE - 8 else 2
    for number in chosen:
        scan = Image.fromarray((images[number] * (255 / 16)).astype(np.uint8))
        scan = scan.resize((side, side), Image.Resampling.BICUBIC)
        scan = scan.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC)
        top = int(rng.integers(4, SIZE - side - 3))
        cover = (np.asarray(scan, np.float32) / 255)[..., None]
        patch = ground[top : top + side, left : left + side]
        ground[top : top + side, left : left + side] = patch * (1 - cover) + ink * cover
        left += side
    answer = "".join(str(labels[number]) for number in chosen)
    image = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
    chance = 1 / 10 if len(chosen) == 1 else 1 / 100
    asked: _Bilingual = ("digits", ("What number is written here?", answer), ("图中写的数字是多少？", answer), chance)
    digits = [1 + int(labels[number]) for number in chosen] + [0] * (2 - len(chosen))
    return _finish(image, rng), [asked], (0,) * 18 + (*digits, 0)


def _word(rng: np.random.Generator, split: str) -> _Picture:
    """One printed word of a closed list, upper or lower case."""
    word = str(rng.choice(WORDS))
    image = _background(rng)
    draw = ImageDraw.Draw(image)
    shown = word.upper() if rng.random() < 0.5 else word
    font = ImageFont.load_default(int(rng.integers(28, 37)))
    left, top, right, bottom = draw.textbbox((0, 0), shown, font=font)
    x = int(rng.integers(2, max(3, SIZE - int(right - left) - 2))) - left
    y = int(rng.integers(4, SIZE - int(bottom - top) - 4)) - top
    draw.text((x, y), shown, font=font, fill=tuple(int(v) for v in rng.integers(0, 110, 3)))
    asked: _Bilingual = ("word", ("What word is written here?", word), ("图中写的是什么单词？", word), 1 / len(WORDS))
    return _finish(image, rng), [asked], (0,) * 20 + (1 + WORDS.index(word),)


def texts(samples: int, make: Callable[[str, int], Sample] = make_sample) -> list[str]:
    """Return questions and answers of the first training samples, the corpus of the tokenizer."""
    lines = [part for greeting in GREETINGS for part in greeting] * 20
    for index in range(samples):
        for question in make("train", index).questions:
            lines += [question.text, question.answer]
    return lines
