"""Dynamic tiling of InternVL 1.5 and later: an image becomes a grid of square tiles that suits its aspect ratio."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from PIL import Image


@dataclass(frozen=True)
class Tiling:
    """How many tiles an image may have.

    Attributes:
        min_num: fewest tiles of a grid.
        max_num: most tiles of a grid.
        thumbnail: whether the whole image, resized to one tile, follows a grid of several tiles.
    """

    min_num: int = 1
    max_num: int = 6
    thumbnail: bool = True


@lru_cache(maxsize=64)
def grids(min_num: int, max_num: int) -> tuple[tuple[int, int], ...]:
    """All grids (columns, rows) with `min_num` to `max_num` tiles, in the reference's order.

    They are sorted by their number of tiles; among equals the order is that of a set of tuples, which the reference
    sorts, and which decides between two grids that suit an image equally well.
    """
    found = {
        (columns, rows)
        for number in range(min_num, max_num + 1)
        for columns in range(1, number + 1)
        for rows in range(1, number + 1)
        if min_num <= columns * rows <= max_num
    }
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


def choose_grid(width: int, height: int, size: int, tiling: Tiling) -> tuple[int, int]:
    """The grid (columns, rows) whose aspect ratio is nearest to the image's.

    Of grids that are equally near, such as 2 x 1 and 4 x 2, a later one is taken if the image has more than half of its
    pixels.

    Args:
        width: of the image, in pixels.
        height: of the image.
        size: side of a tile.
        tiling: bounds of the number of tiles.
    """
    ratio, area = width / height, width * height
    best, distance = (1, 1), float("inf")
    for columns, rows in grids(tiling.min_num, tiling.max_num):
        away = abs(ratio - columns / rows)
        if away < distance or (away == distance and area > 0.5 * size * size * columns * rows):
            best, distance = (columns, rows), away
    return best


def num_tiles(width: int, height: int, size: int, tiling: Tiling) -> int:
    """How many tiles an image has, its thumbnail included."""
    columns, rows = choose_grid(width, height, size, tiling)
    return columns * rows + (tiling.thumbnail and columns * rows > 1)


def cut_tiles(image: Image.Image, size: int, tiling: Tiling) -> list[Image.Image]:
    """Cut an image into tiles, row by row; the thumbnail comes last.

    The image is resized once to the whole grid, without padding.

    Args:
        image: an image in RGB.
        size: side of a tile, in pixels.
        tiling: bounds of the number of tiles.
    """
    columns, rows = choose_grid(*image.size, size, tiling)
    whole = image.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
    tiles = [
        whole.crop((column * size, row * size, (column + 1) * size, (row + 1) * size))
        for row in range(rows)
        for column in range(columns)
    ]
    if tiling.thumbnail and len(tiles) > 1:
        tiles.append(image.resize((size, size), Image.Resampling.BICUBIC))
    return tiles
