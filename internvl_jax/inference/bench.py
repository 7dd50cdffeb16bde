"""Speed and memory of a model on the local devices: the same measurement on a TPU pod and on a laptop's CPU.

Three programs are timed: encode (images), prefill (prompts) and decode (tokens). Each runs once to compile and then
`REPEATS` times; the median is reported, host time and transfers included. MFU is the model's
own arithmetic (matrix products, true sizes) over what the chips could do in that time; `roofline` is the least time
that arithmetic and memory allow over the time taken, collectives not counted. Both need a chip whose figures are known.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from internvl_jax.aot.topology import CHIPS, Chip
from internvl_jax.config import PRESETS, ChatConfig, load_config
from internvl_jax.inference import ideal_flops
from internvl_jax.inference.generator import Generator, bucket
from internvl_jax.inference.loading import abstract_for_running, load, unstack_towers
from internvl_jax.inference.sampling import GenerationConfig
from internvl_jax.models import param_sharding
from internvl_jax.models.layers import Params
from internvl_jax.parallel import mesh as mesh_lib
from internvl_jax.parallel.partitioning import BATCH
from internvl_jax.utils import files

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]

BATCHES = (1, 8)
REPEATS = 5
PROMPT_TOKENS = 512
STEPS = 32  # tokens per row and run of decode

# jax's name of a device -> its generation.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


class BenchError(ValueError):
    """A measurement that cannot be made as asked; the message says what can."""


@dataclass(frozen=True)
class Measurement:
    """One program at one batch size."""

    program: str  # "encode", "prefill" or "decode"
    batch: int  # images or rows
    seconds: float  # of one run, the median; decode: of one step
    fastest: float
    slowest: float
    rate: float
    unit: str
    compile_seconds: float  # the first call less a later one; a compilation cache shortens it
    mfu: float | None
    roofline: float | None


@dataclass(frozen=True)
class Result:
    """Everything that was measured, and on what."""

    model: str
    parameters: int
    dtype: str
    device: str
    devices: int
    processes: int
    mesh: str | None
    jax: str
    prompt_tokens: int
    measurements: list[Measurement]
    time_to_first_token: float  # seconds, one prompt with one image where the model sees, compiled already
    memory_peak_bytes: int  # of the fullest device of this process; on CPU, of the process
    memory_of: str  # "device" or "process"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def run(
    *,
    checkpoint: Path | None = None,
    preset: str | None = None,
    mesh: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    cache_dtype: str | None = None,
    batches: Sequence[int] = BATCHES,
    prompt_tokens: int | None = None,
    profile: Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Measure a checkpoint, or a preset of config.PRESETS with random weights (as fast as trained ones).

    mesh, dtype, quantize, cache_dtype: as loading.load takes them, the last two with a checkpoint only.
    prompt_tokens: None for 512, or what the context has room for.
    profile: a directory for a trace of every program, which xprof shows.
    Raises BenchError for sizes that do not fit the model's context, MeshError for an illegal mesh.
    """
    if (checkpoint is None) == (preset is None):
        raise BenchError("either a checkpoint is measured or a preset: give one of them")
    if preset is not None and (quantize or cache_dtype):
        raise BenchError("random weights are measured as they are: quantize a checkpoint")
    if not batches or min(batches) < 1:
        raise BenchError(f"batches are positive numbers, not {list(batches)}")
    profile = None if profile is None else files.resolve(profile)
    if preset is None:
        checkpoint = files.resolve(checkpoint)
        config = load_config(checkpoint)
    elif preset in PRESETS:
        config = PRESETS[preset]()
    else:
        raise BenchError(f"preset {preset!r} is not one of {', '.join(PRESETS)}")
    prompt = choose_prompt_tokens(config, prompt_tokens)
    if preset is None:
        chat = load(checkpoint, mesh, dtype, quantize=quantize, cache_dtype=cache_dtype, progress=progress)
        generator, name = chat.generator, chat.name
    else:
        generator, name = random_model(config, mesh, dtype), preset
    bench = _Bench(generator, prompt, profile)
    logger.info("%s", HEADER)
    parts = [(part, size) for size in batches for part in bench.parts]
    measurements = []
    for number, (part, size) in enumerate(parts):
        if progress is not None:
            progress(number, len(parts) + 1, f"{part}, batch {size}")
        measurements.append(getattr(bench, part)(size))
        logger.info("%s", row(measurements[-1]))
    first_token = bench.time_to_first_token()
    peak, memory_of = _memory_peak()
    devices = jax.devices()[:1] if generator.mesh is None else generator.mesh.devices.reshape(-1)
    return Result(
        model=name,
        parameters=bench.parameters,
        dtype=generator.dtype.name,
        device=devices[0].device_kind,
        devices=len(devices),
        processes=jax.process_count(),
        mesh=mesh,
        jax=jax.__version__,
        prompt_tokens=prompt,
        measurements=measurements,
        time_to_first_token=first_token,
        memory_peak_bytes=peak,
        memory_of=memory_of,
    )


HEADER = f"{'program':8} {'batch':>5} {'rate':>12} {'unit':16} {'ms':>9} {'compile s':>9} {'MFU':>6} {'roofline':>8}"


def row(one: Measurement) -> str:
    """A measurement as a row below HEADER."""
    mfu, roofline = ("-" if value is None else f"{100 * value:.1f}%" for value in (one.mfu, one.roofline))
    return (
        f"{one.program:8} {one.batch:5} {one.rate:12,.1f} {one.unit:16} {1e3 * one.seconds:9,.2f} "
        f"{one.compile_seconds:9.2f} {mfu:>6} {roofline:>8}"
    )


def lines(result: Result) -> list[str]:
    """The result as a small table."""
    mesh = f"mesh {result.mesh}" if result.mesh else "one device"
    return [
        f"{result.model}: {result.parameters / 1e9:.3f}B parameters, {result.dtype}, {result.devices} x "
        f"{result.device}, {mesh}, {result.processes} process(es), jax {result.jax}",
        HEADER,
        *map(row, result.measurements),
        f"prompts of {result.prompt_tokens} tokens; time to first token {1e3 * result.time_to_first_token:.1f} ms; "
        f"memory peak {result.memory_peak_bytes / 2**30:.2f} GiB ({result.memory_of})",
    ]


class _Bench:
    """The programs of one model, ready to be timed."""

    def __init__(self, generator: Generator, prompt: int, profile: Path | None):
        self.generator = generator
        self.config = generator.config
        self.prompt = prompt
        self.profile = profile
        sees, speaks = self.config.projector is not None, self.config.text is not None
        self.parts = ["encode"] * sees + ["prefill", "decode"] * speaks
        if not self.parts:
            raise BenchError("a bare vision tower is no chat model: there is nothing to measure")
        self.parameters = sum(int(leaf.size) for leaf in jax.tree.leaves(generator.params))
        self._rng = np.random.default_rng(0)

    def encode(self, images: int) -> Measurement:
        pixels = self._pixels(images)
        times = self._time("encode", images, lambda: self.generator.encode(pixels))
        return self._measured("encode", images, times, images, "images/s")

    def prefill(self, rows: int) -> Measurement:
        ids = self._prompts(rows)
        gen = GenerationConfig(max_new_tokens=1, eos_token_ids=())
        times = self._time("prefill", rows, lambda: self.generator.prefill(ids, None, None, gen).last)
        return self._measured("prefill", rows, times, rows * self.prompt, "prompt tokens/s")

    def decode(self, rows: int) -> Measurement:
        room = self.config.text.max_position_embeddings - self.prompt - 1
        steps = min(STEPS, room // (REPEATS + 1))
        gen = GenerationConfig(max_new_tokens=1 + steps * (REPEATS + 1), eos_token_ids=())
        state = self.generator.prefill(self._prompts(rows), None, None, gen)
        jax.block_until_ready(state.last)

        def go_on() -> jax.Array:
            nonlocal state
            state = self.generator.decode(state, steps)
            return state.last

        times = [seconds / steps for seconds in self._time("decode", rows, go_on)]
        return self._measured("decode", rows, times, rows, "tokens/s", self.prompt + gen.max_new_tokens // 2)

    def time_to_first_token(self) -> float:
        """From pixels and a prompt of one row on the host to its first token on the host."""
        sees = "encode" in self.parts
        if "prefill" not in self.parts:
            return float("nan")
        ids, pixels = self._prompts(1), self._pixels(1) if sees else None
        if sees:
            ids[:, 1 : 1 + self.config.tokens_per_image] = self.generator.image_token_id
        gen = GenerationConfig(max_new_tokens=1, eos_token_ids=())

        def answer() -> np.ndarray:
            features = None if pixels is None else self.generator.encode(pixels)
            return np.asarray(self.generator.prefill(ids, None, features, gen).last)

        return statistics.median(self._time("first token", 1, answer)[1:])

    def _pixels(self, images: int) -> np.ndarray:
        vision = self.config.vision
        return self._rng.standard_normal((images, vision.num_channels, *[self.config.image_size] * 2), np.float32)

    def _prompts(self, rows: int) -> np.ndarray:
        """Random tokens, none of them the image token."""
        ids = self._rng.integers(0, self.config.text.vocab_size - 1, (rows, self.prompt), np.int32)
        return ids + (ids >= self.generator.image_token_id) if self.generator.image_token_id is not None else ids

    def _time(self, what: str, batch: int, call: Callable[[], Any]) -> list[float]:
        """Seconds of one call that may compile and of REPEATS more."""
        times = []
        for number in range(REPEATS + 1):
            traced = self.profile is not None and number == 1
            with jax.profiler.trace(str(self.profile)) if traced else contextlib.nullcontext():
                with jax.profiler.TraceAnnotation(f"{what}, batch {batch}"):
                    start = time.perf_counter()
                    jax.block_until_ready(call())
                    times.append(time.perf_counter() - start)
        return times

    def _measured(
        self, program: str, batch: int, times: list[float], amount: int, unit: str, context: int | None = None
    ) -> Measurement:
        first, *later = times
        seconds = statistics.median(later)
        chip = chip_of(jax.devices()[0])
        mfu, roofline = None, None
        if chip is not None:
            mfu, roofline = efficiency(self.generator, chip, program, batch, context or self.prompt, seconds)
        return Measurement(
            program=program,
            batch=batch,
            seconds=seconds,
            fastest=min(later),
            slowest=max(later),
            rate=amount / seconds,
            unit=unit,
            compile_seconds=max(0.0, first - seconds),
            mfu=mfu,
            roofline=roofline,
        )


def efficiency(
    generator: Generator, chip: Chip, program: str, batch: int, context: int, seconds: float
) -> tuple[float, float]:
    """MFU and fraction of the roofline of one run.

    Args:
        generator: the model.
        chip: figures of its devices' generation.
        program: "encode", "prefill" or "decode".
        batch: images or rows.
        context: tokens of a prompt; decode: slots of the KV cache that a step reads.
        seconds: duration of the run; decode: of one step.
    """
    config = generator.config
    chips = (1 if generator.mesh is None else generator.mesh.size) / chip.devices
    traffic = sum(
        leaf.nbytes for part in ideal_flops.PARTS[program] for leaf in jax.tree.leaves(generator.params[part])
    )
    if program == "encode":
        needed = ideal_flops.encode(config, batch)
    elif program == "prefill":
        needed = ideal_flops.prefill(config, batch, context)
    else:
        needed = ideal_flops.decode(config, batch, context)
        text = config.text
        row = 2 * text.num_hidden_layers * context * text.num_key_value_heads * text.head_dim
        traffic += batch * row * generator.cache_dtype.itemsize
    compute = needed / (chips * chip.bf16_flops)
    least = max(compute, traffic / (chips * chip.hbm_bandwidth))
    return compute / seconds, least / seconds


def chip_of(device: jax.Device) -> Chip | None:
    """The generation of a TPU, None for a device whose figures are not known here."""
    return CHIPS[KINDS[device.device_kind]] if device.device_kind in KINDS else None


def choose_prompt_tokens(config: ChatConfig, asked: int | None) -> int:
    """Tokens of a prompt: `asked`, or by default the largest bucket up to PROMPT_TOKENS that the context has room for.

    Raises:
        BenchError: `asked` does not fit the context, or an image does not fit into it.
    """
    if config.text is None:
        return 0
    context = config.text.max_position_embeddings
    most = context - 1 - (REPEATS + 1)
    least = 1 + config.tokens_per_image if config.projector is not None else 1
    if asked is None:
        sizes = [size for size in range(least, min(PROMPT_TOKENS, most) + 1) if bucket(size) == size]
        return sizes[-1] if sizes else min(least, most)
    if not least <= asked <= most:
        raise BenchError(f"a prompt has {least} to {most} tokens here (the context is {context}), not {asked}")
    return asked


def random_model(config: ChatConfig, mesh: str | None, dtype: str | None) -> Generator:
    """A generator with random weights, which are drawn on the devices that hold them."""
    on_cpu = jax.default_backend() == "cpu"
    number = jnp.dtype((jnp.float32 if on_cpu else jnp.bfloat16) if dtype is None else dtype)
    abstract = abstract_for_running(config, number)
    over = None if mesh is None else mesh_lib.make_mesh(mesh, config=config)
    vision = None if over is None else mesh_lib.default_vision_mode(over)
    params = _random_params(abstract, config, over, vision)
    return Generator(
        config,
        unstack_towers(params) if over is None and on_cpu else params,
        dtype=number,
        image_token_id=None if config.projector is None else config.text.vocab_size - 1,
        mesh=over,
        image_axes=BATCH if over is None else mesh_lib.IMAGE_AXES[vision],
    )


def _random_params(abstract: Params, config: ChatConfig, mesh: Mesh | None, vision: str | None) -> Params:
    leaves, tree = jax.tree.flatten(abstract)
    if mesh is None:
        places = [None] * len(leaves)
    else:
        places = jax.tree.leaves(param_sharding.storage_shardings(abstract, mesh, vision=vision))

    def make(number: int) -> jax.Array:
        leaf = leaves[number]
        draw = jax.jit(lambda key: jax.random.normal(key, leaf.shape, leaf.dtype) * 0.02, out_shardings=places[number])
        return draw(jax.random.key(number))

    params = jax.tree.unflatten(tree, [make(number) for number in range(len(leaves))])
    return params if mesh is None else param_sharding.place_params(params, config, mesh, vision=vision)


def _memory_peak() -> tuple[int, str]:
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    if peaks:
        return max(peaks), "device"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"
