"""Train nano from scratch on the CPU, with the project's own trainer.

    python -m internvl_jax.nano.train --output DIR

Two stages, which train what V1-1's did. First the tower and the projector, against labels of what is in the picture,
which a linear layer reads off the visual tokens: learning to see through the language model's few answer tokens takes
many times as long. Then projector and language model on questions and answers, the tower frozen. A third, short stage
trains all of it. The labels help to the end; the linear layer is not part of the model.

    DIR/data/                        the data set (dataset.py)
    DIR/see/ answer/ together/       the stages' runs, each with its metrics and saved steps
    DIR/model/                       what ships

Deterministic. A run that is killed goes on from its last saved step when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from internvl_jax import checkpoint
from internvl_jax.config import PRESETS, ChatConfig
from internvl_jax.config.schema import read_json
from internvl_jax.data.batch import Batch
from internvl_jax.data.loader import open_data
from internvl_jax.data.packing import Layout
from internvl_jax.models import chat_model
from internvl_jax.models.layers import Array, Params
from internvl_jax.nano import build_tokenizer, dataset
from internvl_jax.nano.render import CELL_CLASSES, CONTENTS, PICTURE_CLASSES
from internvl_jax.processing.conversation import IMG_CONTEXT
from internvl_jax.processing.images import ImageProcessor
from internvl_jax.processing.tokenizer import load_tokenizer
from internvl_jax.training import objective
from internvl_jax.training.objective import Sums
from internvl_jax.training.optimizer import AdamW
from internvl_jax.training.recipes import Recipe
from internvl_jax.training.reporting import reporting
from internvl_jax.training.state import Place
from internvl_jax.training.trainer import Loss, Settings, train
from internvl_jax.utils import logs
from internvl_jax.utils.files import new_directory, resolve
from internvl_jax.utils.progress import err

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in the published preprocessor_config.json
LABEL_WEIGHT = 0.5  # of the first stage's loss in the others
ROWS, LENGTH = 64, 84  # four questions about a picture take at most 82 tokens


@dataclass(frozen=True)
class Stage:
    """One run of the trainer."""

    recipe: Recipe
    steps: int
    loss: Loss


def label_loss(labels: Params, config: ChatConfig, features: Array, contents: Array) -> tuple[Array, Array]:
    """Cross-entropy of the labels read off the visual tokens, and how many pictures are read without a mistake.

    What stands in a cell of the pictures' 3x3 grid is read off the tokens that lie there, by the same weights in every
    cell: so that a token says the same thing in the same way wherever it is, which is what the language model's
    attention can read. Words and digits are read off all tokens in order: their mean says too little of them to learn
    from. The two means are added, so that three labels weigh as much as the eighteen of the cells.
    labels: the linear layers of `init_params`. features [M,P,D], contents [M,21] int32.
    """
    cells = cell_means(features, config)
    local = cells @ labels["cell"]["kernel"] + labels["cell"]["bias"]
    whole = features.reshape(features.shape[0], -1)
    picture = whole @ labels["picture"]["kernel"] + labels["picture"]["bias"]
    shapes, colours = jnp.split(local, [CELL_CLASSES[0]], axis=-1)
    parts = [shapes[:, i] for i in range(9)] + [colours[:, i] for i in range(9)]
    parts += jnp.split(picture, np.cumsum(PICTURE_CLASSES)[:-1], axis=-1)
    losses = [optax.softmax_cross_entropy_with_integer_labels(p, contents[:, i]) for i, p in enumerate(parts)]
    right = [jnp.argmax(p, axis=-1) == contents[:, i] for i, p in enumerate(parts)]
    loss = jnp.mean(jnp.stack(losses[:18])) + jnp.mean(jnp.stack(losses[18:]))
    return loss, jnp.sum(jnp.all(jnp.stack(right), axis=0), dtype=jnp.float32)


def cell_means(features: Array, config: ChatConfig) -> Array:
    """Means of the visual tokens over the cells of the pictures' grid, by area. [M,P,D] -> [M,9,D]."""
    images, tokens, width = features.shape
    side = math.isqrt(tokens)
    edges = np.arange(4) * side / 3
    token = np.arange(side)
    # [3, side]: how much of each token lies in each third.
    overlap = np.clip(np.minimum(edges[1:, None], token + 1) - np.maximum(edges[:-1, None], token), 0, None) * 3 / side
    grid = features.reshape(images, side, side, width)
    if config.ps_version == "v1":  # which leaves columns before rows
        grid = grid.transpose(0, 2, 1, 3)
    return jnp.einsum("ih,jw,mhwd->mijd", overlap, overlap, grid).reshape(images, 9, width)


def seeing(
    params: Params, config: ChatConfig, batch: Batch, weights: Array, image_token_id: int, *, dtype: Any, remat: Any,
    z_loss: float, chunk: int, owners: tuple[int, ...], **vit: Any,
) -> Sums:  # fmt: skip
    """The first stage's loss, in objective.loss's form: of the labels alone. What is counted are pictures."""
    features = objective.encode_images(params, config, batch.pixel_values, dtype=dtype, remat=remat, **vit)
    loss, right = label_loss(params["labels"], config, features, batch.image_labels)
    pictures = jnp.float32(len(batch.pixel_values))
    return Sums(loss, right, pictures, jnp.sum(batch.segment_ids > 0, dtype=jnp.float32))


def answering(
    params: Params, config: ChatConfig, batch: Batch, weights: Array, image_token_id: int, *, dtype: Any, remat: Any,
    z_loss: float, chunk: int, owners: tuple[int, ...], **vit: Any,
) -> Sums:  # fmt: skip
    """The other stages' loss, in objective.loss's form: of the answers, and of the labels a little."""
    features = objective.encode_images(params, config, batch.pixel_values, dtype=dtype, remat=remat, **vit)
    seen, _ = label_loss(params["labels"], config, features, batch.image_labels)
    sums = objective.language_loss(
        params, config, batch, features, weights, image_token_id,
        z_loss=z_loss, chunk=chunk, dtype=dtype, remat=remat, owners=owners,
    )  # fmt: skip
    return sums.replace(loss=sums.loss + LABEL_WEIGHT * seen)


def make_stages(steps: Sequence[int] = (2000, 1800, 800), rows: int = ROWS, warmup: int = 100) -> tuple[Stage, ...]:
    """The stages, by default those that the shipped model went through."""
    optimizer = AdamW(1.5e-3, weight_decay=0.05, beta2=0.98, warmup=warmup)
    parts = (
        ("see", ("vision_model", "mlp1", "labels"), seeing),
        ("answer", ("mlp1", "language_model", "labels"), answering),
        ("together", ("vision_model", "mlp1", "language_model", "labels"), answering),
    )
    return tuple(
        Stage(Recipe(name, trained, optimizer, rows, LENGTH), count, loss)
        for (name, trained, loss), count in zip(parts, steps)
    )


def init_params(key: Array, config: ChatConfig) -> Params:
    """The model's parameters, layers that run, and under "labels" what reads labels off the visual tokens."""
    params = chat_model.init_params(key, config)
    vision = params["vision_model"]
    # The published initial layer scale of 0.1 suits 48 layers; five learn faster with whole branches.
    for name in ("ls1", "ls2"):
        vision["layers"][name] *= 5
    width = config.text.hidden_size

    def linear(inputs: int, outputs: int) -> Params:
        return {"kernel": jnp.zeros((inputs, outputs)), "bias": jnp.zeros(outputs)}

    labels = {
        "cell": linear(width, sum(CELL_CLASSES)),
        "picture": linear(config.tokens_per_image * width, sum(PICTURE_CLASSES)),
    }
    return {**params, "labels": labels}


def run(out: Path, config: ChatConfig, stages: Sequence[Stage], *, samples: int, seed: int = 0) -> Params | None:
    """All stages in turn, each from its last saved step. Returns the parameters, or None where it was asked to stop."""
    tokenizer = load_tokenizer(out)
    processor = ImageProcessor(config.image_size, MEAN, STD)
    meta = dataset.write(out / "data", samples)
    first = init_params(jax.random.key(seed), config)
    count = config.num_vision_layers
    running = jax.tree.map(lambda leaf: leaf[:count], first["vision_model"]["layers"])
    params: Params = {**first, "vision_model": {**first["vision_model"], "layers": running}}
    place = Place(config)
    for number, stage in enumerate(stages):
        recipe = stage.recipe
        layout = Layout(recipe.rows, (recipe.length,), recipe.rows, packed=False)
        loader = open_data(
            meta, config, tokenizer, processor, layout, seed=number, fatal=True, image_labels=len(CONTENTS)
        )
        settings = Settings(
            stage.steps, seed=number, remat="none", chunk=recipe.length, save_every=100, keep=2, log_every=1
        )
        identity = {"data": loader.corpus.fingerprint(), "label_weight": LABEL_WEIGHT}
        batches = iter(loader)
        err.print(f"{recipe.name}: {', '.join(recipe.train)}, {stage.steps} steps")
        try:
            with reporting(stage.steps, 50, None) as reporter:
                done = train(
                    out / recipe.name, config, recipe, settings, params, batches, tokenizer.token_to_id(IMG_CONTEXT),
                    place, log=reporter.log, identity=identity, loss=stage.loss,
                )  # fmt: skip
        finally:
            batches.close()
        if not done.finished:
            err.print(f"stopped after step {done.step} of {recipe.name}: the same command goes on there")
            return None
        params = {**done.frozen, **done.state.trained}
    layers = jax.tree.map(
        lambda new, old: jnp.concatenate([new, old[count:]]), params["vision_model"]["layers"],
        first["vision_model"]["layers"],
    )  # fmt: skip
    whole = {**params, "vision_model": {**params["vision_model"], "layers": layers}}
    return {name: part for name, part in whole.items() if name != "labels"}


def write_model(directory: Path, tokenizer: Path, params: Params, config: ChatConfig) -> None:
    """Write the model that ships: bfloat16 weights, config.json, preprocessor_config.json and the tokenizer's files.

    One that was written before is replaced. Raises ValueError where something else is there.
    """
    check_model(directory, config)
    preprocessor = {
        "crop_size": config.image_size, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": list(MEAN), "image_std": list(STD),
        "resample": 3, "size": config.image_size,
    }  # fmt: skip
    with new_directory(directory, replace=True) as temporary:
        for path in tokenizer.glob("*token*"):
            if path.is_file():
                shutil.copy(path, temporary)
        for name, value in (("config.json", config.to_hf()), ("preprocessor_config.json", preprocessor)):
            (temporary / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        checkpoint.save(temporary, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))


def check_model(directory: Path, config: ChatConfig) -> None:
    """Raise ValueError where there is something at `directory` that `write_model` did not write."""
    if not os.path.lexists(directory):
        return
    names = {"config.json", "preprocessor_config.json", checkpoint.PARAMS}
    ours = checkpoint.is_converted(directory) and all(
        path.name in names or "token" in path.name for path in directory.iterdir()
    )
    if not ours or read_json(directory / "config.json") != json.loads(json.dumps(config.to_hf())):
        raise ValueError(f"{directory} is not a model that this wrote: name another directory")


def main(argv: list[str] | None = None) -> int:
    """Parse arguments and train. Returns 1 where it was asked to stop."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="the directory of data, runs and model")
    args = parser.parse_args(argv)
    try:
        out = resolve(args.output)
        if not (out / "tokenizer.model").exists():
            build_tokenizer.build(out)
        config = nano_config(out)
        check_model(out / "model", config)  # before hours of training
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    with logs.to_terminal():
        params = run(out, config, make_stages(), samples=dataset.SAMPLES)
    if params is None:
        return 1
    write_model(out / "model", out, params, config)
    err.print(f"wrote {out / 'model'}: {chat_model.count_params(params):,} parameters")
    return 0


def nano_config(directory: Path) -> ChatConfig:
    """The nano preset with the vocabulary of the tokenizer in `directory`."""
    config = PRESETS["nano"]()
    return replace(config, text=replace(config.text, vocab_size=load_tokenizer(directory).vocab_size))


if __name__ == "__main__":
    raise SystemExit(main())
