"""The time that a compiled program takes, from its schedule: the optimized HLO walked in the order in which it runs.

A roofline lets everything overlap. Here instructions run one after the other, and each takes the longer of its FLOPs at
the chip's peak and its bytes at HBM bandwidth:

* Arrays in VMEM or SMEM cost no HBM traffic. A fusion reads what it slices and writes what it updates.
* A synchronous collective takes its time on the wire, and everything else waits. The network is one resource, but
  permutes that use other links, such as the two directions of a ring, run at the same time.
* An asynchronous collective, copy or slice runs beside the instructions between its start and its done. Only what is
  left at the done is exposed. Copies have the HBM bandwidth that the instructions beside them leave.
* The body of a loop counts once per trip; where the trip count is not known (the decode loop), once.

Left out are fixed costs of small instructions, work of the vector unit, contention and scalar work, so a real program
takes longer. XLA's own estimates of cycles, which have the first two, are added up beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

from internvl_jax.aot import hlo
from internvl_jax.aot.hlo import HloModule, Instruction
from internvl_jax.aot.network import Transfer
from internvl_jax.aot.topology import Link

# Opcodes that move nothing: they name, group or reinterpret arrays.
NAMES = ("get-tuple-element", "bitcast", "async-update")
FREE = (*NAMES, "parameter", "constant", "tuple", "after-all", "opt-barrier", "add-dependency")
SLICES = ("dynamic-slice", "slice", "gather")
# XLA splits a collective over fusions: one that starts it, some that compute beside it, one that waits for it.
ASYNC_START, ASYNC_STEP, ASYNC_DONE = "async-collective-start", "async_collective_fusion", "async-collective-done"
NUM_COSTLIEST = 10  # instructions that a schedule names

Wire = Callable[[hlo.Collective], Transfer]  # one execution of a collective


@dataclass(frozen=True)
class Rates:
    """What one device does in a second, and how long a collective takes.

    Attributes:
        flops: FLOPs per second of the matrix unit.
        hbm_bandwidth: Bytes per second.
        wire: The time of one execution of a collective, and the links that it uses.
    """

    flops: float
    hbm_bandwidth: float
    wire: Wire


@dataclass(frozen=True)
class Cost:
    """What one instruction costs in total, over all of its executions.

    Attributes:
        name: Name of the instruction in the HLO text.
        op_name: Name of the operation in the model, "" where XLA has none.
        seconds: Time of the schedule that it takes; of a done, what is exposed.
        count: Number of executions.
        is_copy: Whether it waits for an asynchronous copy.
    """

    name: str
    op_name: str
    seconds: float
    count: int
    is_copy: bool = False


@dataclass(frozen=True)
class Totals:
    """What the instructions of a program, or of a computation, add up to on one device.

    Attributes:
        seconds: Time of the schedule.
        compute_seconds: Time that the matrix products alone take.
        hbm_bytes: Bytes between HBM and the chip.
        network_seconds: Times of all collectives on the wire, added up, also of permutes that run at once.
        exposed_network_seconds: Time in which a collective runs and nothing else does.
        hidden_network_seconds: Time in which a collective and other instructions run.
        exposed_latency_seconds: The part of the exposed time that is latency.
        exposed_copy_seconds: Time of waiting for asynchronous copies.
        estimated_cycles: XLA's own estimates added up; 0 where the HLO has none.
    """

    seconds: float = 0.0
    compute_seconds: float = 0.0
    hbm_bytes: int = 0
    network_seconds: float = 0.0
    exposed_network_seconds: float = 0.0
    hidden_network_seconds: float = 0.0
    exposed_latency_seconds: float = 0.0
    exposed_copy_seconds: float = 0.0
    estimated_cycles: int = 0


@dataclass(frozen=True)
class Schedule(Totals):
    """The time of a program, what it is made of, and where it goes.

    Attributes:
        instructions_per_layer: Instructions on arrays that run once or more per layer.
        copies_per_layer: Asynchronous copies and slices among the layers.
        costliest: The instructions that take the most time.
        estimated_seconds: XLA's estimated cycles at the chip's clock rate; None where one of them is not known.
        ratio_to_ideal: `seconds` over the time that the program needs at least; None where that is not known.
    """

    instructions_per_layer: float = 0.0
    copies_per_layer: float = 0.0
    costliest: tuple[Cost, ...] = ()
    estimated_seconds: float | None = None
    ratio_to_ideal: float | None = None


def walk(module: HloModule, rates: Rates, num_layers: int = 1) -> Schedule:
    """Return the schedule of a program.

    Args:
        module: Its optimized, scheduled HLO.
        rates: Rates of one device.
        num_layers: Length of the layer scan. What runs a multiple of it belongs to the layers.
    """
    time = _Walker(module, rates).walk(module.entry)
    layers = [cost for cost in time.costs if cost.count % num_layers == 0]
    copies = sum(cost.count for cost in layers if cost.is_copy)
    costliest = sorted(time.costs, key=lambda cost: -cost.seconds)[:NUM_COSTLIEST]
    return Schedule(
        **{part.name: getattr(time, part.name) for part in fields(Totals)},
        instructions_per_layer=(sum(cost.count for cost in layers) - copies) / num_layers,
        copies_per_layer=copies / num_layers,
        costliest=tuple(cost for cost in costliest if cost.seconds > 0),
    )


@dataclass(frozen=True)
class _Time(Totals):
    """The totals of a computation, with the costs of all its instructions."""

    costs: tuple[Cost, ...] = ()

    def __add__(self, other: _Time) -> _Time:
        return _Time(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def times(self, count: int) -> _Time:
        """The time of so many repetitions."""
        numbers = {part.name: getattr(self, part.name) * count for part in fields(Totals)}
        costs = (replace(cost, seconds=cost.seconds * count, count=cost.count * count) for cost in self.costs)
        return replace(self, **numbers, costs=tuple(costs))


class _Walker:
    """Walks computations, each once: a loop's body takes the same time in every trip."""

    def __init__(self, module: HloModule, rates: Rates):
        self._module, self._rates = module, rates
        self._walked: dict[str, _Time] = {}

    def walk(self, name: str) -> _Time:
        """Return the time of a computation."""
        if name not in self._walked:
            self._walked[name] = self._walk(_Computation(self._module, name))
        return self._walked[name]

    def _walk(self, computation: _Computation) -> _Time:
        clock = _Clock(self._rates.hbm_bandwidth)
        for line in computation.lines:
            called = self._called(line)
            if called is not None:
                clock.run_computation(called)
            elif line.opcode.endswith("-done") or line.name.startswith(ASYNC_DONE):
                clock.finish(line, computation.start_of(line))
            elif (collective := computation.collective(line)) is not None:
                start = computation.start_of(line) if _is_start(line) else None
                clock.communicate(line, self._rates.wire(collective), start)
            elif _is_start(line):
                clock.copy(line, computation.copied_bytes(line))
            elif not computation.is_free(line):
                clock.run(line, computation.flops(line) / self._rates.flops, computation.traffic(line))
        return clock.time

    def _called(self, line: Instruction) -> _Time | None:
        """The time of the computation that a loop, a conditional or a call runs; None for other instructions."""
        if line.opcode == "while":
            (body,) = line.called("body")
            return self.walk(body).times(hlo.trip_count(self._module, line) or 1)
        if line.opcode == "conditional":
            return self.walk((line.called("branch_computations") or line.called("false_computation"))[0])
        return self.walk(line.called("to_apply")[0]) if line.opcode == "call" else None


@dataclass
class _Clock:
    """The time within one computation.

    Attributes:
        hbm_bandwidth: Bytes per second.
        time: What has passed.
        pending_copies: Bytes that are still to move, by the name of an asynchronous copy, oldest first.
        arrivals: When an asynchronous collective is complete, and how much of its time is latency, by its name.
        link_free: When each link is free of permutes.
        network_free: When the whole network is free of other collectives.
        network_busy: Until when anything is in the network.
    """

    hbm_bandwidth: float
    time: _Time = field(default_factory=_Time)
    pending_copies: dict[str, float] = field(default_factory=dict)
    arrivals: dict[str, tuple[float, float]] = field(default_factory=dict)
    link_free: dict[Link, float] = field(default_factory=dict)
    network_free: float = 0.0
    network_busy: float = 0.0

    def run(self, line: Instruction, compute: float, traffic: int) -> None:
        """Run an instruction of so many seconds of compute and bytes of traffic."""
        memory = traffic / self.hbm_bandwidth
        seconds = max(compute, memory)
        self._move_copies(seconds - memory)
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line.attributes)
        self.time += _Time(
            seconds=seconds,
            compute_seconds=compute,
            hbm_bytes=traffic,
            estimated_cycles=int(cycles[1]) if cycles else 0,
            costs=(_cost(line, seconds),),
        )

    def run_computation(self, called: _Time) -> None:
        """Run a computation to its end."""
        self._move_copies(max(called.seconds - called.hbm_bytes / self.hbm_bandwidth, 0.0))
        self.time += called

    def communicate(self, line: Instruction, transfer: Transfer, start: str | None) -> None:
        """Run a collective: to its end, or from `start` on if it has that name."""
        shared = [self.link_free.get(link, 0.0) for link in transfer.links] or self.link_free.values()
        begin = max(self.time.seconds, self.network_free, *shared)
        end = begin + transfer.seconds
        if transfer.links:
            self.link_free.update(dict.fromkeys(transfer.links, end))
        else:
            self.network_free = end
        # What of this is exposed is subtracted when it is awaited.
        hidden = max(end - max(begin, self.network_busy), 0.0)
        self.network_busy = max(end, self.network_busy)
        self.time += _Time(network_seconds=transfer.seconds, hidden_network_seconds=hidden)
        if start is None:
            self._wait(line, end, transfer.latency_seconds)
        else:
            self.arrivals[start] = (end, transfer.latency_seconds)

    def copy(self, line: Instruction, traffic: int) -> None:
        """Start an asynchronous copy."""
        self.pending_copies[line.name] = traffic
        self.time += _Time(hbm_bytes=traffic)

    def finish(self, line: Instruction, start: str) -> None:
        """Wait for what the instruction `start` has started."""
        if start in self.arrivals:
            self._wait(line, *self.arrivals.pop(start))
        elif start in self.pending_copies:
            # Copies are moved in the order of their starts, so those before this one are complete then too.
            names = list(self.pending_copies)
            seconds = 0.0
            for name in names[: names.index(start) + 1]:
                seconds += self.pending_copies[name] / self.hbm_bandwidth
                self.pending_copies[name] = 0.0
            del self.pending_copies[start]
            cost = replace(_cost(line, seconds), is_copy=True)
            self.time += _Time(seconds=seconds, exposed_copy_seconds=seconds, costs=(cost,))

    def _wait(self, line: Instruction, end: float, latency: float) -> None:
        exposed = max(end - self.time.seconds, 0.0)
        self._move_copies(exposed)
        self.time += _Time(
            seconds=exposed,
            exposed_network_seconds=exposed,
            hidden_network_seconds=-exposed,
            exposed_latency_seconds=min(exposed, latency),
            costs=(_cost(line, exposed),),
        )

    def _move_copies(self, seconds: float) -> None:
        """Move pending copies while HBM has nothing else to do."""
        size = seconds * self.hbm_bandwidth
        for name, left in self.pending_copies.items():
            moved = min(left, size)
            self.pending_copies[name] = left - moved
            size -= moved


def _cost(line: Instruction, seconds: float) -> Cost:
    op_name = re.search(r'op_name="([^"]*)"', line.attributes)
    return Cost(line.name, op_name[1] if op_name else "", seconds, 1)


def _is_start(line: Instruction) -> bool:
    return line.opcode.endswith("-start") or line.name.startswith(ASYNC_START)


class _Computation:
    """The instructions of one computation: what each reads, writes, computes and communicates."""

    def __init__(self, module: HloModule, name: str):
        self._module, self.name = module, name
        self.lines = module.computations.get(name, ())
        self._by_name = {line.name: line for line in self.lines}

    @cached_property
    def _root(self) -> Instruction:
        return next(line for line in self.lines if line.is_root)

    def _fused(self, line: Instruction) -> _Computation | None:
        """The computation of a fusion or of an asynchronous instruction."""
        called = line.called("calls", "to_apply") if line.opcode in ("fusion", "async-start", "call-start") else []
        return _Computation(self._module, called[0]) if called else None

    def is_free(self, line: Instruction) -> bool:
        """Whether an instruction moves no array: bitcasts, scalars, a custom call that names a buffer."""
        if line.opcode == "custom-call":
            return not hlo.is_kernel(line)
        fused = self._fused(line)
        if fused is not None:
            return all(inner.opcode in FREE for inner in fused.lines)
        return line.opcode in FREE or all(not shape.dims for shape in line.shapes)

    def flops(self, line: Instruction) -> int:
        """FLOPs of the matrix products of an instruction."""
        fused = self._fused(line)
        if fused is not None:
            return sum(fused.flops(inner) for inner in fused.lines)
        return hlo.instruction_flops(line, self.lines) + hlo.kernel_flops(line)

    # Communication.

    def collective(self, line: Instruction) -> hlo.Collective | None:
        """The collective that an instruction is, starts, or fuses; None for other instructions."""
        if line.opcode.removesuffix("-start") in hlo.COLLECTIVES:
            return hlo.collective(line)
        fused = self._fused(line)
        if fused is None or fused.name.startswith(ASYNC_STEP):
            return None
        inner = next((found for part in fused.lines if (found := fused.collective(part))), None)
        if inner is not None and inner.kind == "all-reduce" and any(x.opcode == "dynamic-slice" for x in fused.lines):
            return replace(inner, kind="reduce-scatter", bytes=sum(shape.bytes for shape in line.shapes))
        return inner

    def start_of(self, line: Instruction) -> str:
        """The name of what an instruction starts or waits for: a channel, or the instruction that started it."""
        fused = self._fused(line) if line.opcode == "fusion" else None
        for part in fused.lines if fused is not None else ():
            if channel := re.search(r"channel_id=\d+", part.attributes):
                return channel[0]
        if _is_start(line):
            return line.name
        name = line.operands[0]
        while (before := self._by_name.get(name)) is not None and before.opcode in NAMES:
            name = before.operands[0]
        return name

    # Traffic.

    def copied_bytes(self, line: Instruction) -> int:
        """Bytes of HBM traffic of an asynchronous copy, slice or fusion."""
        fused = self._fused(line)
        if fused is not None:
            return fused._traffic_as_fusion(self._operand_shapes(line))
        if line.opcode == "copy-start":  # (result, operand, context)
            return _in_hbm(line.shapes[0]) + _in_hbm(line.shapes[1])
        moved = line.shapes[len(line.operands)]  # ((operands), result, context)
        if line.opcode == "dynamic-update-slice-start":
            return _in_hbm(line.shapes[1]) + _in_hbm(replace(line.shapes[1], on_chip=moved.on_chip))
        return _in_hbm(moved) + _in_hbm(replace(moved, on_chip=line.shapes[0].on_chip))

    def traffic(self, line: Instruction) -> int:
        """Bytes of HBM traffic of an instruction that runs by itself."""
        operands = self._operand_shapes(line)
        fused = self._fused(line)
        if fused is not None:
            return fused._traffic_as_fusion(operands)
        result = sum(map(_in_hbm, line.shapes))
        if line.opcode == "custom-call":
            stated = re.search(r'"bytes_accessed":"?(\d+)', line.attributes)
            return int(stated[1]) if stated else result + _splash_reads(line, operands)
        if line.opcode in SLICES:
            read = result if operands and not operands[0].on_chip else 0
            return result + min(read, _in_hbm(operands[0])) + sum(map(_in_hbm, operands[1:]))
        if line.opcode == "dynamic-update-slice":
            update = _in_hbm(replace(operands[1], on_chip=line.shapes[0].on_chip))
            return update + _in_hbm(operands[1])
        return result + sum(map(_in_hbm, operands))

    def _operand_shapes(self, line: Instruction) -> list[hlo.Shape]:
        nothing = hlo.Shape("pred", (0,))  # of a token
        lines = (self._by_name.get(name) for name in line.operands)
        return [operand.shapes[0] if operand is not None and operand.shapes else nothing for operand in lines]

    def _traffic_as_fusion(self, operands: list[hlo.Shape]) -> int:
        """Bytes of HBM traffic of a fusion of these instructions."""
        reads = 0
        for line in self.lines:
            if line.opcode == "parameter":
                index = int(line.operands[0])
                if index < len(operands) and not operands[index].on_chip:
                    reads += min(self._bytes_read(line), operands[index].bytes)
        return reads + self._bytes_written(self._root)

    def _bytes_read(self, line: Instruction) -> int:
        """Bytes of an array that the instructions of a fusion read: all of it, or slices."""
        total = 0
        for user in self.lines:
            if line.name not in user.operands:
                continue
            if user.opcode in hlo.COLLECTIVES:
                continue  # a step of a collective, whose time is the network's
            in_place = user.opcode == "fusion" and "output_to_operand_aliasing={{}: (0, {})}" in user.attributes
            if user.opcode in ("bitcast", "get-tuple-element") or in_place:  # in place: other tiles of the same array
                total += self._bytes_read(user)
            elif user.opcode in SLICES and user.operands[0] == line.name:
                total += user.shapes[0].bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == line.name:
                continue  # updated in place
            elif (fused := self._fused(user)) is not None:
                index = user.operands.index(line.name)
                total += sum(
                    fused._bytes_read(inner)
                    for inner in fused.lines
                    if inner.opcode == "parameter" and int(inner.operands[0]) == index
                )
            else:
                return line.shapes[0].bytes
        return total

    def _bytes_written(self, line: Instruction) -> int:
        """Bytes that the root of a fusion writes to HBM."""
        if line.opcode == "tuple":
            return sum(self._bytes_written(self._by_name[name]) for name in line.operands)
        if not line.shapes or all(shape.on_chip for shape in line.shapes):
            return 0
        source = line
        while source.opcode == "bitcast":
            source = self._by_name[source.operands[0]]
        if source.opcode == "dynamic-update-slice":
            return self._by_name[source.operands[1]].shapes[0].bytes
        return 0 if line.opcode in ("parameter", "custom-call", *hlo.COLLECTIVES) else sum(map(_in_hbm, line.shapes))


def _splash_reads(line: Instruction, operands: list[hlo.Shape]) -> int:
    """Bytes of HBM that a splash attention kernel reads."""
    call = hlo.splash_call(line)
    return round(sum(call.times_read(index) * _in_hbm(shape) for index, shape in enumerate(operands)))


def _in_hbm(shape: hlo.Shape) -> int:
    return 0 if shape.on_chip else shape.bytes
