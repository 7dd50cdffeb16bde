"""Images: pixels against the golden bundles and transformers' processor, every mode of PIL, and bad files."""

import io
import json
import os
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from support.paths import DATA

import checkpoints_convert
import internvl_jax
from internvl_jax.config import ConfigError
from internvl_jax.data.augment import augment
from internvl_jax.processing import images
from internvl_jax.processing.images import ImageError, ImageProcessor, load_image, read_once, to_rgb
from internvl_jax.processing.resampling import expand_to_square
from internvl_jax.utils import logs

CHAT = DATA / "internvl_chat_v1_1"
GOLDENS = np.load(CHAT / "goldens.npz")
FILES = {
    name: CHAT / entry["file"] for name, entry in json.loads((CHAT / "goldens.json").read_text())["images"].items()
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_image(mode="RGB", width=37, height=23, seed=0):
    colours = Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 4), np.uint8))
    return colours if mode == "RGBA" else colours.convert("RGB").convert(mode)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def load(source, **options):
    return load_image(source, **{"honour_exif": False, **options})


def png_header(width, height):
    """A PNG that says how large it is and has hardly any pixels."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(100))
    parts = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


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


def test_every_grey_value_under_any_mean_and_std_equals_the_reference(reference):
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
def test_colour_spaces_of_files(mode, format):
    colour = Image.new("RGB", (16, 16), (200, 60, 30))
    image = load(encoded(colour.convert(mode), format, **({"quality": 100} if format == "JPEG" else {})))
    np.testing.assert_allclose(np.asarray(to_rgb(image)), np.asarray(colour), atol=4)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_deep_grey_is_scaled_down_and_not_clipped(dtype):
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


def test_deep_grey_that_only_uses_eight_bits_is_as_pil_has_it():
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
def test_grey_is_scaled_by_its_own_range(values, expected, monkeypatch):
    monkeypatch.setattr(images, "_BLOCK", 1)  # a row at once
    image = load(encoded(Image.fromarray(values[:, None]), "TIFF"))
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.repeat(np.asarray(expected)[:, None, None], 3, axis=2))
    processor = ImageProcessor(5, (0, 0, 0), (1, 1, 1))
    np.testing.assert_array_equal(processor(image), processor(image, "native"))


def test_an_image_without_a_finite_value_is_an_error():
    image = Image.fromarray(np.array([[np.nan, np.inf]], np.float32))
    with pytest.raises(ImageError, match="2 x 1 pixels has no finite value"):
        to_rgb(image)


def test_grey_that_is_taken_for_12_bits_is_told_of_once(logged):
    images._say_once.cache_clear()
    dark = Image.fromarray(np.full((2, 2), 4000, np.uint16))
    for image in (dark, dark, Image.fromarray(np.full((2, 2), 5000, np.uint16))):
        to_rgb(image)
    assert logged == ["grey images of 16 bits without a value above 4095 are read as 12 bits, so that 4095 is white"]


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
    image = load(path, honour_exif=True)
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
def test_exif_orientation_is_honoured_or_ignored(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(random_image("RGB", 24, 16), format, exif=exif)
    plain = Image.open(io.BytesIO(data))
    plain.load()  # a TIFF is turned by PIL itself, in the reference too
    np.testing.assert_array_equal(np.asarray(load(data)), np.asarray(plain))
    upright = ImageOps.exif_transpose(plain)
    np.testing.assert_array_equal(np.asarray(load(data, honour_exif=True)), np.asarray(upright))
    assert upright.size == ((16, 24) if orientation in (5, 6, 7, 8) else (24, 16))


def test_the_golden_phone_image_is_turned():
    image = load(FILES["exif_rot"])
    upright = load(FILES["exif_rot"], honour_exif=True)
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
    assert load(data, honour_exif=True).size == ((16, 24) if turned else (24, 16))


# Large, thin and hostile.


def test_a_very_wide_image_takes_bounded_memory(tmp_path):
    width, height = 20_000, 1_500
    path = tmp_path / "wide.jpg"
    Image.new("RGB", (width, height), (10, 200, 30)).save(path)
    code = f"""
import resource, sys
from internvl_jax.processing.images import ImageProcessor, load_image
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before = peak()
processor = ImageProcessor(448, {MEAN}, {STD})
pixels = processor(load_image({str(path)!r}, honour_exif=True))
assert pixels.shape == (3, 448, 448) and abs(pixels[1] - (200 / 255 - 0.456) / 0.224).max() < 0.02
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    # PIL holds RGB in 4 bytes per pixel; the image is there once.
    assert int(run.stdout) < 1.5 * 4 * width * height


def test_a_sliver():
    column = np.repeat(np.arange(200, dtype=np.uint8), 100)[:, None]
    pixels = ImageProcessor(56, (0, 0, 0), (1, 1, 1))(load(column))
    np.testing.assert_allclose(pixels[:, :, 0], np.broadcast_to(np.linspace(1.3, 197.7, 56) / 255, (3, 56)), atol=4e-3)
    assert np.ptp(pixels, axis=2).max() == 0


def test_bombs_are_refused_before_they_are_unpacked(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(60_000, 60_000))
    for source in (path, path.read_bytes()):
        with pytest.raises(ImageError, match="60000 x 60000 pixels, more than 178,956,970: scale it down first"):
            load(source)
    # Below PIL's own limit, above ours.
    with pytest.raises(ImageError, match=r"9000 x 9000 pixels, more than 1,000,000: scale it down first"):
        load(png_header(9000, 9000), max_pixels=1_000_000)
    with pytest.raises(ImageError, match="30 x 20 pixels, more than 599"):
        load(Image.new("L", (30, 20)), max_pixels=599)
    with pytest.raises(ImageError, match="30 x 20 pixels, more than 599"):
        load(np.zeros((20, 30), np.uint8), max_pixels=599)
    with pytest.raises(ImageError, match="30 x 20 pixels, more than 599"):
        load(encoded(Image.new("L", (30, 20))), max_pixels=599)
    growing = Image.new("L", (2, 2))  # as an icon whose header does not tell the truth
    growing.load = lambda: setattr(growing, "_size", (30, 20))
    with pytest.raises(ImageError, match="30 x 20 pixels, more than 599"):
        load(growing, max_pixels=599)
    assert load(Image.new("L", (30, 20)), max_pixels=600).size == (30, 20)


@pytest.mark.filterwarnings("ignore:Image was not the expected size:UserWarning")
def test_an_icon_that_is_larger_than_its_header_says():
    file = bytearray(encoded(random_image("RGB", 16, 16), "ICO"))
    inside = encoded(Image.new("L", (900, 700)))
    file[14:22] = struct.pack("<II", len(inside), 22)
    assert load(bytes(file[:22]) + inside).size == (900, 700)
    with pytest.raises(ImageError, match="900 x 700 pixels, more than 10,000"):
        load(bytes(file[:22]) + inside, max_pixels=10_000)
    with pytest.raises(ImageError, match="has more than 178,956,970 pixels"):
        load(bytes(file[:22]) + png_header(60_000, 60_000))


@pytest.mark.parametrize(("width", "height"), [(8_388_609, 1), (1, 8_388_609)])
def test_a_side_longer_than_pil_has_a_table_for(width, height):
    with pytest.raises(ImageError, match=f"{width} x {height} pixels, a side above 8,388,608: cut it into pieces"):
        load(png_header(width, height))


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_a_thin_image_takes_little_memory_in_every_layout(tmp_path, size):
    path = tmp_path / "thin.png"
    Image.new("RGB", size, (10, 200, 30)).save(path)
    code = f"""
import resource, sys
from internvl_jax.processing.images import ImageProcessor, load_image
from internvl_jax.data.augment import AUGMENTATIONS, augment
import numpy as np
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before = peak()
image = load_image({str(path)!r}, honour_exif=True)
for layout in ({{}}, {{"pad_to_square": True}}, {{"center_crop": True}}):
    processor = ImageProcessor(336, (0, 0, 0), (1, 1, 1), **layout)
    for path in ("eval", "native") if not layout else ("eval",):
        pixels = processor(image, path)
        assert pixels.shape == (3, 336, 336)
        assert abs(pixels[1] - 200 / 255).max() < 1e-6 or "pad_to_square" in layout
    for kind in AUGMENTATIONS:
        processor(augment(image, kind, np.random.default_rng(0)))
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(run.stdout) < 100e6  # 10.8 GB where the square is made


def test_an_image_without_room_in_memory_is_an_error_of_its_own(monkeypatch):
    def full(*args, **kwargs):
        raise MemoryError

    image = random_image()
    processors = [ImageProcessor(8, MEAN, STD), ImageProcessor(8, MEAN, STD, pad_to_square=True)]
    data = encoded(image)
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "resize", full)
        for processor in processors:
            for do in (processor, processor.scaled):
                with pytest.raises(ImageError, match="37 x 23 pixels takes more memory than there is"):
                    do(image)
    monkeypatch.setattr(Image.Image, "load", full)
    with pytest.raises(ImageError, match="takes more memory than there is"):
        load(data)


# Warnings, which belong to the whole process.


def test_reading_images_in_threads_leaves_the_warnings_of_others_alone():
    data = encoded(random_image("RGB", 400, 400))

    def read():
        for _ in range(10):
            ImageProcessor(28, MEAN, STD)(load(data, honour_exif=True))

    with warnings.catch_warnings(record=True) as arrived:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        said = 0
        while any(thread.is_alive() for thread in threads):
            warnings.warn("the main thread has something to say", stacklevel=1)
            said += 1
        for thread in threads:
            thread.join()
        assert warnings.filters == before
    assert said > 3
    assert [str(item.message) for item in arrived] == ["the main thread has something to say"] * said


def test_no_module_mutes_warnings_for_a_while():
    """warnings.catch_warnings() is for the whole process, and some thread is always reading images."""
    packages = [Path(package.__file__).parent for package in (internvl_jax, checkpoints_convert)]
    sources = [path for package in packages for path in package.rglob("*.py")]
    assert len(sources) > 80
    assert [path for path in sources if "catch_warnings" in path.read_text(encoding="utf-8")] == []


def test_nothing_is_warned_of():
    palette = random_image("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in ("eval", "native"):
            ImageProcessor(28, MEAN, STD)(load(encoded(palette, transparency=bytes(range(256)))), path)
        with pytest.raises(ImageError, match="damaged or truncated"):
            load(png_header(12_000, 8_000))  # more than PIL warns of, fewer than are refused
        large = Image.new("L", (12_000, 8_000), 7)
        tiff = Image.new("1", large.size)
        tiff.putpixel((11_999, 7_999), 1)
        assert load(encoded(tiff, "TIFF")).getpixel((11_999, 7_999)) == 255
        ImageProcessor(28, MEAN, STD)(augment(to_rgb(load(large)), "crop", np.random.default_rng(0)))


def test_the_command_line_leaves_out_what_pil_says_of_metadata(capsys):
    data = encoded(random_image(), exif=b"MM\x00\x2a\x00\x00\x00\x08")
    with warnings.catch_warnings(), logs.to_terminal():
        warnings.simplefilter("always")
        load(data, honour_exif=True)
        warnings.warn("of somebody else", stacklevel=1)
    assert capsys.readouterr().err == "warning: of somebody else\n"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files_are_refused_by_name(tmp_path, format):
    data = encoded(random_image("RGB", 120, 90), format)
    path = tmp_path / f"cut.{format.lower()}"
    for share in (0.1, 0.5, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ImageError, match=rf"cut\.{format.lower()} .*(damaged|truncated)"):
            load(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "DDS"])
def test_damaged_files_are_read_or_refused(format):
    """Whatever a decoder stumbles over, the caller sees an ImageError."""
    exif = Image.Exif()
    exif[0x0112] = 6
    try:
        data = encoded(random_image(), format, **({} if format in ("GIF", "DDS") else {"exif": exif}))
    except (KeyError, OSError) as error:
        pytest.skip(f"this Pillow writes no {format}: {error}")
    rng = np.random.RandomState(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(4):
            damaged[rng.randint(min(len(data), 400))] = rng.randint(256)
        try:
            load(bytes(damaged), honour_exif=True, max_pixels=10**6)
        except ImageError:
            refused += 1
    assert refused


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("a picture says more than a thousand words")
    for name, complaint in [
        ("empty.png", "empty: it has no bytes"),
        ("text.jpg", "not an image in a format that can be read"),
        ("missing.png", "does not exist"),
        ("text.jpg/inside.png", "cannot be read"),
        ("", "is a directory, not an image"),
        ("nul\0.png", "is not a path"),
        ("long" * 2000, r"\.\.\. cannot be read"),
    ]:
        for source in (tmp_path / name, str(tmp_path / name)):
            with pytest.raises(ImageError, match=complaint) as caught:
                load(source)
            assert str(tmp_path) in str(caught.value)
            assert len(str(caught.value)) < 600
    for source in ("https://example.com/cat.png", "file:///cat.png", "data:image/png;base64,iVBORw0KGgo="):
        with pytest.raises(ImageError, match="is a URL; nothing is fetched here: download it and pass the file"):
            load(source)
    with pytest.raises(ImageError, match="is not a path"):
        load("~nobody-has-this-name/cat.png")
    with pytest.raises(ImageError, match="empty: it has no bytes"):
        load(b"")
    for source in (None, 7, [1, 2], io.BytesIO(b"")):
        with pytest.raises(ImageError, match=f"not {type(source).__name__}"):
            load(source)


def test_what_came_instead_of_an_image_is_told(tmp_path):
    """Data sets are cloned without git-lfs, and downloads answered with a page. An SVG is neither."""
    path = tmp_path / "image.png"
    for text, complaint in [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "is a git-lfs pointer, not the file"),
        ("\n<!DOCTYPE html><html>Not found", "is a web page, not the file"),
        ('<?xml version="1.0"?>\n<svg/>', "is not an image in a format that can be read"),
    ]:
        path.write_text(text)
        with pytest.raises(ImageError, match=f"^{path} {complaint}"):
            load(path)
        with pytest.raises(ImageError, match=complaint):
            load(text.encode())


def test_sources_that_are_one_image(tmp_path, monkeypatch):
    image = random_image()
    data = encoded(image)
    (tmp_path / "image.png").write_bytes(data)
    monkeypatch.setenv("HOME", str(tmp_path))
    sources = [tmp_path / "image.png", str(tmp_path / "image.png"), "~/image.png", data, image, np.asarray(image)]
    for source in sources:
        np.testing.assert_array_equal(np.asarray(load(source)), np.asarray(image))


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="this system names no open files")
def test_an_image_from_a_pipe():
    image = random_image()
    read_end, write_end = os.pipe()
    os.write(write_end, encoded(image))
    os.close(write_end)
    try:
        np.testing.assert_array_equal(np.asarray(load(f"/dev/fd/{read_end}")), np.asarray(image))
    finally:
        os.close(read_end)


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="this system names no open files")
def test_a_pipe_is_read_once_and_a_file_stays_a_path(tmp_path, monkeypatch):
    image = random_image()
    data = encoded(image)
    read_end, write_end = os.pipe()
    os.write(write_end, data)
    os.close(write_end)
    try:
        assert read_once(Path(f"/dev/fd/{read_end}")) == data
        (tmp_path / "image.png").write_bytes(data)
        assert read_once(tmp_path / "image.png") == tmp_path / "image.png"
        for missing in ("missing.png", "nul\0.png", "~nobody-has-this-name/cat.png"):
            assert read_once(missing) == Path(missing)
        monkeypatch.setattr(images, "MAX_BYTES", 1000)
        with pytest.raises(ImageError, match="/dev/zero gives more than 1,000 bytes"):
            images._whole(io.FileIO("/dev/zero"), "/dev/zero")
    finally:
        os.close(read_end)


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


# The processor's settings.


def test_padding_to_a_square():
    colour = (123, 116, 103)
    for width, height, left, top in [(5, 2, 0, 1), (2, 5, 1, 0), (4, 1, 0, 1)]:
        image = random_image("RGB", width, height)
        square = np.asarray(expand_to_square(image, colour))
        side = max(width, height)
        assert square.shape == (side, side, 3)
        expected = np.full((side, side, 3), colour, np.uint8)
        expected[top : top + height, left : left + width] = np.asarray(image)
        np.testing.assert_array_equal(square, expected)
    image = random_image("RGB", 6, 6)
    assert expand_to_square(image, colour) is image


def test_a_padded_processor_pads_with_the_mean_colour_and_has_one_path():
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
