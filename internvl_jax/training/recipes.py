"""What is trained, and with which settings. Every number has its source beside it, or "default, not published".

V1-1's own hyper-parameters were never published (its blog's table is not to be found, and the maintainers only say that
they differ from V1-2's). For its two stages stand the nearest published runs that train the same parts. Names like
shell/... are files of the InternVL repository's internvl_chat/, scripts/... of LLaVA's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import jax.numpy as jnp

from internvl_jax.config import ChatConfig
from internvl_jax.models.intern_vit import resize_positions
from internvl_jax.models.layers import Params
from internvl_jax.training.lora import Lora, LoraError
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

    def __post_init__(self):
        if self.mean not in ("token", "device"):
            raise ValueError(f'the loss is a mean over "token" or "device", not {self.mean!r}')
        both = set(self.train) & set(self.lora)
        if both:
            raise LoraError(f"{', '.join(sorted(both))}: train a tower itself or its adapters, not both")
        if not self.train and not self.lora:
            raise ValueError(f"recipe {self.name!r} trains nothing")


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
)

LLAVA_FINETUNE = Recipe(
    "llava-finetune",
    ("mlp1", "language_model"),
    AdamW(2e-5, weight_decay=0.0, warmup=0.03),  # scripts/v1_5/finetune.sh, as all that follow
    rows=128,
    length=2048,
)

RECIPES = {recipe.name: recipe for recipe in (STAGE1, STAGE2, FULL, LORA, LORA_BOTH, LLAVA_PRETRAIN, LLAVA_FINETUNE)}


def recipe_of(name: str) -> Recipe:
    """The recipe of that name. Raises ValueError that lists what there is."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is not known: {', '.join(RECIPES)}")
    return RECIPES[name]


def resize_tower(params: Params, config: ChatConfig, image_size: int) -> tuple[Params, ChatConfig]:
    """A tower for pictures of another size, as stage 1 begins: InternViT-224 becomes 448.

    The table of positions is resized bicubically, once and for good (the published conversion does the same); all else
    stays. Returns parameters and the configuration that goes with them.
    Raises ConfigError for a size that is no whole number of patches or that the projector cannot fold.
    """
    resized = replace(config, vision=replace(config.vision, image_size=image_size), image_size=image_size)
    vision = params["vision_model"]
    table = vision["embeddings"]["position_embedding"]
    grid = resized.vision.grid
    moved = resize_positions(jnp.asarray(table), config.vision.grid, grid, grid).astype(table.dtype)
    embeddings = {**vision["embeddings"], "position_embedding": moved}
    return {**params, "vision_model": {**vision, "embeddings": embeddings}}, resized
