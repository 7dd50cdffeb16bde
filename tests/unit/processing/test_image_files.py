"""Image files that are large, thin, hostile, damaged or no images; warnings; pipes."""

import io
import os
import struct
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.image_cases import MEAN, STD, encoded, load, png_header, random_image

import checkpoints_convert
import internvl_jax
from internvl_jax.data.augment import augment
from internvl_jax.processing import images
from internvl_jax.processing.images import ImageError, ImageProcessor, read_once, to_rgb
from internvl_jax.utils import logs

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
pixels = processor(load_image({str(path)!r}, honor_exif=True))
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
image = load_image({str(path)!r}, honor_exif=True)
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
            ImageProcessor(28, MEAN, STD)(load(data, honor_exif=True))

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
        load(data, honor_exif=True)
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
            load(bytes(damaged), honor_exif=True, max_pixels=10**6)
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
        with pytest.raises(ImageError, match=r"/dev/zero gives more than 1\.00 kB"):
            images.read_whole(io.FileIO("/dev/zero"), "/dev/zero")
    finally:
        os.close(read_end)
