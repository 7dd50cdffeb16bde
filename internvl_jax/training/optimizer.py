"""AdamW (Loshchilov and Hutter, 2019) as the reference uses it, cosine schedule, trained and frozen parameters.

The reference trains with Hugging Face's Trainer and DeepSpeed: torch's AdamW, gradients clipped by their global norm,
biases and some norms exempt from weight decay. torch does not update parameters that the loss does not depend on, not
even by weight decay; here the vision layers past select_layer are not in the tree at all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from internvl_jax.config import ChatConfig
from internvl_jax.models.layers import Params
from internvl_jax.parallel.partitioning import path_of


@dataclass(frozen=True)
class AdamW:
    """Settings of the optimizer. The defaults are the reference's, where it has them.

    Attributes:
        learning_rate: Peak learning rate.
        weight_decay: Weight decay, decoupled.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        max_grad_norm: Gradients are clipped to this global norm. None is no clipping.
        warmup: Warm-up steps; below 1, a fraction of all steps.
        decay: Which parameters decay: "reference" (see `decay_mask`) or "all".
    """

    learning_rate: float
    weight_decay: float = 0.05  # InternVL's fine-tuning scripts; LLaVA's have 0
    beta1: float = 0.9  # zero_stage1_config.json, also the next two
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0  # "auto" in zero_stage1_config.json, which is the Trainer's 1.0
    warmup: float = 0.03
    decay: str = "reference"

    def __post_init__(self) -> None:
        for name, valid, limit in (
            ("learning_rate", self.learning_rate > 0, "more than 0"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("warmup", self.warmup >= 0, "0 or more"),
            ("max_grad_norm", self.max_grad_norm is None or self.max_grad_norm > 0, "more than 0"),
        ):
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be {limit}")

    def warmup_steps(self, steps: int) -> int:
        """Return the warm-up steps in a run of `steps`, rounded up as the Trainer does."""
        return int(self.warmup) if self.warmup >= 1 else -int(-self.warmup * steps // 1)


def schedule(settings: AdamW, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step: transformers' "cosine" schedule.

    It rises linearly from 0 to the peak, then falls as half a cosine to 0. As in transformers, the first step of a run
    with warm-up has rate 0.

    Args:
        settings: Settings of the optimizer.
        steps: Number of steps of the run.
    """
    warmup = settings.warmup_steps(steps)

    def rate(count: Any) -> Any:
        rising = count / max(1, warmup)
        progress = (count - warmup) / max(1, steps - warmup)
        falling = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        return settings.learning_rate * jnp.where(count < warmup, rising, falling)

    return rate


def decay_mask(params: Params, config: ChatConfig) -> Any:
    """Return which parameters have weight decay, by the rule of Hugging Face's Trainer: a tree of bool.

    Biases, torch's LayerNorms and LLaMA's norms have none. The Trainer does not know InternViT's own RMSNorm and layer
    scales as norms, so they decay; so do embeddings.
    """
    layer_norm = config.vision is not None and config.vision.norm_type == "layer_norm"
    exempt = r"bias$|^mlp1/norm/|^language_model/.*scale$" + (r"|^vision_model/.*/norm[12]/" if layer_norm else "")
    return jax.tree_util.tree_map_with_path(lambda keys, _: not re.search(exempt, path_of(keys)), params)


def make_optimizer(settings: AdamW, steps: int, config: ChatConfig) -> optax.GradientTransformation:
    """Return the optimizer of a run. Its moments are float32 if it is given float32 trees (`full_precision`).

    Args:
        settings: Settings of the optimizer.
        steps: Number of steps of the run.
        config: Configuration of the model, which says which norms are LayerNorms.

    Raises:
        ValueError: `settings.decay` is unknown.
    """
    if settings.decay not in ("reference", "all"):
        raise ValueError(f'decay is "reference" or "all", not {settings.decay!r}')
    adamw = optax.adamw(
        schedule(settings, steps),
        settings.beta1,
        settings.beta2,
        settings.eps,
        weight_decay=settings.weight_decay,
        mask=None if settings.decay == "all" else lambda params: decay_mask(params, config),
    )
    if settings.max_grad_norm is None:
        return adamw
    return optax.chain(clip_by_global_norm(settings.max_grad_norm), adamw)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Return a transformation that scales gradients by max_norm / (norm + 1e-6), at most 1, as torch and DeepSpeed do.

    optax's own divides every element, and XLA's CPU backend keeps the quotients: a second copy of all gradients. A
    product is recomputed in each fusion that reads it.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        factor = jnp.minimum(max_norm / (optax.tree.norm(updates) + 1e-6), 1.0)
        return jax.tree.map(lambda leaf: leaf * factor, updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def full_precision(tree: Any) -> Any:
    """Return gradients or parameters in float32. Those that are float32 already are not copied."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def apply_gradients(
    optimizer: optax.GradientTransformation, grads: Any, state: Any, trained: Params
) -> tuple[Params, Any]:
    """Apply one optimizer step in float32.

    Args:
        optimizer: Optimizer of `make_optimizer`.
        grads: Gradients of `trained`.
        state: The optimizer's state.
        trained: Trained parameters.

    Returns:
        The new parameters in their own dtypes, and the new state.
    """
    params = full_precision(trained)
    updates, state = optimizer.update(full_precision(grads), state, params)
    updated = optax.apply_updates(params, updates)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), updated, trained), state


def split(params: Params, parts: Sequence[str]) -> tuple[Params, Params]:
    """Split parameters into trained and frozen ones, by the names of parts. Raises ValueError for an unknown part."""
    unknown = sorted(set(parts) - set(params))
    if unknown:
        raise ValueError(f"{', '.join(unknown)} cannot be trained: the model has {', '.join(sorted(params))}")
    trained = {name: part for name, part in params.items() if name in parts}
    return trained, {name: part for name, part in params.items() if name not in parts}
