"""What a run tells the user at its start and its end."""

from __future__ import annotations

import jax

from internvl_jax.inference.bench import chip_of
from internvl_jax.training.mesh_placement import MeshPlacement
from internvl_jax.training.runs import costs
from internvl_jax.training.runs.prepare import Run
from internvl_jax.training.saving import MODEL
from internvl_jax.training.state import ADAPTERS
from internvl_jax.training.trainer import Outcome
from internvl_jax.utils import files, formats


def summarize(run: Run) -> list[str]:
    """Return lines about a run that is about to start."""
    lines = [_recipe_line(run), _data_line(run), _batch_line(run), _schedule_line(run), *_device_lines(run)]
    epoch = run.data.epoch
    if epoch.problems:
        invalid = len(epoch.problems)
        lines.append(
            f"{invalid:,} of {invalid + len(epoch.sizes):,} checked conversations are invalid and will be skipped "
            f"(internvl-jax data check {files.quoted(run.options.data)} lists them)"
        )
    if run.is_done:
        lines.append(f"{run.output} is done")
    elif run.saved_step is not None:
        lines.append(f"{run.output} resumes after step {run.saved_step}")
    return lines


def _recipe_line(run: Run) -> str:
    recipe = run.context.recipe
    trained, frozen = costs.count_parameters(run.model.config, recipe)
    parts = [*recipe.train, *(f"adapters of {part} (rank {lora.rank})" for part, lora in recipe.lora.items())]
    name = "nano" if run.options.checkpoint is None else run.model.directory.resolve().name
    sizes = f"{formats.parameters(trained)} parameters trained, {formats.parameters(frozen)} frozen"
    return f"recipe {recipe.name} on {name}: {', '.join(parts)}; {sizes}"


def _data_line(run: Run) -> str:
    epoch = run.data.epoch
    return (
        f"data: {epoch.epoch:,} conversations per epoch, {epoch.tokens:,.0f} tokens and "
        f"{formats.number(epoch.images)} images each"
    )


def _batch_line(run: Run) -> str:
    layout, accumulation_steps = run.data.layout, run.context.settings.gradient_accumulation_steps
    micro_batches = f", in {accumulation_steps} micro-batches" if accumulation_steps > 1 else ""
    images = layout.image_slots * run.context.placement.num_data_shards * accumulation_steps
    return (
        f"global batch: {_global_rows(run)} {'packed ' if layout.packed else ''}rows of "
        f"{' or '.join(map(str, layout.lengths))} tokens, up to {images} images, about "
        f"{_conversations_per_step(run):,.0f} conversations{micro_batches}"
    )


def _schedule_line(run: Run) -> str:
    recipe, steps, epoch = run.context.recipe, run.context.settings.steps, run.data.epoch
    epochs = steps * _conversations_per_step(run) / (epoch.epoch * epoch.usable)
    return (
        f"{steps:,} steps ({formats.number(epochs)} epochs), {recipe.optimizer.warmup_steps(steps):,} of them "
        f"warm-up to a learning rate of {recipe.optimizer.learning_rate:g}; loss mean over "
        f"{'tokens' if recipe.loss_mean == 'token' else 'devices'}"
    )


def _device_lines(run: Run) -> list[str]:
    mesh, settings = run.options.mesh, run.context.settings
    where = "one device" if mesh is None else f"mesh {mesh}, {jax.device_count()} devices"
    state, activations = estimate_memory(run)
    lines = [
        f"{where} ({run.context.placement.device.device_kind}), {settings.dtype}, remat {settings.remat}: about "
        f"{formats.memory(state)} of parameters and optimizer state and {formats.memory(activations)} of "
        "activations per device"
    ]
    chip = chip_of(run.context.placement.device)
    if chip is not None and state + activations > chip.hbm_bytes // chip.devices:
        lines.append(
            f"this is more than the {formats.memory(chip.hbm_bytes / chip.devices)} of a {chip.name}: it may not fit. "
            "--remat full, --gradient-accumulation-steps, --param-dtype bfloat16, more devices along fsdp or shorter "
            "rows need less"
        )
    return lines


def summarize_result(run: Run, outcome: Outcome | None) -> list[str]:
    """Return lines about how a run ended and what to do next.

    Args:
        run: The run.
        outcome: How `start` ended. None if the run was done before.
    """
    if outcome is not None and not outcome.finished:
        steps = run.context.settings.steps
        return [f"stopped after step {outcome.step} of {steps}, which is saved: the same command resumes the run"]
    model, recipe = run.output / MODEL, run.context.recipe
    quoted_model, quoted_adapters = files.quoted(model), files.quoted(model / ADAPTERS)
    base = "" if run.options.checkpoint is None else f" --checkpoint {files.quoted(run.model.directory)}"
    if recipe.lora and not recipe.train:
        return [
            f"adapters: {model}",
            f"  internvl-jax chat{base} --adapters {quoted_model}",
            f"  internvl-jax adapters merge {quoted_model} MERGED{base}    # a whole checkpoint",
            f"  internvl-jax adapters to-peft {quoted_model} PEFT{base}    # for Hugging Face's peft",
        ]
    adapters = f" --adapters {quoted_adapters}" if recipe.lora else ""
    if adapters:
        next_step = (
            f"  internvl-jax adapters merge {quoted_adapters} MERGED --checkpoint {quoted_model}    # one checkpoint"
        )
    else:
        next_step = f"  internvl-jax export {quoted_model} EXPORTED    # for PyTorch"
    return [f"model: {model}", f"  internvl-jax chat --checkpoint {quoted_model}{adapters}", next_step]


def estimate_memory(run: Run) -> tuple[int, int]:
    """Return `costs.memory_per_device` of a run."""
    layout, shards = run.data.layout, run.context.placement.num_data_shards
    shape = costs.BatchShape(layout.rows * shards, layout.max_length, layout.image_slots * shards)
    return costs.memory_per_device(run.context, shape, run.options.param_dtype)


def peak_flops(placement: MeshPlacement) -> float | None:
    """Return the peak bfloat16 FLOP/s of all devices of a run, or None if those of the chip are unknown."""
    chip = chip_of(placement.device)
    devices = 1 if placement.mesh is None else placement.mesh.size
    return None if chip is None else devices / chip.devices * chip.bf16_flops


def _global_rows(run: Run) -> int:
    rows = run.data.layout.rows * run.context.placement.num_data_shards
    return rows * run.context.settings.gradient_accumulation_steps


def _conversations_per_step(run: Run) -> float:
    """Return how many conversations a step has on average."""
    layout, epoch = run.data.layout, run.data.epoch
    if not layout.packed:
        return _global_rows(run)
    capacity = max(1.0, epoch.batches(layout) * layout.rows * layout.max_length)
    filled = min(1.0, epoch.epoch * epoch.usable * epoch.tokens / capacity)
    return _global_rows(run) * layout.max_length * filled / epoch.tokens
