"""From image files to pixel arrays, bit for bit as the reference makes them. numpy and PIL only."""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from PIL import ExifTags, Image, ImageFile

from internvl_jax.config import ChatConfig, ConfigError, find_vision_tower
from internvl_jax.processing.resampling import pad_and_resize, resize_and_crop
from internvl_jax.utils import files
from internvl_jax.utils.files import read_json_object

logger = logging.getLogger(__name__)

# PIL's own limit against decompression bombs, above which it refuses: an image of 20,000 x 8,900 pixels.
MAX_PIXELS = 2 * 89_478_485
MAX_SIDE = 1 << 23  # to resize a side, PIL makes a table of 32 bytes for each of its pixels
MAX_BYTES = 1 << 30  # of a file that has to be held in memory

_BLOCK = 1 << 20  # pixels that are converted at once

IMAGE_MODES = ("eval", "native")

# EXIF's orientation -> what turns the image upright; 1 is upright.
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image that cannot be used; the message says which and why."""


def load_image(
    source: str | Path | bytes | Image.Image | np.ndarray, *, honour_exif: bool, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Open an image completely, in the mode that its file has; of an animation the first frame.

    source: a path, the bytes of a file, a PIL image, or an array [H,W], [H,W,1], [H,W,3] or [H,W,4] of uint8.
    honour_exif: turn it upright as its EXIF orientation says (the reference does not).
    Nothing here touches settings of the process: images are read in threads.
    Raises ImageError for what is missing, unreadable, truncated, empty or larger than `max_pixels` or than memory.
    """
    with _memory_for("the image"):
        return _load(source, honour_exif, max_pixels)


def read_once(source: str | Path) -> Path | bytes:
    """The path of a file, or the bytes of what can be read a single time, as a pipe can.

    Raises ImageError for a pipe of more than MAX_BYTES. A file that cannot be opened is left to `load_image`.
    """
    path = Path(source)
    try:
        with path.expanduser().open("rb") as file:
            return path if file.seekable() else _whole(file, str(source))
    except ImageError:
        raise
    except (OSError, ValueError, RuntimeError):
        return path


@contextmanager
def _memory_for(what: str) -> Iterator[None]:
    """An image that memory has no room for is that image's error, not the end of all others'."""
    try:
        yield
    except MemoryError:
        raise ImageError(f"{what} takes more memory than there is: scale it down first") from None


def _load(source: Any, honour_exif: bool, max_pixels: int) -> Image.Image:
    if isinstance(source, Image.Image):
        return _decode(source, "the PIL image", honour_exif, max_pixels)
    if isinstance(source, np.ndarray):
        return _decode(_from_array(source), "the array", honour_exif, max_pixels)
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), f"the image of {len(source)} bytes", honour_exif, max_pixels)
    if not isinstance(source, (str, Path)):
        raise ImageError(f"an image must be a path, bytes, a PIL image or an array, not {type(source).__name__}")
    name = str(source)
    name = name if len(name) <= 300 else name[:300] + "..."
    if "://" in name or name.startswith("data:"):
        raise ImageError(f"{name} is a URL; nothing is fetched here: download it and pass the file")
    try:
        with Path(source).expanduser().open("rb") as file:
            # PIL jumps about in the file, which a pipe (/dev/stdin) does not allow.
            return _read(file if file.seekable() else io.BytesIO(_whole(file, name)), name, honour_exif, max_pixels)
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a directory, not an image") from None
    except OSError as error:
        raise ImageError(f"{name} cannot be read ({error.strerror or error})") from None
    except ImageError:
        raise
    except (ValueError, RuntimeError) as error:  # a NUL in the path; a home directory that nobody has
        raise ImageError(f"{name} is not a path ({error})") from None


def _whole(file: IO[bytes], name: str) -> bytes:
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ImageError(f"{name} gives more than {MAX_BYTES:,} bytes: write it to a file")
    return data


def _read(file: IO[bytes], name: str, honour_exif: bool, max_pixels: int) -> Image.Image:
    if not file.seek(0, io.SEEK_END):
        raise ImageError(f"{name} is empty: it has no bytes")
    try:
        image = _open(file)
    except Image.DecompressionBombError:
        raise ImageError(f"{name} has more than {max_pixels:,} pixels: scale it down first") from None
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(f"{name} is damaged ({error})") from None
    if image is None:
        file.seek(0)
        head = file.read(512)
        raise ImageError(
            (None if b"<svg" in head else files.wrong_download_in(head, name))
            or f"{name} is not an image in a format that can be read (PNG, JPEG, WebP, GIF, ...), or its beginning is "
            "damaged"
        )
    return _decode(image, name, honour_exif, max_pixels)


def _open(file: IO[bytes]) -> ImageFile.ImageFile | None:
    """What PIL.Image.open does without its opinion on size: it warns of a large image, and warnings can only be muted
    for the whole process. `_decode` looks at the size that the header gives. None: no format of PIL's."""
    file.seek(0)
    prefix = file.read(16)
    tried: set[str] = set()
    for prepare in (Image.preinit, Image.init):  # the common formats, then all
        prepare()
        for name in [name for name in Image.ID if name not in tried]:
            tried.add(name)
            factory, accept = Image.OPEN[name]
            try:
                accepted = accept is None or accept(prefix)
                if accepted and not isinstance(accepted, str):  # a text says what the format would need
                    file.seek(0)
                    return cast(ImageFile.ImageFile, factory(file, ""))
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue  # how a format says that the file is not its own
    return None


def _decode(image: Image.Image, name: str, honour_exif: bool, max_pixels: int) -> Image.Image:
    _check_size(image, name, max_pixels)
    try:
        _make_room(image)
        image.load()
    except MemoryError:
        raise
    except Image.DecompressionBombError:  # of an icon's file, whose header need not tell the truth
        raise ImageError(f"{name} has more than {max_pixels:,} pixels: scale it down first") from None
    except Exception as error:  # the decoders of the formats raise whatever they stumble over
        raise ImageError(f"{name} is damaged or truncated ({error})") from None
    _check_size(image, name, max_pixels)
    return _upright(image) if honour_exif else image


def _make_room(image: Image.Image) -> None:
    """PIL warns of a large TIFF a second time where it makes room for the pixels, which is made here."""
    size = getattr(image, "_tile_size", None)  # before it is turned
    if size is not None and size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or MAX_PIXELS):
        image.im = Image.new(image.mode, size).im


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is empty ({width} x {height} pixels)")
    if width * height > max_pixels:
        raise ImageError(f"{name} has {width} x {height} pixels, more than {max_pixels:,}: scale it down first")
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"{name} has {width} x {height} pixels, a side above {MAX_SIDE:,}: cut it into pieces")


def _upright(image: Image.Image) -> Image.Image:
    """Turned as the EXIF orientation says. EXIF data that cannot be read says nothing: the image is still good."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return image
    # PIL's exif_transpose also writes the EXIF data anew, which fails where another entry of it is odd.
    return image.transpose(ORIENTATIONS[orientation]) if orientation in ORIENTATIONS else image


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(
            f"an array must be uint8 [height, width] or [height, width, 3 or 4], not {array.dtype} {list(array.shape)}"
        )
    if 0 in array.shape:
        raise ImageError(f"the array is empty ({list(array.shape)})")
    return Image.fromarray(np.ascontiguousarray(array))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB as PIL does, except for grey of more than 8 bits, which PIL makes black or white.

    Whole numbers (modes I, I;16) and fractions (F) are scaled by the range that their largest value lies in:

    - fractions up to 1: 1 is white;
    - up to 255: 8 bits, as PIL has them;
    - whole numbers up to 4095: 12 bits, which files hold in 16. A 16-bit image that is darker than 6% everywhere
      becomes brighter by this, so a warning says once that it was done;
    - whole numbers up to 65535: 16 bits;
    - above: the largest value is white.

    Negative values and NaN are black; an image of nothing else than NaN and Inf is an ImageError.
    """
    if image.mode == "RGB":
        return image  # PIL would copy it
    image = _to_8_bits(image)
    if image.mode == "La":  # premultiplied grey, which PIL converts to LA only
        image = image.convert("LA")
    if "transparency" in image.info and image.mode in ("L", "P"):
        # It does not change the RGB values, but PIL warns where it is more than one colour.
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey as `to_rgb` scales it, in mode L; every other image as it is."""
    fractions = image.mode == "F"
    if not fractions and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    finite = np.isfinite(values)
    if not finite.any():
        raise ImageError(f"an image of {image.width} x {image.height} pixels has no finite value: all are NaN or Inf")
    highest = float(values.max(where=finite, initial=0))
    if not highest or (highest <= 255 and (not fractions or (highest > 1 and finite.all()))):
        return image
    bounds = (1, 255) if fractions else (4095, 65535)
    white = next((bound for bound in bounds if highest <= bound), highest)
    if white == 4095:
        _say_once("grey images of 16 bits without a value above 4095 are read as 12 bits, so that 4095 is white")
    grey = np.empty(values.shape, np.uint8)
    step = max(1, _BLOCK // image.width)
    for row in range(0, image.height, step):
        block = np.nan_to_num(values[row : row + step].astype(np.float64), nan=0, posinf=white, neginf=0)
        scaled = np.floor(block * 255 / white + (0.5 if white == 1 else 0))
        grey[row : row + step] = np.clip(scaled, 0, 255)
    return Image.fromarray(grey)


@cache
def _say_once(message: str) -> None:
    logger.warning("%s", message)


@dataclass(frozen=True)
class ImageProcessor:
    """Images to normalised arrays of one size. mean and std are per channel, on a scale of 0 to 1."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pad_to_square: bool = False
    center_crop: bool = False

    @classmethod
    def from_dir(
        cls,
        directory: str | Path,
        image_size: int | None = None,
        *,
        pad_to_square: bool = False,
        center_crop: bool = False,
    ) -> ImageProcessor:
        """Read preprocessor_config.json. Raises ImageError naming a setting that is not implemented.

        image_size: pixels per side that the model's config asks for; by default the processor's own `size`, which its
        centre crop must not cut.
        """
        path = Path(directory) / "preprocessor_config.json"
        values = read_json_object(path, ConfigError)
        for name in ("do_resize", "do_normalize", "do_rescale"):
            if not values.get(name, True):
                raise ImageError(f"{path} has {name} false, which is not implemented")
        if values.get("resample", 3) != 3:
            raise ImageError(f"{path} has resample {values['resample']}: only 3 (bicubic) is implemented")
        factor = values.get("rescale_factor", 1 / 255)
        if not isinstance(factor, float) or abs(factor - 1 / 255) > 1e-9:
            raise ImageError(f"{path} has rescale_factor {factor}: only 1/255 is implemented")
        mean, std = (_triple(values.get(name), f"{path} needs {name}") for name in ("image_mean", "image_std"))
        if min(std) <= 0:
            raise ImageError(f"{path} has image_std {list(std)}: an image cannot be divided by that")
        if image_size is None:
            image_size = _size(values.get("size"), f"{path} has no usable size")
            if values.get("do_center_crop") and values.get("crop_size") is not None:
                crop = _size(values["crop_size"], f"{path} has no usable crop_size")
                if crop != image_size:
                    raise ImageError(f"{path} crops {image_size} pixels to {crop}, which is not implemented")
        return cls(image_size, mean, std, pad_to_square=pad_to_square, center_crop=center_crop)

    def __call__(self, image: Image.Image, path: str = "eval") -> np.ndarray:
        """The pixel values of one image, [3,S,S] float32.

        path "eval": convert to RGB, then resize, as the reference's evaluation scripts do. "native": resize in the
        file's own mode, then convert, as its quick-start page does; the two differ where there is transparency or a
        palette (grey of 16 bits takes the first path always). The aspect ratio is not kept, unless `pad_to_square`
        fills up with the mean colour first, or `center_crop` has the shorter side resized and the longer one cut; only
        the first path does either.
        """
        if path not in IMAGE_MODES:
            raise ImageError(f"there is no image path {path!r}; there are {' and '.join(IMAGE_MODES)}")
        if path == "native" and (self.pad_to_square or self.center_crop):
            done = "padded to a square" if self.pad_to_square else "cropped"
            raise ImageError(f"images of this model are {done} in RGB: use the image path 'eval'")
        with _memory_for(f"an image of {image.width} x {image.height} pixels"):
            if path == "native":
                resized = to_rgb(_to_8_bits(image).resize((self.image_size, self.image_size)))
            else:
                resized = self.scaled(image)
        pixels = np.asarray(resized, np.float32) / np.float32(255)
        normalised = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(normalised.transpose(2, 0, 1))

    def scaled(self, image: Image.Image) -> Image.Image:
        """The image of the path "eval" in RGB, of its final size, not yet numbers. Scaled again, it stays so."""
        with _memory_for(f"an image of {image.width} x {image.height} pixels"):
            rgb = to_rgb(image)
            if self.pad_to_square:
                return pad_and_resize(rgb, tuple(int(value * 255) for value in self.mean), self.image_size)
            if self.center_crop:
                return resize_and_crop(rgb, self.image_size)
            return rgb.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)


def load_processor(directory: Path, config: ChatConfig, tower: Path | None = None) -> ImageProcessor | None:
    """The processor of a checkpoint's model; None where the model sees nothing, or its file is absent.

    preprocessor_config.json lies in the checkpoint's directory or, in LLaVA's layout, in its vision tower's: `tower`,
    or where `find_vision_tower` finds it.
    """
    if config.vision is None:
        return None
    places = (directory, find_vision_tower(directory, read_json_object(directory / "config.json", ConfigError), tower))
    place = next((place for place in places if place and (place / "preprocessor_config.json").exists()), None)
    if place is None:
        return None
    return ImageProcessor.from_dir(
        place, config.image_size, pad_to_square=config.pad_to_square, center_crop=config.center_crop
    )


def _triple(value: Any, complaint: str) -> tuple[float, float, float]:
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(v, (int, float)) for v in value):
        raise ImageError(f"{complaint}, a list of three numbers")
    first, second, third = map(float, value)
    return first, second, third


def _size(value: Any, complaint: str) -> int:
    sides = list(value.values()) if isinstance(value, dict) else [value]
    known = not isinstance(value, dict) or value.keys() in ({"height", "width"}, {"shortest_edge"})
    if not known or not all(isinstance(side, int) and side > 0 and side == sides[0] for side in sides):
        raise ImageError(f"{complaint} ({value}): a number, or one height and width, is needed")
    return sides[0]
