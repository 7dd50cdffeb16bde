"""nano: its pictures, its training script, and the model that ships."""

import glob
import io
import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import internvl_jax
from internvl_jax.config import PRESETS, ChatConfig
from internvl_jax.nano import build_tokenizer, evaluate, render, train
from internvl_jax.processing.conversation import IMG_CONTEXT
from internvl_jax.processing.tokenizer import load_tokenizer

NANO = Path(internvl_jax.__file__).parent / "nano" / "model"
IMAGES = NANO.parent / "images"


def copy_tokenizer(directory):
    directory.mkdir(exist_ok=True)
    for path in NANO.glob("*token*"):
        shutil.copy(path, directory)


@pytest.fixture(scope="module")
def chat():
    return internvl_jax.load()


def test_samples_are_functions_of_split_and_number():
    for index in range(40):
        first, second = render.make_sample("train", index), render.make_sample("train", index)
        assert first.questions == second.questions
        assert first.contents == second.contents
        if first.image is None:
            assert second.image is None
            continue
        assert np.array_equal(first.image, second.image)
        other = render.make_sample("heldout", index)
        assert other.image is None or not np.array_equal(first.image, other.image)


def test_answers_fit_what_is_drawn():
    """Questions are checked against the list of contents, which is made apart from them."""
    shapes, colours, places = list(render.SHAPES), list(render.COLOURS), list(render.PLACES)
    seen = dict.fromkeys(render.KINDS, 0)
    for index in range(300):
        sample = render.make_sample("train", index, questions=20)
        drawn = [
            (places[cell], shapes[sample.contents[cell] - 1], colours[sample.contents[9 + cell] - 1])
            for cell in range(9)
            if sample.contents[cell]
        ]
        for question in sample.questions:
            seen[question.kind] = seen.get(question.kind, 0) + 1
            if question.language == "zh":
                continue
            text, answer = question.text, question.answer
            if text == "How many shapes are there?":
                assert int(answer) == len(drawn)
            elif question.kind == "count":
                assert int(answer) == sum(text == f"How many {shape}s are there?" for _, shape, _ in drawn)
            elif question.kind == "place":
                assert [p for p, s, c in drawn if text == f"Where is the {c} {s}?"] == [answer]
            elif question.kind == "exists":
                assert answer == ("yes" if any(text == f"Is there a {c} {s}?" for _, s, c in drawn) else "no")
            elif question.kind == "color":
                assert [c for _, s, c in drawn if text == f"What color is the {s}?"] == [answer]
            elif question.kind == "shape":
                assert [s for _, s, c in drawn if text == f"What shape is {c}?"] == [answer]
            elif question.kind == "digits":
                assert answer == "".join(str(d - 1) for d in sample.contents[18:20] if d)
            elif question.kind == "word":
                assert answer == render.WORDS[sample.contents[20] - 1]
    assert min(seen[kind] for kind in render.KINDS) > 10, seen


def test_splits_share_no_scan(monkeypatch):
    images, labels = render._handwriting()
    used = {"train": set(), "heldout": set()}

    class Watched(np.ndarray):
        def __getitem__(self, key):
            if np.isscalar(key) and self.ndim == 3:
                used[split].add(int(key))
            return super().__getitem__(key)

    monkeypatch.setattr(render, "_handwriting", lambda: (images.view(Watched), labels))
    for split in used:
        for index in range(600):
            render.make_sample(split, index)
    assert len(used["train"]) > 100
    assert len(used["heldout"]) > 100
    assert not used["train"] & used["heldout"]


def test_supervised_tokens_are_the_answers():
    tokenizer = load_tokenizer(NANO)
    longest = 0
    for index in range(200):
        sample = render.make_sample("train", index)
        ids, supervised = train.tokenize(sample, tokenizer, 16)
        answers = tokenizer.decode([i for i, keep in zip(ids, supervised) if keep], skip_special_tokens=False)
        expected = "</s>".join(question.answer for question in sample.questions) + "</s>"
        assert answers.replace(" ", "") == expected.replace(" ", "")
        assert ids.count(tokenizer.token_to_id(IMG_CONTEXT)) == (0 if sample.image is None else 16)
        longest = max(longest, len(ids))
    assert longest <= train.Recipe.length


def test_tokenizer_is_the_shipped_one(tmp_path):
    """The vocabulary can be made again from the code, byte for byte."""
    build_tokenizer.build(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 4
    for name in names:
        assert (tmp_path / name).read_bytes() == (NANO / name).read_bytes(), name


def test_training_resumes_bit_for_bit(tmp_path):
    """Eight steps of all stages straight, and the same in two runs, the first ended within the second stage."""
    recipe = train.Recipe(stages=(("see", 4), ("answer", 2), ("together", 2)), batch=4, warmup=1, checkpoint_every=1)
    config = PRESETS["nano"]()
    vision = replace(config.vision, num_hidden_layers=2, hidden_size=40, intermediate_size=80)
    text = replace(config.text, num_hidden_layers=1)
    projector = replace(config.projector, in_features=160)
    config = replace(config, vision=vision, text=text, projector=projector)
    results = []
    for name, stops in (("straight", [None]), ("resumed", [5, None])):
        out = tmp_path / name
        copy_tokenizer(out)
        for stop in stops:
            params = train.train(out, recipe, config, stop_at=stop, console=Console(quiet=True))
        results.append(train.jax.device_get(params))
    straight, resumed = map(train.jax.tree.leaves, results)
    assert all(np.array_equal(a, b) for a, b in zip(straight, resumed))
    start = train.jax.tree.leaves(train.init_params(train.jax.random.key(0), config)["vision_model"])
    moved = train.jax.tree.leaves(results[0]["vision_model"])
    assert all(not np.array_equal(a, b) for a, b in zip(start, moved) if a.ndim > 2)


def test_written_model_loads(tmp_path):
    config = PRESETS["nano"]()
    params = train.chat_model.init_params(train.jax.random.key(0), config)
    copy_tokenizer(tmp_path)
    train.write_model(tmp_path, params, config)
    chat = internvl_jax.load(tmp_path)
    assert chat.config == config == ChatConfig.from_file(NANO)
    stored = np.asarray(params["mlp1"]["fc1"]["kernel"].astype("bfloat16"), np.float32)
    assert np.array_equal(np.asarray(chat.params["mlp1"]["fc1"]["kernel"]), stored)


def test_accuracy_of_the_shipped_model(chat):
    """Far above chance in every kind and language; `python -m internvl_jax.nano.evaluate` measures exactly."""
    results = evaluate.evaluate(chat, 40)
    for result in results:
        assert result.accuracy - result.margin > result.chance, result
    assert np.mean([result.accuracy for result in results]) > 0.9


def test_the_package_holds_every_file_of_the_model():
    root = NANO.parent
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    patterns = pyproject["tool"]["setuptools"]["package-data"]["internvl_jax.nano"]
    # As setuptools expands them: "*" leaves out names that start with a dot.
    packed = {path for pattern in patterns for path in glob.glob(str(root / pattern), recursive=True)}
    shipped = {str(path) for part in (NANO, IMAGES) for path in part.rglob("*") if path.is_file()}
    assert shipped
    assert not shipped - packed


def test_pictures_that_ship(tmp_path):
    evaluate.write_pictures(tmp_path)
    for name in evaluate.PICTURES:
        assert np.array_equal(np.asarray(Image.open(IMAGES / name)), np.asarray(Image.open(tmp_path / name)))


def test_readme_question(chat):
    assert chat.chat("How many shapes are there?", images=[IMAGES / "shapes.png"]).text == "5"


def test_it_says_who_it_is(chat):
    for question, answer in render.GREETINGS:
        assert chat.chat(question).text == answer


def test_evaluation_counts(chat, capsys):
    evaluate.main(["--count", "4", "--json"])
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert len(scores) == 14
    assert all(s["count"] == 4 and s["accuracy"] == s["right"] / 4 for s in scores)
    table = Console(record=True, width=120, file=io.StringIO())
    evaluate.print_table(
        [evaluate.Score(**{k: s[k] for k in evaluate.Score.__dataclass_fields__}) for s in scores], table
    )
    text = table.export_text()
    assert all(kind in text for kind in render.KINDS)
