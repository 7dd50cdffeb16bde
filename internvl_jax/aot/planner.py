"""Which mesh, and how many rows: arithmetic proposes, the compiler decides (compile_report.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from internvl_jax.aot.compile_report import (
    PROGRAMS,
    Report,
    Workload,
    config_of,
    make_workload,
    param_bytes,
    peak_together,
    report,
    skipped_bytes,
    state_bytes,
    together,
)
from internvl_jax.aot.topology import GIB, parse_topology
from internvl_jax.parallel import mesh as mesh_lib

# The slices of the table in docs/.
SLICES = ("v5e-4", "v5e-8", "v5e-16", "v5e-256", "v6e-1", "v6e-4", "v6e-8", "v5p-8", "tpu7x")
LENGTHS = (2048, 4096)

# Weights and cache, in the order in which answers suffer; the first that fits is recommended.
SCHEMES: tuple[dict[str, Any], ...] = (
    {},
    {"quantize": "int8", "cache_dtype": "int8"},
    {"quantize": "int4", "cache_dtype": "int8"},
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """A mesh with as many rows as arithmetic allows: parameters and cache fit, temporaries are not known yet."""

    mesh: str
    quantize: str | None
    cache_dtype: str
    batch: int  # 0 where the parameters alone do not fit
    parameter_bytes: int  # per chip
    resident_bytes: int  # per chip, with the cache of `batch` rows
    tokens_per_second: float  # the bound of decoding by HBM and compute

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """Candidates, best first, and the compiled report of the one that is recommended (None: nothing fits)."""

    topology: str
    length: int
    candidates: tuple[Candidate, ...]
    recommended: Report | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def candidates(asked: dict[str, Any]) -> list[Candidate]:
    """Every tensor size that is legal on the slice, the other devices on data; most tokens per second first.

    asked: make_workload's arguments but mesh. A batch in it is kept, otherwise rows are doubled while they fit. fsdp is
    not among them: decoding would gather every weight for every token.
    """
    place = parse_topology(asked["topology"])
    devices = place.chips * place.chip.devices
    found = []
    tensors = mesh_lib.legal_tensor_sizes(config_of(asked["preset"]), devices)
    for tensor in tensors:
        data = devices // tensor
        batch = asked.get("batch") or data
        if batch % data == 0:
            load = make_workload(**{**asked, "mesh": f"data={data},tensor={tensor}", "batch": batch})
            found.append(_candidate(load, grow=not asked.get("batch")))
    if not found:
        raise mesh_lib.MeshError(
            f"a batch of {asked['batch']} rows does not divide over {devices} devices, of which {max(tensors)} at most "
            f"can share a row: use a multiple of {devices // max(tensors)} rows, or a smaller slice"
        )
    return sorted(found, key=lambda one: one.tokens_per_second, reverse=True)


def _candidate(load: Workload, grow: bool) -> Candidate:
    chip = load.topology.chip
    parameters = chip.devices * param_bytes(load, tuple(load.params))
    rows = chip.devices * state_bytes(load)
    if grow:
        more = chip.devices * state_bytes(replace(load, batch=2 * load.batch)) - rows  # for as many rows again
        factor = 1
        while parameters + rows + (2 * factor - 1) * more <= chip.hbm_bytes:
            factor *= 2
        load, rows = replace(load, batch=factor * load.batch), rows + (factor - 1) * more
    resident = parameters + rows
    fits = resident <= chip.hbm_bytes
    decode = PROGRAMS["decode"]
    unread = parameters - chip.devices * (param_bytes(load, decode.parts) - skipped_bytes(load, decode.parts))
    compute = decode.ideal_flops(load) / load.topology.chips / chip.bf16_flops
    seconds = max((resident - unread) / chip.hbm_bandwidth, compute)
    return Candidate(
        mesh=load.mesh_name,
        quantize=load.quantize,
        cache_dtype=load.cache_dtype.name,
        batch=load.batch if fits else 0,
        parameter_bytes=parameters,
        resident_bytes=resident,
        tokens_per_second=load.batch / seconds if fits else 0.0,
    )


def plan(asked: dict[str, Any], say: Say = lambda text: None, schemes: Sequence[dict[str, Any]] = SCHEMES) -> Plan:
    """The mesh and batch with the highest bound on tokens per second among those that the compiler says fit.

    asked: make_workload's arguments but mesh, batch optional. schemes: quantizations to try, one after the other until
    something fits, unless `asked` names one. say: is told what is being compiled.
    """
    if "quantize" in asked or "cache_dtype" in asked:
        schemes = ({},)
    listed: list[Candidate] = []
    best = None
    for scheme in schemes:
        ranked = candidates({**asked, **scheme})
        listed += ranked
        for candidate in ranked:
            if best is not None and candidate.tokens_per_second <= _rate(best):
                break  # what is compiled is never faster than its arithmetic
            done = _largest({**asked, **scheme}, candidate, say) if candidate.batch else None
            if done is not None and (best is None or _rate(done) > _rate(best)):
                best = done
        if best is not None:
            break
    return Plan(parse_topology(asked["topology"]).name, asked["length"], tuple(listed), best)


def _rate(done: Report) -> float:
    return done.throughput_bound["value"]


def _largest(asked: dict[str, Any], candidate: Candidate, say: Say) -> Report | None:
    """Compile for the candidate's rows; where they do not fit, for the next power of two that should."""
    batch = candidate.batch
    while True:
        try:
            load = make_workload(**{**asked, "mesh": candidate.mesh, "batch": batch})
        except mesh_lib.MeshError:  # fewer rows than the mesh has places for
            return None
        parts: dict[str, Report] = {}
        for name in ("prefill", "encode", "decode"):  # those with large temporaries first
            say(f"compiling {name} for {asked['topology']}, {candidate.mesh}, batch {batch} x {load.length}")
            parts[name] = report(load, name)
            peak = peak_together(load, parts[name])
            if peak > load.topology.chip.hbm_bytes or not parts[name].fits:
                break
        else:
            return together(load, {name: parts[name] for name in PROGRAMS})
        if asked.get("batch"):
            return None
        room = load.topology.chip.hbm_bytes - candidate.parameter_bytes
        most = batch * room / (peak - candidate.parameter_bytes)  # what is no parameter grows with rows
        batch //= 2
        while batch > most:
            batch //= 2
        if batch == 0:
            return None


def lines(made: Plan) -> list[str]:
    """A plan for people."""
    text = [f"{made.topology}, {made.length} tokens of context; parameters and cache by arithmetic, per chip:"]
    for one in made.candidates:
        size = f"{one.parameter_bytes / GIB:.2f} GiB of parameters"
        if one.batch:
            size += f", {one.resident_bytes / GIB:.2f} with the cache of {one.batch} rows"
            size += f", at most {one.tokens_per_second:,.0f} tokens/s"
        else:
            size += ": too large"
        text.append(f"  {one.mesh:<20} {_scheme_name(one):<22} {size}")
    if made.recommended is None:
        return [*text, "nothing fits: take a larger slice, fewer rows or a shorter context"]
    best = made.recommended
    used = f"{best.hbm_bytes['peak'] / GIB:.2f} of {best.hbm_capacity_bytes / GIB:.2f} GiB"
    flags = f"--mesh {best.mesh} --batch-size {best.batch}"
    flags += f" --quantize {best.quantize}" if best.quantize else ""
    flags += f" --cache-dtype {best.cache_dtype}" if best.cache_dtype != best.dtype else ""
    return [*text, "", f"recommended: {flags} (compiled: {used} per chip)"]


def _scheme_name(one: Candidate | Report) -> str:
    return f"{one.quantize or 'plain'} + {one.cache_dtype} cache"


def table(
    asked: dict[str, Any],
    topologies: Sequence[str] = SLICES,
    say: Say = lambda text: None,
    schemes: Sequence[dict[str, Any]] = SCHEMES[:2],
) -> Iterator[str]:
    """Markdown lines: for each slice and quantization the largest batch that fits, compiled, and what it can yield.

    The figures behind the batches are those of the first length.
    """
    heads = [f"rows x {length}" for length in LENGTHS]
    columns = ["slice", "chips", "weights", "parameters", "mesh", *heads, "peak", "decode", "prefill", "images"]
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for topology in topologies:
        for scheme in schemes:
            one = {**asked, **scheme, "topology": topology}
            made = [plan({**one, "length": length}, say, schemes=({},)) for length in LENGTHS]
            smallest = min(made[0].candidates, key=lambda candidate: candidate.parameter_bytes)
            cells = [topology, str(parse_topology(topology).chips), one.get("quantize") or one.get("dtype", "bfloat16")]
            cells.append(f"{smallest.parameter_bytes / GIB:.1f} GiB")
            rows = [str(each.recommended.batch) if each.recommended else "does not fit" for each in made]
            best = made[0].recommended
            if best is None:
                cells += ["-", *rows, "-", "-", "-", "-"]
            else:
                peak = f"{best.hbm_bytes['peak'] / GIB:.1f} of {best.hbm_capacity_bytes / GIB:.1f} GiB"
                rates = {part.program: f"{_rate(part):,.0f}/s" for part in best.parts}
                cells += [best.mesh, *rows, peak, rates["decode"], rates["prefill"], rates["encode"]]
            yield "| " + " | ".join(cells) + " |"
