"""What a training step is made of: settings, and the context that holds them with recipe, placement and loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from internvl_jax.config import ChatConfig
from internvl_jax.data.batch import Batch
from internvl_jax.models.layers import Array, Variables
from internvl_jax.models.stack import Remat
from internvl_jax.training import objective, optimizer
from internvl_jax.training.mesh_placement import MeshPlacement
from internvl_jax.training.recipes import Recipe

# What the backward pass keeps of a layer: its input only, also the products with weights, everything.
REMAT: dict[str, Remat] = {
    "full": True,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "none": False,
}


class Loss(Protocol):
    """A loss function. `objective.loss` documents the arguments."""

    def __call__(
        self,
        variables: Variables,
        config: ChatConfig,
        batch: Batch,
        weights: Array,
        options: objective.LossOptions,
        *,
        rngs: objective.Rngs = objective.NO_RNGS,
    ) -> objective.LossSums:
        """Return the loss of a micro-batch and its counts."""


@dataclass(frozen=True)
class TrainSettings:
    """How a recipe is run.

    Attributes:
        steps: Number of optimizer steps.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        seed: Seed of dropout, stochastic depth and the adapters' initial values.
        dtype: Computation dtype, and that of frozen parameters.
        remat: Rematerialization policy, a key of REMAT.
        chunk: Tokens of each row whose logits are computed at once.
        save_every: Steps between saved steps.
        keep: Number of saved steps to keep.
        log_every: Steps between reported metrics.
        eval_every: Steps between held-out evaluations.
    """

    steps: int
    gradient_accumulation_steps: int = 1
    seed: int = 0
    dtype: str = "float32"
    # The settings above identify a run; those below may change when it is resumed.
    remat: str = "full"
    chunk: int = objective.CHUNK
    save_every: int = 500
    keep: int = 3
    log_every: int = 10
    eval_every: int = 500

    def __post_init__(self) -> None:
        if self.remat not in REMAT:
            raise ValueError(f"remat {self.remat!r} is not one of {', '.join(REMAT)}")
        counts = ("steps", "gradient_accumulation_steps", "chunk", "save_every", "keep", "log_every", "eval_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")

    def identity(self) -> dict[str, Any]:
        """Return the settings that must stay the same when a run is resumed."""
        return {name: getattr(self, name) for name in ("steps", "gradient_accumulation_steps", "seed", "dtype")}


@dataclass(frozen=True)
class TrainContext:
    """Everything that a training step is compiled from, apart from shapes.

    Attributes:
        recipe: What is trained, and with which numbers.
        settings: How the recipe is run.
        placement: Where the arrays are; also has the model's configuration.
        loss: Loss function.
        loss_groups: Groups of rows for the per-device mean (`Recipe.loss_mean`). None is one per row shard of the mesh.
    """

    recipe: Recipe
    settings: TrainSettings
    placement: MeshPlacement
    loss: Loss = objective.loss
    loss_groups: int | None = None

    @property
    def config(self) -> ChatConfig:
        """Configuration of the model, with the recipe's stochastic depth."""
        config = self.placement.config
        if config.vision is None:
            return config
        return replace(config, vision=replace(config.vision, drop_path_rate=self.recipe.drop_path))

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The recipe's optimizer, with the schedule of the run."""
        return optimizer.make_optimizer(self.recipe.optimizer, self.settings.steps, self.placement.config)

    @property
    def dtype(self) -> Any:
        """Computation dtype."""
        return jnp.dtype(self.settings.dtype)

    @property
    def loss_options(self) -> objective.LossOptions:
        """Options of the loss function in a training step."""
        return objective.LossOptions(
            z_loss=self.recipe.z_loss,
            chunk=self.settings.chunk,
            dtype=self.dtype,
            remat=REMAT[self.settings.remat],
            image_axes=self.placement.image_axes,
        )
