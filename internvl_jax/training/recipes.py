"""What is trained, and with which settings. Every number has its source beside it, or "default, not published".

V1-1's own hyper-parameters were never published (its blog's table is not to be found, and the maintainers only say that
they differ from V1-2's). For its two stages stand the nearest published runs that train the same parts. Names like
shell/... are files of the InternVL repository's internvl_chat/, scripts/... of LLaVA's.
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
    """A training run but for its data, its length in steps and the machine it runs on."""

    name: str
    train: tuple[str, ...]  # parts of the model whose own weights are trained
    optimizer: AdamW
    rows: int  # of one optimizer step, over all devices and micro-batches
    length: int  # tokens of a row
    epochs: float = 1.0
    lora: Mapping[str, Lora] = field(default_factory=dict)  # adapters, by tower; the tower itself is then frozen
    drop_path: float = 0.0  # stochastic depth in the tower; none where it is frozen
    z_loss: float = 0.0  # none in the reference
    mean: str = "token"  # of the loss: over all tokens of a step, or "device", the reference's mean of means
    images_first: bool = False  # placeholders move to the front of their question, as LLaVA's code moves them
    captions: bool = False  # conversations are written as LLaVA's `plain` template has them: an image and its caption

    def __post_init__(self):
        if self.mean not in ("token", "device"):
            raise ValueError(f'the loss is a mean over "token" or "device", not {self.mean!r}')
        both = set(self.train) & set(self.lora)
        if both:
            raise LoraError(f"{', '.join(sorted(both))}: train a tower itself or its adapters, not both")
        if not self.train and not self.lora:
            raise ValueError(f"recipe {self.name!r} trains nothing")
        for name, right, what in (
            ("rows", self.rows >= 1, "at least 1"),
            ("length", self.length >= 2, "at least 2"),
            ("epochs", self.epochs > 0, "more than 0"),
            ("drop_path", 0 <= self.drop_path < 1, "in [0, 1)"),
            ("z_loss", self.z_loss >= 0, "0 or more"),
        ):
            if not right:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be {what}")


# The tower learns to see for this projector and language model, which is frozen. V1-1: 72M samples (model card).
STAGE1 = Recipe(
    "stage1",
    ("vision_model", "mlp1"),  # model card: "InternViT-6B + MLP"
    AdamW(
        1e-5,  # V1-5's pre-training of the same parts, shell/internvl1.5/internlm2_20b/*pretrain.sh, as the next four
        weight_decay=0.05,
        warmup=100,
    ),
    rows=2048,
    drop_path=0.2,
    length=2048,  # default of the release's code (max_seq_length); V1-5's script has 4096
)

# Projector and language model learn to answer. V1-1: about 6M samples (blog).
STAGE2 = Recipe(
    "stage2",
    ("mlp1", "language_model"),  # model card: "MLP + LLM"
    AdamW(
        1e-5,  # V1-2's second fine-tuning of the same parts, shell/internvl1.2/2nd_finetune/*full.sh, as the rest
        weight_decay=0.05,
        warmup=0.03,
    ),
    rows=128,
    length=2048,
)

# Everything at once, as the next release was fine-tuned.
FULL = Recipe(
    "full",
    ("vision_model", "mlp1", "language_model"),
    AdamW(1e-5, weight_decay=0.05, warmup=0.03),  # V1-2's, shell/internvl1.2/hermes2_yi34b/*.sh, as all that follow
    rows=512,
    drop_path=0.4,
    length=2048,
)

# Adapters of the language model, all else frozen.
LORA = Recipe(
    "lora",
    (),
    AdamW(1e-5, weight_decay=0.05, warmup=0.03),  # V1-2's, shell/internvl1.2/2nd_finetune/*lora.sh, as all that follow
    rows=16,
    length=2048,
    lora={"language_model": Lora(rank=16, alpha=32, dropout=0.05)},  # alpha and dropout: wrap_llm_lora
)

# The same with adapters in the tower.
LORA_BOTH = Recipe(
    "lora-both",
    (),
    AdamW(1e-5, weight_decay=0.05, warmup=0.03),  # as LORA
    rows=16,
    length=2048,
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
    AdamW(1e-3, weight_decay=0.0, warmup=0.03),  # scripts/v1_5/pretrain.sh, as all that follow
    rows=256,
    length=2048,
    captions=True,  # --version plain
)

LLAVA_FINETUNE = Recipe(
    "llava-finetune",
    ("mlp1", "language_model"),
    AdamW(2e-5, weight_decay=0.0, warmup=0.03),  # scripts/v1_5/finetune.sh, as all that follow
    rows=128,
    length=2048,
    images_first=True,  # preprocess_multimodal of llava/train/train.py
)

RECIPES = {recipe.name: recipe for recipe in (STAGE1, STAGE2, FULL, LORA, LORA_BOTH, LLAVA_PRETRAIN, LLAVA_FINETUNE)}


def recipe_of(name: str) -> Recipe:
    """The recipe of that name. Raises ValueError that lists what there is."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is not known: {', '.join(RECIPES)}")
    return RECIPES[name]


def override(
    recipe: Recipe,
    *,
    optimizer: Mapping[str, Any] | None = None,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float | None = None,
    lora_targets: Sequence[str] | None = None,
    **fields: Any,
) -> Recipe:
    """A recipe with other numbers; None leaves a field as it is.

    optimizer: fields of AdamW. lora_*: of every tower that has adapters; another rank without an alpha has the
    reference's, twice the rank. lora_targets: names of `linear_layers` or their last parts, q_proj.
    fields: others of Recipe. Raises ValueError or LoraError for values that mean nothing.
    """
    asked: dict[str, Any] = {"rank": lora_rank, "alpha": lora_alpha, "dropout": lora_dropout, "targets": lora_targets}
    changes = {name: value for name, value in asked.items() if value is not None}
    if changes and not recipe.lora:
        adapted = [name for name, one in RECIPES.items() if one.lora]
        raise LoraError(f"recipe {recipe.name!r} has no adapters: those that have are {', '.join(adapted)}")
    if "rank" in changes:
        changes.setdefault("alpha", None)
    if lora_targets is not None:
        known = [target for tower in recipe.lora for target in linear_layers(tower)]
        unknown = [name for name in lora_targets if not any(_names(name, target) for target in known)]
        if unknown:
            raise LoraError(f"no layer {', '.join(unknown)} can have adapters: there are {', '.join(known)}")
    adapters = {}
    for tower, lora in recipe.lora.items():
        own = dict(changes)
        if lora_targets is not None:
            own["targets"] = tuple(t for t in linear_layers(tower) if any(_names(name, t) for name in lora_targets))
        adapters[tower] = replace(lora, **own)
    adapters = {tower: lora for tower, lora in adapters.items() if lora.targets != ()}
    numbers = {name: value for name, value in (optimizer or {}).items() if value is not None}
    given = {name: value for name, value in fields.items() if value is not None}
    return replace(recipe, optimizer=replace(recipe.optimizer, **numbers), lora=adapters, **given)


def _names(name: str, target: str) -> bool:
    return name in (target, target.rpartition("/")[2])
