"""The image processor's settings."""

import json

import numpy as np
import pytest
from PIL import Image
from support.image_cases import CHAT, MEAN, STD, random_image

from internvl_jax.config import ConfigError
from internvl_jax.processing.images import ImageError, ImageProcessor
from internvl_jax.processing.resampling import expand_to_square

# The processor's settings.


def test_padding_to_a_square():
    color = (123, 116, 103)
    for width, height, left, top in [(5, 2, 0, 1), (2, 5, 1, 0), (4, 1, 0, 1)]:
        image = random_image("RGB", width, height)
        square = np.asarray(expand_to_square(image, color))
        side = max(width, height)
        assert square.shape == (side, side, 3)
        expected = np.full((side, side, 3), color, np.uint8)
        expected[top : top + height, left : left + width] = np.asarray(image)
        np.testing.assert_array_equal(square, expected)
    image = random_image("RGB", 6, 6)
    assert expand_to_square(image, color) is image


def test_a_padded_processor_pads_with_the_mean_color_and_has_one_path():
    processor = ImageProcessor(8, MEAN, STD, pad_to_square=True)
    image = Image.new("L", (8, 2), 255)
    pixels = processor(image)
    mean = (np.array([123, 116, 103]) / 255 - MEAN) / STD
    np.testing.assert_allclose(pixels[:, 0], np.repeat(mean[:, None], 8, axis=1), atol=1e-6)
    with pytest.raises(ImageError, match="use the image path 'eval'"):
        processor(image, "native")
    with pytest.raises(ImageError, match="there are eval and native"):
        processor(image, "quickstart")


def write_config(directory, without=(), **changes):
    values = json.loads((CHAT / "checkpoint" / "preprocessor_config.json").read_text()) | changes
    for name in without:
        del values[name]
    (directory / "preprocessor_config.json").write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize("size", [112, {"shortest_edge": 112}, {"height": 112, "width": 112}])
@pytest.mark.parametrize("crop", [112, {"height": 112, "width": 112}, None])
def test_forms_of_the_size(tmp_path, size, crop):
    processor = ImageProcessor.from_dir(write_config(tmp_path, size=size, crop_size=crop))
    assert processor == ImageProcessor(112, MEAN, STD)


@pytest.mark.parametrize(
    "size",
    [None, 0, -1, "112", 1.5, [112], {}, {"height": 112}, {"height": 112, "width": 111}, {"longest_edge": 112}]
    + [{"shortest_edge": [112]}],
)
def test_unusable_sizes_are_refused_unless_the_model_says_its_own(tmp_path, size):
    write_config(tmp_path, size=size)
    with pytest.raises(ImageError, match=r"preprocessor_config.json has no usable size"):
        ImageProcessor.from_dir(tmp_path)
    assert ImageProcessor.from_dir(tmp_path, 56).image_size == 56


def test_keys_that_may_be_missing(tmp_path):
    write_config(tmp_path, without=("do_resize", "do_normalize", "do_center_crop", "crop_size", "resample"))
    assert ImageProcessor.from_dir(tmp_path) == ImageProcessor(112, MEAN, STD)
    write_config(tmp_path, do_rescale=True, rescale_factor=0.00392156862745098, do_convert_rgb=True, resample=3)
    assert ImageProcessor.from_dir(tmp_path, pad_to_square=True) == ImageProcessor(112, MEAN, STD, pad_to_square=True)
    write_config(tmp_path, do_center_crop=False, crop_size=56)
    assert ImageProcessor.from_dir(tmp_path).image_size == 112


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"do_resize": False}, "do_resize false, which is not implemented"),
        ({"do_normalize": False}, "do_normalize false, which is not implemented"),
        ({"do_rescale": False}, "do_rescale false, which is not implemented"),
        ({"resample": 2}, r"resample 2: only 3 \(bicubic\)"),
        ({"resample": None}, "resample None"),
        ({"rescale_factor": 1.0}, "rescale_factor 1.0: only 1/255"),
        ({"rescale_factor": 0.00393}, "rescale_factor 0.00393: only 1/255"),
        ({"rescale_factor": None}, "rescale_factor None: only 1/255"),
        ({"image_mean": [0.5, 0.5]}, "needs image_mean, a list of three numbers"),
        ({"image_mean": 0.5}, "needs image_mean"),
        ({"image_std": ["a", "b", "c"]}, "needs image_std"),
        ({"image_std": [0.2, 0.0, 0.2]}, r"image_std \[0.2, 0.0, 0.2\]"),
        ({"crop_size": 56}, "crops 112 pixels to 56, which is not implemented"),
        ({"crop_size": "all"}, r"no usable crop_size \(all\)"),
        ({"without": ["image_mean"]}, "needs image_mean"),
        ({"without": ["image_std"]}, "needs image_std"),
        ({"without": ["size"]}, "no usable size"),
    ],
)
def test_settings_that_are_not_implemented_are_named(tmp_path, changes, complaint):
    write_config(tmp_path, **changes)
    with pytest.raises(ImageError, match=rf"preprocessor_config\.json .*{complaint}"):
        ImageProcessor.from_dir(tmp_path)


def test_a_missing_or_damaged_preprocessor_config(tmp_path):
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json does not exist"):
        ImageProcessor.from_dir(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": ')
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json is not readable JSON"):
        ImageProcessor.from_dir(tmp_path)
