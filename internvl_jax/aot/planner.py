"""Choosing a mesh and a batch size: candidates are ranked by arithmetic, then compiled until one fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from internvl_jax.aot.compile_report import CompileReport, combine_reports, make_report, resident_peak
from internvl_jax.aot.programs import PROGRAMS, decode_state_bytes
from internvl_jax.aot.topology import GIB, parse_topology
from internvl_jax.aot.workload import Workload, WorkloadRequest, make_workload, read_config
from internvl_jax.parallel import mesh as mesh_lib

# The slices and lengths of the table in docs/tpu.md.
SLICES = ("v5e-4", "v5e-8", "v5e-16", "v5e-256", "v6e-1", "v6e-4", "v6e-8", "v5p-8", "tpu7x")
LENGTHS = (2048, 4096)

Log = Callable[[str], None]


@dataclass(frozen=True)
class Precision:
    """Dtypes of weights and KV cache: `WorkloadRequest.quantize` and `WorkloadRequest.cache_dtype`."""

    quantize: str | None = None
    cache_dtype: str | None = None


# Highest quality first; the first one that fits is recommended.
PRECISIONS = (Precision(), Precision("int8", "int8"), Precision("int4", "int8"))


@dataclass(frozen=True)
class Candidate:
    """A mesh with as many rows as parameters and KV cache leave room for; temporaries are not known yet.

    Attributes:
        mesh: Mesh as the option --mesh takes it.
        quantize: Weight quantization, or None.
        cache_dtype: KV cache dtype.
        batch: Number of rows; 0 where the parameters alone do not fit.
        parameter_bytes: Bytes of parameters per chip.
        resident_bytes: Bytes of parameters and of the cache of `batch` rows per chip.
        tokens_per_second: Upper bound on decoding by HBM bandwidth and compute.
    """

    mesh: str
    quantize: str | None
    cache_dtype: str
    batch: int
    parameter_bytes: int
    resident_bytes: int
    tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Return the candidate as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class MeshPlan:
    """Candidates, best first, and the report of the recommended one.

    Attributes:
        topology: Slice as the compiler names it.
        length: Cache slots per row.
        candidates: Meshes, fastest first within each precision.
        recommended: Report of "generate" for the recommended mesh; None where nothing fits.
    """

    topology: str
    length: int
    candidates: tuple[Candidate, ...]
    recommended: CompileReport | None

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return asdict(self)


def rank_candidates(request: WorkloadRequest) -> list[Candidate]:
    """List every legal tensor size on the slice, with the other devices on the data axis; fastest first.

    The fsdp axis is left out: decoding would gather every weight for every token.

    Args:
        request: Its mesh is ignored. A batch is kept; None doubles the rows while they fit.

    Raises:
        MeshError: The batch does not divide over the devices of any legal mesh.
    """
    topology = parse_topology(request.topology)
    devices = topology.chips * topology.chip.devices
    candidates = []
    tensor_sizes = mesh_lib.legal_tensor_sizes(read_config(request.preset), devices)
    for tensor in tensor_sizes:
        data = devices // tensor
        batch = request.batch or data
        if batch % data == 0:
            workload = make_workload(replace(request, mesh=f"data={data},tensor={tensor}", batch=batch))
            candidates.append(_make_candidate(workload, grow=not request.batch))
    if not candidates:
        raise mesh_lib.MeshError(
            f"a batch of {request.batch} rows does not divide over {devices} devices, of which at most "
            f"{max(tensor_sizes)} can share a row: use a multiple of {devices // max(tensor_sizes)} rows, or a smaller "
            "slice"
        )
    return sorted(candidates, key=lambda one: one.tokens_per_second, reverse=True)


def _make_candidate(workload: Workload, grow: bool) -> Candidate:
    chip = workload.topology.chip
    parameters = workload.param_bytes()
    state = decode_state_bytes(workload)
    if grow:
        per_batch = decode_state_bytes(replace(workload, batch=2 * workload.batch)) - state
        factor = 1
        while parameters + state + (2 * factor - 1) * per_batch <= chip.hbm_bytes:
            factor *= 2
        workload, state = replace(workload, batch=factor * workload.batch), state + (factor - 1) * per_batch
    resident = parameters + state
    fits = resident <= chip.hbm_bytes
    decode = PROGRAMS["decode"]
    unread = parameters - (workload.param_bytes(decode.parts) - workload.unread_param_bytes(decode.parts))
    compute = decode.ideal_flops(workload) / workload.topology.chips / chip.bf16_flops
    seconds = max((resident - unread) / chip.hbm_bandwidth, compute)
    return Candidate(
        mesh=workload.mesh_name,
        quantize=workload.quantize,
        cache_dtype=workload.cache_dtype.name,
        batch=workload.batch if fits else 0,
        parameter_bytes=parameters,
        resident_bytes=resident,
        tokens_per_second=workload.batch / seconds if fits else 0.0,
    )


def plan_mesh(
    request: WorkloadRequest, log: Log = lambda line: None, precisions: Sequence[Precision] = PRECISIONS
) -> MeshPlan:
    """Find the mesh and batch size with the highest bound on tokens per second among those that compile and fit.

    Args:
        request: Its mesh is ignored. A batch is kept; None looks for the largest that fits. If it names a quantization
            or a cache dtype, only that precision is tried.
        log: Called with a line before each compilation.
        precisions: Precisions to try, in this order, until one fits.
    """
    if request.quantize or request.cache_dtype:
        precisions = (Precision(request.quantize, request.cache_dtype),)
    candidates: list[Candidate] = []
    best = None
    for precision in precisions:
        quantized = replace(request, quantize=precision.quantize, cache_dtype=precision.cache_dtype)
        ranked = rank_candidates(quantized)
        candidates += ranked
        for candidate in ranked:
            if best is not None and candidate.tokens_per_second <= _throughput(best):
                break  # a compiled program is never faster than its arithmetic bound
            report = _largest_batch(quantized, candidate, log) if candidate.batch else None
            if report is not None and (best is None or _throughput(report) > _throughput(best)):
                best = report
        if best is not None:
            break
    return MeshPlan(parse_topology(request.topology).name, request.length, tuple(candidates), best)


def _throughput(report: CompileReport) -> float:
    return report.throughput_bound["value"]


def _largest_batch(request: WorkloadRequest, candidate: Candidate, log: Log) -> CompileReport | None:
    """Compile for the candidate's batch; if it does not fit, for the next power of two that should."""
    batch = candidate.batch
    while True:
        try:
            workload = make_workload(replace(request, mesh=candidate.mesh, batch=batch))
        except mesh_lib.MeshError:  # fewer rows than devices on the data axis
            return None
        reports: dict[str, CompileReport] = {}
        for name in ("prefill", "encode", "decode"):  # programs with large temporaries first
            log(f"compiling {name} for {request.topology}, {candidate.mesh}, batch {batch} x {workload.length}")
            reports[name] = make_report(workload, name)
            peak = resident_peak(workload, reports[name])
            if peak > workload.topology.chip.hbm_bytes or not reports[name].fits:
                break
        else:
            return combine_reports(workload, {name: reports[name] for name in PROGRAMS})
        if request.batch:
            return None
        room = workload.topology.chip.hbm_bytes - candidate.parameter_bytes
        limit = batch * room / (peak - candidate.parameter_bytes)  # everything but parameters grows with the rows
        batch //= 2
        while batch > limit:
            batch //= 2
        if batch == 0:
            return None


def format_plan(plan: MeshPlan) -> list[str]:
    """Return the lines of a plan for the terminal."""
    lines = [f"{plan.topology}, {plan.length} tokens of context; parameters and cache per chip, by arithmetic:"]
    for one in plan.candidates:
        sizes = f"{one.parameter_bytes / GIB:.2f} GiB of parameters"
        if one.batch:
            sizes += f", {one.resident_bytes / GIB:.2f} with the cache of {one.batch} rows"
            sizes += f", at most {one.tokens_per_second:,.0f} tokens/s"
        else:
            sizes += ": too large"
        precision = f"{one.quantize or 'plain'} + {one.cache_dtype} cache"
        lines.append(f"  {one.mesh:<20} {precision:<22} {sizes}")
    if plan.recommended is None:
        return [*lines, "nothing fits: choose a larger slice, fewer rows or a shorter context"]
    best = plan.recommended
    used = f"{best.hbm_bytes['peak'] / GIB:.2f} of {best.hbm_capacity_bytes / GIB:.2f} GiB"
    flags = f"--mesh {best.mesh} --batch-size {best.batch}"
    flags += f" --quantize {best.quantize}" if best.quantize else ""
    flags += f" --cache-dtype {best.cache_dtype}" if best.cache_dtype != best.dtype else ""
    return [*lines, "", f"recommended: {flags} (compiled: {used} per chip)"]


def plan_table(
    request: WorkloadRequest,
    slices: Sequence[str] = SLICES,
    log: Log = lambda line: None,
    precisions: Sequence[Precision] = PRECISIONS[:2],
) -> Iterator[str]:
    """Yield a Markdown table: per slice and precision the largest batch that fits, compiled, and its throughput by the
    schedule, of the bounds.

    Memory and throughput are those of the first of `LENGTHS`.

    Args:
        request: Its topology, mesh and length are ignored.
        slices: Names of slices.
        log: Called with a line before each compilation.
        precisions: Precisions, each of which gets a row, unless the request names one.
    """
    if request.quantize or request.cache_dtype:
        precisions = (Precision(request.quantize, request.cache_dtype),)
    batches = [f"rows x {length}" for length in LENGTHS]
    columns = ["slice", "chips", "weights", "parameters", "mesh", *batches, "peak", "decode", "prefill", "images"]
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for name in slices:
        for precision in precisions:
            one = replace(request, topology=name, quantize=precision.quantize, cache_dtype=precision.cache_dtype)
            plans = [plan_mesh(replace(one, length=length), log, (precision,)) for length in LENGTHS]
            yield "| " + " | ".join(_table_cells(one, plans)) + " |"


def _table_cells(request: WorkloadRequest, plans: Sequence[MeshPlan]) -> list[str]:
    smallest = min(plans[0].candidates, key=lambda candidate: candidate.parameter_bytes)
    cells = [request.topology, str(parse_topology(request.topology).chips), request.quantize or request.dtype]
    cells.append(f"{smallest.parameter_bytes / GIB:.1f} GiB")
    rows = [str(plan.recommended.batch) if plan.recommended else "does not fit" for plan in plans]
    best = plans[0].recommended
    if best is None:
        return [*cells, "-", *rows, "-", "-", "-", "-"]
    peak = f"{best.hbm_bytes['peak'] / GIB:.1f} of {best.hbm_capacity_bytes / GIB:.1f} GiB"
    rates = {part.program: f"{part.scheduled_throughput:,.0f} of {_throughput(part):,.0f}/s" for part in best.parts}
    return [*cells, best.mesh, *rows, peak, rates["decode"], rates["prefill"], rates["encode"]]
