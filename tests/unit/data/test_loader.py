"""Reading as a whole: order, shares, positions that are saved and restored, problems."""

import json
from collections import Counter

import jax
import numpy as np
import pytest
from support.annotation_files import damage, write_data
from support.golden import DATA

from internvl_jax.config import load_config
from internvl_jax.data import loader as data_loader
from internvl_jax.data.annotations import DataError
from internvl_jax.data.loader import ReadOptions
from internvl_jax.data.packing import Layout
from internvl_jax.data.samples import SampleMaker
from internvl_jax.processing.images import ImageProcessor
from internvl_jax.processing.tokenizer import load_tokenizer

CHECKPOINT = DATA / "internvl_chat_v1_1" / "checkpoint"
PACKED = Layout(rows=2, lengths=(160,), image_slots=4)
BUCKETS = Layout(rows=2, lengths=(48, 96), image_slots=4, packed=False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def model():
    config = load_config(CHECKPOINT)
    return config, load_tokenizer(CHECKPOINT), ImageProcessor.from_dir(CHECKPOINT, config.image_size)


@pytest.fixture
def meta(tmp_path):
    sets = {**write_data(tmp_path), **write_data(tmp_path, 10, "b", every_other_image=False, repeat_time=2)}
    (tmp_path / "meta.json").write_text(json.dumps(sets))
    return tmp_path / "meta.json"


def open_data(meta, config, tokenizer, processor, layout, *, report=None, augmentation="crop", **options):
    maker = SampleMaker.for_model(
        config, tokenizer, processor, max_length=layout.max_length, image_slots=layout.image_slots,
        augmentation=augmentation,
    )  # fmt: skip
    return data_loader.open_data(meta, maker, layout, ReadOptions(**options), report=report)


def answers(batch, tokenizer):
    """The answers of a batch, by row and segment."""
    found = []
    for row in range(len(batch.input_ids)):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            learned = (batch.segment_ids[row] == segment) & (batch.labels[row] >= 0)
            found.append(tokenizer.decode(batch.labels[row][learned]))
    return found


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(ones, others):
    assert len(ones) == len(others)
    for one, other in zip(ones, others):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
            assert a.dtype == b.dtype
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("layout", [PACKED, BUCKETS], ids=["packed", "buckets"])
def test_an_epoch_has_every_sample_as_often_as_the_meta_file_says(meta, model, layout):
    loader = open_data(meta, *model, layout, epochs=1)
    batches = list(loader)
    assert {batch.input_ids.shape for batch in batches} == {(2, length) for length in layout.lengths}
    assert {batch.pixel_values.shape for batch in batches} == {(4, 3, 112, 112)}
    counted = Counter(answer for batch in batches for answer in answers(batch, model[1]))
    assert counted == {**{f"a {n}": 1 for n in range(40)}, **{f"b {n}": 2 for n in range(10)}}
    images = sum(int(np.any(pixels)) for batch in batches for pixels in batch.pixel_values)
    assert images == 20
    image_token = model[1].token_to_id("<IMG_CONTEXT>")
    for batch in batches:
        assert np.sum(batch.input_ids == image_token) == 16 * sum(bool(np.any(p)) for p in batch.pixel_values)


def test_order(meta, model):
    def first(**options):
        return [
            a for batch in take(iter(open_data(meta, *model, PACKED, **options)), 6) for a in answers(batch, model[1])
        ]

    assert first(seed=1) == first(seed=1)
    assert first(seed=1) != first(seed=2)
    in_order = [int(answer[2:]) for answer in first(shuffle=False)]
    assert np.max(np.abs(np.asarray(in_order) - np.arange(len(in_order)))) < 12
    one = [a for batch in open_data(meta, *model, PACKED, epochs=1) for a in answers(batch, model[1])]
    two = [a for batch in open_data(meta, *model, PACKED, epochs=2) for a in answers(batch, model[1])]
    assert Counter(two) == {answer: 2 * count for answer, count in Counter(one).items()}
    assert two[60:] != one  # the second epoch has another order


def test_processes_share_an_epoch(meta, model):
    shares = [
        [a for batch in open_data(meta, *model, PACKED, epochs=1, process=(i, 3)) for a in answers(batch, model[1])]
        for i in range(3)
    ]
    assert [len(share) for share in shares] == [20, 20, 20]
    whole = [a for batch in open_data(meta, *model, PACKED, epochs=1) for a in answers(batch, model[1])]
    assert Counter(answer for share in shares for answer in share) == Counter(whole)
    for process in [(3, 3), (-1, 2), (0, 0)]:
        with pytest.raises(DataError, match="there is no process"):
            open_data(meta, *model, PACKED, process=process)
    shares = [
        [a for batch in open_data(meta, *model, BUCKETS, epochs=1, process=(i, 2)) for a in answers(batch, model[1])]
        for i in range(2)
    ]
    assert Counter(answer for share in shares for answer in share) == Counter(whole)
    with pytest.raises(DataError, match="not one for each of 61"):
        open_data(meta, *model, PACKED, process=(0, 61))


@pytest.mark.parametrize("layout", [PACKED, BUCKETS], ids=["packed", "buckets"])
@pytest.mark.parametrize("stop", [0, 1, 5, 23])  # 23 is in the second epoch
def test_a_saved_position_is_restored_bit_for_bit(meta, model, layout, stop):
    straight = take(iter(open_data(meta, *model, layout, seed=3)), stop + 4)
    before = iter(open_data(meta, *model, layout, seed=3))
    take(before, stop)
    state = json.loads(json.dumps(before.get_state()))
    before.close()
    after = iter(open_data(meta, *model, layout, seed=3))
    after.set_state(state)
    assert after.get_state() == state
    assert_same(take(after, 4), straight[stop:])
    take(after, 1)
    after.set_state(state)  # back, on an iterator that runs
    assert_same(take(after, 4), straight[stop:])


def test_images_are_cropped_anew_in_every_epoch(tmp_path, model):
    (tmp_path / "meta.json").write_text(json.dumps(write_data(tmp_path, 2)))
    layout = Layout(rows=1, lengths=(160,), image_slots=1, packed=False)
    images = {b.pixel_values.tobytes() for b in open_data(tmp_path / "meta.json", *model, layout, epochs=4)}
    assert len(images) == 1 + 4  # none, and four crops
    plain = open_data(tmp_path / "meta.json", *model, layout, epochs=4, augmentation=None)
    assert len({b.pixel_values.tobytes() for b in plain}) == 2


def test_crops_follow_the_seed(tmp_path, model):
    (tmp_path / "meta.json").write_text(json.dumps(write_data(tmp_path, 4)))

    def pixels(seed):
        batches = list(open_data(tmp_path / "meta.json", *model, PACKED, shuffle=False, epochs=1, seed=seed))
        return np.concatenate([batch.pixel_values for batch in batches])

    one, two = pixels(1), pixels(2)
    assert np.array_equal(one, pixels(1))
    seen = np.any(one, axis=(1, 2, 3))
    assert seen.sum() == 2
    assert all(np.abs(a - b).max() > 0.1 for a, b in zip(one[seen], two[seen]))


def test_keys_that_nothing_reads_are_told_of(tmp_path, model, logged):
    sets = write_data(tmp_path, 6, every_other_image=False)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(json.loads(line) | {"img": "x.png"}) + "\n" for line in lines))
    (tmp_path / "meta.json").write_text(json.dumps(sets))
    loader = open_data(tmp_path / "meta.json", *model, PACKED, shuffle=False, epochs=2)
    assert len(list(loader)) > 1
    assert logged == [f'{tmp_path}/a.jsonl:1: the key "img" is not read: images are read from "image" or "images"']


def test_numbers_that_there_cannot_be(meta, model):
    with pytest.raises(DataError, match=r"^workers is -1: it must be 0 \(threads\) or more$"):
        open_data(meta, *model, PACKED, workers=-1)
    with pytest.raises(DataError, match=r"^epochs is 0: it must be at least 1$"):
        open_data(meta, *model, PACKED, epochs=0)


def test_a_position_in_other_data_is_refused(meta, model):
    state = iter(open_data(meta, *model, PACKED)).get_state()
    for options in ({"seed": 1}, {"process": (0, 2)}, {"shuffle": False}):
        with pytest.raises(DataError, match=next(iter(options))):
            iter(open_data(meta, *model, PACKED, **options)).set_state(state)
    with open(meta.parent / "a.jsonl", "a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match="corpus was"):
        iter(open_data(meta, *model, PACKED)).set_state(state)


def test_problems_are_skipped_counted_and_told_once(meta, model):
    wrong = damage(meta.parent)
    told = []
    loader = open_data(meta, *model, PACKED, epochs=2, report=told.append)
    iterator = iter(loader)
    found = Counter(answer for batch in iterator for answer in answers(batch, model[1]))
    assert sorted(problem.location for problem in told) == sorted(f"{meta.parent}/a.jsonl:{n}" for n in wrong.values())
    assert loader.problems.counts == {"annotation": 2, "placeholders": 2, "image": 4}
    assert iterator.get_state()["problems"] == dict(loader.problems.counts)
    assert found == {**{f"a {n}": 2 for n in range(40) if n not in (2, 5, 7, 9)}, **{f"b {n}": 4 for n in range(10)}}


def test_problems_can_be_fatal(meta, model):
    damage(meta.parent)
    with pytest.raises(DataError, match=r"a\.jsonl:3: not JSON"):
        list(open_data(meta, *model, PACKED, shuffle=False, fatal=True))


def test_positions_among_problems(meta, model):
    damage(meta.parent)
    straight = iter(open_data(meta, *model, PACKED))
    batches = take(straight, 12)
    before = iter(open_data(meta, *model, PACKED))
    take(before, 7)
    after = iter(open_data(meta, *model, PACKED))
    after.set_state(before.get_state())
    assert_same(take(after, 5), batches[7:])
    assert after.get_state() == straight.get_state()


def test_data_of_which_nothing_can_be_used(tmp_path, model):
    (tmp_path / "a.jsonl").write_text("{}\n" * 5)
    with pytest.raises(DataError, match=r"none of 5 samples can be used; the last is .*a.jsonl:[1-5]: "):
        next(iter(open_data(tmp_path / "a.jsonl", *model, PACKED)))


def test_a_few_bad_samples_may_come_again_in_every_epoch(tmp_path, model):
    """Only a whole epoch without a usable sample ends the run, not as many problems over the epochs."""
    write_data(tmp_path, 4, every_other_image=False)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("{}\n")
    loader = open_data(tmp_path / "a.jsonl", *model, PACKED, epochs=8)
    found = Counter(answer for batch in loader for answer in answers(batch, model[1]))
    assert found == {f"a {number}": 8 for number in range(4)}
    assert sum(loader.problems.counts.values()) == 8


def test_worker_processes_give_the_same_batches_and_positions(meta, model):
    damage(meta.parent)
    alone = iter(open_data(meta, *model, PACKED))
    batches = take(alone, 8)
    loader = open_data(meta, *model, PACKED, workers=2)
    several = iter(loader)
    assert_same(take(several, 5), batches[:5])
    state = several.get_state()
    several.close()
    again = iter(open_data(meta, *model, PACKED))
    again.set_state(state)
    assert_same(take(again, 3), batches[5:])
    assert again.get_state() == alone.get_state()
