"""Boxes of answers: from thousandths to pixels, and drawn."""

import numpy as np
import pytest
from PIL import Image

from internvl_jax.processing.boxes import Box, draw_boxes, parse_boxes


def test_boxes_in_pixels_of_a_wide_image():
    text = "<ref>a dog</ref><box>[[250, 100, 500, 1000]]</box> <ref>两只猫</ref><box>[[0,0,10,20], [1, 2, 3, 4]]</box>"
    assert parse_boxes(text, 2000, 500) == [
        Box("a dog", 500, 50, 1000, 500),
        Box("两只猫", 0, 0, 20, 10),
        Box("两只猫", 2, 1, 6, 2),
    ]


def test_a_box_without_a_label():
    assert parse_boxes("Here: <box>[[0, 0, 1000, 1000]]</box>", 56, 112) == [Box("", 0, 0, 56, 112)]


@pytest.mark.parametrize("box", ["[500, 0, 400, 10]", "[0, 500, 10, 400]", "[0, 0, 1001, 10]", "[0, 0, 10, 1001]"])
def test_a_box_outside_the_image_is_left_out(box, caplog):
    text = f"<ref>a</ref><box>[{box}, [1, 2, 3, 4]]</box>"
    assert parse_boxes(text, 1000, 1000) == [Box("a", 1, 2, 3, 4)]
    assert f"the box {box} is not within the image" in caplog.text


@pytest.mark.parametrize("text", ["<box>[[1, 2, 3]]</box>", "<ref>a</ref><box>nothing</box>"])
def test_a_box_without_four_numbers_is_left_out(text, caplog):
    assert parse_boxes(text, 10, 10) == []
    assert "holds no box of four numbers" in caplog.text


def test_text_without_boxes(caplog):
    assert parse_boxes("a <ref>dog</ref> at [[1, 2, 3, 4]]", 10, 10) == []
    assert caplog.text == ""


def test_drawn_edges():
    image = Image.new("L", (200, 100), 255)
    drawn = draw_boxes(image, [Box("", 20, 10, 120, 60), Box("b", 150, 10, 190, 60)])
    changed = np.any(np.asarray(drawn) != 255, axis=-1)
    assert drawn.mode == "RGB"
    assert tuple(np.asarray(drawn)[10, 20]) == (255, 0, 0)
    assert tuple(np.asarray(drawn)[60, 190]) == (0, 255, 0)
    assert changed[10, 20:121].all()
    assert changed[10:61, 120].all()
    assert not changed[11:60, 21:120].any()
    assert np.asarray(image).min() == 255
