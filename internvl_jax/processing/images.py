"""From picture files to pixel arrays, bit for bit as the reference makes them. numpy and PIL only."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from internvl_jax.config import read_json

# PIL's own limit against decompression bombs, above which it refuses: a picture of 20,000 x 8,900 pixels.
MAX_PIXELS = 2 * 89_478_485

IMAGE_MODES = ("eval", "native")


class ImageError(ValueError):
    """A picture that cannot be used; the message says which and why."""


def load_image(
    source: str | Path | bytes | Image.Image | np.ndarray, *, honour_exif: bool, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Open a picture completely, in the mode that its file has; of an animation the first frame.

    source: a path, the bytes of a file, a PIL image, or an array [H,W], [H,W,1], [H,W,3] or [H,W,4] of uint8.
    honour_exif: turn it upright as its EXIF orientation says (the reference does not).
    Raises ImageError for what is missing, unreadable, truncated, empty or larger than `max_pixels`.
    """
    if isinstance(source, Image.Image):
        image, name = source, "the PIL image"
    elif isinstance(source, np.ndarray):
        image, name = _from_array(source), "the array"
    else:
        image, name = _open(source, max_pixels)
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is empty ({width} x {height} pixels)")
    if width * height > max_pixels:
        raise ImageError(f"{name} has {width} x {height} pixels, more than {max_pixels:,}: scale it down first")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            return ImageOps.exif_transpose(image) if honour_exif else image
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(f"{name} is damaged or truncated ({error})") from None


def _open(source: str | Path | bytes, max_pixels: int) -> tuple[Image.Image, str]:
    if isinstance(source, bytes):
        name, file = f"the picture of {len(source)} bytes", io.BytesIO(source)
    elif isinstance(source, (str, Path)):
        if "://" in str(source):
            raise ImageError(f"{source} is a URL; nothing is fetched here: download it and pass the file")
        path = Path(source).expanduser()
        name = str(path)
        if path.is_dir():
            raise ImageError(f"{name} is a directory, not a picture")
        try:
            # Read whole and closed at once: PIL would keep the file open until the picture is loaded.
            file = io.BytesIO(path.read_bytes())
        except FileNotFoundError:
            raise ImageError(f"{name} does not exist") from None
        except OSError as error:
            raise ImageError(f"{name} cannot be read ({error.strerror or error})") from None
    else:
        raise ImageError(f"a picture must be a path, bytes, a PIL image or an array, not {type(source).__name__}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(file), name
    except Image.DecompressionBombError:
        raise ImageError(f"{name} has more than {max_pixels:,} pixels: scale it down first") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not a picture in a format that can be read (PNG, JPEG, WebP, GIF, ...)") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{name} is damaged ({error})") from None


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
    """Convert to RGB as PIL does, but scale 16-bit grey down to 8 bits: PIL would clip it to white."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.size and values.max() > 255:
            image = Image.fromarray((np.clip(values, 0, 65535) // 257).astype(np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns of palettes with transparency; the reference drops it too
        return image.convert("RGB")


@dataclass(frozen=True)
class ImageProcessor:
    """Pictures to normalised arrays of one size. mean and std are per channel, on a scale of 0 to 1."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pad_to_square: bool = False

    @classmethod
    def from_dir(
        cls, directory: str | Path, image_size: int | None = None, *, pad_to_square: bool = False
    ) -> ImageProcessor:
        """Read preprocessor_config.json. Raises ImageError naming a setting that is not implemented.

        image_size: pixels per side that the model's config asks for; by default the processor's own.
        """
        path = Path(directory) / "preprocessor_config.json"
        values = read_json(path)
        for name in ("do_resize", "do_normalize", "do_rescale"):
            if not values.get(name, True):
                raise ImageError(f"{path} has {name} false, which is not implemented")
        if values.get("resample", 3) != 3:
            raise ImageError(f"{path} has resample {values['resample']}: only 3 (bicubic) is implemented")
        if abs(values.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
            raise ImageError(f"{path} has rescale_factor {values['rescale_factor']}: only 1/255 is implemented")
        triples = []
        for name in ("image_mean", "image_std"):
            triple = values.get(name)
            if not isinstance(triple, list) or len(triple) != 3 or not all(isinstance(v, (int, float)) for v in triple):
                raise ImageError(f"{path} needs {name}, a list of three numbers")
            triples.append(tuple(float(v) for v in triple))
        return cls(image_size or _size(values.get("size"), path), *triples, pad_to_square=pad_to_square)

    def __call__(self, image: Image.Image, path: str = "eval") -> np.ndarray:
        """The pixel values of one picture, [3,S,S] float32.

        path "eval": convert to RGB, then resize, as the reference's evaluation scripts do. "native": resize in the
        file's own mode, then convert, as its quick-start page does; the two differ where there is transparency or a
        palette. The aspect ratio is not kept, unless `pad_to_square` fills up with the mean colour first.
        """
        if path not in IMAGE_MODES:
            raise ImageError(f"there is no image path {path!r}; there are {' and '.join(IMAGE_MODES)}")
        size = (self.image_size, self.image_size)
        if path == "native" and not image.mode.startswith("I"):
            resized = to_rgb(image.resize(size))
        else:
            rgb = to_rgb(image)
            if self.pad_to_square:
                rgb = expand_to_square(rgb, tuple(int(value * 255) for value in self.mean))
            resized = rgb.resize(size, Image.Resampling.BICUBIC)
        pixels = np.asarray(resized, np.float32) / np.float32(255)
        normalised = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(normalised.transpose(2, 0, 1))


def expand_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Centre a picture on a square of its longer side, filled with `colour`."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _size(size: Any, path: Path) -> int:
    if isinstance(size, dict):
        sides = {size[key] for key in ("height", "width", "shortest_edge") if key in size}
        size = sides.pop() if len(sides) == 1 else None
    if not isinstance(size, int) or size < 1:
        raise ImageError(f"{path} has no usable size: a number, or one height and width, is needed")
    return size
