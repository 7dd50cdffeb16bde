"""nano: its images, its training script, and the model that ships."""

import glob
import io
import json
import os
import re
import shutil
import signal
import tomllib
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from support.paths import ROOT

import internvl_jax
from internvl_jax.config import PRESETS, load_config
from internvl_jax.data.annotations import Corpus, read_meta
from internvl_jax.data.batch import IGNORED
from internvl_jax.data.samples import Sample, SampleMaker
from internvl_jax.nano import build_tokenizer, dataset, evaluate, lesson, phrasings, render, train
from internvl_jax.processing.images import load_processor
from internvl_jax.processing.tokenizer import load_tokenizer
from internvl_jax.training import trainer
from internvl_jax.training.trainer import TrainHooks

NANO = Path(internvl_jax.__file__).parent / "nano" / "model"
IMAGES = NANO.parent / "images"


def small_config():
    config = PRESETS["nano"]()
    vision = replace(config.vision, num_hidden_layers=3, hidden_size=40, intermediate_size=80)
    text = replace(config.text, num_hidden_layers=1)
    return replace(config, vision=vision, text=text, projector=replace(config.projector, in_features=160))


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
    images, labels = render.handwritten_digits()
    used = {"train": set(), "heldout": set()}

    class Watched(np.ndarray):
        def __getitem__(self, key):
            if np.isscalar(key) and self.ndim == 3:
                used[split].add(int(key))
            return super().__getitem__(key)

    monkeypatch.setattr(render, "handwritten_digits", lambda: (images.view(Watched), labels))
    for split in used:
        for index in range(600):
            render.make_sample(split, index)
    assert len(used["train"]) > 100
    assert len(used["heldout"]) > 100
    assert not used["train"] & used["heldout"]


def test_data_set_is_in_the_documented_format(tmp_path):
    """Every sample is valid and has the labels of its image; written again, the bytes are the same."""
    count = 60
    meta = dataset.write(tmp_path / "data", count)
    dataset.write(tmp_path / "again", count)
    for path in sorted((tmp_path / "data").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "data")).read_bytes()
    with pytest.raises(ValueError, match="has 60 samples, not 61"):
        dataset.write(tmp_path / "data", count + 1)
    config, tokenizer = load_config(NANO), load_tokenizer(NANO)
    maker = SampleMaker.for_model(
        config, tokenizer, load_processor(NANO, config), max_length=train.LENGTH, image_slots=1, image_labels=21
    )
    corpus = Corpus(read_meta(meta))
    assert len(corpus) == count
    for number in range(count):
        drawn = render.make_sample("train", number)
        sample = maker(corpus[number], np.random.default_rng(0))
        assert isinstance(sample, Sample)
        assert not sample.truncated
        answers = tokenizer.decode(sample.labels[sample.labels != IGNORED], skip_special_tokens=False)
        expected = "</s>".join(question.answer for question in drawn.questions) + "</s>"
        assert answers.replace(" ", "") == expected.replace(" ", "")
        assert len(sample.pixel_values) == len(sample.image_labels) == (drawn.image is not None)
        if drawn.image is not None:
            assert tuple(sample.image_labels[0]) == drawn.contents
            assert np.array_equal(sample.pixel_values[0], maker.processor(Image.fromarray(drawn.image)))


def snapshot(directory):
    """Every file below a directory, with its bytes and its time."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


FOREIGN = {
    "images/train/000000.png": b"a photo of somebody",
    "train.jsonl": b'{"id": 1}\n',
    "heldout.jsonl": b"",
    "meta.json": b'{"nano": {"length": 20, "root": "/data"}}',
}


@pytest.mark.parametrize("name", FOREIGN)
def test_lesson_changes_nothing_that_is_not_its_own(tmp_path, name, capsys):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".png"):
        first = next(n for n in range(9) if render.make_sample("train", n).image is not None)
        path = path.with_name(f"{first:06}.png")
        Image.new("RGB", (7, 5)).save(path)
    else:
        path.write_bytes(FOREIGN[name])
    before = snapshot(tmp_path)
    message = f"{path} exists with other content: choose another directory"
    with pytest.raises(ValueError, match=re.escape(message)):
        lesson.write(tmp_path, 6, 4)
    if name == "meta.json":
        with pytest.raises(SystemExit) as stopped:
            lesson.main([str(tmp_path), "--samples", "6"])
        assert stopped.value.code == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    assert snapshot(tmp_path) == before


def test_lesson_goes_on_where_it_was_stopped(tmp_path, monkeypatch, logged):
    monkeypatch.setenv("HOME", str(tmp_path))
    lesson.write(tmp_path / "whole", 6, 4)
    (tmp_path / "mine.txt").write_text("stays")
    lesson.write("~/a b/../whole", 6, 4)  # changes nothing
    expected = {name: data for name, (data, _) in snapshot(tmp_path / "whole").items()}
    assert len(expected) == 13
    for name in ("meta.json", "train.jsonl", sorted(expected)[-1], "images/train/000001.png"):
        (tmp_path / "whole" / name).unlink(missing_ok=True)
    lesson.write(tmp_path / "whole", 6, 4)
    assert {name: data for name, (data, _) in snapshot(tmp_path / "whole").items()} == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "whole"]
    assert not logged


@pytest.mark.parametrize("name", ["images/000/000000.png", "train.jsonl", "meta.json"])
def test_data_set_changes_nothing_that_is_not_its_own(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(FOREIGN.get(name, b"a photo of somebody"))
    first = render.make_sample("train", 0).image
    before = snapshot(tmp_path)
    assert first is not None  # or the image's name would be of no interest
    with pytest.raises(ValueError, match=f"{path.name} exists with other content: choose another directory"):
        dataset.write(tmp_path, 20)
    assert {key: value for key, value in snapshot(tmp_path).items() if key in before} == before


def test_data_set_removes_what_killed_runs_left(tmp_path, logged):
    part = tmp_path / "images" / "000"
    part.mkdir(parents=True)
    (part / ".000003.png.tmp-4194305").write_bytes(b"half")
    (tmp_path / ".train.jsonl.tmp-4194305").write_bytes(b"half")
    dataset.write(tmp_path, 5)
    assert len(logged) == 2
    assert not list(tmp_path.rglob(".*"))


def test_images_tokenizer_and_model_of_others_stay(tmp_path):
    (tmp_path / "shapes.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"shapes\.png exists with other content"):
        evaluate.write_images(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["shapes.png"]
    (tmp_path / "added_tokens.json").write_text("{}")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"added_tokens\.json belongs to another tokenizer: choose another directory"):
        build_tokenizer.build(tmp_path, pieces=400, samples=40)
    assert {name: values for name, values in snapshot(tmp_path).items() if name in before} == before
    assert not (tmp_path / "tokenizer.model").exists()
    build_tokenizer.build(tmp_path / "own", pieces=400, samples=40)
    whole = {name: data for name, (data, _) in snapshot(tmp_path / "own").items()}
    (tmp_path / "own" / "tokenizer.model").unlink()  # of a run that was stopped
    build_tokenizer.build(tmp_path / "own", pieces=400, samples=40)
    assert {name: data for name, (data, _) in snapshot(tmp_path / "own").items()} == whole
    config = load_config(NANO)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="model was not written by this command"):
        train.write_model(tmp_path / "model", NANO, {}, config)
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    train.check_model(NANO, config)
    with pytest.raises(ValueError, match="was not written by this command"):
        train.check_model(NANO, replace(config, image_size=56))


@pytest.mark.long  # the code is tested on fewer pieces
def test_tokenizer_is_the_shipped_one(tmp_path):
    """The vocabulary can be made again from the code, byte for byte."""
    build_tokenizer.build(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 4
    for name in names:
        assert (tmp_path / name).read_bytes() == (NANO / name).read_bytes(), name


@pytest.mark.long  # nano runs the trainer, whose own tests resume too
def test_training_resumes_bit_for_bit(tmp_path, monkeypatch):
    """Two stages straight, and the same in two runs, the first stopped within the second stage; a model is written."""
    # The third differs from the second in what is frozen.
    stages = train.make_stages((4, 4), rows=4, warmup=1, samples=(24, 24))
    config = small_config()
    start = jax.device_get(train.init_params(jax.random.key(0), config))
    results = []
    make, made = trainer.make_step, {}

    def shared(context):  # compiled once for both
        if context.recipe.name not in made:
            made[context.recipe.name] = make(context)
        return made[context.recipe.name]

    monkeypatch.setattr(trainer, "make_step", shared)
    for name, stop in (("straight", None), ("resumed", 2)):
        out = tmp_path / name
        copy_tokenizer(out)
        if stop is not None:
            real = train.train

            def stopping(directory, *args, real=real, stop=stop, **options):
                def log(entry):
                    if directory.name == "answer" and entry["step"] == stop:
                        os.kill(os.getpid(), signal.SIGTERM)

                return real(directory, *args, **{**options, "hooks": TrainHooks(log=log)})

            with monkeypatch.context() as patch:
                patch.setattr(train, "train", stopping)
                assert train.run(out, config, stages, train.init_params(jax.random.key(0), config), {}) is None
        params = train.run(out, config, stages, train.init_params(jax.random.key(0), config), {})
        results.append(jax.device_get(params))
    jax.tree.map(np.testing.assert_array_equal, *results)
    start = jax.device_get(jax.jit(train.init_params, static_argnames="config")(jax.random.key(0), config))
    for part in ("vision_model", "mlp1", "language_model"):
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), results[0][part], start[part])
        assert max(jax.tree.leaves(moved)) > 0, part
    losses = [json.loads(line)["loss"] for line in (tmp_path / "straight" / "see" / "metrics.jsonl").open()]
    assert losses[-1] < losses[0]
    train.write_model(tmp_path / "model", out, params, config)
    chat = internvl_jax.load(tmp_path / "model")
    assert chat.config == config
    stored = np.asarray(results[0]["mlp1"]["fc1"]["kernel"].astype("bfloat16"), np.float32)
    assert np.array_equal(np.asarray(chat.params["mlp1"]["fc1"]["kernel"]), stored)


def test_the_fourth_stage_starts_from_a_model_on_disk(tmp_path):
    """Its batches are packed, the vision tower is frozen, and a run is not resumed with another model."""
    config = small_config()
    params = train.init_params(jax.random.key(0), config)
    del params["labels"]  # a model on disk has none
    copy_tokenizer(tmp_path)
    train.write_model(tmp_path / "third", tmp_path, params, config)
    (stage,) = train.make_stages((2, 2, 2, 3), rows=4, warmup=1, samples=(24, 24))[3:]
    start, identity = train.read_checkpoint(tmp_path / "third", tmp_path, config)
    before = jax.device_get(start)
    after = jax.device_get(train.run(tmp_path, config, [stage], start, identity))
    for part in ("vision_model", "mlp1", "language_model"):
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after[part], before[part])
        assert (max(jax.tree.leaves(moved)) > 0) == (part != "vision_model"), part
    metrics = [json.loads(line) for line in (tmp_path / "phrase" / "metrics.jsonl").open()]
    assert [entry["step"] for entry in metrics] == [1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["phrase", "phrasings", "third"]
    train.write_model(tmp_path / "other", tmp_path, after, config)
    start, identity = train.read_checkpoint(tmp_path / "other", tmp_path, config)
    with pytest.raises(ValueError, match="checkpoint"):
        train.run(tmp_path, config, [stage], start, identity)


def test_the_fourth_stage_refuses_other_models(tmp_path, capsys):
    config = load_config(NANO)
    with pytest.raises(ValueError, match="is not a model of this command"):
        train.read_checkpoint(IMAGES, NANO, config)
    with pytest.raises(ValueError, match="was not written by this command"):
        train.read_checkpoint(NANO, NANO, replace(config, image_size=56))
    (tmp_path / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(ValueError, match="is another tokenizer than"):
        train.read_checkpoint(NANO, tmp_path, config)
    copy_tokenizer(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--output", str(tmp_path), "--checkpoint", str(tmp_path / "none")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'none'} is not a model of this command")


def test_accuracy_of_the_shipped_model(chat):
    """Far above chance in every kind and language; `python -m internvl_jax.nano.evaluate` measures exactly."""
    results = evaluate.evaluate(chat, 25)
    for result in results:
        assert result.accuracy - result.margin > result.chance, result
    assert np.mean([result.accuracy for result in results]) > 0.9


def test_the_package_holds_every_file_of_the_model():
    root = NANO.parent
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = pyproject["tool"]["setuptools"]["package-data"]["internvl_jax.nano"]
    # As setuptools expands them: "*" leaves out names that start with a dot.
    packed = {path for pattern in patterns for path in glob.glob(str(root / pattern), recursive=True)}
    shipped = {str(path) for part in (NANO, IMAGES) for path in part.rglob("*") if path.is_file()}
    assert shipped
    assert not shipped - packed


def test_shipped_images(tmp_path):
    evaluate.write_images(tmp_path)
    for name in evaluate.IMAGES:
        assert np.array_equal(np.asarray(Image.open(IMAGES / name)), np.asarray(Image.open(tmp_path / name)))


def test_readme_question(chat):
    assert chat.chat("How many shapes are there?", images=[IMAGES / "shapes.png"]).text == "5"


def test_it_says_who_it_is(chat):
    for question, answer in render.GREETINGS:
        assert chat.chat(question).text == answer


def test_evaluation_counts(chat, capsys):
    evaluate.main(["--count", "4", "--json"])
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert len(scores) == 20
    assert all(s["count"] == 4 and s["accuracy"] == s["num_correct"] / 4 for s in scores)
    table = Console(record=True, width=120, file=io.StringIO())
    evaluate.print_table(
        [evaluate.KindScore(**{k: s[k] for k in evaluate.KindScore.__dataclass_fields__}) for s in scores], table
    )
    text = table.export_text()
    rows = re.findall(r"^│ (\w+)", text, re.MULTILINE)
    assert rows == [*render.KINDS, "mean", *phrasings.EXTRA_KINDS]
