"""Memory, FLOPs, collectives and rooflines of the inference programs, compiled ahead of time for a TPU slice.

The programs are compiled by the TPU's own compiler for a described topology; no TPU is needed and nothing runs. Memory
is the compiler's own analysis. FLOPs and collectives are counted in the optimized HLO (`hlo`). Times are rooflines from
published chip figures (`topology`): lower bounds on the time that a program takes.

Figures are per chip. A TPU7x chip is two JAX devices; its figures are those of both together.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

from internvl_jax.aot.compiled_program import (
    beside_ideal,
    compile_program,
    format_memory,
    format_schedule,
    format_work,
    ideal_seconds,
    roofline_seconds,
    write_hlo,
)
from internvl_jax.aot.programs import PROGRAMS, InferenceProgram
from internvl_jax.aot.schedule import Schedule
from internvl_jax.aot.topology import GIB
from internvl_jax.aot.workload import Workload
from internvl_jax.parallel import mesh as mesh_lib

GENERATE = "generate"  # all programs, with every parameter resident: what a chat server needs


@dataclass(frozen=True)
class CompileReport:
    """One program compiled for one mesh. Figures are per chip; None where the program does not fit.

    Attributes:
        topology: Slice as the compiler names it, for example "v5e:2x4".
        chips: Number of chips.
        program: Key of `PROGRAMS`, or "generate".
        mesh: Mesh as the option --mesh takes it.
        vision: How the vision tower is partitioned.
        batch: Number of rows, each with one image.
        length: Cache slots per row.
        prompt: Prompt tokens that prefill reads.
        dtype: Computation dtype.
        cache_dtype: KV cache dtype.
        quantize: Weight quantization, or None.
        flags: Compiler flags.
        hbm_bytes: Bytes of arguments, outputs, temporaries, aliased (outputs in the buffers of donated arguments), peak
            and parameters; only the last two of a program that does not fit.
        hbm_capacity_bytes: HBM that a program can use.
        fits: Whether the program compiles within that.
        flops_per_chip: FLOPs of all matrix products in the compiled program.
        ideal_flops_per_chip: FLOPs that the computation needs.
        collectives: Per kind: kind, count_per_layer, bytes_per_layer, count and bytes (of the results).
        roofline_seconds: Lower bounds by compute, hbm and network; empty where the program does not fit.
        bound_by: The largest of these.
        ideal_seconds: Time that the program needs at least.
        schedule: Time of the schedule (`schedule.Schedule`); None where the program does not fit.
        throughput_bound: Upper bound on the throughput of the whole slice: value and unit.
        compile_seconds: Time that compilation took.
        advice: What would fit, where the program does not.
        parts: Reports of the single programs, of "generate" only.
    """

    topology: str
    chips: int
    program: str
    mesh: str
    vision: str
    batch: int
    length: int
    prompt: int
    dtype: str
    cache_dtype: str
    quantize: str | None
    flags: dict[str, str]
    hbm_bytes: dict[str, int]
    hbm_capacity_bytes: int
    fits: bool
    flops_per_chip: float | None
    ideal_flops_per_chip: float
    collectives: list[dict[str, Any]]
    roofline_seconds: dict[str, float]
    bound_by: str | None
    ideal_seconds: float
    schedule: Schedule | None
    throughput_bound: dict[str, Any]
    compile_seconds: float
    advice: tuple[str, ...] = ()
    parts: tuple[CompileReport, ...] = ()

    @property
    def scheduled_throughput(self) -> float:
        """Throughput of the whole slice by the schedule, in the unit of the bound; 0 where the program does not fit."""
        if self.schedule is None or self.bound_by is None:
            return 0.0
        return self.throughput_bound["value"] * self.roofline_seconds[self.bound_by] / self.schedule.seconds

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)


def make_report(workload: Workload, program: str, dump_hlo: Path | None = None) -> CompileReport:
    """Compile a program and analyze it.

    Args:
        workload: Model, mesh and input shapes.
        program: Key of `PROGRAMS`, or "generate" for all of them.
        dump_hlo: Directory for the optimized HLO, PROGRAM.txt.

    Raises:
        ValueError: The program is unknown, or needs a part that the model does not have.
    """
    if program == GENERATE:
        return combine_reports(workload, {name: make_report(workload, name, dump_hlo) for name in PROGRAMS})
    if program not in PROGRAMS:
        raise ValueError(f"there is no program {program!r}; there are {', '.join((*PROGRAMS, GENERATE))}")
    spec = PROGRAMS[program]
    missing = [part for part in spec.parts if part not in workload.params]
    if missing:
        raise ValueError(f"{program} needs {' and '.join(missing)}, which this model does not have")
    chip = workload.topology.chip
    with jax.set_mesh(workload.mesh):
        lowered = spec.lower(workload)
        num_layers = spec.num_layers(workload.config)
        compiled = compile_program(workload.topology, workload.mesh, lowered, num_layers, workload.flags)
    if dump_hlo is not None:
        write_hlo(compiled, dump_hlo, program)
    memory = compiled.memory | {"parameters": workload.param_bytes(spec.parts)}
    traffic = _least_traffic(workload, spec, memory) if compiled.fits else 0
    roofline = roofline_seconds(compiled, chip, traffic)
    bound_by = max(roofline, key=lambda name: roofline[name]) if compiled.fits else None
    items = spec.items_per_call(workload)
    ideal_flops = spec.ideal_flops(workload) / workload.topology.chips
    ideal = ideal_seconds(ideal_flops, roofline, chip) if compiled.fits else 0.0
    report = CompileReport(
        topology=workload.topology.name,
        chips=workload.topology.chips,
        program=program,
        mesh=workload.mesh_name,
        vision=workload.vision,
        batch=workload.batch,
        length=workload.length,
        prompt=workload.prompt,
        dtype=workload.dtype.name,
        cache_dtype=workload.cache_dtype.name,
        quantize=workload.quantize,
        flags=dict(workload.flags),
        hbm_bytes=memory,
        hbm_capacity_bytes=chip.hbm_bytes,
        fits=compiled.fits,
        flops_per_chip=compiled.flops,
        ideal_flops_per_chip=ideal_flops,
        collectives=compiled.collectives,
        roofline_seconds=roofline,
        bound_by=bound_by,
        ideal_seconds=ideal,
        schedule=beside_ideal(compiled.schedule, ideal),
        throughput_bound={"value": items / roofline[bound_by] if bound_by else None, "unit": spec.unit},
        compile_seconds=compiled.compile_seconds,
    )
    return report if report.fits else replace(report, advice=_advice(workload, report))


def combine_reports(workload: Workload, parts: dict[str, CompileReport]) -> CompileReport:
    """Combine the reports of all programs into that of "generate", with every parameter resident all the time.

    Times and throughput are those of decoding, where a chat spends most of its time; `parts` has the others.
    """
    chip, decode = workload.topology.chip, parts["decode"]
    parameters = workload.param_bytes()
    peak = max(resident_peak(workload, part) for part in parts.values())
    memory = {"peak": peak, "parameters": parameters}
    if all(part.fits for part in parts.values()):
        memory = decode.hbm_bytes | memory
        memory["arguments"] += parameters - decode.hbm_bytes["parameters"]
        memory["temporaries"] = max(part.hbm_bytes["temporaries"] for part in parts.values())
    fits = all(part.fits for part in parts.values()) and peak <= chip.hbm_bytes
    report = replace(
        decode,
        program=GENERATE,
        hbm_bytes=memory,
        fits=fits,
        compile_seconds=sum(part.compile_seconds for part in parts.values()),
        advice=(),
        parts=tuple(parts.values()),
    )
    return report if fits else replace(report, advice=_advice(workload, report))


def resident_peak(workload: Workload, part: CompileReport) -> int:
    """Return the bytes per chip at a program's peak when the parameters that it does not read stay resident too."""
    return part.hbm_bytes["peak"] - part.hbm_bytes["parameters"] + workload.param_bytes()


def _least_traffic(workload: Workload, spec: InferenceProgram, memory: dict[str, int]) -> int:
    """Bytes between HBM and the chip when every argument is read once and every new output is written once."""
    new_outputs = memory["outputs"] - memory["aliased"]
    return memory["arguments"] + new_outputs - workload.unread_param_bytes(spec.parts)


def _advice(workload: Workload, report: CompileReport) -> tuple[str, ...]:
    """By how much a program is too large, and what would fit. Everything but parameters is taken to grow with rows."""
    chip, memory = workload.topology.chip, report.hbm_bytes
    excess = memory["peak"] - report.hbm_capacity_bytes
    advice = [f"needs {memory['peak'] / GIB:.2f} GiB per chip, {excess / GIB:.2f} GiB more than there are"]
    room = report.hbm_capacity_bytes - memory["parameters"]
    per_batch = memory["peak"] - memory["parameters"]
    multiple = workload.mesh.shape["data"] * workload.mesh.shape["fsdp"]
    rows = int(workload.batch * room / per_batch) // multiple * multiple if room > 0 else 0
    if rows:
        advice.append(f"about {rows} rows of this length would fit on this mesh")
    elif room <= 0:
        advice.append(f"the parameters alone take {memory['parameters'] / GIB:.2f} GiB per chip")
    tensor = workload.mesh.shape["tensor"]
    for size in mesh_lib.legal_tensor_sizes(workload.config, 64):
        if size > tensor and memory["peak"] * tensor / size < report.hbm_capacity_bytes * 0.95:
            chips = workload.topology.chips * size // tensor
            advice.append(f"about {chips} chips of {chip.name} would be enough, with tensor={size}")
            break
    return tuple(advice)


def format_report(report: CompileReport) -> list[str]:
    """Return the lines of a report for the terminal."""
    head = f"{report.program}: {report.topology} ({report.chips} chips), {report.mesh}, batch {report.batch}"
    head += f", length {report.length}"
    if report.prompt != report.length and report.program != "encode":
        head += f", prompt {report.prompt}"
    head += f", {report.dtype}" + (f", {report.quantize} weights" if report.quantize else "")
    head += f", {report.cache_dtype} cache" if report.cache_dtype != report.dtype else ""
    head += f", {len(report.flags)} compiler flags" if report.flags else ""
    lines = [head, *format_memory(report.hbm_bytes, report.hbm_capacity_bytes, report.fits, report.advice)]
    lines += format_work(report.flops_per_chip, report.ideal_flops_per_chip, report.collectives)
    if report.fits:
        times = ", ".join(f"{name} {1e3 * seconds:.3g}" for name, seconds in report.roofline_seconds.items())
        bound = report.throughput_bound
        lines.append(
            f"  roofline ms  {times}: bound by {report.bound_by}, at most {bound['value']:,.4g} {bound['unit']}"
        )
        if not report.parts:  # which have their own
            lines += format_schedule(report.schedule, report.ideal_seconds)
    lines.append(f"  compiled in  {report.compile_seconds:.1f} s")
    for part in report.parts:
        lines += ["", *format_report(part)]
    return lines
