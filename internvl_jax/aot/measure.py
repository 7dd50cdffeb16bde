"""A program compiled for a slice that is not here: its memory, arithmetic and communication, per chip."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from internvl_jax.aot import hlo
from internvl_jax.aot.topology import DIE_TO_DIE, GIB, Topology


@dataclass(frozen=True)
class Measured:
    """What the compiler says of a program. Figures are per chip; None: it does not fit, and more is not known."""

    memory: dict[str, Any]  # bytes: arguments, outputs, temporaries, aliased (outputs in arguments' buffers), peak
    flops: float | None
    collectives: list[dict[str, Any]]  # kind, count_per_layer, bytes_per_layer, count, bytes: of the results
    network_seconds: float | None
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return self.flops is not None


def compile_for(topology: Topology, mesh: Mesh, lowered: jax.stages.Lowered, layers: int) -> Measured:
    """Compile a lowered program and measure it. layers: what runs a multiple of that often belongs to the layers."""
    devices = topology.chip.devices
    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = exhausted(str(error))
        if needed is None:
            raise
        memory: dict[str, Any] = dict.fromkeys(("arguments", "outputs", "temporaries", "aliased"))
        return Measured(memory | {"peak": devices * needed}, None, [], None, time.perf_counter() - started)
    seconds = time.perf_counter() - started
    stats = compiled.memory_analysis()
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "peak": stats.peak_memory_in_bytes,
    }
    text = hlo.parse(compiled.as_text())
    found = hlo.collectives(text)
    return Measured(
        {name: devices * size for name, size in memory.items()},
        devices * hlo.flops(text),
        _summary(found, layers),
        sum(network_seconds(topology, mesh, one) for one in found),
        seconds,
    )


def bytes_on_device(tree: Any) -> int:
    """Bytes of a tree of ShapeDtypeStructs with shardings on one device."""

    def size(leaf: Any) -> int:
        width = 0.5 if leaf.dtype.name in ("int4", "uint4") else leaf.dtype.itemsize
        return math.ceil(math.prod(leaf.sharding.shard_shape(leaf.shape)) * width)

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def exhausted(message: str) -> int | None:
    """Bytes per device that a program needs which the compiler found too large; None where that is not the message."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    needed = re.search(r"required for HLO temporaries \(([\d.]+)([KMGT]?)i?B?\)", message) or re.search(
        r"Used ([\d.]+)([KMGT]?)i?B? of [\d.]+[KMGT]?i?B? hbm", message
    )
    return int(float(needed[1]) * _UNITS[needed[2]]) if needed else None


def _summary(found: list[hlo.Collective], layers: int) -> list[dict[str, Any]]:
    """Collectives by kind. What runs a multiple of `layers` times belongs to the layers."""
    summary = []
    for kind in dict.fromkeys(one.kind for one in found):
        same = [one for one in found if one.kind == kind]
        inside = [one for one in same if one.times % layers == 0]
        summary.append(
            {
                "kind": kind,
                "count_per_layer": sum(one.times for one in inside) // layers,
                "bytes_per_layer": sum(one.times * one.bytes for one in inside) // layers,
                "count": sum(one.times for one in same),
                "bytes": sum(one.times * one.bytes for one in same),
            }
        )
    return summary


def network_seconds(topology: Topology, mesh: Mesh, one: hlo.Collective) -> float:
    """The least time that a collective takes: what a chip must send, over its links to the chips that take part.

    The formulas are those of bandwidth-optimal rings; latency is not counted.
    """
    devices = list(mesh.devices.flat)
    group = [devices[place] for place in one.group] if one.group else devices
    places = {tuple(device.coords) for device in group}
    chips, chip = len(places), topology.chip
    on_one_chip = chips == 1
    k = len(group) if on_one_chip else chips
    if k == 1:
        return 0.0
    sent = {
        "all-reduce": 2 * (k - 1) / k,
        "all-gather": (k - 1) / k,
        "reduce-scatter": k - 1,
        "all-to-all": (k - 1) / k,
        "collective-permute": 1,
    }[one.kind] * one.bytes
    links = DIE_TO_DIE if on_one_chip else topology.links(places)
    return one.times * sent / (links * chip.link_bandwidth)


def mesh_name(mesh: Mesh) -> str:
    """A mesh as --mesh takes it."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "tensor=1"


def gib(size: int | None) -> str:
    """Bytes for people."""
    return "?" if size is None else f"{size / GIB:.2f}"


def memory_lines(memory: Mapping[str, Any], capacity: int, fits: bool, advice: tuple[str, ...]) -> list[str]:
    """Whether it fits, what would, and what lies in HBM."""
    used = f"{gib(memory['peak'])} of {gib(capacity)} GiB per chip"
    text = [f"  fits         {'yes' if fits else 'NO'}: {used}", *(f"               {line}" for line in advice)]
    return [
        *text,
        "  HBM          " + ", ".join(f"{kind} {gib(memory[kind])}" for kind in memory if kind != "peak") + " GiB",
    ]


def work_lines(flops: float | None, ideal: float, collectives: list[dict[str, Any]]) -> list[str]:
    """Arithmetic beside its ideal, and communication."""
    if flops is None:
        return [f"  FLOPs        not known, ideal {ideal:.4g} per chip"]
    text = [f"  FLOPs        {flops:.4g} per chip, {flops / ideal:.3f} x the ideal {ideal:.4g}"]
    return text + [
        f"  {'collectives' if number == 0 else '':<13}{one['count_per_layer']:g} {one['kind']} per layer "
        f"({one['bytes_per_layer'] / 2**20:.3g} MiB), {one['count']} in all ({one['bytes'] / 2**20:.3g} MiB)"
        for number, one in enumerate(collectives)
    ]
