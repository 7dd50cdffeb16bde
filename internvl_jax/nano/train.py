"""Train nano from scratch on the CPU, with the project's own trainer.

    python -m internvl_jax.nano.train --output DIR [--checkpoint MODEL]

Training has four stages. The first trains the vision tower and the projector on image labels, predicted from the
visual tokens by linear heads; learning vision from the few answer tokens of the language model would take many times as
long. The second trains projector and language model on questions and answers, with the tower frozen. The third, a short
one, trains everything. The label loss is used in these stages; the linear heads are not part of the model. The fourth
trains projector and language model on other phrasings of the questions, greetings and descriptions (phrasings.py),
among the questions as they were, by the answers alone. --checkpoint runs the fourth stage only, from a model that the
third one left.

    DIR/data/ phrasings/                   the data sets (dataset.py) of the first three stages and of the fourth
    DIR/see/ answer/ together/ phrase/     the stages' runs, each with its metrics and saved steps
    DIR/model/                             the model of the package

Training is deterministic. The same command resumes an interrupted run from its last saved step.
"""

from __future__ import annotations

import argparse
import hashlib
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
from internvl_jax.config import PRESETS, ChatConfig, config_to_hf
from internvl_jax.data.batch import Batch
from internvl_jax.data.loader import ReadOptions, open_data
from internvl_jax.data.packing import Layout
from internvl_jax.data.samples import SampleMaker
from internvl_jax.models import chat_model
from internvl_jax.models.layers import Array, Params, Variables
from internvl_jax.nano import build_tokenizer, dataset
from internvl_jax.nano.phrasings import phrased_sample
from internvl_jax.nano.render import CELL_CLASSES, CONTENTS, IMAGE_CLASSES, make_sample
from internvl_jax.processing.images import ImageProcessor
from internvl_jax.processing.tokenizer import load_tokenizer
from internvl_jax.training import objective
from internvl_jax.training.context import Loss, TrainContext, TrainSettings
from internvl_jax.training.mesh_placement import MeshPlacement
from internvl_jax.training.objective import LossOptions, LossSums
from internvl_jax.training.optimizer import AdamW
from internvl_jax.training.recipes import Recipe
from internvl_jax.training.runs.reporting import reporting
from internvl_jax.training.trainer import Outcome, TrainHooks, train
from internvl_jax.utils import logs
from internvl_jax.utils.files import new_directory, read_json_object, resolve
from internvl_jax.utils.progress import err

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in the published preprocessor_config.json
LABEL_WEIGHT = 0.5  # of the label loss in the second and third stage
ROWS, LENGTH = 64, 84  # four questions about an image take at most 82 tokens
PHRASED_SAMPLES = 24_000  # of the fourth stage, which reads each two or three times


@dataclass(frozen=True)
class TrainingStage:
    """One stage.

    Attributes:
        recipe: What is trained.
        steps: Number of steps.
        loss: Its loss.
        data: Directory of its data set, which stages may share.
        make: Function that makes the samples of the data set.
        samples: Number of samples of the data set.
        layout: Shapes of a batch.
        seed: Seed of the order of the data, and of the trainer.
    """

    recipe: Recipe
    steps: int
    loss: Loss
    data: str
    make: dataset.MakeSample
    samples: int
    layout: Layout
    seed: int


def label_loss(labels: Params, config: ChatConfig, features: Array, contents: Array) -> tuple[Array, Array]:
    """Return the cross-entropy of the image labels, and the number of images with all labels predicted correctly.

    The contents of each cell of the 3x3 grid are predicted from the mean of the cell's tokens, with the same weights
    for every cell, so that tokens represent contents independently of position. Words and digits are predicted from all
    tokens in order, since their mean has too little information. The two mean losses are added, so that three labels
    weigh as much as the eighteen labels of the cells.

    Args:
        labels: Linear heads of `init_params`.
        config: Model configuration.
        features: Visual tokens [M,P,D].
        contents: Class labels [M,21] int32, described by `render.CONTENTS`.
    """
    cells = cell_means(features, config)
    local = cells @ labels["cell"]["kernel"] + labels["cell"]["bias"]
    whole = features.reshape(features.shape[0], -1)
    image = whole @ labels["image"]["kernel"] + labels["image"]["bias"]
    shapes, colours = jnp.split(local, [CELL_CLASSES[0]], axis=-1)
    parts = [shapes[:, i] for i in range(9)] + [colours[:, i] for i in range(9)]
    parts += jnp.split(image, np.cumsum(IMAGE_CLASSES)[:-1], axis=-1)
    losses = [optax.softmax_cross_entropy_with_integer_labels(p, contents[:, i]) for i, p in enumerate(parts)]
    correct = [jnp.argmax(p, axis=-1) == contents[:, i] for i, p in enumerate(parts)]
    loss = jnp.mean(jnp.stack(losses[:18])) + jnp.mean(jnp.stack(losses[18:]))
    return loss, jnp.sum(jnp.all(jnp.stack(correct), axis=0), dtype=jnp.float32)


def cell_means(features: Array, config: ChatConfig) -> Array:
    """Return the area-weighted means of the visual tokens over the cells of the 3x3 grid. [M,P,D] -> [M,9,D]."""
    images, tokens, width = features.shape
    side = math.isqrt(tokens)
    edges = np.arange(4) * side / 3
    token = np.arange(side)
    # [3, side]: overlap of each token with each third of the image.
    overlap = np.clip(np.minimum(edges[1:, None], token + 1) - np.maximum(edges[:-1, None], token), 0, None) * 3 / side
    grid = features.reshape(images, side, side, width)
    if config.ps_version == "v1":  # whose tokens are ordered by columns
        grid = grid.transpose(0, 2, 1, 3)
    return jnp.einsum("ih,jw,mhwd->mijd", overlap, overlap, grid).reshape(images, 9, width)


def vision_loss(
    variables: Variables,
    config: ChatConfig,
    batch: Batch,
    weights: Array,
    options: LossOptions,
    *,
    rngs: objective.Rngs = objective.NO_RNGS,
) -> LossSums:
    """Loss of the first stage, with the signature of objective.loss: the label loss. Counts are of images."""
    features = objective.encode_images(variables, config, batch.pixel_values, options, rngs=rngs)
    loss, num_correct = label_loss(variables["params"]["labels"], config, features, batch.image_labels)
    num_images = jnp.float32(len(batch.pixel_values))
    return LossSums(loss, num_correct, num_images, jnp.sum(batch.segment_ids > 0, dtype=jnp.float32))


def answer_loss(
    variables: Variables,
    config: ChatConfig,
    batch: Batch,
    weights: Array,
    options: LossOptions,
    *,
    rngs: objective.Rngs = objective.NO_RNGS,
) -> LossSums:
    """Loss of the other stages, with the signature of objective.loss: answers, plus the weighted label loss."""
    features = objective.encode_images(variables, config, batch.pixel_values, options, rngs=rngs)
    image_loss, _ = label_loss(variables["params"]["labels"], config, features, batch.image_labels)
    sums = objective.language_loss(variables, config, batch, features, weights, options, rngs=rngs)
    return sums.replace(loss=sums.loss + LABEL_WEIGHT * image_loss)


def make_stages(
    steps: Sequence[int] = (2000, 1800, 800, 700),
    rows: int = ROWS,
    warmup: int = 100,
    samples: tuple[int, int] = (dataset.SAMPLES, PHRASED_SAMPLES),
) -> tuple[TrainingStage, ...]:
    """Return the stages, by default those of the shipped model.

    Args:
        steps: Number of steps of each stage; fewer numbers are fewer stages.
        rows: Rows per batch of the first three stages, each with one sample.
        warmup: Warm-up steps.
        samples: Number of samples of the first three stages and of the fourth.
    """
    optimizer = AdamW(1.5e-3, weight_decay=0.05, beta2=0.98, warmup=warmup)
    layout = Layout(rows, (LENGTH,), image_slots=rows, packed=False)
    data = ("data", make_sample, samples[0], layout)
    # The samples differ in length: packed, as many tokens hold a quarter more of them.
    packed = ("phrasings", phrased_sample, samples[1], Layout(rows // 2, (2 * LENGTH,), image_slots=rows * 5 // 4))
    parts = (
        ("see", ("vision_model", "mlp1", "labels"), optimizer, vision_loss, data),
        ("answer", ("mlp1", "language_model", "labels"), optimizer, answer_loss, data),
        ("together", ("vision_model", "mlp1", "language_model", "labels"), optimizer, answer_loss, data),
        ("phrase", ("mlp1", "language_model"), replace(optimizer, learning_rate=1e-3), objective.loss, packed),
    )
    return tuple(
        TrainingStage(Recipe(name, trained, adamw, of[-1].rows, of[-1].max_length), count, loss, *of, seed=seed)
        for seed, ((name, trained, adamw, loss, of), count) in enumerate(zip(parts, steps))
    )


def init_params(key: Array, config: ChatConfig) -> Params:
    """Initialize the model's parameters, and under "labels" the linear heads of `label_loss`."""
    params = chat_model.init_params(key, config)
    vision = params["vision_model"]
    # The published initial layer scale of 0.1 is for 48 layers; five layers learn faster with larger branches.
    for name in ("ls1", "ls2"):
        vision["layers"][name] *= 5
    width = config.required_text.hidden_size

    def linear(inputs: int, outputs: int) -> Params:
        return {"kernel": jnp.zeros((inputs, outputs)), "bias": jnp.zeros(outputs)}

    labels = {
        "cell": linear(width, sum(CELL_CLASSES)),
        "image": linear(config.tokens_per_image * width, sum(IMAGE_CLASSES)),
    }
    return {**params, "labels": labels}


def run(
    out: Path, config: ChatConfig, stages: Sequence[TrainingStage], initial: Params, identity: dict[str, Any]
) -> Params | None:
    """Run stages, each from its last saved step.

    Args:
        out: Directory with the tokenizer, to which data and runs are written.
        config: Model configuration.
        stages: Stages of `make_stages`.
        initial: Parameters that the first of these stages starts from.
        identity: What `initial` is, saved with each run: a run of other parameters is refused.

    Returns:
        The parameters without the linear heads, or None if the run was stopped by a signal.
    """
    num_layers = config.num_vision_layers
    running = jax.tree.map(lambda leaf: leaf[:num_layers], initial["vision_model"]["layers"])
    params: Params = {**initial, "vision_model": {**initial["vision_model"], "layers": running}}
    for stage in stages:
        outcome = run_stage(out, config, stage, params, identity)
        if not outcome.finished:
            err.print(f"stopped after step {outcome.step} of {stage.recipe.name}: the same command resumes the run")
            return None
        params = {**outcome.frozen, **outcome.state.trained}
    layers = jax.tree.map(
        lambda new, old: jnp.concatenate([new, old[num_layers:]]), params["vision_model"]["layers"],
        initial["vision_model"]["layers"],
    )  # fmt: skip
    whole = {**params, "vision_model": {**params["vision_model"], "layers": layers}}
    return {name: part for name, part in whole.items() if name != "labels"}


def run_stage(out: Path, config: ChatConfig, stage: TrainingStage, params: Params, identity: dict[str, Any]) -> Outcome:
    """Run one stage in the directory `out`/NAME, from its last saved step if there is one.

    Args:
        out: Directory with the tokenizer.
        config: Model configuration.
        stage: The stage, whose data set is written if it is not there.
        params: Parameters that the stage starts from; must not be used afterwards.
        identity: What the run of all stages started from.
    """
    recipe, layout = stage.recipe, stage.layout
    meta = dataset.write(out / stage.data, stage.samples, make=stage.make)
    tokenizer = load_tokenizer(out)
    processor = ImageProcessor(config.required_image_size, MEAN, STD)
    maker = SampleMaker.for_model(
        config, tokenizer, processor, max_length=layout.max_length, image_slots=layout.image_slots,
        image_labels=len(CONTENTS),
    )  # fmt: skip
    loader = open_data(meta, maker, layout, ReadOptions(seed=stage.seed, fatal=True))
    settings = TrainSettings(
        stage.steps, seed=stage.seed, remat="none", chunk=layout.max_length, save_every=100, keep=2, log_every=1
    )
    context = TrainContext(recipe, settings, MeshPlacement(config), stage.loss)
    facts = {"data": loader.corpus.fingerprint(), "label_weight": LABEL_WEIGHT, **identity}
    batches = iter(loader)
    err.print(f"{recipe.name}: {', '.join(recipe.train)}, {stage.steps} steps")
    try:
        with reporting(stage.steps, 50, None) as reporter:
            hooks = TrainHooks(log=reporter.log)
            return train(out / recipe.name, context, params, batches, hooks=hooks, identity=facts)
    finally:
        batches.close()


def write_model(directory: Path, tokenizer: Path, params: Params, config: ChatConfig) -> None:
    """Write the model of the package: bfloat16 weights, config.json, preprocessor_config.json and tokenizer files.

    A model that was written before is replaced.

    Args:
        directory: Directory to write to.
        tokenizer: Directory with the tokenizer.
        params: Model parameters.
        config: Model configuration.

    Raises:
        ValueError: The directory exists and is not such a model.
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
        for name, value in (("config.json", config_to_hf(config)), ("preprocessor_config.json", preprocessor)):
            (temporary / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        checkpoint.save(temporary, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))


def check_model(directory: Path, config: ChatConfig) -> None:
    """Raise ValueError if `directory` exists and was not written by `write_model`."""
    if not os.path.lexists(directory):
        return
    names = {"config.json", "preprocessor_config.json", checkpoint.PARAMS}
    ours = checkpoint.is_converted(directory) and all(
        path.name in names or "token" in path.name for path in directory.iterdir()
    )
    if not ours or read_json_object(directory / "config.json") != json.loads(json.dumps(config_to_hf(config))):
        raise ValueError(f"{directory} was not written by this command: choose another directory")


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns 1 if it was asked to stop."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="the directory of data, runs and model")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="MODEL", help="a model that the third stage left: the fourth alone is run"
    )
    args = parser.parse_args(argv)
    stages = make_stages()
    identity: dict[str, Any] = {}
    try:
        out = resolve(args.output)
        if not (out / "tokenizer.model").exists():
            build_tokenizer.build(out)
        config = nano_config(out)
        check_model(out / "model", config)  # before hours of training
        if args.checkpoint is None:
            initial = init_params(jax.random.key(0), config)
        else:
            initial, identity = read_checkpoint(resolve(args.checkpoint), out, config)
            stages = stages[-1:]
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    with logs.to_terminal():
        params = run(out, config, stages, initial, identity)
    if params is None:
        return 1
    write_model(out / "model", out, params, config)
    err.print(f"wrote {out / 'model'}: {chat_model.count_params(params):,} parameters")
    return 0


def read_checkpoint(directory: Path, tokenizer: Path, config: ChatConfig) -> tuple[Params, dict[str, Any]]:
    """Read the parameters that the fourth stage starts from.

    Args:
        directory: A model of `write_model`.
        tokenizer: Directory with the tokenizer, which must be the model's.
        config: Model configuration, which must be the model's.

    Returns:
        The parameters in float32, and what identifies them.

    Raises:
        ValueError: The directory is not such a model; a parameter is missing or damaged.
    """
    if not checkpoint.is_converted(directory):
        raise ValueError(f"{directory} is not a model of this command")
    check_model(directory, config)
    name = "tokenizer.model"
    if (directory / name).read_bytes() != (tokenizer / name).read_bytes():
        raise ValueError(f"{directory / name} is another tokenizer than {tokenizer / name}")
    params = checkpoint.load(directory, chat_model.abstract_params(config))
    content = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))
    return params, {"checkpoint": hashlib.sha256(content).hexdigest()[:16]}


def nano_config(directory: Path) -> ChatConfig:
    """Return the nano preset with the vocabulary size of the tokenizer in `directory`."""
    config = PRESETS["nano"]()
    return replace(config, text=replace(config.required_text, vocab_size=load_tokenizer(directory).vocab_size))


if __name__ == "__main__":
    raise SystemExit(main())
