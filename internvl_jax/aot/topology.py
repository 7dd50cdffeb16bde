"""TPU generations: published figures, names of slices, and device descriptions for slices that this machine lacks.

Figures per chip are from Google's pages docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} (August 2026). The usable
HBM is what libtpu's compiler states when a program does not fit; the rest of the chip's memory is reserved.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One generation. FLOP/s and bytes/s per chip; `link_bandwidth` is one direction of one link to a neighbour."""

    name: str
    bf16_flops: float
    int8_ops: float
    hbm_bytes: int  # usable, as the compiler states it
    hbm_bandwidth: float
    link_bandwidth: float
    dimensions: int  # of the interconnect
    devices: int = 1  # that JAX sees per chip
    cores_in_name: int = 1  # what the N of "v5p-N" counts, per chip
    smallest: int = 1  # chips of the smallest slice
    chip_config: str | None = None  # v4: both cores of a chip as one device, as JAX runs it

    @property
    def full_torus(self) -> int:
        """Chips along a dimension from which on its ends are linked too."""
        return 16 if self.dimensions == 2 else 4


CHIPS = {
    chip.name: chip
    for chip in (
        # Bidirectional ICI per chip, over its links, over two directions: 2400 Gbps / 6, 400 GB/s / 4, 1200 GB/s / 6,
        # 800 GB/s / 4, 1200 GB/s / 6. v4 has no int8 figure (its page: bf16 or int8, 275), TPU7x none but fp8.
        Chip("v4", 275e12, 275e12, int(30.75 * GIB), 1228e9, 50e9, 3, 1, 2, 4, "megacore"),
        Chip("v5e", 197e12, 393e12, int(15.75 * GIB), 819e9, 50e9, 2),
        Chip("v5p", 459e12, 918e12, int(95.74 * GIB), 2765e9, 100e9, 3, 1, 2, 4),
        Chip("v6e", 918e12, 1836e12, int(31.25 * GIB), 1638e9, 100e9, 2),
        Chip("tpu7x", 2307e12, 2307e12, int(189.5 * GIB), 7380e9, 100e9, 3, 2, 2, 4),
    )
}
# The two dies of a TPU7x chip are linked "six times faster than a 1D ICI link" (its page).
DIE_TO_DIE = 6

_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e", "v7x": "tpu7x", "7x": "tpu7x", "ironwood": "tpu7x"}
_SHAPES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
}


class TopologyError(ValueError):
    """A slice that does not exist; the message lists those that do."""


@dataclass(frozen=True)
class Topology:
    """A slice: a chip and how many of them stand along each dimension."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """As the compiler names it, for example "v5e:2x4"."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def slice_name(self) -> str:
        """As people say it, for example "v5e-8" or, counting cores, "v5p-8" for four chips."""
        return f"{self.chip.name}-{self.chips * self.chip.cores_in_name}"

    def links(self, places: Iterable[Sequence[int]]) -> int:
        """Links to neighbours that the worst placed of these chips (their coordinates) has among them; 0 for one chip.

        A dimension gives one link (the chips at its ends have no more), two where it is closed to a ring.
        """
        total = 0
        for place, along in zip(zip(*places), self.shape):
            extent = max(place) - min(place) + 1
            closed = extent == along and along % self.chip.full_torus == 0 and self._torus
            total += 0 if extent == 1 else 2 if closed else 1
        return total

    @property
    def _torus(self) -> bool:
        # Three-dimensional slices below one cube of 4x4x4 have no ring at all.
        return self.chip.dimensions == 2 or all(n % self.chip.full_torus == 0 for n in self.shape)

    def devices(self) -> list[Any]:
        """Descriptions of the slice's devices, for which XLA compiles; their coordinates are in `coords`.

        Raises ImportError without libtpu, TopologyError where the compiler knows no such slice.
        """
        prepare()
        from jax.experimental import topologies

        options: dict[str, Any] = {"chip_config_name": self.chip.chip_config} if self.chip.chip_config else {}
        if self.chips == 1:  # otherwise slices are multiples of a host's 2x2
            options["chips_per_host_bounds"] = [1, 1, 1]
        try:
            described = topologies.get_topology_desc(topology_name=self.name, platform="tpu", **options)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise TopologyError(
                f"the TPU compiler does not know the slice {self.name} ({reason}); {legal(self.chip)}"
            ) from None
        return list(described.devices)


def prepare() -> None:
    """Make jax compile for TPUs without looking for one: call before anything touches jax's devices."""
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "compiling for TPUs needs libtpu, which is not installed: pip install 'internvl-jax[tpu]' (on Linux; it "
            "needs no TPU)"
        )
    # No metadata server, several reports at once, and the machine's own TPU, if it has one, left alone.
    settings = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    os.environ.update(settings)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    import jax

    jax.config.update("jax_platforms", "cpu")


def parse_topology(text: str) -> Topology:
    """Read the name of a slice: "v5e-8", "v6e-1", "v5p-8" (8 cores, 4 chips), "tpu7x" or "v5e:2x4".

    A bare generation is its smallest slice. Raises TopologyError listing the names that exist.
    """
    match = re.fullmatch(r"([a-z0-9]+?)(?:-(\d+)|:(\d+(?:x\d+)*))?", text.strip().lower().removeprefix("tpu-"))
    generation = _ALIASES.get(match[1], match[1]) if match else None
    if generation not in CHIPS:
        raise TopologyError(
            f"topology {text!r} is not known: write for example v5e-8, v6e-1, v5p-8 or v5e:2x4; generations are "
            f"{', '.join(CHIPS)}"
        )
    chip = CHIPS[generation]
    if match[3]:
        shape = tuple(int(size) for size in match[3].split("x"))
        if len(shape) != chip.dimensions or 0 in shape:
            raise TopologyError(f"a {chip.name} slice has {chip.dimensions} dimensions, not {match[3]}; {legal(chip)}")
        return Topology(chip, shape)
    number = int(match[2]) if match[2] else chip.smallest * chip.cores_in_name
    for topology in slices(chip):
        if topology.chips * chip.cores_in_name == number:
            return topology
    raise TopologyError(f"there is no slice {text!r}; {legal(chip)}")


def slices(chip: Chip) -> list[Topology]:
    """The usual slices of a generation, smallest first."""
    return [Topology(chip, tuple(int(size) for size in shape.split("x"))) for shape in _SHAPES[chip.dimensions]]


def legal(chip: Chip) -> str:
    """The slices of a generation, as a sentence."""
    names = ", ".join(f"{topology.slice_name} ({topology.name})" for topology in slices(chip))
    counts = f"; the number counts cores, {chip.cores_in_name} per chip" if chip.cores_in_name > 1 else ""
    return f"{chip.name} has {names}{counts}"
