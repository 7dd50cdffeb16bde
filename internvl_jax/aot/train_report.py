"""Memory, FLOPs, collectives and rooflines of a training step, compiled ahead of time for a TPU slice.

The step is the trainer's own, lowered for a recipe; see `compile_report` for where each figure comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from internvl_jax.aot.compiled_program import (
    beside_ideal,
    compile_program,
    format_gib,
    format_memory,
    format_schedule,
    format_work,
    ideal_seconds,
    mesh_name,
    roofline_seconds,
    write_hlo,
)
from internvl_jax.aot.flags import DEFAULT, compiler_flags
from internvl_jax.aot.schedule import Schedule
from internvl_jax.aot.topology import GIB, Topology, parse_topology
from internvl_jax.aot.workload import mesh_over, read_config
from internvl_jax.config import ChatConfig
from internvl_jax.data.batch import Batch
from internvl_jax.inference.loading import abstract_for_running
from internvl_jax.parallel import mesh as mesh_lib
from internvl_jax.parallel.partitioning import BATCH, fit_spec
from internvl_jax.training.context import REMAT, TrainContext, TrainSettings
from internvl_jax.training.initialization import init_state
from internvl_jax.training.mesh_placement import MeshPlacement
from internvl_jax.training.recipes import Recipe, recipe_of
from internvl_jax.training.runs import costs
from internvl_jax.training.state import State
from internvl_jax.training.step import make_step

# The slices and recipes of the table in docs/training.md.
SLICES = ("v5e-8", "v5e-16", "v5e-32", "v5e-64", "v6e-8", "v6e-16", "v5p-8", "v5p-16")
RECIPES = ("stage1", "stage2", "full", "lora")
STEPS = 1000  # length of the learning rate schedule; any number compiles to the same program

Log = Callable[[str], None]


@dataclass(frozen=True)
class MemoryConfiguration:
    """Where a training step trades memory for precision or compute: dtype of trained parameters, remat policy."""

    param_dtype: str
    remat: str


# In order of preference: trained parameters in float32, and little recomputation.
MEMORY_CONFIGURATIONS = (
    MemoryConfiguration("float32", "dots"),
    MemoryConfiguration("float32", "full"),
    MemoryConfiguration("bfloat16", "full"),
)


@dataclass(frozen=True)
class TrainRequest:
    """What a report on a training step is asked for, as a user writes it.

    Attributes:
        topology: TPU slice as `parse_topology` reads it.
        preset: Name in `config.PRESETS`, or a directory with a config.json.
        recipe: Name in `training.recipes.RECIPES`.
        mesh: Mesh as `mesh_lib.make_mesh` reads it. None puts all devices on the fsdp axis.
        batch: Rows of a micro-batch over all devices. None is one row per device of the data and fsdp axes.
        length: Tokens per row.
        images: Images per row. None is one, or none where the model has no vision tower.
        remat: Rematerialization policy: "full", "dots" or "none".
        param_dtype: Dtype of trained parameters. Optimizer moments are float32; frozen parameters are in `dtype`.
        dtype: Computation dtype.
        vision: How the vision tower is partitioned, as in `WorkloadRequest`.
        flags: Compiler flags, as `flags.compiler_flags` reads them.
    """

    topology: str
    preset: str = "internvl_chat_v1_1"
    recipe: str = "stage2"
    mesh: str | None = None
    batch: int | None = None
    length: int = 2048
    images: int | None = None
    remat: str = "full"
    param_dtype: str = "float32"
    dtype: str = "bfloat16"
    vision: str | None = None
    flags: str = DEFAULT


@dataclass(frozen=True)
class TrainWorkload:
    """A validated request: the training step of a recipe on the mesh of a slice."""

    request: TrainRequest
    config: ChatConfig
    topology: Topology
    mesh: Mesh
    context: TrainContext
    batch: int
    images: int
    flags: Mapping[str, str]

    @property
    def batch_shape(self) -> costs.BatchShape:
        """Size of the micro-batch over all devices."""
        return costs.BatchShape(self.batch, self.request.length, self.batch * self.images)

    @property
    def ideal_flops(self) -> float:
        """FLOPs of a step on all devices; rematerialized computation is not counted."""
        return costs.step_flops(self.config, self.context.recipe, self.batch_shape)

    @property
    def estimated_bytes(self) -> int:
        """Estimate of the bytes per chip, by arithmetic."""
        state, activations = costs.memory_per_device(self.context, self.batch_shape, self.request.param_dtype)
        return self.topology.chip.devices * (state + activations)


@dataclass(frozen=True)
class TrainReport:
    """A training step compiled for one mesh. Figures are per chip; None where the step does not fit.

    Attributes:
        topology: Slice as the compiler names it.
        chips: Number of chips.
        recipe: Name of the recipe.
        mesh: Mesh as the option --mesh takes it.
        vision: How the vision tower is partitioned.
        batch: Rows of a micro-batch over all devices.
        length: Tokens per row.
        images: Images per row.
        remat: Rematerialization policy.
        param_dtype: Dtype of trained parameters.
        dtype: Computation dtype.
        flags: Compiler flags.
        hbm_bytes: Bytes of arguments, outputs, temporaries, aliased and peak; only the peak where it does not fit.
        hbm_capacity_bytes: HBM that a program can use.
        fits: Whether the step compiles within that.
        flops_per_chip: FLOPs of all matrix products in the compiled step.
        ideal_flops_per_chip: FLOPs that the step needs.
        collectives: Per kind: kind, count_per_layer, bytes_per_layer, count and bytes (of the results).
        roofline_seconds: Lower bounds by compute, hbm and network; empty where the step does not fit.
        ideal_seconds: Time that the step needs at least.
        schedule: Time of the schedule (`schedule.Schedule`); None where the step does not fit.
        compile_seconds: Time that compilation took.
    """

    topology: str
    chips: int
    recipe: str
    mesh: str
    vision: str
    batch: int
    length: int
    images: int
    remat: str
    param_dtype: str
    dtype: str
    flags: dict[str, str]
    hbm_bytes: dict[str, int]
    hbm_capacity_bytes: int
    fits: bool
    flops_per_chip: float | None
    ideal_flops_per_chip: float
    collectives: list[dict[str, Any]]
    roofline_seconds: dict[str, float]
    ideal_seconds: float
    schedule: Schedule | None
    compile_seconds: float

    @property
    def step_seconds(self) -> float:
        """Lower bound on the time of a step, with perfect overlap of compute, HBM and network.

        Infinite where the step does not fit.
        """
        return max(self.roofline_seconds.values(), default=math.inf)

    @property
    def scheduled_seconds(self) -> float:
        """Time of a step by its schedule. Infinite where the step does not fit."""
        return math.inf if self.schedule is None else self.schedule.seconds

    @property
    def model_flops_utilization(self) -> float:
        """FLOPs that the step needs, over those of the chip's peak in the time of the schedule."""
        peak = parse_topology(self.topology).chip.bf16_flops
        return self.ideal_flops_per_chip / (self.scheduled_seconds * peak)

    @property
    def exposed_network(self) -> float:
        """Part of the schedule's time in which everything waits for the network; NaN where the step does not fit."""
        if self.schedule is None:
            return math.nan
        return self.schedule.exposed_network_seconds / self.schedule.seconds

    @property
    def flops_ratio(self) -> float:
        """FLOPs of the compiled step over those that it needs; NaN where the step does not fit."""
        return math.nan if self.flops_per_chip is None else self.flops_per_chip / self.ideal_flops_per_chip

    @property
    def collective_bytes(self) -> int:
        """Bytes of the results of all collectives."""
        return sum(one["bytes"] for one in self.collectives)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)


def make_train_workload(request: TrainRequest) -> TrainWorkload:
    """Validate a request and describe the devices and the mesh.

    Raises:
        ValueError: A value is not legal; the message lists the legal ones. `TopologyError` and `MeshError` are
            ValueErrors.
        ImportError: libtpu is not installed.
    """
    topology, config = parse_topology(request.topology), read_config(request.preset)
    if config.text is None or (config.vision is None) != (config.projector is None):
        raise ValueError(
            f"{request.preset} is neither a chat model nor a language model: --program train needs a language model, "
            "and with a vision tower also a projector"
        )
    recipe = _recipe_for(request, config)
    images = int(config.vision is not None) if request.images is None else request.images
    if images and config.vision is None:
        raise ValueError(f"{request.preset} has no vision tower: leave out --images-per-row")
    if request.remat not in REMAT:
        raise ValueError(f"remat {request.remat!r} is not one of {', '.join(REMAT)}")
    if not 2 <= request.length <= config.text.max_position_embeddings:
        raise ValueError(f"a row has 2 to {config.text.max_position_embeddings} tokens, not {request.length}")
    if config.vision is not None and not 0 <= images * config.tokens_per_image < request.length:
        raise ValueError(
            f"{images} images of {config.tokens_per_image} tokens do not leave room for text in a row of "
            f"{request.length} tokens"
        )
    num_devices = topology.chips * topology.chip.devices
    mesh = mesh_over(topology, request.mesh or f"fsdp={num_devices}", config)
    batch = mesh.shape["data"] * mesh.shape["fsdp"] if request.batch is None else request.batch
    mesh_lib.validate_mesh(config, mesh, batch)
    if batch < 1:
        raise ValueError(f"a batch has at least one row, not {batch}")
    settings = TrainSettings(STEPS, dtype=request.dtype, remat=request.remat)
    context = TrainContext(recipe, settings, MeshPlacement(config, mesh, request.vision))
    flags = compiler_flags(request.flags, topology.chip.name)
    return TrainWorkload(request, config, topology, mesh, context, batch, images, flags)


def _recipe_for(request: TrainRequest, config: ChatConfig) -> Recipe:
    """The recipe of that name, for the parts that the model has."""
    recipe = recipe_of(request.recipe)
    if config.vision is not None:
        return recipe
    train = tuple(part for part in recipe.train if part == "language_model")
    adapters = {part: lora for part, lora in recipe.lora.items() if part == "language_model"}
    if not train and not adapters:
        raise ValueError(
            f"recipe {recipe.name!r} trains {', '.join(recipe.train)}, which {request.preset} does not have"
        )
    return replace(recipe, train=train, lora=adapters)


def abstract_arguments(workload: TrainWorkload) -> tuple[State, Any, Batch]:
    """Return the arguments of the step (state, frozen parameters, batch) as ShapeDtypeStructs with shardings."""
    context, request = workload.context, workload.request
    placement = context.placement

    def stored(name: str, part: Any) -> Any:
        dtype = jnp.dtype(request.param_dtype if name in context.recipe.train else request.dtype)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), part)

    params = {name: stored(name, part) for name, part in abstract_for_running(workload.config, jnp.float32).items()}
    params = jax.eval_shape(placement.pad, params)
    state, frozen = jax.eval_shape(partial(init_state, context=context), params)

    def with_sharding(leaf: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    frozen = jax.tree.map(with_sharding, frozen, placement.param_shardings(frozen)) if frozen else {}
    return jax.tree.map(with_sharding, state, placement.state_shardings(state)), frozen, _abstract_batch(workload)


def _abstract_batch(workload: TrainWorkload) -> Batch:
    config, request, mesh = workload.config, workload.request, workload.mesh

    def abstract(shape: tuple[int, ...], dtype: Any) -> Any:
        spec = fit_spec(P(None, BATCH, *[None] * (len(shape) - 2)), shape, mesh.shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    tokens = abstract((1, workload.batch, request.length), jnp.int32)
    pixels: tuple[int, ...] = (3, 0, 0)
    if config.vision is not None:
        pixels = (config.vision.num_channels, *[config.required_image_size] * 2)
    return Batch(
        input_ids=tokens,
        labels=tokens,
        segment_ids=tokens,
        positions=tokens,
        image_index=tokens,
        pixel_values=abstract((1, workload.batch * workload.images, *pixels), jnp.float32),
    )


def make_train_report(workload: TrainWorkload, dump_hlo: Path | None = None) -> TrainReport:
    """Compile the training step and analyze it.

    Args:
        workload: The step.
        dump_hlo: Directory for the optimized HLO, train.txt.
    """
    chip, mesh, request = workload.topology.chip, workload.mesh, workload.request
    step = make_step(workload.context)
    num_layers = workload.config.required_text.num_hidden_layers
    with jax.set_mesh(mesh):
        lowered = step.lower(*abstract_arguments(workload))
        compiled = compile_program(workload.topology, mesh, lowered, num_layers, workload.flags)
    if dump_hlo is not None:
        write_hlo(compiled, dump_hlo, "train")
    memory = compiled.memory
    traffic = memory["arguments"] + memory["outputs"] if compiled.fits else 0  # the state is read and written
    roofline = roofline_seconds(compiled, chip, traffic)
    ideal_flops = workload.ideal_flops / workload.topology.chips
    ideal = ideal_seconds(ideal_flops, roofline, chip) if compiled.fits else 0.0
    return TrainReport(
        topology=workload.topology.name,
        chips=workload.topology.chips,
        recipe=workload.context.recipe.name,
        mesh=mesh_name(mesh),
        vision=workload.context.placement.vision,
        batch=workload.batch,
        length=request.length,
        images=workload.images,
        remat=request.remat,
        param_dtype=request.param_dtype,
        dtype=request.dtype,
        flags=dict(workload.flags),
        hbm_bytes=memory,
        hbm_capacity_bytes=chip.hbm_bytes,
        fits=compiled.fits,
        flops_per_chip=compiled.flops,
        ideal_flops_per_chip=ideal_flops,
        collectives=compiled.collectives,
        roofline_seconds=roofline,
        ideal_seconds=ideal,
        schedule=beside_ideal(compiled.schedule, ideal),
        compile_seconds=compiled.compile_seconds,
    )


def format_train_report(report: TrainReport) -> list[str]:
    """Return the lines of a report for the terminal."""
    images = {0: "no images", 1: "1 image each"}.get(report.images, f"{report.images} images each")
    lines = [
        f"train {report.recipe}: {report.topology} ({report.chips} chips), {report.mesh}, {report.batch} rows of "
        f"{report.length} tokens with {images}, remat {report.remat}, {report.param_dtype} parameters, "
        f"{report.dtype} compute" + (f", {len(report.flags)} compiler flags" if report.flags else "")
    ]
    excess = report.hbm_bytes["peak"] - report.hbm_capacity_bytes
    advice = () if report.fits else (f"{format_gib(excess)} GiB more than there are: see --plan",)
    lines += format_memory(report.hbm_bytes, report.hbm_capacity_bytes, report.fits, advice)
    lines += format_work(report.flops_per_chip, report.ideal_flops_per_chip, report.collectives)
    if report.fits:
        times = ", ".join(f"{name} {1e3 * seconds:.4g}" for name, seconds in report.roofline_seconds.items())
        tokens = report.batch * report.length / report.step_seconds
        lines.append(f"  roofline ms  {times}: at most {tokens:,.0f} tokens/s")
        lines += format_schedule(report.schedule, report.ideal_seconds)
    return [*lines, f"  compiled in  {report.compile_seconds:.1f} s"]


def plan_training(
    request: TrainRequest,
    log: Log = lambda line: None,
    compile_step: Callable[[TrainWorkload], TrainReport] = make_train_report,
) -> TrainReport | None:
    """Find a memory configuration and a micro-batch that fit.

    The first of `MEMORY_CONFIGURATIONS` that fits with one row per device is chosen, then the largest power of two of
    rows that fits. Arithmetic (`training.runs.costs`) proposes, the compiler decides.

    Args:
        request: Its batch, remat and param_dtype are ignored.
        log: Called with a line before each compilation.
        compile_step: Compiles and analyzes a step.

    Returns:
        The report of the largest micro-batch, or None where nothing fits.
    """

    def compiled(workload: TrainWorkload) -> TrainReport:
        asked = workload.request
        log(
            f"compiling {asked.recipe} for {workload.topology.name}, {mesh_name(workload.mesh)}, "
            f"{workload.batch} rows of {asked.length}, remat {asked.remat}, {asked.param_dtype}"
        )
        return compile_step(workload)

    for memory in MEMORY_CONFIGURATIONS:
        asked = replace(request, batch=None, param_dtype=memory.param_dtype, remat=memory.remat)
        workload = make_train_workload(asked)
        capacity = workload.topology.chip.hbm_bytes
        # The estimate of remat "full" may be 30% too high.
        if workload.estimated_bytes > (1.3 if memory.remat == "full" else 1) * capacity:
            continue
        report = compiled(workload)
        if not report.fits:
            continue
        per_batch = max(workload.estimated_bytes - replace(workload, batch=0).estimated_bytes, 1)
        factor = 1
        while report.hbm_bytes["peak"] + (2 * factor - 1) * per_batch <= capacity:
            factor *= 2
        while factor > 1:
            larger = compiled(replace(workload, batch=factor * workload.batch))
            if larger.fits:
                return larger
            factor //= 2
        return report
    return None


_COLUMNS = (
    "slice",
    "recipe",
    "mesh",
    "parameters",
    "remat",
    "rows",
    "peak",
    "FLOPs / ideal",
    "collective bytes",
    "step-time lower bound",
    "step by the schedule",
    "exposed network",
    "model FLOPs utilization",
)


def train_table(
    request: TrainRequest,
    slices: Sequence[str] = SLICES,
    recipes: Sequence[str] = RECIPES,
    log: Log = lambda line: None,
    compile_step: Callable[[TrainWorkload], TrainReport] = make_train_report,
) -> Iterator[str]:
    """Yield a Markdown table: what of each recipe fits on each slice, compiled.

    Args:
        request: Its topology, recipe, batch, remat and param_dtype are ignored.
        slices: Names of slices.
        recipes: Names of recipes.
        log: Called with a line before each compilation.
        compile_step: Compiles and analyzes a step.
    """
    yield "| " + " | ".join(_COLUMNS) + " |"
    yield "|---" * len(_COLUMNS) + "|"
    for topology in slices:
        for recipe in recipes:
            report = plan_training(replace(request, topology=topology, recipe=recipe), log, compile_step)
            cells = [topology, recipe, *["-"] * 3, "does not fit", *["-"] * 7]
            if report is not None:
                cells = [
                    topology,
                    recipe,
                    report.mesh,
                    report.param_dtype,
                    report.remat,
                    str(report.batch),
                    f"{format_gib(report.hbm_bytes['peak'])} of {format_gib(report.hbm_capacity_bytes)} GiB",
                    f"{report.flops_ratio:.2f}",
                    f"{report.collective_bytes / GIB:.0f} GiB",
                    f"{report.step_seconds:.2f} s",
                    f"{report.scheduled_seconds:.2f} s",
                    f"{report.exposed_network:.1%}",
                    f"{report.model_flops_utilization:.0%}",
                ]
            yield "| " + " | ".join(cells) + " |"
