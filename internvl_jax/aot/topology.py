"""TPU generations: published figures, slice names, and device descriptions for ahead-of-time compilation.

Figures per chip are from Google's pages docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} (August 2026). The usable
HBM is what libtpu's compiler states when a program does not fit; the rest of the chip's memory is reserved. Clock rates
are from Jouppi et al., "TPU v4" (2023), and from Austin et al., "How to Scale Your Model" (2025), part 2; that
of other generations is not published.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One TPU generation. Figures are per chip.

    Attributes:
        name: Name of the generation, for example "v5e".
        bf16_flops: Peak bfloat16 FLOP/s.
        int8_ops: Peak int8 operations/s.
        hbm_bytes: Usable HBM, as the compiler reports it.
        hbm_bandwidth: HBM bandwidth in bytes/s.
        link_bandwidth: Bandwidth of one direction of one ICI link in bytes/s.
        dimensions: Dimensions of the interconnect.
        devices: JAX devices per chip.
        cores_in_name: Cores per chip that the N of "v5p-N" counts.
        smallest: Chips of the smallest slice.
        chip_config: Compiler configuration; v4 runs both cores of a chip as one device.
        clock_rate: Cycles per second, or None where it is not published.
    """

    name: str
    bf16_flops: float
    int8_ops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    dimensions: int
    devices: int = 1
    cores_in_name: int = 1
    smallest: int = 1
    chip_config: str | None = None
    clock_rate: float | None = None

    @property
    def full_torus(self) -> int:
        """Number of chips along a dimension at which wraparound links close it to a ring."""
        return 16 if self.dimensions == 2 else 4


CHIPS = {
    chip.name: chip
    for chip in (
        # link_bandwidth is the bidirectional ICI bandwidth per chip over links and directions: 2400 Gbps / 6,
        # 400 GB/s / 4, 1200 GB/s / 6, 800 GB/s / 4, 1200 GB/s / 6. v4 has no int8 figure (its page: bf16 or int8, 275),
        # TPU7x none but fp8.
        Chip("v4", 275e12, 275e12, int(30.75 * GIB), 1228e9, 50e9, 3, 1, 2, 4, "megacore", clock_rate=1.05e9),
        Chip("v5e", 197e12, 393e12, int(15.75 * GIB), 819e9, 50e9, 2, clock_rate=1.5e9),
        Chip("v5p", 459e12, 918e12, int(95.74 * GIB), 2765e9, 100e9, 3, 1, 2, 4),
        Chip("v6e", 918e12, 1836e12, int(31.25 * GIB), 1638e9, 100e9, 2),
        Chip("tpu7x", 2307e12, 2307e12, int(189.5 * GIB), 7380e9, 100e9, 3, 2, 2, 4),
    )
}
# The two dies of a TPU7x chip are linked "six times faster than a 1D ICI link" (its page).
DIE_TO_DIE = 6
# A hop over an ICI link takes at least about 1 us, however little is sent (Austin et al., part 3, which measured 8 us
# for an all-gather of three hops).
HOP_SECONDS = 1e-6

_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e", "v7x": "tpu7x", "7x": "tpu7x", "ironwood": "tpu7x"}
_SHAPES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
}


class TopologyError(ValueError):
    """The slice does not exist; the message lists those that do."""


class Link(NamedTuple):
    """One direction of a link: from the chip at `coords` to the next along `dim`, up (1) or down (-1)."""

    coords: tuple[int, ...]
    dim: int
    sign: int


@dataclass(frozen=True)
class Topology:
    """A slice: the generation and the number of chips along each dimension."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """Name as the compiler writes it, for example "v5e:2x4"."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def slice_name(self) -> str:
        """Name as Cloud TPU writes it, for example "v5e-8" or, counting cores, "v5p-8" for four chips."""
        return f"{self.chip.name}-{self.chips * self.chip.cores_in_name}"

    def links(self, coords: Iterable[Sequence[int]]) -> float:
        """Return the number of links within a group of chips that the chip with the fewest has; 0 for one chip.

        A dimension contributes one link (a chip at its end has no more), or two where it is closed to a ring. Chips
        that lie apart share the links between them with the groups of the chips there, and have a part of each.

        Args:
            coords: Coordinates of the chips in the slice.
        """
        total: float = 0
        for dim, positions in enumerate(map(set, zip(*coords))):
            if dim < len(self.shape) and len(positions) > 1:
                extent = max(positions) - min(positions) + 1
                gap = (extent - 1) // (len(positions) - 1)
                ring = self._is_ring(dim) and len(positions) * gap == self.shape[dim]
                total += (2 if ring else 1) / gap
        return total

    def hops(self, coords: Iterable[Sequence[int]]) -> int:
        """Return the number of links between the two chips of a group that are farthest apart.

        Args:
            coords: Coordinates of the chips in the slice.
        """
        total = 0
        for dim, positions in enumerate(map(set, zip(*coords))):
            if dim < len(self.shape):  # coordinates always have three
                extent = max(positions) - min(positions)
                total += min(extent, self.shape[dim] // 2) if self._is_ring(dim) else extent
        return total

    def route(self, source: Sequence[int], target: Sequence[int]) -> list[Link]:
        """Return the links from one chip to another: along one dimension after the other, each the shorter way."""
        links, at = [], list(source)
        for dim, size in enumerate(self.shape):
            steps = target[dim] - source[dim]
            if self._is_ring(dim) and 2 * abs(steps) > size:
                steps -= size if steps > 0 else -size
            sign = 1 if steps > 0 else -1
            for _ in range(abs(steps)):
                links.append(Link(tuple(at), dim, sign))
                at[dim] = (at[dim] + sign) % size
        return links

    def _is_ring(self, dim: int) -> bool:
        """Whether wraparound links close a dimension. Of a 3D slice below a cube of 4x4x4 they close none."""
        sizes = self.shape if self.chip.dimensions == 3 else self.shape[dim : dim + 1]
        return all(size % self.chip.full_torus == 0 for size in sizes)

    def devices(self) -> list[Any]:
        """Return descriptions of the slice's devices, for which XLA compiles; `coords` has their coordinates.

        Raises:
            ImportError: libtpu is not installed.
            TopologyError: The compiler does not support the slice.
        """
        _configure_jax()
        from jax.experimental import topologies

        options: dict[str, Any] = {"chip_config_name": self.chip.chip_config} if self.chip.chip_config else {}
        if self.chips == 1:  # otherwise slices are multiples of a host's 2x2
            options["chips_per_host_bounds"] = [1, 1, 1]
        try:
            described = topologies.get_topology_desc(topology_name=self.name, platform="tpu", **options)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise TopologyError(
                f"the TPU compiler does not know the slice {self.name} ({reason}); {_slices_text(self.chip)}"
            ) from None
        return list(described.devices)


def _configure_jax() -> None:
    """Let jax compile for TPUs without looking for one. Must run before jax initializes its backends."""
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "compiling for TPUs needs libtpu, which is not installed: pip install 'internvl-jax[tpu]' (on Linux; it "
            "needs no TPU)"
        )
    # Do not query the metadata server, allow several processes with libtpu, and do not use a local TPU.
    settings = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    os.environ.update(settings)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    import jax

    jax.config.update("jax_platforms", "cpu")


def parse_topology(text: str) -> Topology:
    """Parse the name of a slice: "v5e-8", "v6e-1", "v5p-8" (8 cores, 4 chips), "tpu7x" or "v5e:2x4".

    A generation without a number is its smallest slice.

    Raises:
        TopologyError: There is no such slice; the message lists the names that exist.
    """
    match = re.fullmatch(r"([a-z0-9]+?)(?:-(\d+)|:(\d+(?:x\d+)*))?", text.strip().lower().removeprefix("tpu-"))
    generation = _ALIASES.get(match[1], match[1]) if match else ""
    if match is None or generation not in CHIPS:
        raise TopologyError(
            f"topology {text!r} is not known: write for example v5e-8, v6e-1, v5p-8 or v5e:2x4; generations are "
            f"{', '.join(CHIPS)}"
        )
    chip = CHIPS[generation]
    if match[3]:
        shape = tuple(int(size) for size in match[3].split("x"))
        if len(shape) != chip.dimensions or 0 in shape:
            raise TopologyError(
                f"a {chip.name} slice has {chip.dimensions} dimensions, not {match[3]}; {_slices_text(chip)}"
            )
        return Topology(chip, shape)
    number = int(match[2]) if match[2] else chip.smallest * chip.cores_in_name
    for topology in slices(chip):
        if topology.chips * chip.cores_in_name == number:
            return topology
    raise TopologyError(f"there is no slice {text!r}; {_slices_text(chip)}")


def slices(chip: Chip) -> list[Topology]:
    """Return the standard slices of a generation, smallest first."""
    return [Topology(chip, tuple(int(size) for size in shape.split("x"))) for shape in _SHAPES[chip.dimensions]]


def _slices_text(chip: Chip) -> str:
    """The slices of a generation, as a sentence for error messages."""
    names = ", ".join(f"{topology.slice_name} ({topology.name})" for topology in slices(chip))
    counts = f"; the number counts cores, {chip.cores_in_name} per chip" if chip.cores_in_name > 1 else ""
    return f"{chip.name} has {names}{counts}"
