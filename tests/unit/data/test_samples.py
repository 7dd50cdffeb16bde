"""Entries become samples, pixels and all; whatever is wrong with one is told with its file and line."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from support.golden import DATA, bundle

from internvl_jax.config import load_config
from internvl_jax.data import samples
from internvl_jax.data.annotations import DataError, Record, Source
from internvl_jax.data.augment import RATIO, SCALE, augment, crop, random_crop
from internvl_jax.data.samples import Problem, ProblemLog, Sample, SampleMaker
from internvl_jax.processing.images import ImageProcessor
from internvl_jax.processing.tokenizer import load_tokenizer

CHECKPOINT = DATA / "internvl_chat_v1_1" / "checkpoint"
IMAGES = DATA / "internvl_chat_v1_1" / "images"
ARRAYS, FACTS = bundle("internvl_chat_v1_1")


def make_maker(max_length=96, image_slots=4, **options):
    config = load_config(CHECKPOINT)
    processor = ImageProcessor.from_dir(CHECKPOINT, config.image_size)
    return SampleMaker.for_model(
        config, load_tokenizer(CHECKPOINT), processor, max_length=max_length, image_slots=image_slots, **options
    )


@pytest.fixture(scope="module")
def maker():
    return make_maker()


def record(entry, augment=False, root=IMAGES):
    text = entry if isinstance(entry, bytes) else json.dumps(entry).encode()
    return Record(Source("name", root, root / "a.jsonl", augment=augment), "a.jsonl:7", text)


def entry(*texts, **others):
    return {"conversations": [{"from": ("human", "gpt")[n % 2], "value": t} for n, t in enumerate(texts)], **others}


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("row", range(3))
def test_golden_samples_with_their_pixels(maker, row):
    golden = FACTS["train_samples"][row]
    files = [FACTS["images"][name]["file"].split("/")[-1] for name in golden["images"]]
    image = {"image": files[0]} if files else {}
    sample = maker(record({"conversations": golden["conversations"], **image}), rng())
    assert isinstance(sample, Sample)
    assert np.array_equal(sample.input_ids, ARRAYS["train/input_ids"][row][: len(sample.input_ids)])
    assert np.array_equal(sample.labels, ARRAYS["train/labels"][row][: len(sample.labels)])
    assert sample.pixel_values.dtype == np.float32
    assert sample.pixel_values.shape == (len(files), 3, 112, 112)
    for name, pixels in zip(golden["images"], sample.pixel_values):
        assert np.array_equal(pixels, ARRAYS[f"images/{name}/eval"])


def test_several_images_in_order(maker):
    sample = maker(record(entry("<image> <image>?", "Two.", image=["gray.png", "rgb.png"])), rng())
    assert np.array_equal(sample.pixel_values[0], ARRAYS["images/gray/eval"])
    assert np.array_equal(sample.pixel_values[1], ARRAYS["images/rgb/eval"])
    assert not sample.truncated


def test_counting_needs_no_images():
    sample = make_maker(with_pixels=False)(record(entry("<image>?", "Yes.", image="nowhere.png")), rng())
    assert sample.pixel_values.shape == (0, 3, 112, 112)


def test_one_image_under_both_names_is_one_image():
    assert samples.image_names({"image": "a.png", "images": ["a.png"]}) == ["a.png"]


def test_image_labels_are_whole_numbers_of_int32():
    labels = samples.image_labels({"image_labels": [[1, -2], [3, 4]]}, 2, 2)
    assert (labels.dtype, labels.tolist()) == (np.int32, [[1, -2], [3, 4]])
    assert samples.image_labels({}, 0, 2).shape == (0, 2)
    for bad in ([[1]], [[1, 2.5]], [[1, 2**31]], [[1, 2**70]], [[1, "2"]], [[1, None]], 7):
        with pytest.raises(samples.SampleError, match="2 whole numbers for each image"):
            samples.image_labels({"image_labels": bad}, 1, 2)


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (b"{", "annotation", "not JSON"),
        (b"\xff\xfe", "annotation", "not JSON"),
        (b"[1]", "annotation", "not a JSON object, but list"),
        (b'{"a":' * 10**5, "annotation", "not JSON"),
        (entry("a", "b", image="rgb.png", images="gray.png"), "annotation", 'both "image" and "images"'),
        (entry("a", "b", images=[{"path": "rgb.png"}]), "annotation", '"images" must be a path or a list'),
        (entry("a", "b", image=3), "annotation", "a path or a list"),
        (entry("a", "b", image=[""]), "annotation", "a path or a list"),
        (entry("a", "b", video="a.mp4"), "annotation", "a video"),
        ({}, "conversation", "must be a list"),
        (entry("a"), "conversation", "no answer"),
        (entry("half of a \ud800 pair", "b"), "conversation", "surrogate"),
        (entry("<image>?", "b"), "placeholders", "1 <image> placeholder.* for 0 image"),
        (entry("<image><image>?", "b", image="rgb.png"), "placeholders", "2 <image> placeholder.* for 1 image"),
        (entry("a", "b", image="nowhere.png"), "image", "nowhere.png does not exist"),
        (entry("a", "b", image="corrupt.png"), "image", "corrupt.png is damaged or truncated"),
        (entry("a", "b", image="text.png"), "image", "text.png is not an image"),
        (entry("<image>" * 5, "b", image=["rgb.png"] * 5), "too many images", "5 images, but a batch has 4"),
        (entry("long " * 99, "b"), "no supervised token", "no answer within the first 96"),
        (entry("long " * 40 + "<image>?", "b", image="rgb.png"), "truncated image", "truncating .* tokens to 96"),
    ],
)
def test_problems(maker, tmp_path, bad, kind, message):
    for name in ("rgb.png", "gray.png"):
        (tmp_path / name).write_bytes((IMAGES / name).read_bytes())
    (tmp_path / "corrupt.png").write_bytes((IMAGES / "rgb.png").read_bytes()[:9000])
    (tmp_path / "text.png").write_text("no image")
    problem = maker(record(bad, root=tmp_path), rng())
    assert isinstance(problem, Problem)
    assert (problem.kind, problem.location) == (kind, "a.jsonl:7")

    assert re.search(message, problem.message)


@pytest.mark.parametrize("image", ["", None, [], "absent"])
@pytest.mark.parametrize("key", ["image", "images", "video"])
def test_no_image_is_text_only(maker, key, image):
    sample = maker(record(entry("Say hello.", "Hello.", **({} if image == "absent" else {key: image}))), rng())
    assert isinstance(sample, Sample)
    assert sample.pixel_values.shape == (0, 3, 112, 112)
    assert sample.unread_keys == ()


@pytest.mark.parametrize(
    "keys",
    [
        {"image": "rgb.png"},
        {"images": "rgb.png"},
        {"image": ["rgb.png"]},
        {"images": ["rgb.png"]},
        {"image": "", "images": ["rgb.png"]},
        {"image": "rgb.png", "images": "rgb.png"},
    ],
)
def test_both_names_of_images_are_read(maker, keys):
    sample = maker(record(entry("What colour is this?", "Red.", **keys)), rng())
    assert np.array_equal(sample.pixel_values[0], ARRAYS["images/rgb/eval"])
    assert sample.unread_keys == ()


def test_keys_that_nothing_reads(maker, logged):
    published = {"id": 1, "width": 3, "height": 4, "data_source": "x", "model": "", "system": "", "weight": None}
    assert maker(record(entry("Q?", "A.", **published)), rng()).unread_keys == ()
    ask = entry("What colour is this?", "Red.", img="rgb.png", system="Be brief.")
    ask["conversations"][1]["loss"] = False
    sample = maker(record(ask), rng())
    assert sample.unread_keys == ("img", "system", "conversations: loss")
    bad = maker(record(entry("<image>?", "b", image_path="rgb.png")), rng())
    assert (bad.kind, bad.unread_keys) == ("placeholders", ("image_path",))
    problems = ProblemLog()
    for made in (sample, sample, bad, bad):
        problems.warn_of_unread_keys(made)
    assert logged == [
        'a.jsonl:7: the key "img" is not read: images are read from "image" or "images"',
        'a.jsonl:7: the key "system" is not read',
        'a.jsonl:7: the key "conversations: loss" is not read',
        'a.jsonl:7: the key "image_path" is not read: images are read from "image" or "images"',
    ]
    for number in range(100):
        problems.warn_of_unread_keys(sample._replace(unread_keys=(f"key{number}",)))
    assert len(logged) == 20


def test_problems_are_reported_once_and_counted_always():
    told = []
    problems = ProblemLog(told.append)
    for place in ("a:1", "a:2", "a:1"):
        problems.add(Problem("image", "x", place))
    assert [problem.location for problem in told] == ["a:1", "a:2"]
    assert problems.counts == {"image": 3}
    with pytest.raises(DataError, match="a:3: it is so"):
        ProblemLog(fatal=True).add(Problem("image", "it is so", "a:3"))


def test_as_many_images_as_a_batch_has_slots(maker):
    sample = maker(record(entry("<image>" * 4, "Four.", image=["gray.png"] * 4)), rng())
    assert len(sample.pixel_values) == 4


def test_training_does_not_turn_images_by_exif(maker):
    sample = maker(record(entry("<image>?", "A bird.", image="exif_rot.jpg")), rng())
    assert np.array_equal(sample.pixel_values[0], ARRAYS["images/exif_rot/eval"])


def test_qualities_of_jpeg(monkeypatch):
    used = set()
    image = Image.new("RGB", (1, 1))
    save = Image.Image.save
    monkeypatch.setattr(
        Image.Image, "save", lambda self, *args, quality: used.add(quality) or save(self, *args, quality=quality)
    )
    draw = rng()
    for _ in range(300):
        augment(image, "jpeg", draw)
    assert (min(used), max(used)) == (75, 100)


def test_a_long_answer_is_truncated(maker):
    sample = maker(record(entry("Q?", "word " * 200)), rng())
    assert sample.truncated
    assert len(sample.input_ids) == len(sample.labels) == 96


def test_augmentation_where_asked_for(maker):
    ask = entry("<image>?", "A bird.", image="rgb.png")
    plain = maker(record(ask), rng())
    first, again, other = (maker(record(ask, augment=True), rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(plain.pixel_values[0], ARRAYS["images/rgb/eval"])
    assert np.array_equal(first.pixel_values, again.pixel_values)
    assert not np.array_equal(first.pixel_values, other.pixel_values)
    assert not np.array_equal(first.pixel_values, plain.pixel_values)
    never = make_maker(augmentation=None)(record(ask, augment=True), rng(1))
    assert np.array_equal(never.pixel_values, plain.pixel_values)
    with pytest.raises(DataError, match="there are crop and jpeg"):
        make_maker(augmentation="flip")


def test_crops_are_as_published():
    image = Image.fromarray(np.arange(300 * 400 * 3, dtype=np.uint32).astype(np.uint8).reshape(300, 400, 3))
    areas, ratios, corners = [], [], set()
    draw = rng(3)
    for _ in range(500):
        crop = random_crop(image, draw)
        areas.append(crop.width * crop.height / (300 * 400))
        ratios.append(crop.width / crop.height)
        corners.add(crop.getpixel((0, 0)))
    assert SCALE[0] - 0.01 < min(areas) < 0.83
    assert 0.93 < max(areas) <= SCALE[1]
    assert min(ratios) > RATIO[0] - 0.02
    assert max(ratios) < RATIO[1] + 0.02
    assert min(ratios) < 1.12  # a crop of 0.8 of 400 x 300 is at least 1.07 wide
    assert len(corners) > 50
    assert random_crop(Image.new("RGB", (1000, 10)), draw).size == (13, 10)  # no crop fits: centered
    assert random_crop(Image.new("RGB", (10, 1000)), draw).size == (10, 13)
    assert random_crop(Image.new("RGB", (1, 1)), draw).size == (1, 1)


def test_jpeg_keeps_the_size_and_loses_a_little():
    image = Image.radial_gradient("L").convert("RGB")
    changed = augment(image, "jpeg", rng())
    assert changed.size == image.size
    difference = np.abs(np.asarray(changed, np.int32) - np.asarray(image, np.int32))
    assert 0 < difference.mean() < 3


def test_crops_are_pils():
    image = Image.fromarray(rng().integers(0, 256, (300, 2, 3), np.uint8))
    for box in ((0, 0, 2, 300), (1, 150, 2, 299), (0, 7, 1, 8)):
        cut = crop(image, box[0], box[1], box[2] - box[0], box[3] - box[1])
        assert np.array_equal(np.asarray(cut), np.asarray(image.crop(box)))


def test_an_image_that_jpeg_cannot_hold_is_a_problem(maker, tmp_path):
    Image.new("RGB", (70_000, 1)).save(tmp_path / "long.png")
    ask = record(entry("<image>?", "b", image="long.png"), augment=True, root=tmp_path)
    problem = make_maker(augmentation="jpeg")(ask, rng())
    assert (problem.kind, problem.location) == ("image", "a.jsonl:7")
    assert "70000 x 1 pixels cannot be written as JPEG, whose sides have at most 65,500" in problem.message
    assert isinstance(maker(ask, rng()), Sample)


def test_an_entry_without_room_in_memory_is_a_problem(maker, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(np, "stack", full)
    problem = maker(record(entry("<image>?", "b", image="rgb.png")), rng())
    assert (problem.kind, problem.location) == ("memory", "a.jsonl:7")


def test_models_that_rows_do_not_fit():
    with pytest.raises(DataError, match="longer than the model's context"):
        make_maker(max_length=10**6)
