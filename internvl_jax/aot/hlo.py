"""What a compiled program does, read from its optimized HLO text (`compiled.as_text()`).

XLA's own cost_analysis counts every loop body once, the loop over layers included. Here each instruction is counted as
often as it runs: a while loop by its trip count where its condition compares a counter with a constant, once otherwise
(decoding ends when the answers do: its figures are those of one step). Of a conditional's branches the first counts,
the one for "false": greedy decoding in this project.

Pure text analysis: no jax, no device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8, "s4": 0.5, "u4": 0.5}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.$-]+) \(.*\{$|^ENTRY %?([\w.$-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.$-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]((?:\{[^{}]*\})?)")


@dataclass(frozen=True)
class Shape:
    """One array. `on_chip`: kept in the core's own memory (VMEM), not in HBM."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def bytes(self) -> int:
        width = _BYTES.get(self.dtype, 1 if re.match(r"f8|s8|u8|s2|u2", self.dtype) else 4)
        return math.ceil(math.prod(self.dims) * width)


@dataclass(frozen=True)
class Instruction:
    """One line: `name = shapes opcode(operands), attributes`."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result; several where it is a tuple
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, *keys: str) -> list[str]:
        """Names of the computations in attributes like `calls=%name` or `branch_computations={%a, %b}`."""
        found = []
        for key in keys:
            match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.$-]+)", self.attributes)
            found += re.findall(r"%?([\w.$-]+)", match[1].strip("{}")) if match else []
        return found


@dataclass(frozen=True)
class Program:
    """Computations by name; `entry` is where it starts."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str


@dataclass(frozen=True)
class Run:
    """An instruction and how often it runs; `loop` is the innermost while's name and `trips` its count."""

    instruction: Instruction
    computation: str
    times: int
    loop: str | None
    trips: int | None


@dataclass(frozen=True)
class Collective:
    """One communication. `times`: how often it runs in all; once per pass of `loop`, which makes `trips` passes."""

    kind: str
    bytes: int  # of its result on one device
    times: int
    loop: str | None
    trips: int | None
    group: tuple[int, ...]  # places in the mesh of the devices that take part, of the first group; () for all


def parse(text: str) -> Program:
    """Read HLO text. Raises ValueError where there is no entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = None, None
    for line in _whole_lines(text):
        header = _COMPUTATION.match(line)
        if header:
            current = computations.setdefault(header[1] or header[2], [])
            if line.startswith("ENTRY"):
                entry = header[1] or header[2]
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            operands, attributes = _split_operands(match[5])
            shapes = tuple(
                Shape(dtype, tuple(int(d) for d in dims.split(",") if d), "S(1)" in layout)
                for dtype, dims, layout in _SHAPE.findall(match[3])
            )
            names = tuple(re.findall(r"%([\w.$-]+)", operands)) or (operands.strip(),)
            current.append(Instruction(match[2], match[4], shapes, names, attributes, bool(match[1])))
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of an HLO module")
    return Program({name: tuple(lines) for name, lines in computations.items()}, entry)


def _whole_lines(text: str) -> Iterator[str]:
    """Lines of HLO; attributes of Pallas kernels, which XLA spreads over several, are put together again."""
    whole = ""
    for line in text.splitlines():
        ends = line == "}" or line.startswith("}, execution_thread")
        if line.startswith(('"', "}")) and not ends:
            whole += line
        else:
            yield whole
            whole = line
    yield whole


def _split_operands(text: str) -> tuple[str, str]:
    """Split at the parenthesis that closes the operands."""
    depth = 1
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:index], text[index + 1 :]
    return text, ""


def runs(program: Program) -> Iterator[Run]:
    """Every instruction that runs, in the computation where it stands, with its number of times."""

    def visit(name: str, times: int, loop: str | None, trips: int | None) -> Iterator[Run]:
        for instruction in program.computations.get(name, ()):
            yield Run(instruction, name, times, loop, trips)
            if instruction.opcode == "while":
                count = trip_count(program, instruction)
                for body in instruction.called("body"):
                    yield from visit(body, times * (count or 1), instruction.name, count)
            elif instruction.opcode == "conditional":
                branches = instruction.called("branch_computations") or instruction.called("false_computation")
                yield from visit(branches[0], times, loop, trips)
            else:
                for called in instruction.called("calls") + (
                    instruction.called("to_apply") if instruction.opcode == "call" else []
                ):
                    yield from visit(called, times, loop, trips)

    return visit(program.entry, 1, None, None)


def trip_count(program: Program, loop: Instruction) -> int | None:
    """How often a while loop runs: known where its condition is counter < constant, as a scan's is; else None."""
    stated = re.search(r"known_trip_count\D*(\d+)", loop.attributes)
    if stated:
        return int(stated[1])
    (condition,) = loop.called("condition")
    lines = {line.name: line for line in program.computations[condition]}
    root = next(line for line in lines.values() if line.is_root)
    if root.opcode == "fusion":  # the comparison alone, wrapped
        inner = {line.name: line for line in program.computations[root.called("calls")[0]]}
        parameters = [line for line in inner.values() if line.opcode == "parameter"]
        lines |= inner | {p.name: lines[root.operands[int(p.operands[0])]] for p in parameters}
        root = next(line for line in inner.values() if line.is_root)
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    bound = _constant(lines, root.operands[1])
    counter = lines.get(root.operands[0])
    place = counter and re.search(r"\bindex=(\d+)", counter.attributes)
    return None if bound is None else -(-bound // (_increment(program, loop, int(place[1])) if place else 1))


def _constant(lines: dict[str, Instruction], name: str) -> int | None:
    """The value of a constant, also through what only passes it on."""
    line = lines.get(name)
    while line is not None and line.opcode in ("copy", "bitcast", "convert"):
        line = lines.get(line.operands[0])
    return int(line.operands[0]) if line is not None and line.opcode == "constant" else None


def _increment(program: Program, loop: Instruction, place: int) -> int:
    """By how much a loop's body raises the counter at that place of what it carries: 1 unless it plainly adds more.

    XLA's rings that gather a matrix while it is multiplied count by two, a step in each direction.
    """
    (body,) = loop.called("body")
    lines = {line.name: line for line in program.computations[body]}
    result = next(line for line in lines.values() if line.is_root)
    added = lines.get(result.operands[place]) if result.opcode == "tuple" else None
    if added is None or added.opcode != "add":
        return 1
    constants = [_constant(lines, name) for name in added.operands]
    return next((value for value in constants if value), 1)


def collectives(program: Program) -> list[Collective]:
    """All communication between devices; the pieces of one that XLA spread over several fusions count once."""
    found, seen = [], set()
    for run in runs(program):
        kind = run.instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        if run.computation.startswith(("async_collective", "fused_computation")):
            channel = re.search(r"channel_id=(\d+)", run.instruction.attributes)
            if channel and (channel[1], run.loop) in seen:
                continue
            seen.add((channel and channel[1], run.loop))
        shapes = run.instruction.shapes
        if run.instruction.opcode in ("all-gather-start", "collective-permute-start"):
            shapes = shapes[1:2]  # (operand, result, bookkeeping)
        size = sum(shape.bytes for shape in shapes)
        group = replica_group(run.instruction.attributes)
        found.append(Collective(kind, size, run.times, run.loop, run.trips, group))
    return found


def replica_group(attributes: str) -> tuple[int, ...]:
    """The first group of devices that a collective joins, () where all take part or none are named.

    XLA writes groups as lists {{0,1},{2,3}}, as iotas [2,4]<=[4,2]T(1,0), as axes of a mesh, or as pairs of a permute.
    """
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    if pairs:
        links = [(int(source), int(target)) for source, target in re.findall(r"(\d+),(\d+)", pairs[1])]
        following, group = dict(links), [links[0][0]]
        while (after := following.get(group[-1])) is not None and after not in group:
            group.append(after)
        return tuple(group)
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return tuple(map(int, listed[1].split(",")))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        groups, sizes, order = ([int(n) for n in part.split(",")] if part else None for part in iota.groups())
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        return tuple(ids.transpose(order).reshape(groups)[0].tolist())
    mesh = re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", attributes)
    if mesh:
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        taken = re.findall(r"'(\w+)'", mesh[2])
        ids = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
        return tuple(ids[tuple(slice(None) if name in taken else 0 for name in axes)].reshape(-1).tolist())
    return ()


def flops(program: Program) -> int:
    """Floating point operations of all matrix products on one device, 2 per multiply-add: XLA's, those included that it
    turned into sums on the vector unit (one query against the cache), and those of Pallas kernels."""
    return sum(
        run.times * (flops_of(run.instruction, program.computations[run.computation]) + kernel_flops(run.instruction))
        for run in runs(program)
    )


# Matrix products of each splash attention kernel, by its name: scores and weighted sum; scores, dp and dq; scores, dp,
# dk and dv (and dq, where one kernel does both).
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def kernel_flops(instruction: Instruction) -> int:
    """Floating point operations of one Pallas kernel: as it states them (cost_estimate), or, where splash attention
    does not, of the blocks that its mask leaves. 0 for anything else; ValueError for a kernel that is not known."""
    if instruction.opcode != "custom-call" or '"tpu_custom_call"' not in instruction.attributes:
        return 0
    stated = re.search(r'"cost_estimate":\{"flops":"?(\d+)', instruction.attributes)
    if stated:
        return int(stated[1])
    kind = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", instruction.name)
    if not kind:
        raise ValueError(f"the kernel {instruction.name} does not say how much it computes: give it a cost_estimate")
    settings = {name: int(size) for name, size in re.findall(r"(block_\w+)\W+(\d+)", instruction.attributes)}
    suffix = "" if kind[1] == "fwd" else f"_{kind[1]}"
    fused = kind[1] == "dkv" and re.search(r"use_fused_bwd_kernel\W+true", instruction.attributes)
    products = _SPLASH_PRODUCTS[kind[1]] + bool(fused)
    constraints = re.search(r"operand_layout_constraints=\{(.*?)\}\}", instruction.attributes)[1]
    shapes = re.findall(r"(\w+)\[([\d,]+)\]", constraints)
    operands = [(dtype, [int(size) for size in dims.split(",")]) for dtype, dims in shapes]
    queries, keys = [dims for dtype, dims in operands if dtype in ("bf16", "f32")][:2]
    length, slots, heads = queries[-2], keys[-2], math.prod(queries[:-2])
    rows, columns = settings[f"block_q{suffix}"], settings[f"block_kv{suffix}"]
    # A causal mask is computed in the kernel from the queries' places, one more operand of integers; blocks above the
    # diagonal are skipped.
    first = next(place for place, (dtype, _) in enumerate(operands) if dtype in ("bf16", "f32"))
    integers = sum(dtype == "s32" for dtype, _ in operands[first:])
    causal = integers > (2 if "segmented" in instruction.name else 0)
    blocks = sum(
        not causal or column * columns < (row + 1) * rows
        for row in range(-(-length // rows))
        for column in range(-(-slots // columns))
    )
    return 2 * products * heads * queries[-1] * blocks * rows * columns


def flops_of(instruction: Instruction, computation: tuple[Instruction, ...]) -> int:
    """Floating point operations of one `dot`, `convolution` or sum of products that was a dot; 0 for anything else."""
    shapes = {line.name: line.shapes[0] for line in computation if line.shapes}
    if instruction.opcode == "reduce" and "dot_general" in instruction.attributes:
        summed = next((line for line in computation if line.name == instruction.operands[0]), None)
        while summed is not None and summed.opcode in ("convert", "bitcast", "copy"):
            summed = next((line for line in computation if line.name == summed.operands[0]), None)
        is_product = summed is not None and summed.opcode == "multiply"
        return 2 * math.prod(shapes[instruction.operands[0]].dims) if is_product else 0
    if instruction.opcode not in ("dot", "convolution"):
        return 0
    left, right = (shapes[name].dims for name in instruction.operands[:2])
    result = instruction.shapes[0].dims
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        return 2 * math.prod(result) * math.prod(left[int(d)] for d in contracted[1].split(",") if d)
    # dim_labels name each axis: b batch, f features, digits are window axes; i and o of the kernel.
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", re.search(r"window=\{([^}]*)\}|$", instruction.attributes)[1] or ""))
    pairs = 1
    for axis in (letter for letter in labels[3] if letter.isdigit()):
        place = int(axis)
        stride, dilate, spread = (_entry(window, key, place, 1) for key in ("stride", "lhs_dilate", "rhs_dilate"))
        low = int(window["pad"].split("x")[place].split("_")[0]) if "pad" in window else 0
        size, taps = left[labels[1].index(axis)], right[labels[2].index(axis)]
        pairs *= sum(
            0 <= p <= (size - 1) * dilate and p % dilate == 0
            for o in range(result[labels[3].index(axis)])
            for p in (o * stride + tap * spread - low for tap in range(taps))
        )
    outputs = result[labels[3].index("b")] * result[labels[3].index("f")]
    return 2 * outputs * right[labels[2].index("i")] * pairs


def _entry(window: dict[str, str], key: str, place: int, default: int) -> int:
    return int(window[key].split("x")[place]) if key in window else default


def copies(program: Program, at_least: int) -> list[tuple[Run, int]]:
    """Copies in HBM of arrays of at least that many bytes, with their bytes. In a good program there are none."""
    # Inside a fusion a copy is how the fusion reads its operand; a fusion that is nothing but a copy is one, unless its
    # result lies where its operand lay.
    inside = {
        name
        for lines in program.computations.values()
        for line in lines
        if line.opcode == "fusion"
        for name in line.called("calls")
    }
    found = []
    for run in runs(program):
        line = run.instruction
        if run.computation in inside or not line.shapes or line.shapes[0].on_chip:
            continue
        opcode = line.opcode
        if opcode == "fusion" and "output_to_operand_aliasing" not in line.attributes:
            fused = program.computations[line.called("calls")[0]]
            opcode = next(inner.opcode for inner in fused if inner.is_root)
        if opcode in ("copy", "copy-start", "transpose") and line.shapes[0].bytes >= at_least:
            found.append((run, line.shapes[0].bytes))
    return found
