"""The model that a run writes at its end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from internvl_jax import checkpoint, lora
from internvl_jax.config import load_config
from internvl_jax.models.layers import Params
from internvl_jax.parallel import distributed
from internvl_jax.training.mesh_placement import MeshPlacement
from internvl_jax.training.recipes import Recipe
from internvl_jax.training.runs import resizing
from internvl_jax.training.state import ADAPTERS, split_adapters
from internvl_jax.utils import files


def write_model(
    directory: str | Path, base: str | Path, trained: Params, placement: MeshPlacement, recipe: Recipe
) -> None:
    """Write what was trained: a checkpoint for chat and export, or an adapter directory if only adapters were trained.

    Args:
        directory: Directory to write.
        base: Converted checkpoint that the run started from. What was not trained, vision layers past select_layer
            included, is copied from it, and its dtypes are kept.
        trained: Trained parts as a State holds them, on the mesh.
        placement: Placement of the run. If its image size is not that of `base`, the vision tower was resized.
        recipe: Recipe of the run.

    Raises:
        CheckpointError: `directory` exists.
    """
    directory, base = Path(directory), Path(base)
    parts, adapters = split_adapters(placement.unpadded_params(trained))
    if not parts and adapters is not None:
        lora.save(directory, adapters, recipe.lora)
        return
    resized = placement.config.image_size != load_config(base).image_size
    config_files = resizing.resized_files(base, placement.config) if resized else None

    def write(to: Path) -> None:
        reshaped = [resizing.POSITIONS] if resized else ()
        checkpoint.write_changed(to, base, parts, reshaped=reshaped, files=config_files)

    if adapters is None:
        write(directory)
    else:
        _write_with_adapters(directory, write, adapters, recipe)


def _write_with_adapters(directory: Path, write: Callable[[Path], None], adapters: Params, recipe: Recipe) -> None:
    """Write model and adapters under a temporary name: a model without its adapters must never be at `directory`."""
    number = distributed.broadcast_from_process_0(str(os.getpid()).encode()).decode()
    temporary = files.temporary_path(directory, number)
    try:
        with distributed.process_0_first() as first:
            if first and os.path.lexists(directory):
                raise checkpoint.CheckpointError(f"{directory} exists already: remove it, or write somewhere else")
            if first:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        write(temporary / directory.name)
        lora.save(temporary / directory.name / ADAPTERS, adapters, recipe.lora)
        with distributed.process_0_first() as first:
            if first:
                (temporary / directory.name).rename(directory)
    finally:
        if distributed.is_process_0():
            shutil.rmtree(temporary, ignore_errors=True)
