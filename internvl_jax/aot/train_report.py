"""What a training step becomes on a TPU: the trainer's own step of a recipe, compiled for a slice that is not here.

As compile_report.py, which see: memory is the compiler's account, FLOPs and collectives are counted in its program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from internvl_jax.aot.compile_report import config_of
from internvl_jax.aot.measure import compile_for, gib, memory_lines, mesh_name, work_lines
from internvl_jax.aot.topology import GIB, Topology, parse_topology
from internvl_jax.config import ChatConfig
from internvl_jax.data.batch import Batch
from internvl_jax.inference.loading import abstract_for_running
from internvl_jax.parallel import mesh as mesh_lib
from internvl_jax.parallel.partitioning import BATCH, fit_spec
from internvl_jax.training import costs, optimizer
from internvl_jax.training.recipes import Recipe, recipe_of
from internvl_jax.training.state import Place, State, init_state
from internvl_jax.training.trainer import REMAT, Settings, make_step

SLICES = ("v5e-8", "v5e-16", "v5e-32", "v5e-64", "v6e-8", "v6e-16", "v5p-8", "v5p-16")
RECIPES = ("stage1", "stage2", "full", "lora")
STEPS = 1000  # of the schedule; any number compiles to the same program

# Ways to hold a step, in the order in which they are wished for: what is trained in float32, and little computed twice.
WAYS = (("float32", "dots"), ("float32", "full"), ("bfloat16", "full"))


@dataclass(frozen=True)
class Work:
    """A recipe on a slice: `internvl-jax train`'s step with its micro-batch."""

    config: ChatConfig
    topology: Topology
    place: Place
    recipe: Recipe
    rows: int  # of a micro-batch, over all devices
    length: int
    images: int  # slots for pictures in a row
    remat: str
    param_dtype: str  # of what is trained; moments are float32, what is frozen is stored as it is computed
    dtype: str  # of computation

    @property
    def settings(self) -> Settings:
        return Settings(STEPS, dtype=self.dtype, remat=self.remat)

    @property
    def ideal_flops(self) -> float:
        """Of all devices; what is computed again is not counted."""
        return costs.step_flops(self.config, self.recipe, self.rows, self.length, self.rows * self.images)

    @property
    def estimate(self) -> int:
        """Bytes per chip by arithmetic."""
        held, activations = costs.memory_per_device(
            self.recipe,
            self.place,
            rows=self.rows,
            length=self.length,
            images=self.rows * self.images,
            trained_dtype=self.param_dtype,
            dtype=self.dtype,
            remat=self.remat,
            chunk=self.settings.chunk,
        )
        return self.topology.chip.devices * (held + activations)


@dataclass(frozen=True)
class TrainReport:
    """One step on one mesh. Figures are per chip; None: not known, because it does not fit."""

    topology: str
    chips: int
    recipe: str
    mesh: str
    vision: str
    rows: int
    length: int
    images: int
    remat: str
    param_dtype: str
    dtype: str
    hbm_bytes: dict[str, int | None]  # as compile_report.Report's
    hbm_capacity_bytes: int
    fits: bool
    flops_per_chip: float | None
    ideal_flops_per_chip: float
    collectives: list[dict[str, Any]]
    roofline_seconds: dict[str, float | None]  # compute, hbm, network
    compile_seconds: float

    @property
    def step_seconds(self) -> float | None:
        """The least that a step takes, everything overlapping everything."""
        return max(self.roofline_seconds.values()) if self.fits else None  # type: ignore[type-var]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def make_work(
    preset: str = "internvl_chat_v1_1",
    *,
    topology: str,
    recipe: str = "stage2",
    mesh: str | None = None,
    batch: int | None = None,
    length: int = 2048,
    images: int = 1,
    remat: str = "full",
    param_dtype: str = "float32",
    dtype: str = "bfloat16",
    vision: str | None = None,
) -> Work:
    """Check what was asked for, and describe the devices.

    preset, topology: as compile_report.make_workload takes them. recipe: a name of training.recipes.RECIPES.
    mesh: None for all devices along fsdp. batch: rows of a micro-batch; None: one for each device along data and fsdp.
    Raises ValueErrors that list the legal choices, ImportError without libtpu.
    """
    where, config, chosen = parse_topology(topology), config_of(preset), recipe_of(recipe)
    if config.text is None or config.vision is None or config.projector is None:
        raise ValueError(
            f"{preset} is not a chat model: --program train needs a vision tower, a projector and a language model"
        )
    if remat not in REMAT:
        raise ValueError(f"remat {remat!r} is not one of {', '.join(REMAT)}")
    if length < 2 or length > config.text.max_position_embeddings:
        raise ValueError(f"a row has 2 to {config.text.max_position_embeddings} tokens, not {length}")
    if not 0 <= images * config.tokens_per_image < length:
        raise ValueError(f"{images} pictures of {config.tokens_per_image} tokens do not leave room in {length} tokens")
    devices = where.devices()
    over = mesh_lib.make_mesh(mesh or f"fsdp={len(devices)}", devices, config)
    if over.size != len(devices):
        raise mesh_lib.MeshError(f"the mesh {mesh} uses {over.size} of the {len(devices)} devices of {where.name}")
    rows = over.shape["data"] * over.shape["fsdp"] if batch is None else batch
    mesh_lib.validate_mesh(config, over, rows)
    if rows < 1:
        raise ValueError(f"a batch has at least one row, not {rows}")
    place = Place(config, over, vision)
    return Work(config, where, place, chosen, rows, length, images, remat, param_dtype, dtype)


def arguments(work: Work) -> tuple[State, Any, Batch]:
    """What the step is given, as ShapeDtypeStructs with shardings."""
    place, recipe = work.place, work.recipe

    def stored(name: str, part: Any) -> Any:
        dtype = jnp.dtype(work.param_dtype if name in recipe.train else work.dtype)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), part)

    params = {name: stored(name, part) for name, part in abstract_for_running(work.config, jnp.float32).items()}
    params = jax.eval_shape(place.pad, params)
    adamw = optimizer.make_optimizer(recipe.optimizer, STEPS, work.config)
    state, frozen = jax.eval_shape(partial(init_state, recipe=recipe, adamw=adamw, place=place, seed=0), params)

    def put(leaf: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def values(shape: tuple[int, ...], dtype: Any) -> Any:
        spec = fit_spec(P(None, BATCH, *[None] * (len(shape) - 2)), shape, place.mesh.shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(place.mesh, spec))

    tokens = values((1, work.rows, work.length), jnp.int32)
    pixels = (work.config.vision.num_channels, *[work.config.image_size] * 2)
    batch = Batch(
        input_ids=tokens,
        labels=tokens,
        segment_ids=tokens,
        positions=tokens,
        pixel_values=values((1, work.rows * work.images, *pixels), jnp.float32),
    )
    frozen = jax.tree.map(put, frozen, place.specs(frozen)) if frozen else {}
    return jax.tree.map(put, state, place.shardings(state)), frozen, batch


def report(work: Work) -> TrainReport:
    """Compile the step and measure it."""
    chip, mesh = work.topology.chip, work.place.mesh
    adamw = optimizer.make_optimizer(work.recipe.optimizer, STEPS, work.config)
    step = make_step(work.config, work.recipe, work.settings, adamw, 0, work.place)
    with jax.set_mesh(mesh):
        measured = compile_for(
            work.topology, mesh, step.lower(*arguments(work)), work.config.text.num_hidden_layers
        )  # fmt: skip
    memory = measured.memory
    roofline: dict[str, float | None] = dict.fromkeys(("compute", "hbm", "network"))
    if measured.fits:
        roofline = {
            "compute": measured.flops / chip.bf16_flops,
            "hbm": (memory["arguments"] + memory["outputs"]) / chip.hbm_bandwidth,  # the state is read and written
            "network": measured.network_seconds,
        }
    return TrainReport(
        topology=work.topology.name,
        chips=work.topology.chips,
        recipe=work.recipe.name,
        mesh=mesh_name(mesh),
        vision=work.place.vision,
        rows=work.rows,
        length=work.length,
        images=work.images,
        remat=work.remat,
        param_dtype=work.param_dtype,
        dtype=work.dtype,
        hbm_bytes=memory,
        hbm_capacity_bytes=chip.hbm_bytes,
        fits=measured.fits,
        flops_per_chip=measured.flops,
        ideal_flops_per_chip=work.ideal_flops / work.topology.chips,
        collectives=measured.collectives,
        roofline_seconds=roofline,
        compile_seconds=measured.compile_seconds,
    )


def lines(done: TrainReport) -> list[str]:
    """A report for people."""
    text = [
        f"train {done.recipe}: {done.topology} ({done.chips} chips), {done.mesh}, {done.rows} rows of {done.length} "
        f"tokens with {done.images} pictures, remat {done.remat}, {done.param_dtype} parameters, {done.dtype} compute"
    ]
    over = (done.hbm_bytes["peak"] or 0) - done.hbm_capacity_bytes
    advice = () if done.fits else (f"{gib(over)} GiB more than there are: see --plan",)
    text += memory_lines(done.hbm_bytes, done.hbm_capacity_bytes, done.fits, advice)
    text += work_lines(done.flops_per_chip, done.ideal_flops_per_chip, done.collectives)
    if done.fits:
        times = ", ".join(f"{name} {1e3 * (seconds or 0):.4g}" for name, seconds in done.roofline_seconds.items())
        tokens = done.rows * done.length / done.step_seconds
        text.append(f"  roofline ms  {times}: at most {tokens:,.0f} tokens/s")
    return [*text, f"  compiled in  {done.compile_seconds:.1f} s"]


def plan(asked: dict[str, Any], say: Callable[[str], None] = lambda text: None) -> TrainReport | None:
    """The first of WAYS that fits with a row on every device, and then as many rows as fit, in powers of two.

    asked: make_work's arguments but batch, remat and param_dtype. Arithmetic (training/costs.py) proposes, the compiler
    decides. None: nothing fits.
    """

    def compiled(work: Work) -> TrainReport:
        say(
            f"compiling {work.recipe.name} for {work.topology.name}, {mesh_name(work.place.mesh)}, {work.rows} rows of "
            f"{work.length}, remat {work.remat}, {work.param_dtype}"
        )
        return report(work)

    for param_dtype, remat in WAYS:
        work = make_work(**asked, param_dtype=param_dtype, remat=remat)
        capacity = work.topology.chip.hbm_bytes
        last = (param_dtype, remat) == WAYS[-1]
        if work.estimate > (1.3 if last or remat == "full" else 1) * capacity:
            continue  # arithmetic is no closer than that
        done = compiled(work)
        if not done.fits:
            continue
        per_row = max(work.estimate - replace(work, rows=0).estimate, 1)
        factor = 1
        while done.hbm_bytes["peak"] + (2 * factor - 1) * per_row <= capacity:
            factor *= 2
        while factor > 1:
            more = compiled(replace(work, rows=factor * work.rows))
            if more.fits:
                return more
            factor //= 2
        return done
    return None


def table(
    asked: dict[str, Any],
    topologies: Sequence[str] = SLICES,
    recipes: Sequence[str] = RECIPES,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[str]:
    """Markdown lines: what of each recipe fits on each slice, compiled."""
    columns = [
        "slice",
        "recipe",
        "mesh",
        "parameters",
        "remat",
        "rows",
        "peak",
        "FLOPs / ideal",
        "sent",
        "step at least",
    ]
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for topology in topologies:
        for recipe in recipes:
            done = plan({**asked, "topology": topology, "recipe": recipe}, say)
            cells = [topology, recipe, *["-"] * 3, "does not fit", *["-"] * 4]
            if done is not None:
                moved = sum(one["bytes"] for one in done.collectives)
                cells = [
                    topology,
                    recipe,
                    done.mesh,
                    done.param_dtype,
                    done.remat,
                    str(done.rows),
                    f"{gib(done.hbm_bytes['peak'])} of {gib(done.hbm_capacity_bytes)} GiB",
                    f"{done.flops_per_chip / done.ideal_flops_per_chip:.2f}",
                    f"{moved / GIB:.0f} GiB",
                    f"{done.step_seconds:.2f} s",
                ]
            yield "| " + " | ".join(cells) + " |"
