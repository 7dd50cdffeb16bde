"""Pixels against the golden bundles and transformers' processor, every mode of PIL, EXIF, arrays."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps
from support.image_cases import CHAT, FILES, GOLDENS, MEAN, STD, encoded, load, random_image
from support.paths import DATA

from internvl_jax.processing import images
from internvl_jax.processing.images import ImageError, ImageProcessor, to_rgb
from internvl_jax.utils import logs

# The golden arrays.


@pytest.mark.parametrize("name", ["rgb", "rgba", "gray", "palette", "exif_rot"])
@pytest.mark.parametrize(("path", "array"), [("eval", "eval"), ("native", "quickstart")])
def test_golden_pixels_bit_for_bit(name, path, array):
    processor = ImageProcessor.from_dir(CHAT / "checkpoint")
    pixels = processor(load(FILES[name]), path)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, GOLDENS[f"images/{name}/{array}"])


def test_golden_pixels_of_an_image_padded_to_a_square():
    processor = ImageProcessor.from_dir(CHAT / "checkpoint", pad_to_square=True)
    np.testing.assert_array_equal(processor(load(FILES["rgb"])), GOLDENS["images/rgb/eval_pad2square"])


@pytest.mark.parametrize(("row", "name"), [(0, "rgb.png"), (1, "exif_rot.jpg")])
def test_golden_pixels_of_the_bare_tower(row, name):
    bundle = DATA / "intern_vit"
    for layout in ("checkpoint_bin", "checkpoint_safetensors"):
        pixels = ImageProcessor.from_dir(bundle / layout)(load(bundle / "images" / name))
        np.testing.assert_array_equal(pixels, np.load(bundle / "goldens.npz")["pixel_values"][row])


# transformers' processor.


@pytest.fixture(scope="module")
def reference():
    """The reference's processor: the pixels of an image that already has the right size."""
    transformers = pytest.importorskip("transformers")
    names = ("CLIPImageProcessorPil", "CLIPImageProcessor")
    cls = next(getattr(transformers, name) for name in names if hasattr(transformers, name))

    def pixels(image, size, mean=MEAN, std=STD):
        processor = cls(size=size, crop_size=size, image_mean=list(mean), image_std=list(std))
        return np.asarray(processor(image, return_tensors="np")["pixel_values"])[0]

    return pixels


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "F"])
def test_every_mode_equals_the_reference(reference, mode):
    image = random_image("RGB").convert("L").convert(mode) if mode == "F" else random_image(mode)
    assert image.mode == mode
    processor = ImageProcessor(28, MEAN, STD)
    eval_way = image.convert("RGB").resize((28, 28), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(processor(image), reference(eval_way, 28))
    quick_start = image.resize((28, 28)).convert("RGB")
    np.testing.assert_array_equal(processor(image, "native"), reference(quick_start, 28))


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (28, 28), (27, 300), (500, 333)])
def test_every_size_equals_the_reference(reference, size):
    image = random_image("RGB", *size)
    resized = image.resize((28, 28), Image.Resampling.BICUBIC)
    for path in ("eval", "native"):
        np.testing.assert_array_equal(ImageProcessor(28, MEAN, STD)(image, path), reference(resized, 28))


def test_every_gray_value_under_any_mean_and_std_equals_the_reference(reference):
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    rng = np.random.RandomState(1)
    clip = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    triples = [(MEAN, STD), clip, ((0.5,) * 3, (0.5,) * 3)]
    triples += [(tuple(rng.rand(3)), tuple(rng.rand(3) + 0.01)) for _ in range(20)]
    for mean, std in triples:
        np.testing.assert_array_equal(ImageProcessor(16, mean, std)(image), reference(image, 16, mean, std))


# Modes and formats, from files.


def test_transparency_differs_between_the_paths_and_opaque_images_do_not():
    processor = ImageProcessor(28, MEAN, STD)
    see_through = load(encoded(random_image("RGBA")))
    assert see_through.mode == "RGBA"
    assert np.abs(processor(see_through) - processor(see_through, "native")).max() > 0.1
    for mode in ("RGB", "L"):
        opaque = load(encoded(random_image(mode)))
        np.testing.assert_array_equal(processor(opaque), processor(opaque, "native"))


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))])
def test_palettes_with_and_without_transparency(transparency):
    palette = random_image("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    options = {} if transparency is None else {"transparency": transparency}
    image = load(encoded(palette, **options))
    assert image.mode == "P"
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize(("mode", "format"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("LAB", "TIFF"), ("YCbCr", "JPEG")])
def test_color_spaces_of_files(mode, format):
    color = Image.new("RGB", (16, 16), (200, 60, 30))
    image = load(encoded(color.convert(mode), format, **({"quality": 100} if format == "JPEG" else {})))
    np.testing.assert_allclose(np.asarray(to_rgb(image)), np.asarray(color), atol=4)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_deep_gray_is_scaled_down_and_not_clipped(dtype):
    values = np.linspace(0, 65535, 64).round().astype(dtype).reshape(8, 8)
    image = load(encoded(Image.fromarray(values), "PNG" if dtype == np.uint16 else "TIFF"))
    assert image.mode in ("I;16", "I")
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.repeat((values // 257)[..., None], 3, axis=2))
    assert ImageProcessor(8, (0, 0, 0), (1, 1, 1))(image).max() == 1
    processor = ImageProcessor(5, (0, 0, 0), (1, 1, 1))
    np.testing.assert_array_equal(processor(image), processor(image, "native"))


def test_fractions_up_to_255_are_as_pil_has_them():
    values = np.array([[-3, 0.2, 1.5, 254.9]], np.float32)
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.fromarray(values)))[0, :, 0], [0, 0, 1, 254])


def test_deep_gray_that_only_uses_eight_bits_is_as_pil_has_it():
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    np.testing.assert_array_equal(np.asarray(to_rgb(load(encoded(Image.fromarray(values)))))[..., 0], values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 1000, 4095], np.uint16), [0, 62, 255]),  # 12 bits
        (np.array([0, 1000, 4095], np.int32), [0, 62, 255]),
        (np.array([0, 1000, 4096], np.uint16), [0, 3, 15]),  # 16 bits
        (np.array([-5, 70_000, 700_000], np.int32), [0, 25, 255]),
        (np.array([0, 0.5, 1], np.float32), [0, 128, 255]),
        (np.array([-1, 0.25, 0.5], np.float32), [0, 64, 128]),
        (np.array([0, 0.5, np.nan], np.float32), [0, 128, 0]),
        (np.array([np.nan, 100, np.inf], np.float32), [0, 100, 255]),
        (np.array([0, 500, 1000], np.float32), [0, 127, 255]),
        (np.zeros(3, np.float32), [0, 0, 0]),
    ],
)
def test_gray_is_scaled_by_its_own_range(values, expected, monkeypatch):
    monkeypatch.setattr(images, "BLOCK_PIXELS", 1)  # a row at once
    image = load(encoded(Image.fromarray(values[:, None]), "TIFF"))
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.repeat(np.asarray(expected)[:, None, None], 3, axis=2))
    processor = ImageProcessor(5, (0, 0, 0), (1, 1, 1))
    np.testing.assert_array_equal(processor(image), processor(image, "native"))


def test_an_image_without_a_finite_value_is_an_error():
    image = Image.fromarray(np.array([[np.nan, np.inf]], np.float32))
    with pytest.raises(ImageError, match="2 x 1 pixels has no finite value"):
        to_rgb(image)


def test_gray_that_is_taken_for_12_bits_is_told_of_once(logged):
    logs.warn_once.cache_clear()
    dark = Image.fromarray(np.full((2, 2), 4000, np.uint16))
    for image in (dark, dark, Image.fromarray(np.full((2, 2), 5000, np.uint16))):
        to_rgb(image)
    assert logged == ["gray images of 16 bits without a value above 4095 are read as 12 bits, so that 4095 is white"]


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I", "F", "La", "RGBa"])
def test_modes_that_only_memory_holds(mode):
    image = Image.new(mode, (9, 5))
    for path in ("eval", "native"):
        np.testing.assert_array_equal(
            ImageProcessor(14, (0, 0, 0), (1, 1, 1))(load(image), path), np.zeros((3, 14, 14))
        )


@pytest.mark.parametrize(
    ("format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {}), ("AVIF", {})]
)
def test_the_first_frame_of_an_animation_after_its_file_is_gone(tmp_path, format, options):
    red, blue = Image.new("RGB", (12, 8), (255, 0, 0)), Image.new("RGB", (12, 8), (0, 0, 255))
    path = tmp_path / "animation"
    try:
        red.save(path, format, save_all=True, append_images=[blue, red], duration=100, **options)
    except (KeyError, OSError) as error:
        pytest.skip(f"this Pillow writes no {format}: {error}")
    with Image.open(path) as animation:
        assert animation.n_frames == 3
    image = load(path, honor_exif=True)
    path.unlink()
    np.testing.assert_allclose(np.asarray(to_rgb(image)), np.asarray(red), atol=2)


def test_an_open_animation_keeps_the_callers_frame():
    red, blue = Image.new("RGB", (12, 8), (255, 0, 0)), Image.new("RGB", (12, 8), (0, 0, 255))
    image = Image.open(io.BytesIO(encoded(red, "GIF", save_all=True, append_images=[blue])))
    image.seek(1)
    np.testing.assert_array_equal(np.asarray(to_rgb(load(image))), np.asarray(blue))


# EXIF.


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_orientation_is_honored_or_ignored(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(random_image("RGB", 24, 16), format, exif=exif)
    plain = Image.open(io.BytesIO(data))
    plain.load()  # a TIFF is turned by PIL itself, in the reference too
    np.testing.assert_array_equal(np.asarray(load(data)), np.asarray(plain))
    upright = ImageOps.exif_transpose(plain)
    np.testing.assert_array_equal(np.asarray(load(data, honor_exif=True)), np.asarray(upright))
    assert upright.size == ((16, 24) if orientation in (5, 6, 7, 8) else (24, 16))


def test_the_golden_phone_image_is_turned():
    image = load(FILES["exif_rot"])
    upright = load(FILES["exif_rot"], honor_exif=True)
    assert (image.size, upright.size) == ((96, 140), (140, 96))
    np.testing.assert_array_equal(np.asarray(upright), np.rot90(np.asarray(image), -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@pytest.mark.parametrize(
    ("exif", "turned"),
    [
        # Orientation 6, and BitsPerSample as a fraction, which PIL can read and not write.
        (struct.pack(">2sHIH HHIHH HHII I II", b"MM", 42, 8, 2, 0x112, 3, 1, 6, 0, 0x102, 5, 1, 38, 0, 1, 2), True),
        (b"MM\x00\x2a\x00\x00\x00\x08", False),
        (b"not EXIF at all", False),
    ],
)
def test_damaged_exif_does_not_cost_the_image(exif, turned):
    data = encoded(random_image("RGB", 24, 16), exif=exif)
    assert load(data, honor_exif=True).size == ((16, 24) if turned else (24, 16))


# Arrays.


@pytest.mark.parametrize(
    ("shape", "mode"), [((5, 7), "L"), ((5, 7, 1), "L"), ((5, 7, 3), "RGB"), ((5, 7, 4), "RGBA"), ((1, 1), "L")]
)
def test_arrays(shape, mode):
    array = np.random.RandomState(0).randint(0, 256, shape, np.uint8)
    for layout in (array, np.asfortranarray(array), array[::-1, ::-1][::-1, ::-1]):
        image = load(layout)
        assert image.mode == mode
        np.testing.assert_array_equal(np.asarray(image), array.reshape(np.shape(image)))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((5, 7, 3), np.float32),
        np.zeros((5, 7, 3), np.float64),
        np.zeros((5, 7), np.uint16),
        np.zeros((5, 7), bool),
        np.zeros((5, 7, 3), np.int64),
        np.zeros((5, 7, 2), np.uint8),
        np.zeros((5, 7, 5), np.uint8),
        np.zeros((3, 5, 7), np.uint8),
        np.zeros((1, 5, 7, 3), np.uint8),
        np.zeros(7, np.uint8),
        np.zeros((), np.uint8),
        np.array([["a"]]),
    ],
)
def test_arrays_of_other_kinds_are_refused(array):
    with pytest.raises(ImageError, match=r"an array must be uint8 \[height, width\].*not " + str(array.dtype)):
        load(array)


@pytest.mark.parametrize("shape", [(0, 7), (5, 0, 3), (0, 0, 4), (0, 5, 1)])
def test_empty_images_are_refused(shape):
    with pytest.raises(ImageError, match="is empty"):
        load(np.zeros(shape, np.uint8))
    with pytest.raises(ImageError, match=r"the PIL image is empty \(0 x 5 pixels\)"):
        load(Image.new("RGB", (0, 5)))
