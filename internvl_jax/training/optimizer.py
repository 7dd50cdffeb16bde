"""AdamW (Loshchilov and Hutter, 2019) in the reference's setting, cosine schedule, and what is trained at all.

The reference trains through Hugging Face's Trainer and DeepSpeed: torch's AdamW, gradients clipped by their global
norm, biases and some norms exempt from decay. torch gives no gradient to what the loss does not reach, and leaves it
alone, decay included; here the vision layers past select_layer are not in the tree at all.
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
    """Settings of the optimizer. The defaults are the reference's, where it has them."""

    learning_rate: float  # at its peak
    weight_decay: float = 0.05  # InternVL's fine-tuning scripts; LLaVA's: 0
    beta1: float = 0.9  # zero_stage1_config.json, as the next two
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float | None = 1.0  # "auto" there, which is the Trainer's 1.0; None: not clipped
    warmup: float = 0.03  # below 1: of all steps; from 1 on: steps
    decay: str = "reference"  # which parameters: "reference" (`decayed`), or "all"

    def __post_init__(self):
        for name, right, what in (
            ("learning_rate", self.learning_rate > 0, "more than 0"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("warmup", self.warmup >= 0, "0 or more"),
            ("clip", self.clip is None or self.clip > 0, "more than 0"),
        ):
            if not right:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be {what}")

    def warmup_steps(self, steps: int) -> int:
        """Steps of the warm-up in a run of `steps`, rounded up as the Trainer does."""
        return int(self.warmup) if self.warmup >= 1 else -int(-self.warmup * steps // 1)


def schedule(settings: AdamW, steps: int) -> optax.Schedule:
    """The learning rate of each step: linear from 0 to the peak, then half a cosine to 0, as transformers' "cosine".

    The first step of a run with warm-up has rate 0, there as here.
    """
    warmup = settings.warmup_steps(steps)

    def rate(count: Any) -> Any:
        rising = count / max(1, warmup)
        progress = (count - warmup) / max(1, steps - warmup)
        falling = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        return settings.learning_rate * jnp.where(count < warmup, rising, falling)

    return rate


def decayed(params: Params, config: ChatConfig) -> Any:
    """Which parameters decay, as Hugging Face's Trainer decides: a tree of bool.

    Exempt are biases, torch's LayerNorms and LLaMA's norms. InternViT's own RMSNorm and its layer scales are none of
    these to the Trainer, and decay; embeddings do too.
    """
    layer_norm = config.vision is not None and config.vision.norm_type == "layer_norm"
    exempt = r"bias$|^mlp1/norm/|^language_model/.*scale$" + (r"|^vision_model/.*/norm[12]/" if layer_norm else "")
    return jax.tree_util.tree_map_with_path(lambda keys, _: not re.search(exempt, path_of(keys)), params)


def make_optimizer(settings: AdamW, steps: int, config: ChatConfig) -> optax.GradientTransformation:
    """The optimizer of a run of `steps`; give it float32 trees (`full_precision`), so that its moments are float32.

    Raises ValueError for an unknown `decay`.
    """
    if settings.decay not in ("reference", "all"):
        raise ValueError(f'decay is "reference" or "all", not {settings.decay!r}')
    adamw = optax.adamw(
        schedule(settings, steps),
        settings.beta1,
        settings.beta2,
        settings.eps,
        weight_decay=settings.weight_decay,
        mask=None if settings.decay == "all" else lambda params: decayed(params, config),
    )
    return adamw if settings.clip is None else optax.chain(clip_by_global_norm(settings.clip), adamw)


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """Scale gradients down to that norm, by torch's factor (DeepSpeed's too): largest / (norm + 1e-6), at most 1.

    optax's own divides every element, and XLA's CPU backend keeps the quotients: a second copy of all gradients. A
    product it forms again in each of the fusions that read it.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        factor = jnp.minimum(largest / (optax.tree.norm(updates) + 1e-6), 1.0)
        return jax.tree.map(lambda leaf: leaf * factor, updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def full_precision(tree: Any) -> Any:
    """Gradients or parameters in float32; nothing is copied where they are."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def apply_gradients(
    optimizer: optax.GradientTransformation, grads: Any, state: Any, trained: Params
) -> tuple[Params, Any]:
    """One step: parameters and optimizer state after it. Computed in float32, parameters kept in their own dtype."""
    whole = full_precision(trained)
    updates, state = optimizer.update(full_precision(grads), state, whole)
    moved = optax.apply_updates(whole, updates)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), moved, trained), state


def split(params: Params, parts: Sequence[str]) -> tuple[Params, Params]:
    """What is trained and what is frozen, by the names of parts. Raises ValueError for a part that is not there."""
    unknown = sorted(set(parts) - set(params))
    if unknown:
        raise ValueError(f"{', '.join(unknown)} cannot be trained: the model has {', '.join(sorted(params))}")
    trained = {name: part for name, part in params.items() if name in parts}
    return trained, {name: part for name, part in params.items() if name not in parts}
