"""From image files to pixel arrays, bit for bit as the reference makes them. numpy and PIL only."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from PIL import ExifTags, Image, ImageFile

from internvl_jax.config import ChatConfig, ConfigError, find_vision_tower
from internvl_jax.config.schema import MAX_TILES
from internvl_jax.processing.resampling import pad_and_resize, resize_and_crop
from internvl_jax.processing.tiling import Tiling, cut_tiles
from internvl_jax.utils import formats
from internvl_jax.utils.files import read_json_object, wrong_download_in
from internvl_jax.utils.logs import warn_once

# PIL's own limit against decompression bombs: an image of 20,000 x 8,900 pixels.
MAX_PIXELS = 2 * 89_478_485
MAX_SIDE = 1 << 23  # pixels; to resize a side, PIL needs a table of 32 bytes per pixel
MAX_BYTES = 1 << 30  # of a file that has to be held in memory

BLOCK_PIXELS = 1 << 20  # gray pixels that are scaled at once

IMAGE_MODES = ("eval", "native")

# EXIF orientation -> the transposition that turns the image upright; 1 is upright already.
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
    source: str | Path | bytes | Image.Image | np.ndarray, *, honor_exif: bool, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Read an image completely, in the mode of its file; the first frame of an animation.

    It may be called in threads: settings of the process (PIL's, or warnings) are left alone.

    Args:
        source: a path, the bytes of a file, a PIL image, or an array [H,W], [H,W,1], [H,W,3] or [H,W,4] of uint8.
        honor_exif: turn the image upright as its EXIF orientation says, which the reference does not.
        max_pixels: larger images are refused.

    Returns:
        The decoded image.

    Raises:
        ImageError: the image is missing, unreadable, truncated, empty, or larger than `max_pixels` or than memory.
    """
    with _memory_for("the image"):
        return _load(source, honor_exif, max_pixels)


def read_once(source: str | Path) -> Path | bytes:
    """Return the path of a file as it is, but read a source that can be read only once, such as a pipe.

    A file that cannot be opened is returned as its path, for `load_image` to report.

    Raises:
        ImageError: a pipe delivers more than MAX_BYTES.
    """
    path = Path(source)
    try:
        with path.expanduser().open("rb") as file:
            return path if file.seekable() else read_whole(file, str(source))
    except ImageError:
        raise
    except (OSError, ValueError, RuntimeError):
        return path


@contextmanager
def _memory_for(what: str) -> Iterator[None]:
    """Turn a MemoryError into an ImageError, so that one huge image does not end a run over many."""
    try:
        yield
    except MemoryError:
        raise ImageError(f"{what} takes more memory than there is: scale it down first") from None


def _load(source: Any, honor_exif: bool, max_pixels: int) -> Image.Image:
    if isinstance(source, Image.Image):
        return _decode(source, "the PIL image", honor_exif, max_pixels)
    if isinstance(source, np.ndarray):
        return _decode(_from_array(source), "the array", honor_exif, max_pixels)
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), f"the image of {len(source)} bytes", honor_exif, max_pixels)
    if not isinstance(source, (str, Path)):
        raise ImageError(f"an image must be a path, bytes, a PIL image or an array, not {type(source).__name__}")
    name = str(source)
    name = name if len(name) <= 300 else name[:300] + "..."
    if "://" in name or name.startswith("data:"):
        raise ImageError(f"{name} is a URL; nothing is fetched here: download it and pass the file")
    try:
        with Path(source).expanduser().open("rb") as file:
            # PIL seeks in the file, which a pipe (/dev/stdin) does not allow.
            return _read(file if file.seekable() else io.BytesIO(read_whole(file, name)), name, honor_exif, max_pixels)
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a directory, not an image") from None
    except OSError as error:
        raise ImageError(f"{name} cannot be read ({error.strerror or error})") from None
    except ImageError:
        raise
    except (ValueError, RuntimeError) as error:  # a NUL in the path, or an unknown user's home directory
        raise ImageError(f"{name} is not a path ({error})") from None


def read_whole(file: IO[bytes], name: str) -> bytes:
    """All bytes of an open file or pipe. Raises ImageError for more than MAX_BYTES."""
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ImageError(f"{name} gives more than {formats.disk(MAX_BYTES)}: write it to a file")
    return data


def _read(file: IO[bytes], name: str, honor_exif: bool, max_pixels: int) -> Image.Image:
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
            (None if b"<svg" in head else wrong_download_in(head, name))
            or f"{name} is not an image in a format that can be read (PNG, JPEG, WebP, GIF, ...), or its beginning is "
            "damaged"
        )
    return _decode(image, name, honor_exif, max_pixels)


def _open(file: IO[bytes]) -> ImageFile.ImageFile | None:
    """PIL.Image.open without its warning of large images, which could be muted only for the whole process.

    `_decode` checks the size that the header gives. Returns None where no format of PIL fits.
    """
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
                if accepted and not isinstance(accepted, str):  # a text names what PIL lacks for the format
                    file.seek(0)
                    return cast(ImageFile.ImageFile, factory(file, ""))
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue  # the file has another format
    return None


def _decode(image: Image.Image, name: str, honor_exif: bool, max_pixels: int) -> Image.Image:
    _check_size(image, name, max_pixels)
    try:
        _make_room(image)
        image.load()
    except MemoryError:
        raise
    except Image.DecompressionBombError:  # an icon's header may give a wrong size
        raise ImageError(f"{name} has more than {max_pixels:,} pixels: scale it down first") from None
    except Exception as error:  # decoders of damaged files raise anything
        raise ImageError(f"{name} is damaged or truncated ({error})") from None
    _check_size(image, name, max_pixels)
    return _upright(image) if honor_exif else image


def _make_room(image: Image.Image) -> None:
    """Allocate a large TIFF's pixels here, because PIL would warn of its size again when it does."""
    size = getattr(image, "_tile_size", None)  # before PIL transposes it
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
    """Apply the EXIF orientation. Unreadable EXIF data is ignored: the pixels are still good."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return image
    # PIL's exif_transpose also rewrites the EXIF data, which fails where another entry is malformed.
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
    """Convert to RGB as PIL does, except for gray of more than 8 bits, which PIL turns black or white.

    Integers (modes I, I;16) and floats (F) are scaled by the range of their largest value:

    - floats up to 1: 1 is white;
    - up to 255: 8 bits, as PIL reads them;
    - integers up to 4095: 12 bits, which files store in 16. This brightens a 16-bit image that is darker than 6%
      everywhere, so it is warned of once;
    - integers up to 65535: 16 bits;
    - above: the largest value is white.

    Negative values and NaN are black.

    Raises:
        ImageError: every value of the image is NaN or Inf.
    """
    if image.mode == "RGB":
        return image  # PIL would copy it
    image = _to_8_bits(image)
    if image.mode == "La":  # premultiplied gray, which PIL converts to LA only
        image = image.convert("LA")
    if "transparency" in image.info and image.mode in ("L", "P"):
        # It does not change the RGB values, but PIL warns where it is more than one color.
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Gray as `to_rgb` scales it, in mode L; any other image unchanged."""
    floats = image.mode == "F"
    if not floats and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    finite = np.isfinite(values)
    if not finite.any():
        raise ImageError(f"an image of {image.width} x {image.height} pixels has no finite value: all are NaN or Inf")
    highest = float(values.max(where=finite, initial=0))
    if not highest or (highest <= 255 and (not floats or (highest > 1 and finite.all()))):
        return image
    bounds = (1, 255) if floats else (4095, 65535)
    white = next((bound for bound in bounds if highest <= bound), highest)
    if white == 4095:
        warn_once("gray images of 16 bits without a value above 4095 are read as 12 bits, so that 4095 is white")
    gray = np.empty(values.shape, np.uint8)
    step = max(1, BLOCK_PIXELS // image.width)
    for row in range(0, image.height, step):
        block = np.nan_to_num(values[row : row + step].astype(np.float64), nan=0, posinf=white, neginf=0)
        scaled = np.floor(block * 255 / white + (0.5 if white == 1 else 0))
        gray[row : row + step] = np.clip(scaled, 0, 255)
    return Image.fromarray(gray)


@dataclass(frozen=True)
class ImageProcessor:
    """Converts images to normalized arrays of one size.

    Attributes:
        image_size: side of the result, S, in pixels.
        mean: mean of each channel, on a scale of 0 to 1.
        std: standard deviation of each channel, on the same scale.
        pad_to_square: pad to a square with the mean color before resizing.
        center_crop: resize the shorter side and crop the longer one, instead of changing the aspect ratio.
        tiling: cut images into tiles of `image_size`; None: every image is one.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pad_to_square: bool = False
    center_crop: bool = False
    tiling: Tiling | None = None

    @classmethod
    def from_dir(
        cls,
        directory: str | Path,
        image_size: int | None = None,
        *,
        pad_to_square: bool = False,
        center_crop: bool = False,
        tiling: Tiling | None = None,
    ) -> ImageProcessor:
        """Read preprocessor_config.json.

        Args:
            directory: where the file is.
            image_size: the side in pixels that the model's configuration asks for; None: the file's own `size`, which
                its center crop must not reduce.
            pad_to_square: as the attribute.
            center_crop: as the attribute.
            tiling: as the attribute.

        Returns:
            The processor.

        Raises:
            ImageError: the file has a setting that is not implemented.
            ConfigError: the file is missing or damaged.
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
        return cls(image_size, mean, std, pad_to_square, center_crop, tiling)

    def __call__(self, image: Image.Image, path: str = "eval") -> np.ndarray:
        """Compute the pixel values of one image.

        Args:
            image: an image in any mode.
            path: "eval" converts to RGB and then resizes, as the reference's evaluation scripts do. "native" resizes in
                the file's own mode and then converts, as its quick-start page does; it does not pad or crop. The two
                differ where there is transparency or a palette. 16-bit gray is always converted first.

        Returns:
            [3,S,S] float32.

        Raises:
            ImageError: the path is unknown or not available for this processor, or the image has no finite value.
        """
        if path not in IMAGE_MODES:
            raise ImageError(f"there is no image path {path!r}; there are {' and '.join(IMAGE_MODES)}")
        if path == "native" and (self.pad_to_square or self.center_crop):
            done = "padded to a square" if self.pad_to_square else "cropped"
            raise ImageError(f"images of this model are {done} in RGB: use the image path 'eval'")
        if self.tiling is not None:
            raise ImageError("images of this model are cut into tiles: use tiles() of its processor")
        with _memory_for(f"an image of {image.width} x {image.height} pixels"):
            if path == "native":
                resized = to_rgb(_to_8_bits(image).resize((self.image_size, self.image_size)))
            else:
                resized = self.scaled(image)
        return self._normalize(resized)

    def tiles(self, image: Image.Image, path: str = "eval", max_num: int | None = None) -> np.ndarray:
        """Compute the pixel values of one image's tiles.

        Args:
            image: an image in any mode.
            path: as for a call; only "eval" where images are cut into tiles.
            max_num: most tiles of this image's grid; None: as `tiling` says.

        Returns:
            [T,3,S,S] float32: one where images are not cut, else the grid row by row and then the thumbnail, if any.

        Raises:
            ImageError: as for a call, or there are no tiles to limit.
        """
        if self.tiling is None:
            if max_num is not None:
                raise ImageError("images of this model are not cut into tiles: leave out the limit")
            return self(image, path)[None]
        if path != "eval":
            raise ImageError("images of this model are cut into tiles in RGB: use the image path 'eval'")
        tiling = self.tiling
        if max_num is not None:
            if not 1 <= max_num <= MAX_TILES:
                raise ImageError(f"an image has 1 to {MAX_TILES} tiles, not {max_num}")
            tiling = replace(tiling, min_num=min(tiling.min_num, max_num), max_num=max_num)
        with _memory_for(f"an image of {image.width} x {image.height} pixels"):
            tiles = cut_tiles(to_rgb(image), self.image_size, tiling)
        return np.stack([self._normalize(tile) for tile in tiles])

    def _normalize(self, image: Image.Image) -> np.ndarray:
        """[3,H,W] float32 of an image in RGB."""
        pixels = np.asarray(image, np.float32) / np.float32(255)
        normalized = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(normalized.transpose(2, 0, 1))

    def scaled(self, image: Image.Image) -> Image.Image:
        """The image of path "eval" in RGB and final size, before normalization. Scaling it again changes nothing.

        An image that is cut into tiles keeps its size.
        """
        with _memory_for(f"an image of {image.width} x {image.height} pixels"):
            rgb = to_rgb(image)
            if self.tiling is not None:
                return rgb
            if self.pad_to_square:
                return pad_and_resize(rgb, tuple(int(value * 255) for value in self.mean), self.image_size)
            if self.center_crop:
                return resize_and_crop(rgb, self.image_size)
            return rgb.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)


def load_processor(directory: Path, config: ChatConfig, tower: Path | None = None) -> ImageProcessor | None:
    """Load the image processor of a checkpoint.

    Args:
        directory: the checkpoint's directory, which has preprocessor_config.json; in LLaVA's layout the vision tower's
            directory may have it instead.
        config: the model's configuration.
        tower: the vision tower's directory; None: where `find_vision_tower` finds it.

    Returns:
        The processor; None if the model has no vision tower or the file is absent.
    """
    if config.vision is None:
        return None
    places = (directory, find_vision_tower(directory, read_json_object(directory / "config.json", ConfigError), tower))
    place = next((place for place in places if place and (place / "preprocessor_config.json").exists()), None)
    if place is None:
        return None
    tiling = None
    if config.dynamic_image_size:
        tiling = Tiling(config.min_dynamic_patch, config.max_dynamic_patch, config.use_thumbnail)
    return ImageProcessor.from_dir(
        place,
        config.image_size,
        pad_to_square=config.pad_to_square,
        center_crop=config.center_crop,
        tiling=tiling,
    )


def _triple(value: Any, problem: str) -> tuple[float, float, float]:
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(v, (int, float)) for v in value):
        raise ImageError(f"{problem}, a list of three numbers")
    first, second, third = map(float, value)
    return first, second, third


def _size(value: Any, problem: str) -> int:
    sides = list(value.values()) if isinstance(value, dict) else [value]
    known = not isinstance(value, dict) or value.keys() in ({"height", "width"}, {"shortest_edge"})
    if not known or not all(isinstance(side, int) and side > 0 and side == sides[0] for side in sides):
        raise ImageError(f"{problem} ({value}): a number, or one height and width, is needed")
    return sides[0]
