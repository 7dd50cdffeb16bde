"""From picture files to pixel arrays, bit for bit as the reference makes them. numpy and PIL only."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from internvl_jax.config import ChatConfig, read_json, tower_directory

# PIL's own limit against decompression bombs, above which it refuses: a picture of 20,000 x 8,900 pixels.
MAX_PIXELS = 2 * 89_478_485

IMAGE_MODES = ("eval", "native")

# EXIF's orientation -> what turns the picture upright; 1 is upright.
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
        return _decode(source, "the PIL image", honour_exif, max_pixels)
    if isinstance(source, np.ndarray):
        return _decode(_from_array(source), "the array", honour_exif, max_pixels)
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), f"the picture of {len(source)} bytes", honour_exif, max_pixels)
    if not isinstance(source, (str, Path)):
        raise ImageError(f"a picture must be a path, bytes, a PIL image or an array, not {type(source).__name__}")
    name = str(source)
    name = name if len(name) <= 300 else name[:300] + "..."
    if "://" in name or name.startswith("data:"):
        raise ImageError(f"{name} is a URL; nothing is fetched here: download it and pass the file")
    try:
        with Path(source).expanduser().open("rb") as file:
            # PIL jumps about in the file, which a pipe (/dev/stdin) does not allow.
            return _read(file if file.seekable() else io.BytesIO(file.read()), name, honour_exif, max_pixels)
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a directory, not a picture") from None
    except OSError as error:
        raise ImageError(f"{name} cannot be read ({error.strerror or error})") from None
    except ImageError:
        raise
    except (ValueError, RuntimeError) as error:  # a NUL in the path; a home directory that nobody has
        raise ImageError(f"{name} is not a path ({error})") from None


def _read(file: IO[bytes], name: str, honour_exif: bool, max_pixels: int) -> Image.Image:
    if not file.seek(0, io.SEEK_END):
        raise ImageError(f"{name} is empty: it has no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(file)
    except Image.DecompressionBombError:
        raise ImageError(f"{name} has more than {max_pixels:,} pixels: scale it down first") from None
    except UnidentifiedImageError:
        raise ImageError(
            f"{name} is not a picture in a format that can be read (PNG, JPEG, WebP, GIF, ...), or its beginning is "
            "damaged"
        ) from None
    except Exception as error:
        raise ImageError(f"{name} is damaged ({error})") from None
    return _decode(image, name, honour_exif, max_pixels)


def _decode(image: Image.Image, name: str, honour_exif: bool, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is empty ({width} x {height} pixels)")
    if width * height > max_pixels:
        raise ImageError(f"{name} has {width} x {height} pixels, more than {max_pixels:,}: scale it down first")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
    except Exception as error:  # the decoders of the formats raise whatever they stumble over
        raise ImageError(f"{name} is damaged or truncated ({error})") from None
    return _upright(image) if honour_exif else image


def _upright(image: Image.Image) -> Image.Image:
    """Turned as the EXIF orientation says. EXIF data that cannot be read says nothing: the picture is still good."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
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
    """Convert to RGB as PIL does, except for 16-bit grey: PIL clips what is above 255 to white.

    Grey values (modes I, I;16) that go above 255 are read as 16-bit and scaled down; others are as PIL has them.
    """
    if image.mode == "RGB":
        return image  # PIL would copy it
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.size and values.max() > 255:
            image = Image.fromarray((np.clip(values, 0, 65535) // 257).astype(np.uint8))
    elif image.mode == "La":  # premultiplied grey, which PIL converts to LA only
        image = image.convert("LA")
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
    centre_crop: bool = False

    @classmethod
    def from_dir(
        cls,
        directory: str | Path,
        image_size: int | None = None,
        *,
        pad_to_square: bool = False,
        centre_crop: bool = False,
    ) -> ImageProcessor:
        """Read preprocessor_config.json. Raises ImageError naming a setting that is not implemented.

        image_size: pixels per side that the model's config asks for; by default the processor's own `size`, which its
        centre crop must not cut.
        """
        path = Path(directory) / "preprocessor_config.json"
        values = read_json(path)
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
            raise ImageError(f"{path} has image_std {list(std)}: a picture cannot be divided by that")
        if image_size is None:
            image_size = _size(values.get("size"), f"{path} has no usable size")
            if values.get("do_center_crop") and values.get("crop_size") is not None:
                crop = _size(values["crop_size"], f"{path} has no usable crop_size")
                if crop != image_size:
                    raise ImageError(f"{path} crops {image_size} pixels to {crop}, which is not implemented")
        return cls(image_size, mean, std, pad_to_square=pad_to_square, centre_crop=centre_crop)

    def __call__(self, image: Image.Image, path: str = "eval") -> np.ndarray:
        """The pixel values of one picture, [3,S,S] float32.

        path "eval": convert to RGB, then resize, as the reference's evaluation scripts do. "native": resize in the
        file's own mode, then convert, as its quick-start page does; the two differ where there is transparency or a
        palette (grey of 16 bits takes the first path always). The aspect ratio is not kept, unless `pad_to_square`
        fills up with the mean colour first, or `centre_crop` has the shorter side resized and the longer one cut; only
        the first path does either.
        """
        if path not in IMAGE_MODES:
            raise ImageError(f"there is no image path {path!r}; there are {' and '.join(IMAGE_MODES)}")
        if path == "native" and (self.pad_to_square or self.centre_crop):
            done = "padded to a square" if self.pad_to_square else "cropped"
            raise ImageError(f"pictures of this model are {done} in RGB: use the image path 'eval'")
        if path == "native" and not image.mode.startswith("I"):
            resized = to_rgb(image.resize((self.image_size, self.image_size)))
        else:
            resized = self.scaled(image)
        pixels = np.asarray(resized, np.float32) / np.float32(255)
        normalised = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(normalised.transpose(2, 0, 1))

    def scaled(self, image: Image.Image) -> Image.Image:
        """The picture of the path "eval" in RGB, of its final size, not yet numbers. Scaled again, it stays so."""
        rgb = to_rgb(image)
        if self.pad_to_square:
            rgb = expand_to_square(rgb, tuple(int(value * 255) for value in self.mean))
        if self.centre_crop:
            return _crop(rgb, self.image_size)
        return rgb.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)


def load_processor(directory: Path, config: ChatConfig) -> ImageProcessor | None:
    """The processor of a checkpoint's model; None where the model sees nothing, or its file is absent.

    preprocessor_config.json lies in the checkpoint's directory or, in LLaVA's layout, in its vision tower's.
    """
    if config.vision is None:
        return None
    places = (directory, tower_directory(directory, read_json(directory / "config.json")))
    place = next((place for place in places if place and (place / "preprocessor_config.json").exists()), None)
    if place is None:
        return None
    return ImageProcessor.from_dir(
        place, config.image_size, pad_to_square=config.pad_to_square, centre_crop=config.centre_crop
    )


def _crop(image: Image.Image, size: int) -> Image.Image:
    """The shorter side resized to `size`, the longer one in proportion; then the centre, as CLIPImageProcessor does."""
    width, height = image.size
    short = min(width, height)
    width, height = int(size * width / short), int(size * height / short)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def expand_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Centre a picture on a square of its longer side, filled with `colour`."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


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
