"""Every token, label and image of the samples in a batch, once and in order, within its shapes."""

import jax
import numpy as np
import pytest

from internvl_jax.data.annotations import DataError
from internvl_jax.data.batch import IGNORED, Batch, pad_rows
from internvl_jax.data.packing import Layout, assemble, choose
from internvl_jax.data.samples import Sample

SIZE = 2


def make_sample(number, tokens, images=0):
    ids = 1000 * number + np.arange(tokens, dtype=np.int32)
    labels = np.where(np.arange(tokens) % 3 == 2, ids, IGNORED).astype(np.int32)
    pixels = np.full((images, 3, SIZE, SIZE), 0.5, np.float32) + 10 * number + np.arange(images)[:, None, None, None]
    return Sample(ids, labels, pixels.astype(np.float32), f"a:{number}", False)


def random_samples(count, longest, images=2, seed=0):
    rng = np.random.default_rng(seed)
    return [make_sample(n, rng.integers(3, longest + 1), rng.integers(0, images + 1)) for n in range(count)]


def batches_of(samples, layout):
    """As the loader makes them: read one, see whether there is a batch."""
    waiting = []
    for number in range(len(samples) + 1):
        last = number == len(samples)
        waiting += samples[number : number + 1]
        while (rows := choose(waiting, layout, last=last)) is not None:
            yield [[waiting[i] for i in row] for row in rows]
            taken = {i for row in rows for i in row}
            assert taken, "a batch of nothing"
            waiting = [sample for i, sample in enumerate(waiting) if i not in taken]
    assert not waiting


LAYOUTS = [
    Layout(rows=4, lengths=(32,), image_slots=8),
    Layout(rows=1, lengths=(32,), image_slots=2),
    Layout(rows=4, lengths=(32,), image_slots=3),
    Layout(rows=4, lengths=(8, 16, 32), image_slots=8, packed=False),
    Layout(rows=4, lengths=(32,), image_slots=2, packed=False),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("images", [0, 2])
def test_every_sample_is_whole_and_there_once(layout, images):
    samples = random_samples(300, 32, images)
    seen = []
    for rows in batches_of(samples, layout):
        batch = assemble(rows, layout, SIZE)
        assert batch.input_ids.shape in {(layout.rows, length) for length in layout.lengths}
        assert batch.pixel_values.shape == (layout.image_slots, 3, SIZE, SIZE)
        slot = 0
        for row, row_samples in enumerate(rows):
            segments = batch.segment_ids[row]
            assert segments.max() == len(row_samples) <= (layout.rows * 32 if layout.packed else 1)
            for number, sample in enumerate(row_samples, 1):
                here = segments == number
                assert np.array_equal(batch.input_ids[row][here], sample.input_ids)
                assert np.array_equal(batch.labels[row][here], sample.labels)
                assert np.array_equal(batch.positions[row][here], np.arange(here.sum()))
                assert np.all(np.diff(np.flatnonzero(here)) == 1)
                for pixels in sample.pixel_values:
                    assert np.array_equal(batch.pixel_values[slot], pixels)
                    slot += 1
                seen.append(sample.location)
        padding = batch.segment_ids == 0
        assert np.all(batch.labels[padding] == IGNORED)
        assert not batch.input_ids[padding].any()
        assert not batch.positions[padding].any()
        assert np.all(batch.image_index[padding] == -1)
        assert not batch.pixel_values[slot:].any()
    assert sorted(seen) == sorted(sample.location for sample in samples)


def test_packed_rows_are_full():
    layout = Layout(rows=8, lengths=(2048,), image_slots=64)
    batches = [assemble(rows, layout, SIZE) for rows in batches_of(random_samples(2000, 800, 1), layout)]
    filled = np.mean([np.mean(batch.segment_ids > 0) for batch in batches[:-3]])
    print(f"{filled:.1%} of packed rows are tokens")
    assert filled > 0.98


def test_samples_that_fit_exactly():
    """A bucket, a row and the image slots of a batch are used to the last place."""
    layout = Layout(rows=2, lengths=(8, 16), image_slots=2, packed=False)
    assert [layout.bucket(tokens) for tokens in (1, 7, 8, 9, 16)] == [8, 8, 8, 16, 16]
    assert choose([make_sample(0, 8, 1), make_sample(1, 9, 1), make_sample(2, 8, 1)], layout) == [[0], [2]]
    packed = Layout(rows=2, lengths=(16,), image_slots=2)
    samples = [make_sample(0, 16, 2), make_sample(1, 10), make_sample(2, 6), make_sample(3, 32)]
    assert choose(samples, packed) == [[0], [1, 2]]
    assert choose(samples[:3], packed) is None  # two batches' tokens are waited for
    assert choose([make_sample(n, 3, 1) for n in range(4)], packed) == [[0, 1], []]  # or their images
    assert choose([make_sample(n, 3, 1) for n in range(3)], packed) is None


def test_a_sample_waits_for_a_few_batches_at_most():
    layout = Layout(rows=2, lengths=(32,), image_slots=4)
    samples = random_samples(400, 32, 4)
    order = [int(sample.location[2:]) for rows in batches_of(samples, layout) for row in rows for sample in row]
    assert np.max(np.abs(np.asarray(order) - np.arange(len(order)))) < 40


def test_text_only_rows_stand_beside_others():
    layout = Layout(rows=3, lengths=(8,), image_slots=2, packed=False)
    rows = [[make_sample(1, 5)], [make_sample(2, 8, 1)], [make_sample(3, 4)]]
    batch = assemble(rows, layout, SIZE)
    assert batch.pixel_values[0].min() == 20.5
    assert not batch.pixel_values[1].any()
    assert [int(n) for n in (batch.segment_ids > 0).sum(axis=1)] == [5, 8, 4]


def test_a_supervised_first_token_is_not_predicted_from_the_sample_before():
    sample = Sample(np.arange(4, dtype=np.int32), np.arange(4, dtype=np.int32), np.zeros((0, 3, 2, 2)), "a:1", False)
    batch = assemble([[sample, sample]], Layout(1, (8,), 1), SIZE)
    assert batch.labels[0].tolist() == [IGNORED, 1, 2, 3, IGNORED, 1, 2, 3]


def test_image_tokens_are_numbered_over_the_rows():
    """Text and padding have no number, even padding whose id is the image token's."""
    ids = [np.asarray(row, np.int32) for row in ([5, 0, 0, 6], [0, 0, 7], [8, 9])]
    samples = [Sample(row, row, np.zeros((count, 3, SIZE, SIZE), np.float32), "a:1", False)
               for row, count in zip(ids, (1, 1, 0))]  # fmt: skip
    batch = assemble([[samples[0], samples[2]], [samples[1]]], Layout(3, (8,), 2), SIZE, image_token_id=0)
    assert batch.image_index.tolist() == [
        [-1, 0, 1, -1, -1, -1, -1, -1],
        [2, 3, -1, -1, -1, -1, -1, -1],
        [-1] * 8,
    ]
    assert batch.image_index.dtype == np.int32


def test_rows_are_padded_to_a_shape_that_processes_share():
    batch = assemble([[make_sample(1, 5, 1)]], Layout(2, (8,), 1), SIZE)
    padded = pad_rows(batch, 12)
    assert isinstance(padded, Batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(padded)} == {np.dtype(np.int32), np.dtype(np.float32)}
    for name in ("input_ids", "labels", "segment_ids", "positions", "image_index"):
        before, after = getattr(batch, name), getattr(padded, name)
        assert after.shape == (2, 12)
        assert np.array_equal(after[:, :8], before)
        assert np.all(after[:, 8:] == {"labels": IGNORED, "image_index": -1}.get(name, 0))
    with pytest.raises(ValueError, match="cannot be padded"):
        pad_rows(padded, 8)


@pytest.mark.parametrize(
    "values", [(0, (8,), 1), (1, (8,), 0), (1, (), 1), (1, (8, 8), 1), (1, (9, 8), 1), (1, (8, 9), 1), (1, (1,), 1)]
)
def test_layouts_that_there_are_not(values):
    with pytest.raises(DataError):
        Layout(*values)
