"""What is trained, and with which settings. Every number has its source beside it, or "default, not published".

V1-1's own hyper-parameters were never published: its blog's table can no longer be found, and the maintainers only say
that they differ from V1-2's. Its two stages use the nearest published runs that train the same parts. Names such as
shell/... are files in the InternVL repository's internvl_chat/, scripts/... in LLaVA's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from internvl_jax.lora import Lora, LoraError
from internvl_jax.models.axes import linear_layers
from internvl_jax.training.optimizer import AdamW


@dataclass(frozen=True)
class Recipe:
    """Everything about a training run but its data, its number of steps and the devices that it runs on.

    Attributes:
        name: Name on the command line.
        train: Parts of the model whose own weights are trained: "vision_model", "mlp1", "language_model".
        optimizer: Settings of AdamW and of the learning rate.
        global_batch_size: Rows per optimizer step, over all devices and micro-batches.
        max_seq_length: Tokens per row.
        epochs: Passes over the data.
        lora: Adapters by part of the model. The part's own weights are then frozen.
        drop_path: Rate of stochastic depth in the vision tower, where it is trained.
        z_loss: Weight of the squared log-normalizer of the softmax; the reference has none.
        loss_mean: "token" is the mean over all supervised tokens of a step. "device" is the reference's: a mean per
            device and micro-batch, then over these.
        images_first: Image placeholders are moved to the front of their question, as LLaVA does.
        captions: Conversations are an image and its caption, in LLaVA's `plain` template.

    Raises:
        ValueError: A value is out of range, or nothing is trained. `LoraError` is a ValueError.
    """

    name: str
    train: tuple[str, ...]
    optimizer: AdamW
    global_batch_size: int
    max_seq_length: int
    epochs: float = 1.0
    lora: Mapping[str, Lora] = field(default_factory=dict)
    drop_path: float = 0.0
    z_loss: float = 0.0
    loss_mean: str = "token"
    images_first: bool = False
    captions: bool = False

    def __post_init__(self) -> None:
        if self.loss_mean not in ("token", "device"):
            raise ValueError(f'loss_mean is "token" or "device", not {self.loss_mean!r}')
        both = set(self.train) & set(self.lora)
        if both:
            raise LoraError(f"{', '.join(sorted(both))}: train a part itself or its adapters, not both")
        if not self.train and not self.lora:
            raise ValueError(f"recipe {self.name!r} trains nothing")
        for name, valid, limit in (
            ("global_batch_size", self.global_batch_size >= 1, "at least 1"),
            ("max_seq_length", self.max_seq_length >= 2, "at least 2"),
            ("epochs", self.epochs > 0, "more than 0"),
            ("drop_path", 0 <= self.drop_path < 1, "in [0, 1)"),
            ("z_loss", self.z_loss >= 0, "0 or more"),
        ):
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be {limit}")


# Trains the vision tower and the projector for a frozen language model. V1-1: 72M samples (model card).
STAGE1 = Recipe(
    "stage1",
    ("vision_model", "mlp1"),  # model card: "InternViT-6B + MLP"
    AdamW(
        1e-5,  # V1-5's pre-training of the same parts, shell/internvl1.5/internlm2_20b/*pretrain.sh; also the next 4
        weight_decay=0.05,
        warmup=100,
    ),
    global_batch_size=2048,
    drop_path=0.2,
    max_seq_length=2048,  # default of the release's code (max_seq_length); V1-5's script has 4096
)

# Trains the projector and the language model to answer. V1-1: about 6M samples (blog).
STAGE2 = Recipe(
    "stage2",
    ("mlp1", "language_model"),  # model card: "MLP + LLM"
    AdamW(
        1e-5,  # V1-2's second fine-tuning of the same parts, shell/internvl1.2/2nd_finetune/*full.sh (also all below)
        weight_decay=0.05,
        warmup=0.03,
    ),
    global_batch_size=128,
    max_seq_length=2048,
)

# Trains everything at once, as the next release was fine-tuned.
FULL = Recipe(
    "full",
    ("vision_model", "mlp1", "language_model"),
    AdamW(1e-5, weight_decay=0.05, warmup=0.03),  # V1-2's, shell/internvl1.2/hermes2_yi34b/*.sh (also all below)
    global_batch_size=512,
    drop_path=0.4,
    max_seq_length=2048,
)

# Trains adapters of the language model; everything else is frozen.
LORA = Recipe(
    "lora",
    (),
    AdamW(1e-5, weight_decay=0.05, warmup=0.03),  # V1-2's, shell/internvl1.2/2nd_finetune/*lora.sh (also all below)
    global_batch_size=16,
    max_seq_length=2048,
    lora={"language_model": Lora(rank=16, alpha=32, dropout=0.05)},  # alpha and dropout: wrap_llm_lora
)

# The same, with adapters in the vision tower too.
LORA_BOTH = Recipe(
    "lora-both",
    (),
    AdamW(1e-5, weight_decay=0.05, warmup=0.03),  # that of LORA
    global_batch_size=16,
    max_seq_length=2048,
    lora={
        "language_model": Lora(rank=16, alpha=32, dropout=0.05),
        "vision_model": Lora(
            rank=16, alpha=32, dropout=0.05
        ),  # default, not published; alpha, dropout: wrap_backbone_lora
    },
)

# The comparison systems: LLaVA-1.5 and InternVL V1-0, which was trained with LLaVA's scripts.
LLAVA_PRETRAIN = Recipe(
    "llava-pretrain",
    ("mlp1",),
    AdamW(1e-3, weight_decay=0.0, warmup=0.03),  # scripts/v1_5/pretrain.sh (also all below)
    global_batch_size=256,
    max_seq_length=2048,
    captions=True,  # --version plain
)

LLAVA_FINETUNE = Recipe(
    "llava-finetune",
    ("mlp1", "language_model"),
    AdamW(2e-5, weight_decay=0.0, warmup=0.03),  # scripts/v1_5/finetune.sh (also all below)
    global_batch_size=128,
    max_seq_length=2048,
    images_first=True,  # preprocess_multimodal of llava/train/train.py
)

RECIPES = {recipe.name: recipe for recipe in (STAGE1, STAGE2, FULL, LORA, LORA_BOTH, LLAVA_PRETRAIN, LLAVA_FINETUNE)}


def recipe_of(name: str) -> Recipe:
    """Return the recipe of that name. Raises ValueError with the known names."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is not known: {', '.join(RECIPES)}")
    return RECIPES[name]


def override(
    recipe: Recipe,
    *,
    optimizer: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Recipe:
    """Return the recipe with other numbers. None leaves a field as it is.

    Args:
        recipe: Recipe to change.
        optimizer: Fields of AdamW.
        lora: Fields of Lora ("rank", "alpha", "dropout", "targets"), for every part with adapters. A rank without an
            alpha gets the reference's alpha, twice the rank. Targets are names in `linear_layers`, or their last
            components such as q_proj.
        **fields: Other fields of Recipe.

    Raises:
        ValueError: A value is out of range.
        LoraError: The recipe has no adapters, or a target is unknown.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    numbers = {name: value for name, value in (optimizer or {}).items() if value is not None}
    changes = {name: value for name, value in (lora or {}).items() if value is not None}
    adapters = _override_adapters(recipe, changes) if changes else recipe.lora
    return replace(recipe, optimizer=replace(recipe.optimizer, **numbers), lora=adapters, **given)


def _override_adapters(recipe: Recipe, changes: dict[str, Any]) -> dict[str, Lora]:
    if not recipe.lora:
        adapted = [name for name, other in RECIPES.items() if other.lora]
        raise LoraError(f"recipe {recipe.name!r} has no adapters: those that have are {', '.join(adapted)}")
    if "rank" in changes:
        changes.setdefault("alpha", None)
    targets: Sequence[str] | None = changes.pop("targets", None)
    if targets is None:
        return {part: replace(lora, **changes) for part, lora in recipe.lora.items()}
    known = [layer for part in recipe.lora for layer in linear_layers(part)]
    unknown = [target for target in targets if not any(_matches(target, layer) for layer in known)]
    if unknown:
        raise LoraError(f"no layer {', '.join(unknown)} can have adapters: there are {', '.join(known)}")
    adapters = {}
    for part, lora in recipe.lora.items():
        layers = tuple(layer for layer in linear_layers(part) if any(_matches(target, layer) for target in targets))
        if layers:
            adapters[part] = replace(lora, **changes, targets=layers)
    return adapters


def _matches(target: str, layer: str) -> bool:
    return target in (layer, layer.rpartition("/")[2])
