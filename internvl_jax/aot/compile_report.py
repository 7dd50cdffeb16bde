"""What the programs of this project become on a TPU, found out by compiling them for one that is not there.

The very functions that run (generate.py's, donation included) are lowered with shapes that carry the shardings of
sharding.py over the mesh of a described slice, and compiled by the TPU's own compiler. Memory is the compiler's
account. FLOPs and collectives are counted in the optimized HLO (hlo.py). Times are rooflines from published figures
(chips.py): no program can be faster than its bound, and none was run.

Figures are per chip. A TPU7x chip is two devices for JAX, and its figures are those of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from internvl_jax.aot.measure import bytes_on_device, compile_for, memory_lines, mesh_name, work_lines
from internvl_jax.aot.topology import GIB, Topology, parse_topology
from internvl_jax.config import PRESETS, ChatConfig
from internvl_jax.inference import generate
from internvl_jax.inference.loading import abstract_for_running
from internvl_jax.inference.sampling import GenerationConfig, make_settings
from internvl_jax.models import flops, param_sharding
from internvl_jax.models.layers import Params
from internvl_jax.parallel import mesh as mesh_lib
from internvl_jax.parallel.partitioning import fit_spec
from internvl_jax.quantize import quantize_params
from internvl_jax.utils.files import resolve

ShapeDtype = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Workload:
    """A model on a mesh, and how much it is given."""

    config: ChatConfig
    topology: Topology
    mesh: Mesh
    vision: str  # how the tower is spread, a key of mesh.IMAGE_AXES
    params: Params  # ShapeDtypeStructs with shardings
    batch: int  # rows, and images: one per row
    length: int  # slots of the cache: tokens of prompt and answer
    prompt: int  # tokens that prefill reads
    dtype: Any  # of computation
    cache_dtype: Any
    quantize: str | None  # weights: a name of quantize.SCHEMES

    @property
    def image_axes(self) -> tuple[str, ...]:
        return mesh_lib.IMAGE_AXES[self.vision]

    @property
    def mesh_name(self) -> str:
        return mesh_name(self.mesh)


# Programs.


@dataclass(frozen=True)
class Program:
    """One of the functions that run: how it is lowered, what it reads, what it must compute at least."""

    lower: Callable[[Workload], jax.stages.Lowered]
    parts: tuple[str, ...]  # of the parameter tree that it reads
    layers: Callable[[ChatConfig], int]
    ideal_flops: Callable[[Workload], float]  # of all devices: true heads, tokens and vocabulary, matrix products only
    amount: Callable[[Workload], int]  # what one run yields,
    unit: str  # in these


def _encode(load: Workload) -> jax.stages.Lowered:
    vision = load.config.vision
    pixels = ShapeDtype((load.batch, vision.num_channels, *[load.config.image_size] * 2), jnp.float32)
    multiple = math.prod(load.mesh.shape[axis] for axis in load.image_axes)
    pixels = jax.eval_shape(partial(generate._pad_images, multiple=multiple), pixels)
    return generate._encode.lower(load.params, pixels, config=load.config, dtype=load.dtype, image_axes=load.image_axes)


def _prefill_arguments(load: Workload) -> tuple[Any, ...]:
    config, shape = load.config, (load.batch, load.prompt)
    features = None
    if config.projector is not None and load.prompt > config.tokens_per_image:
        features = ShapeDtype((load.batch, config.tokens_per_image, config.text.hidden_size), load.dtype)
        features = jax.eval_shape(generate._pad_images, features)
        features = ShapeDtype(features.shape, features.dtype, sharding=NamedSharding(load.mesh, P()))
    settings = make_settings(GenerationConfig(), load.batch, config.text.eos_token_ids)
    settings = jax.tree.map(lambda row: ShapeDtype(row.shape, row.dtype), settings)
    token = ShapeDtype((), jnp.int32)
    return load.params, ShapeDtype(shape, jnp.int32), ShapeDtype(shape, bool), features, token, settings


def _prefill_settings(load: Workload) -> dict[str, Any]:
    return {"config": load.config, "slots": load.length, "dtype": load.dtype, "cache_dtype": load.cache_dtype}


def _prefill(load: Workload) -> jax.stages.Lowered:
    return generate._prefill.lower(*_prefill_arguments(load), **_prefill_settings(load))


def _state(load: Workload) -> generate.DecodeState:
    """What prefill leaves and decoding goes on with, laid out as prefill lays it out."""
    state = jax.eval_shape(partial(generate.prefill_step, **_prefill_settings(load)), *_prefill_arguments(load))

    def place(leaf: Any, spec: P) -> Any:
        where = NamedSharding(load.mesh, fit_spec(spec, leaf.shape, load.mesh.shape))
        return ShapeDtype(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(place, state, generate.state_specs(state))


def _decode(load: Workload) -> jax.stages.Lowered:
    steps = ShapeDtype((), jnp.int32)
    return generate._decode.lower(load.params, _state(load), steps, config=load.config, dtype=load.dtype)


def _encode_flops(load: Workload) -> float:
    config = load.config
    return load.batch * (flops.tower_products(config) + flops.tower_attention(config) + flops.projector(config))


def _prefill_flops(load: Workload) -> float:
    """Layers, the causal half of attention, logits of the last position only."""
    config, length = load.config, load.prompt
    layers = 2 * length * flops.text_weights(config) + flops.causal_attention(config, length)
    return load.batch * (layers + flops.head(config))


def _decode_flops(load: Workload) -> float:
    """One step: layers, attention over every slot of the cache, logits."""
    text = load.config.text
    attention = 4 * load.length * text.num_attention_heads * text.head_dim * text.num_hidden_layers
    return load.batch * (2 * flops.text_weights(load.config) + attention + flops.head(load.config))


def _text_layers(config: ChatConfig) -> int:
    return config.text.num_hidden_layers


PROGRAMS = {
    "encode": Program(
        _encode,
        ("vision_model", "mlp1"),
        lambda config: config.num_vision_layers,
        _encode_flops,
        lambda load: load.batch,
        "images/s",
    ),
    "prefill": Program(
        _prefill,
        ("language_model",),
        _text_layers,
        _prefill_flops,
        lambda load: load.batch * load.prompt,
        "prompt tokens/s",
    ),
    "decode": Program(_decode, ("language_model",), _text_layers, _decode_flops, lambda load: load.batch, "tokens/s"),
}
GENERATE = "generate"  # all of them, resident together: what a chat server needs


_running = lru_cache(abstract_for_running)  # it traces the whole initialisation


# Reports.


@dataclass(frozen=True)
class Report:
    """One program on one mesh; see the module's docstring for how each figure comes about. None: not known."""

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
    # Bytes per chip: arguments, outputs, temporaries, aliased (outputs that are arguments' buffers), peak, parameters.
    hbm_bytes: dict[str, int | None]
    hbm_capacity_bytes: int
    fits: bool
    flops_per_chip: float | None
    ideal_flops_per_chip: float
    collectives: list[dict[str, Any]]  # kind, count_per_layer, bytes_per_layer, count, bytes: of the results
    roofline_seconds: dict[str, float | None]  # compute, hbm, network
    bound_by: str | None
    throughput_bound: dict[str, Any]  # value, unit
    compile_seconds: float
    advice: tuple[str, ...] = ()  # where it does not fit: what would
    parts: tuple[Report, ...] = ()  # of `generate`

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def make_workload(
    preset: str = "internvl_chat_v1_1",
    *,
    topology: str,
    mesh: str | None = None,
    batch: int = 1,
    length: int = 2048,
    prompt: int | None = None,
    vision: str | None = None,
    dtype: str = "bfloat16",
    cache_dtype: str | None = None,
    quantize: str | None = None,
) -> Workload:
    """Check what was asked for, and describe the devices.

    preset: a name of config.PRESETS, or a directory with a config.json. topology: see chips.parse_topology.
    mesh: as mesh.make_mesh takes it; None: the largest tensor axis, the rest on data. prompt: None for all of
        length.
    vision: "tensor" or "data"; None: sharding's default. dtype: of computation; cache_dtype: None for the same.
    quantize: "int8" or "int4" weights.
    Raises ValueErrors that list the legal choices, ImportError without libtpu.
    """
    place = parse_topology(topology)
    config = config_of(preset)
    if batch < 1:
        raise ValueError(f"a batch has at least one row, not {batch}")
    prompt = length if prompt is None else prompt
    if config.text is not None and not 1 <= prompt <= length <= config.text.max_position_embeddings:
        raise ValueError(
            f"prompt {prompt} and length {length} must satisfy 1 <= prompt <= length <= "
            f"{config.text.max_position_embeddings}, the model's context"
        )
    devices = place.devices()
    over = mesh_lib.make_mesh(mesh, devices, config)
    if over.size != len(devices):
        raise mesh_lib.MeshError(
            f"the mesh {mesh} uses {over.size} of the {len(devices)} devices of {place.name}: name a smaller slice, or "
            f"give the rest to data"
        )
    mesh_lib.validate_mesh(config, over, batch)
    spread = mesh_lib.default_vision_mode(over) if vision is None else vision
    kept = jnp.dtype(cache_dtype or dtype)
    params = abstract_params(config, over, spread, jnp.dtype(dtype), quantize)
    return Workload(config, place, over, spread, params, batch, length, prompt, jnp.dtype(dtype), kept, quantize)


def config_of(preset: str) -> ChatConfig:
    """A preset's configuration, or that of a directory."""
    if preset in PRESETS:
        return PRESETS[preset]()
    directory = resolve(preset)
    if directory.exists():
        return ChatConfig.from_file(directory)
    raise ValueError(f"preset {preset!r} is neither one of {', '.join(PRESETS)} nor a directory with a config.json")


def abstract_params(config: ChatConfig, mesh: Mesh, vision: str, dtype: Any, scheme: str | None = None) -> Params:
    """The parameters that running needs, as they lie on the mesh: ShapeDtypeStructs, padded and with shardings."""
    params = _running(config, dtype)
    if scheme is not None:
        params = jax.eval_shape(partial(quantize_params, scheme=scheme), params)
    params = jax.eval_shape(lambda tree: param_sharding.pad_params(tree, config, mesh, vision=vision), params)
    shardings = param_sharding.param_shardings(params, mesh, vision=vision)
    return jax.tree.map(lambda leaf, where: ShapeDtype(leaf.shape, leaf.dtype, sharding=where), params, shardings)


def report(load: Workload, program: str) -> Report:
    """Compile one program (or `generate`: all three) and measure it. Raises ValueError for an unknown program."""
    if program == GENERATE:
        return together(load, {name: report(load, name) for name in PROGRAMS})
    if program not in PROGRAMS:
        raise ValueError(f"there is no program {program!r}; there are {', '.join((*PROGRAMS, GENERATE))}")
    spec = PROGRAMS[program]
    missing = [part for part in spec.parts if part not in load.params]
    if missing:
        raise ValueError(f"{program} needs {' and '.join(missing)}, which this model does not have")
    chip = load.topology.chip
    with jax.set_mesh(load.mesh):
        measured = compile_for(load.topology, load.mesh, spec.lower(load), spec.layers(load.config))
    memory = measured.memory | {"parameters": chip.devices * param_bytes(load, spec.parts)}
    roofline: dict[str, Any] = dict.fromkeys(("compute", "hbm", "network"))
    if measured.fits:
        roofline = {
            "compute": measured.flops / chip.bf16_flops,
            "hbm": _least_traffic(load, spec, memory) / chip.hbm_bandwidth,
            "network": measured.network_seconds,
        }
    bound_by = max(roofline, key=lambda name: roofline[name]) if measured.fits else None
    done = Report(
        topology=load.topology.name,
        chips=load.topology.chips,
        program=program,
        mesh=load.mesh_name,
        vision=load.vision,
        batch=load.batch,
        length=load.length,
        prompt=load.prompt,
        dtype=load.dtype.name,
        cache_dtype=load.cache_dtype.name,
        quantize=load.quantize,
        hbm_bytes=memory,
        hbm_capacity_bytes=chip.hbm_bytes,
        fits=measured.fits,
        flops_per_chip=measured.flops,
        ideal_flops_per_chip=spec.ideal_flops(load) / load.topology.chips,
        collectives=measured.collectives,
        roofline_seconds=roofline,
        bound_by=bound_by,
        throughput_bound={"value": spec.amount(load) / roofline[bound_by] if bound_by else None, "unit": spec.unit},
        compile_seconds=measured.compile_seconds,
    )
    return done if done.fits else replace(done, advice=advice(load, done))


def together(load: Workload, parts: dict[str, Report]) -> Report:
    """`generate` from the reports of all programs: every parameter stays on the device while each runs in turn.

    Figures of time are those of decoding steps, where a chat spends it; `parts` has the others.
    """
    chip, decode = load.topology.chip, parts["decode"]
    parameters = chip.devices * param_bytes(load, tuple(load.params))
    peak = max(peak_together(load, part) for part in parts.values())
    extra = [part.hbm_bytes["temporaries"] for part in parts.values()]
    memory = decode.hbm_bytes | {
        "arguments": (decode.fits and decode.hbm_bytes["arguments"] - decode.hbm_bytes["parameters"] + parameters)
        or None,
        "temporaries": None if None in extra else max(extra),
        "peak": peak,
        "parameters": parameters,
    }
    fits = all(part.fits for part in parts.values()) and peak <= chip.hbm_bytes
    whole = replace(
        decode,
        program=GENERATE,
        hbm_bytes=memory,
        fits=fits,
        compile_seconds=sum(part.compile_seconds for part in parts.values()),
        advice=(),
        parts=tuple(parts.values()),
    )
    return whole if fits else replace(whole, advice=advice(load, whole))


def peak_together(load: Workload, part: Report) -> int:
    """Bytes per chip at a program's peak, with the parameters that it does not read beside it."""
    everything = load.topology.chip.devices * param_bytes(load, tuple(load.params))
    return part.hbm_bytes["peak"] - part.hbm_bytes["parameters"] + everything


def param_bytes(load: Workload, parts: Iterable[str]) -> int:
    """Bytes of these parts' parameters on one device."""
    return bytes_on_device([load.params[part] for part in parts if part in load.params])


def state_bytes(load: Workload) -> int:
    """Bytes of the rows that are decoded, the cache above all, on one device."""
    with jax.set_mesh(load.mesh):
        return bytes_on_device(_state(load))


def _least_traffic(load: Workload, spec: Program, memory: dict[str, int]) -> int:
    """Bytes that must pass between HBM and the chip: every argument is read once, every new output written once."""
    skipped = load.topology.chip.devices * skipped_bytes(load, spec.parts)
    return memory["arguments"] + memory["outputs"] - memory["aliased"] - skipped


def skipped_bytes(load: Workload, parts: Iterable[str]) -> int:
    """Bytes of parameters on one device that a program need not read: of the embedding table it reads few rows, unless
    the table is the head too."""
    language = load.params["language_model"] if "language_model" in parts else {}
    return bytes_on_device(language["embed_tokens"]) if "lm_head" in language else 0


def advice(load: Workload, done: Report) -> tuple[str, ...]:
    """By how much a program is too large, and what would fit by arithmetic: what is no parameter grows with rows."""
    chip, memory = load.topology.chip, done.hbm_bytes
    over = memory["peak"] - done.hbm_capacity_bytes
    lines = [f"needs {memory['peak'] / GIB:.2f} GiB per chip, {over / GIB:.2f} GiB more than there are"]
    room = done.hbm_capacity_bytes - memory["parameters"]
    grows = memory["peak"] - memory["parameters"]
    multiple = load.mesh.shape["data"] * load.mesh.shape["fsdp"]
    rows = int(load.batch * room / grows) // multiple * multiple if room > 0 else 0
    if rows:
        lines.append(f"about {rows} rows of this length would fit on this mesh")
    elif room <= 0:
        lines.append(f"the parameters alone take {memory['parameters'] / GIB:.2f} GiB per chip")
    tensor = load.mesh.shape["tensor"]
    for size in mesh_lib.legal_tensor_sizes(load.config, 64):
        if size > tensor and memory["peak"] * tensor / size < done.hbm_capacity_bytes * 0.95:
            needed = load.topology.chips * size // tensor
            lines.append(f"about {needed} chips of {chip.name} would hold it, with tensor={size}")
            break
    return tuple(lines)


def lines(done: Report) -> list[str]:
    """A report for people."""
    head = (
        f"{done.program}: {done.topology} ({done.chips} chips), {done.mesh}, batch {done.batch}, length {done.length}"
    )
    if done.prompt != done.length and done.program != "encode":
        head += f", prompt {done.prompt}"
    head += f", {done.dtype}" + (f", {done.quantize} weights" if done.quantize else "")
    head += f", {done.cache_dtype} cache" if done.cache_dtype != done.dtype else ""
    text = [head, *memory_lines(done.hbm_bytes, done.hbm_capacity_bytes, done.fits, done.advice)]
    text += work_lines(done.flops_per_chip, done.ideal_flops_per_chip, done.collectives)
    if done.fits:
        times = ", ".join(f"{name} {1e3 * seconds:.3g}" for name, seconds in done.roofline_seconds.items())
        bound = done.throughput_bound
        text.append(f"  roofline ms  {times}: bound by {done.bound_by}, at most {bound['value']:,.4g} {bound['unit']}")
    text.append(f"  compiled in  {done.compile_seconds:.1f} s")
    for part in done.parts:
        text += ["", *lines(part)]
    return text
