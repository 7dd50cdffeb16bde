"""Compiling a program for a TPU topology, and its memory, FLOPs and collectives per chip."""

from __future__ import annotations

import math
import re
import time
import types
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from internvl_jax.aot import hlo, schedule
from internvl_jax.aot.network import Network
from internvl_jax.aot.schedule import Schedule
from internvl_jax.aot.topology import GIB, Chip, Topology
from internvl_jax.utils import files


@dataclass(frozen=True)
class CompiledStats:
    """What is known of a compiled program. Figures are per chip; None where the program does not fit.

    Attributes:
        memory: Bytes of arguments, outputs, temporaries, aliased (outputs in the buffers of donated arguments) and
            peak; only the peak where the program does not fit.
        flops: FLOPs of all matrix products.
        collectives: Per kind: kind, count_per_layer, bytes_per_layer, count and bytes (of the results).
        network_seconds: Lower bound on the time of all collectives.
        compile_seconds: Time that compilation took.
        schedule: Time of the program's schedule.
        hlo_text: The optimized, scheduled HLO.
    """

    memory: dict[str, int]
    flops: float | None
    collectives: list[dict[str, Any]]
    network_seconds: float | None
    compile_seconds: float
    schedule: Schedule | None = None
    hlo_text: str = ""

    @property
    def fits(self) -> bool:
        """Whether the program fits into the chip's HBM."""
        return self.flops is not None


def compile_program(
    topology: Topology,
    mesh: Mesh,
    lowered: jax.stages.Lowered,
    num_layers: int,
    flags: Mapping[str, str] = types.MappingProxyType({}),
) -> CompiledStats:
    """Compile a lowered program and analyze it.

    Args:
        topology: Slice that the program was lowered for.
        mesh: Mesh over the slice's devices.
        lowered: The program.
        num_layers: Length of the layer scan. Collectives that run a multiple of it are attributed to the layers.
        flags: Compiler flags, as `flags.compiler_flags` returns them.

    Returns:
        The figures; of a program that does not fit only the peak memory is known.

    Raises:
        ValueError: The compiler does not know a flag.
    """
    devices = topology.chip.devices
    start = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=dict(flags) or None)
    except jax.errors.JaxRuntimeError as error:
        if unknown := re.search(r"No such compile option: '(\w+)'", str(error)):
            raise ValueError(f"the TPU compiler does not know the flag --{unknown[1]}") from None
        needed = exhausted_bytes(str(error))
        if needed is None:
            raise
        return CompiledStats({"peak": devices * needed}, None, [], None, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    stats, text = compiled.memory_analysis(), compiled.as_text()
    if stats is None or text is None:
        raise RuntimeError("the compiler returned neither a memory analysis nor HLO text for the program")
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "peak": stats.peak_memory_in_bytes,
    }
    module, chip, network = hlo.parse(text), topology.chip, Network(topology, mesh)
    rates = schedule.Rates(
        flops=chip.bf16_flops / devices,
        hbm_bandwidth=chip.hbm_bandwidth / devices,
        wire=network.transfer,
    )
    timed = schedule.walk(module, rates, num_layers)
    estimated = timed.estimated_cycles / chip.clock_rate if chip.clock_rate and timed.estimated_cycles else None
    collectives = hlo.collectives(module)
    return CompiledStats(
        memory={name: devices * size for name, size in memory.items()},
        flops=devices * hlo.flops(module),
        collectives=_by_kind(collectives, num_layers),
        network_seconds=sum(map(network.lower_bound, collectives)),
        compile_seconds=seconds,
        schedule=replace(timed, hbm_bytes=devices * timed.hbm_bytes, estimated_seconds=estimated),
        hlo_text=text,
    )


def write_hlo(compiled: CompiledStats, directory: Path, program: str) -> None:
    """Write the optimized HLO of a program to `directory`/`program`.txt. Nothing where the program does not fit."""
    if compiled.hlo_text:
        directory.mkdir(parents=True, exist_ok=True)
        files.write_text(directory / f"{program}.txt", compiled.hlo_text)


def roofline_seconds(compiled: CompiledStats, chip: Chip, hbm_traffic: int) -> dict[str, float]:
    """Return lower bounds on a program's time by compute, HBM bandwidth and network; empty where it does not fit.

    Args:
        compiled: The program.
        chip: TPU generation.
        hbm_traffic: Bytes per chip that must pass between HBM and the chip.
    """
    if compiled.flops is None or compiled.network_seconds is None:
        return {}
    return {
        "compute": compiled.flops / chip.bf16_flops,
        "hbm": hbm_traffic / chip.hbm_bandwidth,
        "network": compiled.network_seconds,
    }


def bytes_per_device(tree: Any) -> int:
    """Return the bytes on one device of a pytree of ShapeDtypeStructs with shardings."""

    def size(leaf: Any) -> int:
        width = 0.5 if leaf.dtype.name in ("int4", "uint4") else leaf.dtype.itemsize
        return math.ceil(math.prod(leaf.sharding.shard_shape(leaf.shape)) * width)

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def exhausted_bytes(message: str) -> int | None:
    """Return the bytes per device that a program needs, from the compiler's RESOURCE_EXHAUSTED message.

    None for any other message.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    needed = re.search(r"required for HLO temporaries \(([\d.]+)([KMGT]?)i?B?\)", message) or re.search(
        r"Used ([\d.]+)([KMGT]?)i?B? of [\d.]+[KMGT]?i?B? hbm", message
    )
    return int(float(needed[1]) * _UNITS[needed[2]]) if needed else None


def _by_kind(collectives: list[hlo.Collective], num_layers: int) -> list[dict[str, Any]]:
    """Counts and bytes of collectives by kind."""
    summary = []
    for kind in dict.fromkeys(one.kind for one in collectives):
        same = [one for one in collectives if one.kind == kind]
        in_layers = [one for one in same if one.count % num_layers == 0]
        summary.append(
            {
                "kind": kind,
                "count_per_layer": sum(one.count for one in in_layers) // num_layers,
                "bytes_per_layer": sum(one.count * one.bytes for one in in_layers) // num_layers,
                "count": sum(one.count for one in same),
                "bytes": sum(one.count * one.bytes for one in same),
            }
        )
    return summary


def mesh_name(mesh: Mesh) -> str:
    """Return a mesh as the option --mesh takes it, for example "data=2,tensor=4"."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "tensor=1"


def format_gib(size: int) -> str:
    """Format bytes in GiB with two decimals."""
    return f"{size / GIB:.2f}"


def format_memory(memory: Mapping[str, int], capacity: int, fits: bool, advice: tuple[str, ...]) -> list[str]:
    """Return the report lines about memory: whether the program fits, what would, and what HBM holds."""
    used = f"{format_gib(memory['peak'])} of {format_gib(capacity)} GiB per chip"
    sizes = ", ".join(f"{kind} {format_gib(memory[kind])}" for kind in memory if kind != "peak")
    return [
        f"  fits         {'yes' if fits else 'NO'}: {used}",
        *(f"               {line}" for line in advice),
        *([f"  HBM          {sizes} GiB"] if sizes else []),
    ]


def ideal_seconds(ideal_flops: float, roofline: Mapping[str, float], chip: Chip) -> float:
    """Return the time that a program needs at least: its ideal FLOPs at the chip's peak, or its HBM traffic.

    Args:
        ideal_flops: FLOPs per chip that the computation needs.
        roofline: Lower bounds of `roofline_seconds`.
        chip: TPU generation.
    """
    return max(ideal_flops / chip.bf16_flops, roofline["hbm"])


def beside_ideal(timed: Schedule | None, ideal: float) -> Schedule | None:
    """Return a schedule with its ratio to the ideal seconds; None where the program does not fit."""
    return None if timed is None else replace(timed, ratio_to_ideal=timed.seconds / ideal)


def format_schedule(timed: Schedule | None, ideal: float) -> list[str]:
    """Return the report lines about the schedule: its time beside the ideal, what is exposed, what takes longest.

    Args:
        timed: The schedule; None where the program does not fit.
        ideal: Seconds that the program needs at least.
    """
    if timed is None:
        return []
    exposed, hidden, latency = (
        f"{1e3 * seconds:.3g}"
        for seconds in (timed.exposed_network_seconds, timed.hidden_network_seconds, timed.exposed_latency_seconds)
    )
    lines = [
        f"  schedule ms  {1e3 * timed.seconds:.4g}, {timed.seconds / ideal:.2f} x the ideal {1e3 * ideal:.4g}; HBM "
        f"{timed.hbm_bytes / GIB:.3g} GiB",
        f"               network {exposed} exposed ({latency} of it latency), {hidden} hidden; copies "
        f"{1e3 * timed.exposed_copy_seconds:.3g} exposed",
        f"               {timed.instructions_per_layer:.0f} instructions and {timed.copies_per_layer:.0f} asynchronous "
        "copies per layer",
    ]
    if timed.estimated_cycles:
        estimated = "" if timed.estimated_seconds is None else f", {1e3 * timed.estimated_seconds:.4g} ms"
        lines.append(
            f"               XLA estimates {timed.estimated_cycles:,} cycles{estimated} without kernels and collectives"
        )
    return lines + [
        f"  {'costliest ms' if index == 0 else '':<13}{1e3 * cost.seconds:<8.3g}{cost.count} x {cost.name}: "
        f"{_short_op_name(cost.op_name)}"
        for index, cost in enumerate(timed.costliest)
    ]


def _short_op_name(op_name: str) -> str:
    """The last parts of an operation's name, without the loops around it."""
    parts = [part for part in op_name.split("/") if part not in ("while", "body", "closed_call", "checkpoint")]
    return "/".join(parts[-4:]) or "no name"


def format_work(flops: float | None, ideal: float, collectives: list[dict[str, Any]]) -> list[str]:
    """Return the report lines about FLOPs, beside the ideal, and collectives."""
    if flops is None:
        return [f"  FLOPs        not known, ideal {ideal:.4g} per chip"]
    return [f"  FLOPs        {flops:.4g} per chip, {flops / ideal:.3f} x the ideal {ideal:.4g}"] + [
        f"  {'collectives' if index == 0 else '':<13}{one['count_per_layer']:g} {one['kind']} per layer "
        f"({one['bytes_per_layer'] / 2**20:.3g} MiB), {one['count']} in total ({one['bytes'] / 2**20:.3g} MiB)"
        for index, one in enumerate(collectives)
    ]
