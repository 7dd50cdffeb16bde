"""Batches and image slots that an estimate gives; test_train.py estimates from data."""

import pytest

from internvl_jax.data.estimate import EpochEstimate
from internvl_jax.data.packing import Layout


def test_image_slots_leave_a_tenth_over_the_mean_and_room_for_any_sample():
    one = EpochEstimate(1000, ((100, 1),) * 10, 500, ())
    assert one.image_slots(8, 1000, packed=True) in (88, 89)  # 80 samples, an image each; 1.1 is no exact number
    assert one.image_slots(8, 1000, packed=False) == 8  # 9 of one each cannot be in 8 rows
    few = EpochEstimate(1000, ((100, 0),) * 99 + ((100, 7),), 500, ())
    assert few.image_slots(2, 100, packed=True) == few.image_slots(2, 100, packed=False) == 7
    assert EpochEstimate(1000, ((100, 0),), 50, ()).image_slots(2, 100, packed=True) == 1


def test_batches_of_an_epoch_leave_out_what_cannot_be_used():
    found = EpochEstimate(1000, ((100, 1),) * 10, 500, (None,) * 10)
    assert (found.usable, found.tokens, found.images) == (0.5, 100, 1)
    assert found.batches(Layout(1, (100,), 1)) == pytest.approx(500)
    assert found.batches(Layout(1, (1000,), 10)) == pytest.approx(50)
