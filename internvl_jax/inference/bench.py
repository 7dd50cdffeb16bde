"""Speed and memory of a model on the local devices, from a laptop's CPU to a TPU pod.

Three programs are timed: encode (images), prefill (prompts) and decode (tokens). Each runs once to compile and then
`REPEATS` times; the median is reported, including host time and transfers. MFU is the model's FLOPs (matrix products,
true sizes) over the chips' peak FLOPs in that time. `roofline` is the least time that FLOPs and memory bandwidth allow,
without collectives, over the measured time. Both are reported for known TPUs only.
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
import numpy as np
from jax.sharding import Mesh

from internvl_jax.aot.topology import CHIPS, Chip
from internvl_jax.config import PRESETS, ChatConfig, load_config
from internvl_jax.inference.generation import ideal_flops
from internvl_jax.inference.generation.bound_model import bind_model
from internvl_jax.inference.generation.generator import Generator, prompt_bucket
from internvl_jax.inference.generation.sampling import GenerationConfig
from internvl_jax.inference.load_options import LoadOptions
from internvl_jax.inference.loading import (
    abstract_for_running,
    inference_layout,
    load,
    resolve_dtype,
    resolve_mesh,
)
from internvl_jax.models import param_sharding
from internvl_jax.models.layers import Params
from internvl_jax.parallel import mesh as mesh_lib
from internvl_jax.utils import files, formats

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]

REPEATS = 5
PROMPT_TOKENS = 512
STEPS = 32  # tokens per row and run of decode

# device_kind -> TPU generation, a key of CHIPS.
DEVICE_KINDS = {
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
    """The measurement is not possible with these options; the message says what is."""


@dataclass(frozen=True)
class Measurement:
    """One program at one batch size.

    Attributes:
        program: "encode", "prefill" or "decode".
        batch: images or rows.
        seconds: median time of a run; for decode, of a step. `fastest` and `slowest` likewise.
        rate: amount of work per second, in `unit`.
        unit: "images/s", "prompt tokens/s" or "tokens/s".
        compile_seconds: time of the first call minus `seconds`; shorter with a compilation cache.
        mfu: model FLOPs utilization, or None.
        roofline: fraction of the roofline, or None.
    """

    program: str
    batch: int
    seconds: float
    fastest: float
    slowest: float
    rate: float
    unit: str
    compile_seconds: float
    mfu: float | None
    roofline: float | None


@dataclass(frozen=True)
class Result:
    """All measurements of a model, and where they were made.

    Attributes:
        prompt_tokens: length of each prompt.
        time_to_first_token: seconds from host to host for one prompt, with one image if the model has vision; compiled
            before.
        memory_peak_bytes: of the fullest local device; on CPU, of the process.
        memory_of: "device" or "process".
    """

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
    time_to_first_token: float
    memory_peak_bytes: int
    memory_of: str

    def to_dict(self) -> dict[str, Any]:
        """The fields for JSON."""
        return asdict(self)


def run(
    batch_sizes: Sequence[int],
    *,
    checkpoint: Path | None = None,
    preset: str | None = None,
    options: LoadOptions | None = None,
    prompt_tokens: int | None = None,
    profile: Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Measure a checkpoint, or a preset with random weights, which are as fast as trained ones.

    Args:
        batch_sizes: numbers of images and rows to measure.
        checkpoint: directory of a checkpoint.
        preset: name of a configuration in config.PRESETS.
        options: how to load the checkpoint; of a preset, mesh and dtype.
        prompt_tokens: length of each prompt; None: 512, or what the context has room for.
        profile: directory for a trace of each program, for xprof; None: no traces.
        progress: called as progress(done, total, what).

    Raises:
        BenchError: the options contradict each other or do not fit the model's context.
        MeshError: the mesh is illegal.
    """
    options = options or LoadOptions()
    if not batch_sizes or min(batch_sizes) < 1:
        raise BenchError(f"batch sizes are positive numbers, not {list(batch_sizes)}")
    config = _config_of(checkpoint, preset, options)
    prompt = choose_prompt_tokens(config, prompt_tokens)
    if preset is None:
        chat = load(checkpoint, options, progress=progress)
        generator, name = chat.generator, chat.name
    else:
        generator, name = random_model(config, options), preset
    bench = _Bench(generator, prompt, None if profile is None else files.resolve(profile))
    measurements = _measure(bench, batch_sizes, progress)
    first_token = bench.time_to_first_token()
    peak, memory_of = _memory_peak()
    mesh = generator.mesh
    devices = jax.devices()[:1] if mesh is None else mesh.devices.reshape(-1)
    return Result(
        model=name,
        parameters=bench.parameters,
        dtype=generator.dtype.name,
        device=devices[0].device_kind,
        devices=len(devices),
        processes=jax.process_count(),
        mesh=None if options.mesh is None else str(options.mesh),
        jax=jax.__version__,
        prompt_tokens=prompt,
        measurements=measurements,
        time_to_first_token=first_token,
        memory_peak_bytes=peak,
        memory_of=memory_of,
    )


def _config_of(checkpoint: Path | None, preset: str | None, options: LoadOptions) -> ChatConfig:
    if checkpoint is not None and preset is None:
        return load_config(files.resolve(checkpoint))
    if preset is None or checkpoint is not None:
        raise BenchError("either a checkpoint is measured or a preset: give one of them")
    if preset not in PRESETS:
        raise BenchError(f"preset {preset!r} is not one of {', '.join(PRESETS)}")
    if options.quantize or options.cache_dtype:
        raise BenchError("a preset is measured without quantization: quantize a checkpoint")
    return PRESETS[preset]()


def _measure(bench: _Bench, batch_sizes: Sequence[int], progress: Progress | None) -> list[Measurement]:
    """Measure every program at every batch size, and log each row when it is ready."""
    logger.info("%s", HEADER)
    runs = [(program, size) for size in batch_sizes for program in bench.programs]
    measurements = []
    for number, (program, size) in enumerate(runs):
        if progress is not None:
            progress(number, len(runs) + 1, f"{program}, batch {size}")
        measurements.append(bench.programs[program](size))
        logger.info("%s", row(measurements[-1]))
    return measurements


HEADER = f"{'program':8} {'batch':>5} {'rate':>12} {'unit':16} {'ms':>9} {'compile s':>9} {'MFU':>6} {'roofline':>8}"


def row(one: Measurement) -> str:
    """A measurement as a table row below HEADER."""
    rate, ms, compile_seconds = map(formats.number, (one.rate, 1e3 * one.seconds, one.compile_seconds))
    mfu, roofline = ("-" if value is None else f"{value:.1%}" for value in (one.mfu, one.roofline))
    return f"{one.program:8} {one.batch:5} {rate:>12} {one.unit:16} {ms:>9} {compile_seconds:>9} {mfu:>6} {roofline:>8}"


def lines(result: Result) -> list[str]:
    """The result as the lines of a table."""
    mesh = f"mesh {result.mesh}" if result.mesh else "one device"
    first, peak = formats.duration(result.time_to_first_token), formats.memory(result.memory_peak_bytes)
    return [
        f"{result.model}: {formats.parameters(result.parameters)} parameters, {result.dtype}, {result.devices} x "
        f"{result.device}, {mesh}, {result.processes} process{'' if result.processes == 1 else 'es'}, jax {result.jax}",
        HEADER,
        *map(row, result.measurements),
        f"prompts of {result.prompt_tokens} tokens; time to first token {first}; "
        f"peak memory {peak} ({result.memory_of})",
    ]


class _Bench:
    """The programs of one model. `programs` has the function that measures each of them."""

    def __init__(self, generator: Generator, prompt: int, profile: Path | None):
        self.generator = generator
        self.config = generator.config
        self.prompt = prompt
        self.profile = profile
        self.programs: dict[str, Callable[[int], Measurement]] = {}
        if self.config.projector is not None:
            self.programs["encode"] = self.encode
        if self.config.text is not None:
            self.programs |= {"prefill": self.prefill, "decode": self.decode}
        if not self.programs:
            raise BenchError("a vision tower without a language model is not measured")
        self.parameters = sum(int(leaf.size) for leaf in jax.tree.leaves(generator.params))
        self._rng = np.random.default_rng(0)

    def encode(self, images: int) -> Measurement:
        pixels = self._pixels(images)
        times = self._time("encode", images, lambda: self.generator.encode(pixels))
        return self._measurement("encode", images, times, images, "images/s")

    def prefill(self, rows: int) -> Measurement:
        ids = self._prompts(rows)
        gen = GenerationConfig(max_new_tokens=1, eos_token_ids=())
        times = self._time("prefill", rows, lambda: self.generator.prefill(ids, None, None, gen).last)
        return self._measurement("prefill", rows, times, rows * self.prompt, "prompt tokens/s")

    def decode(self, rows: int) -> Measurement:
        room = self.config.required_text.context - self.prompt - 1
        steps = min(STEPS, room // (REPEATS + 1))
        gen = GenerationConfig(max_new_tokens=1 + steps * (REPEATS + 1), eos_token_ids=())
        state = self.generator.prefill(self._prompts(rows), None, None, gen)
        jax.block_until_ready(state.last)

        def run_steps() -> jax.Array:
            nonlocal state
            state = self.generator.decode(state, steps)
            return state.last

        times = [seconds / steps for seconds in self._time("decode", rows, run_steps)]
        return self._measurement("decode", rows, times, rows, "tokens/s", self.prompt + gen.max_new_tokens // 2)

    def time_to_first_token(self) -> float:
        """Seconds from one prompt and its image on the host to the first token on the host."""
        if "prefill" not in self.programs:
            return float("nan")
        ids, pixels = self._prompts(1), None
        if "encode" in self.programs:
            pixels = self._pixels(1)
            ids[:, 1 : 1 + self.config.tokens_per_image] = self.generator.image_token_id
        gen = GenerationConfig(max_new_tokens=1, eos_token_ids=())

        def answer() -> np.ndarray:
            features = None if pixels is None else self.generator.encode(pixels)
            return np.asarray(self.generator.prefill(ids, None, features, gen).last)

        return statistics.median(self._time("first token", 1, answer)[1:])

    def _pixels(self, images: int) -> np.ndarray:
        channels, size = self.config.required_vision.num_channels, self.config.required_image_size
        return self._rng.standard_normal((images, channels, size, size), np.float32)

    def _prompts(self, rows: int) -> np.ndarray:
        """Random tokens [rows, prompt] int32, none of them the image token."""
        ids = self._rng.integers(0, self.config.required_text.vocab_size - 1, (rows, self.prompt), np.int32)
        return ids + (ids >= self.generator.image_token_id) if self.generator.image_token_id is not None else ids

    def _time(self, what: str, batch: int, call: Callable[[], Any]) -> list[float]:
        """Seconds of the first call, which may compile, and of REPEATS more. The second one is traced."""
        times = []
        for number in range(REPEATS + 1):
            traced = self.profile is not None and number == 1
            with jax.profiler.trace(str(self.profile)) if traced else contextlib.nullcontext():
                with jax.profiler.TraceAnnotation(f"{what}, batch {batch}"):
                    start = time.perf_counter()
                    jax.block_until_ready(call())
                    times.append(time.perf_counter() - start)
        return times

    def _measurement(
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
        text = config.required_text
        row = 2 * text.num_hidden_layers * context * text.num_key_value_heads * text.head_dim
        traffic += batch * row * generator.cache_dtype.itemsize
    compute = needed / (chips * chip.bf16_flops)
    least = max(compute, traffic / (chips * chip.hbm_bandwidth))
    return compute / seconds, least / seconds


def chip_of(device: jax.Device) -> Chip | None:
    """Figures of a TPU's generation; None for other devices."""
    return CHIPS[DEVICE_KINDS[device.device_kind]] if device.device_kind in DEVICE_KINDS else None


def choose_prompt_tokens(config: ChatConfig, requested: int | None) -> int:
    """Length of a prompt: `requested`, by default the largest bucket up to PROMPT_TOKENS that fits the context.

    Raises:
        BenchError: `requested` does not fit the context, or has no room for an image.
    """
    if config.text is None:
        return 0
    context = config.text.context
    most = context - 1 - (REPEATS + 1)
    least = 1 + config.tokens_per_image if config.projector is not None else 1
    if requested is None:
        sizes = [size for size in range(least, min(PROMPT_TOKENS, most) + 1) if prompt_bucket(size) == size]
        return sizes[-1] if sizes else min(least, most)
    if not least <= requested <= most:
        raise BenchError(f"a prompt has {least} to {most} tokens here (the context is {context}), not {requested}")
    return requested


def random_model(config: ChatConfig, options: LoadOptions) -> Generator:
    """A generator with random weights, made on the devices that hold them.

    Args:
        config: configuration of the model.
        options: its mesh, vision_mode and dtype are used.
    """
    mesh, vision_mode = resolve_mesh(options, config)
    dtype = resolve_dtype(options.dtype)
    params = inference_layout(_random_params(abstract_for_running(config, dtype), config, mesh, vision_mode), mesh)
    model = bind_model(config, params, dtype=dtype, image_axes=mesh_lib.IMAGE_AXES[vision_mode])
    image_token = None if config.projector is None else config.required_text.vocab_size - 1
    return Generator(model, image_token_id=image_token, mesh=mesh)


def _random_params(abstract: Params, config: ChatConfig, mesh: Mesh | None, vision_mode: str) -> Params:
    leaves, tree = jax.tree.flatten(abstract)
    shardings = [None] * len(leaves)
    if mesh is not None:
        shardings = jax.tree.leaves(param_sharding.storage_shardings(abstract, mesh, vision=vision_mode))

    def make(index: int) -> jax.Array:
        leaf = leaves[index]
        draw = jax.jit(
            lambda key: jax.random.normal(key, leaf.shape, leaf.dtype) * 0.02, out_shardings=shardings[index]
        )
        return draw(jax.random.key(index))

    params = jax.tree.unflatten(tree, [make(index) for index in range(len(leaves))])
    return params if mesh is None else param_sharding.place_params(params, config, mesh, vision=vision_mode)


def _memory_peak() -> tuple[int, str]:
    """Bytes, and whether they are of a device or of the process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    if peaks:
        return max(peaks), "device"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"
