"""FLOPs, collectives and copies of a compiled program, from its optimized HLO text (`compiled.as_text()`).

XLA's cost_analysis counts every loop body once, the layer scan included. Here each instruction is counted as often as
it runs: the body of a while loop by the trip count, where the condition compares a counter with a constant, and once
otherwise (the decode loop ends when all answers do, so its figures are those of one step). Of a conditional, the first
branch is counted, the one for "false", which is greedy decoding in this project.

This is text analysis only: it uses neither jax nor a device.
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
    """Shape of one array. `on_chip` is True for arrays in VMEM or SMEM, memory spaces S(1) and S(6), instead of HBM."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        width = _BYTES.get(self.dtype, 1 if re.match(r"f8|s8|u8|s2|u2", self.dtype) else 4)
        return math.ceil(math.prod(self.dims) * width)


@dataclass(frozen=True)
class Instruction:
    """One instruction: `name = shapes opcode(operands), attributes`. `shapes` has several entries for a tuple."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, *keys: str) -> list[str]:
        """Return the names of computations in attributes like `calls=%name` or `branch_computations={%a, %b}`."""
        found = []
        for key in keys:
            match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.$-]+)", self.attributes)
            found += re.findall(r"%?([\w.$-]+)", match[1].strip("{}")) if match else []
        return found


@dataclass(frozen=True)
class HloModule:
    """Computations by name, and the name of the entry computation."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str


@dataclass(frozen=True)
class Execution:
    """An instruction and how often it runs.

    Attributes:
        instruction: The instruction.
        computation: Name of the computation that contains it.
        count: Number of times that it runs.
        loop: Name of the innermost while loop around it, or None.
        trip_count: Trip count of that loop, or None where it is not known.
    """

    instruction: Instruction
    computation: str
    count: int
    loop: str | None
    trip_count: int | None


@dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
        kind: One of `COLLECTIVES`.
        bytes: Bytes of the result on one device.
        count: Number of times that it runs.
        loop: Name of the innermost while loop around it, or None.
        trip_count: Trip count of that loop, or None where it is not known.
        group: Indices into the mesh of the first group of devices that take part; () for all devices.
        pairs: Of a permute, the pairs of indices of source and target.
    """

    kind: str
    bytes: int
    count: int
    loop: str | None
    trip_count: int | None
    group: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...] = ()


def parse(text: str) -> HloModule:
    """Parse HLO text.

    Raises:
        ValueError: There is no entry computation.
    """
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
                Shape(dtype, tuple(int(d) for d in dims.split(",") if d), "S(1)" in layout or "S(6)" in layout)
                for dtype, dims, layout in _SHAPE.findall(match[3])
            )
            names = tuple(re.findall(r"%([\w.$-]+)", operands)) or (operands.strip(),)
            current.append(Instruction(match[2], match[4], shapes, names, attributes, bool(match[1])))
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of an HLO module")
    return HloModule({name: tuple(lines) for name, lines in computations.items()}, entry)


def _whole_lines(text: str) -> Iterator[str]:
    """Lines of HLO, with the attributes of Pallas kernels, which XLA breaks over several lines, joined."""
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


def executions(module: HloModule) -> Iterator[Execution]:
    """Yield every instruction that runs, with the number of times that it does."""

    def visit(name: str, count: int, loop: str | None, trips: int | None) -> Iterator[Execution]:
        for instruction in module.computations.get(name, ()):
            yield Execution(instruction, name, count, loop, trips)
            if instruction.opcode == "while":
                inner = trip_count(module, instruction)
                for body in instruction.called("body"):
                    yield from visit(body, count * (inner or 1), instruction.name, inner)
            elif instruction.opcode == "conditional":
                branches = instruction.called("branch_computations") or instruction.called("false_computation")
                yield from visit(branches[0], count, loop, trips)
            else:
                for called in instruction.called("calls") + (
                    instruction.called("to_apply") if instruction.opcode == "call" else []
                ):
                    yield from visit(called, count, loop, trips)

    return visit(module.entry, 1, None, None)


def trip_count(module: HloModule, loop: Instruction) -> int | None:
    """Return the trip count of a while loop, or None where its condition is not `counter < constant`."""
    stated = re.search(r"known_trip_count\D*(\d+)", loop.attributes)
    if stated:
        return int(stated[1])
    (condition,) = loop.called("condition")
    lines = {line.name: line for line in module.computations[condition]}
    root = next(line for line in lines.values() if line.is_root)
    if root.opcode == "fusion":  # of the comparison alone
        inner = {line.name: line for line in module.computations[root.called("calls")[0]]}
        parameters = [line for line in inner.values() if line.opcode == "parameter"]
        lines |= inner | {p.name: lines[root.operands[int(p.operands[0])]] for p in parameters}
        root = next(line for line in inner.values() if line.is_root)
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    bound = _constant(lines, root.operands[1])
    counter = lines.get(root.operands[0])
    index = counter and re.search(r"\bindex=(\d+)", counter.attributes)
    return None if bound is None else -(-bound // (_increment(module, loop, int(index[1])) if index else 1))


def _constant(lines: dict[str, Instruction], name: str) -> int | None:
    """The value of a constant, also behind copies, bitcasts and conversions."""
    line = lines.get(name)
    while line is not None and line.opcode in ("copy", "bitcast", "convert"):
        line = lines.get(line.operands[0])
    return int(line.operands[0]) if line is not None and line.opcode == "constant" else None


def _increment(module: HloModule, loop: Instruction, index: int) -> int:
    """The increment of the loop counter at that index of the carry: 1 unless the body adds another constant.

    Windowed-einsum loops count by two: one step in each direction of the ring.
    """
    (body,) = loop.called("body")
    lines = {line.name: line for line in module.computations[body]}
    result = next(line for line in lines.values() if line.is_root)
    added = lines.get(result.operands[index]) if result.opcode == "tuple" else None
    if added is None or added.opcode != "add":
        return 1
    constants = [_constant(lines, name) for name in added.operands]
    return next((value for value in constants if value), 1)


def collectives(module: HloModule) -> list[Collective]:
    """Return all collectives. One that XLA splits over several fusions is counted once."""
    found, seen = [], set()
    for one in executions(module):
        kind = one.instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        if one.computation.startswith(("async_collective", "fused_computation")):
            channel = re.search(r"channel_id=(\d+)", one.instruction.attributes)
            if channel and (channel[1], one.loop) in seen:
                continue
            seen.add((channel and channel[1], one.loop))
        found.append(collective(one.instruction, one.count, one.loop, one.trip_count))
    return found


def collective(
    instruction: Instruction, count: int = 1, loop: str | None = None, trip_count: int | None = None
) -> Collective:
    """Return the collective that an instruction is or starts. Arguments as the attributes of `Collective`."""
    shapes = instruction.shapes
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        operands = len(instruction.operands)
        shapes = shapes[operands : 2 * operands]  # (operands, results, context)
    size = sum(shape.bytes for shape in shapes)
    kind = instruction.opcode.removesuffix("-start")
    group, pairs = replica_group(instruction.attributes), permuted_pairs(instruction.attributes)
    return Collective(kind, size, count, loop, trip_count, group, pairs)


def permuted_pairs(attributes: str) -> tuple[tuple[int, int], ...]:
    """Return the pairs of source and target of a permute; () for any other collective."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    return tuple((int(a), int(b)) for a, b in re.findall(r"(\d+),(\d+)", pairs[1])) if pairs else ()


def replica_group(attributes: str) -> tuple[int, ...]:
    """Return the first replica group of a collective; () where all devices take part or none are named.

    XLA writes groups as lists {{0,1},{2,3}}, as iotas [2,4]<=[4,2]T(1,0), as mesh axes, or as the pairs of a permute.
    """
    pairs = permuted_pairs(attributes)
    if pairs:
        following, group = dict(pairs), [pairs[0][0]]
        while (after := following.get(group[-1])) is not None and after not in group:
            group.append(after)
        return tuple(group)
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return tuple(map(int, listed[1].split(",")))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        groups, sizes = ([int(n) for n in iota[part].split(",")] for part in (1, 2))
        order = [int(n) for n in iota[3].split(",")] if iota[3] else None
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        return tuple(ids.transpose(order).reshape(groups)[0].tolist())
    mesh = re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", attributes)
    if mesh:
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        taken = re.findall(r"'(\w+)'", mesh[2])
        ids = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
        return tuple(ids[tuple(slice(None) if name in taken else 0 for name in axes)].reshape(-1).tolist())
    return ()


def flops(module: HloModule) -> int:
    """Return the FLOPs of all matrix products on one device, 2 per multiply-add.

    Products that XLA rewrites as reductions on the vector unit (one query against the KV cache) and Pallas kernels are
    included.
    """
    return sum(
        one.count
        * (instruction_flops(one.instruction, module.computations[one.computation]) + kernel_flops(one.instruction))
        for one in executions(module)
    )


def kernel_flops(instruction: Instruction) -> int:
    """Return the FLOPs of one Pallas kernel; 0 for any other instruction.

    They are the kernel's own cost_estimate. Splash attention has none: its FLOPs are those of the blocks that the mask
    does not skip.

    Raises:
        ValueError: Another kernel has no cost_estimate.
    """
    if not is_kernel(instruction):
        return 0
    stated = re.search(r'"cost_estimate":\{"flops":"?(\d+)', instruction.attributes)
    return int(stated[1]) if stated else splash_call(instruction).flops


def is_kernel(instruction: Instruction) -> bool:
    """Whether an instruction is a Pallas kernel."""
    return instruction.opcode == "custom-call" and '"tpu_custom_call"' in instruction.attributes


# Number of matrix products of each splash attention kernel: scores and weighted sum; scores, dp and dq; scores, dp, dk
# and dv (and dq in the fused backward kernel).
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


@dataclass(frozen=True)
class SplashCall:
    """One call of a splash attention kernel.

    The grid goes over heads, over blocks of queries and over blocks of keys; "dkv" goes over keys before queries.

    Attributes:
        kind: "fwd", "dq" or "dkv".
        products: Number of matrix products per block.
        operands: Dtype and dimensions of every operand.
        first: Index of the first float operand, the queries. Keys and values follow.
        rows: Queries per block.
        columns: Keys per block.
        visited: Number of blocks of one head that the mask does not skip.
    """

    kind: str
    products: int
    operands: tuple[Shape, ...]
    first: int
    rows: int
    columns: int
    visited: int

    @property
    def _heads(self) -> int:
        return math.prod(self.operands[self.first].dims[:-2])  # of all batch rows

    @property
    def flops(self) -> int:
        """FLOPs of the visited blocks."""
        head_dim = self.operands[self.first].dims[-1]
        return 2 * self.products * self._heads * head_dim * self.visited * self.rows * self.columns

    def times_read(self, index: int) -> float:
        """Return how often an operand is read from HBM, in multiples of its size.

        What belongs to the inner blocks of the grid is read in every block that is visited, the rest once. Several
        heads of queries read the same keys, and every head the same segment ids.
        """
        shape = self.operands[index]
        if index < self.first or len(shape.dims) < 2:
            return 1.0
        queries, keys = (self.operands[self.first + offset].dims[-2] for offset in (0, 1))
        if shape.dtype == "s32":  # segment ids and positions: [8,T] of the inner blocks, [T,128] of the outer ones
            is_inner = shape.dims[-2] == 8
        else:
            is_inner = (index - self.first in (1, 2)) != (self.kind == "dkv")
        blocks = -(-keys // self.columns) if is_inner != (self.kind == "dkv") else -(-queries // self.rows)
        if blocks == 1:
            return 1.0
        return self._heads / math.prod(shape.dims[:-2]) * (self.visited / blocks if is_inner else 1.0)


def splash_call(instruction: Instruction) -> SplashCall:
    """Return what a splash attention kernel works on.

    Raises:
        ValueError: It is another kernel.
    """
    kind = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", instruction.name)
    if not kind:
        raise ValueError(f"the kernel {instruction.name} has no cost_estimate: pass one to pallas_call")
    settings = {name: int(size) for name, size in re.findall(r"(block_\w+)\W+(\d+)", instruction.attributes)}
    suffix = "" if kind[1] == "fwd" else f"_{kind[1]}"
    rows, columns = settings[f"block_q{suffix}"], settings[f"block_kv{suffix}"]
    fused = kind[1] == "dkv" and re.search(r"use_fused_bwd_kernel\W+true", instruction.attributes)
    constraints = _attribute(instruction, r"operand_layout_constraints=\{(.*?)\}\}")[1]
    shapes = re.findall(r"(\w+)\[([\d,]+)\]", constraints)
    operands = tuple(Shape(dtype, tuple(int(size) for size in dims.split(","))) for dtype, dims in shapes)
    first = next(index for index, shape in enumerate(operands) if shape.dtype in ("bf16", "f32"))
    length, slots = (operands[first + offset].dims[-2] for offset in (0, 1))
    # A causal mask is computed in the kernel from the query positions, one more integer operand; blocks above the
    # diagonal are skipped.
    integers = sum(shape.dtype == "s32" for shape in operands[first:])
    causal = integers > (2 if "segmented" in instruction.name else 0)
    visited = sum(
        not causal or column * columns < (row + 1) * rows
        for row in range(-(-length // rows))
        for column in range(-(-slots // columns))
    )
    products = _SPLASH_PRODUCTS[kind[1]] + bool(fused)
    return SplashCall(kind[1], products, operands, first, rows, columns, visited)


def _attribute(instruction: Instruction, pattern: str) -> re.Match[str]:
    match = re.search(pattern, instruction.attributes)
    if match is None:
        raise ValueError(f"{instruction.opcode} {instruction.name} has no {pattern.partition('=')[0]} in its HLO text")
    return match


def instruction_flops(instruction: Instruction, computation: tuple[Instruction, ...]) -> int:
    """Return the FLOPs of one `dot`, `convolution` or reduction that was a dot; 0 for any other instruction.

    Args:
        instruction: The instruction.
        computation: All instructions of the computation that contains it.
    """
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
        contracted = _attribute(instruction, r"lhs_contracting_dims=\{([\d,]*)\}")
        return 2 * math.prod(result) * math.prod(left[int(d)] for d in contracted[1].split(",") if d)
    return _convolution_flops(instruction, left, right)


def _convolution_flops(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    # dim_labels name each axis: b batch, f features, digits are window axes; i and o of the kernel.
    result = instruction.shapes[0].dims
    labels = _attribute(instruction, r"dim_labels=(\w+)_(\w+)->(\w+)")
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", _attribute(instruction, r"window=\{([^}]*)\}|$")[1] or ""))
    pairs = 1
    for axis in (letter for letter in labels[3] if letter.isdigit()):
        dim = int(axis)
        stride, dilate, spread = (_window_entry(window, key, dim) for key in ("stride", "lhs_dilate", "rhs_dilate"))
        low = int(window["pad"].split("x")[dim].split("_")[0]) if "pad" in window else 0
        size, taps = left[labels[1].index(axis)], right[labels[2].index(axis)]
        pairs *= sum(
            0 <= p <= (size - 1) * dilate and p % dilate == 0
            for o in range(result[labels[3].index(axis)])
            for p in (o * stride + tap * spread - low for tap in range(taps))
        )
    outputs = result[labels[3].index("b")] * result[labels[3].index("f")]
    return 2 * outputs * right[labels[2].index("i")] * pairs


def _window_entry(window: dict[str, str], key: str, dim: int) -> int:
    return int(window[key].split("x")[dim]) if key in window else 1


def copies(module: HloModule, at_least: int) -> list[tuple[Execution, int]]:
    """Return the copies in HBM of arrays of at least that many bytes, with their bytes. A good program has none."""
    # A copy inside a fusion is how the fusion reads its operand. A fusion that consists of a copy counts, unless its
    # result aliases its operand.
    inside = {
        name
        for lines in module.computations.values()
        for line in lines
        if line.opcode == "fusion"
        for name in line.called("calls")
    }
    found = []
    for one in executions(module):
        line = one.instruction
        if one.computation in inside or not line.shapes or line.shapes[0].on_chip:
            continue
        opcode = line.opcode
        if opcode == "fusion" and "output_to_operand_aliasing" not in line.attributes:
            fused = module.computations[line.called("calls")[0]]
            opcode = next(inner.opcode for inner in fused if inner.is_root)
        if opcode in ("copy", "copy-start", "transpose") and line.shapes[0].bytes >= at_least:
            found.append((one, line.shapes[0].bytes))
    return found
