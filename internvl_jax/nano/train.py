"""Train nano from scratch on the CPU.

    python -m internvl_jax.nano.train --out DIR

Two stages, which train what V1-1's did. First the tower and the projector, against labels of what is in the picture,
which a linear layer reads off the visual tokens: learning to see through the language model's few answer tokens takes
many times as long. Then projector and language model on questions and answers, the tower frozen. A third, short stage
trains all of it. The labels help to the end; the linear layer is not part of the model.

Deterministic: a batch is a function of its step's number. Resumable: a run that is killed goes on from its last
checkpoint when the same command is given again, with the same result.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import flax.serialization
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from internvl_jax import checkpoint
from internvl_jax.config import PRESETS, ChatConfig
from internvl_jax.models import chat_model, llama
from internvl_jax.models.layers import Array, Params, positions_from_valid, unstack
from internvl_jax.nano import build_tokenizer
from internvl_jax.nano.render import CELL_CLASSES, PICTURE_CLASSES, Sample, make_sample
from internvl_jax.processing.conversation import IMG_CONTEXT, TEMPLATES, build_prompt, place_images, prepare_prompt
from internvl_jax.processing.images import ImageProcessor
from internvl_jax.processing.tokenizer import Tokenizer, load_tokenizer

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in the published preprocessor_config.json


@dataclass(frozen=True)
class Recipe:
    """Settings of a run; the defaults made the shipped model."""

    stages: tuple[tuple[str, int], ...] = (("see", 2000), ("answer", 1800), ("together", 800))  # names and steps
    batch: int = 64
    length: int = 84  # tokens per row; four questions about a picture take at most 82
    learning_rate: float = 1.5e-3
    warmup: int = 100
    label_weight: float = 0.5  # of the first stage's loss in the others
    weight_decay: float = 0.05
    clip: float = 1.0
    checkpoint_every: int = 100

    @property
    def steps(self) -> int:
        return sum(steps for _, steps in self.stages)

    def stage_at(self, step: int) -> tuple[str, int, int]:
        """The stage of a step: its name, its first step and how many it has."""
        ends = np.cumsum([steps for _, steps in self.stages])
        number = min(int(np.searchsorted(ends, step, side="right")), len(ends) - 1)
        name, steps = self.stages[number]
        return name, int(ends[number]) - steps, steps


class Batch(flax.struct.PyTreeNode):
    """Rows with pictures come first, so that the pictures in order are the prompts' pictures in order."""

    input_ids: Any  # [B,T] int32, padded on the right
    valid: Any  # [B,T] bool
    supervised: Any  # [B,T] bool: answers and their end tokens
    pixel_values: Any  # [B,3,S,S] float32; those of text-only rows are never read
    contents: Any  # [B,21] int32, see render.CONTENTS


def tokenize(sample: Sample, tokenizer: Tokenizer, tokens_per_image: int) -> tuple[list[int], list[bool]]:
    """A sample's conversation as token ids, and which of them are supervised: answers with their end tokens."""
    template = TEMPLATES["internvl_zh"]
    images = 0 if sample.image is None else 1
    history: list[tuple[str, str]] = []
    ids: list[int] = []
    supervised: list[bool] = []
    for question in sample.questions:
        text = place_images(question.text, images, bool(history))
        prompt = prepare_prompt(template, text, history, images, tokens_per_image)
        prompt_ids = tokenizer.encode(prompt)
        whole = tokenizer.encode(prompt + template.before_answer + question.answer + template.answer_end)
        if whole[: len(prompt_ids)] != prompt_ids or prompt_ids[: len(ids)] != ids:
            raise ValueError(f"the tokens of {build_prompt(template, history, text)!r} change with what follows")
        supervised += [False] * (len(prompt_ids) - len(ids)) + [True] * (len(whole) - len(prompt_ids))
        ids = whole
        history.append((text, question.answer))
    return ids, supervised


def make_batch(step: int, recipe: Recipe, config: ChatConfig, tokenizer: Tokenizer) -> Batch:
    """The batch of that step."""
    samples = [make_sample("train", step * recipe.batch + row) for row in range(recipe.batch)]
    samples.sort(key=lambda sample: sample.image is None)
    processor = ImageProcessor(config.image_size, MEAN, STD)
    shape = (recipe.batch, recipe.length)
    ids, valid, supervised = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, bool)
    pixels = np.zeros((recipe.batch, 3, config.image_size, config.image_size), np.float32)
    for row, sample in enumerate(samples):
        tokens, answers = tokenize(sample, tokenizer, config.tokens_per_image)
        ids[row, : len(tokens)] = tokens
        valid[row, : len(tokens)] = True
        supervised[row, : len(tokens)] = answers
        if sample.image is not None:
            pixels[row] = processor(Image.fromarray(sample.image))
    return Batch(ids, valid, supervised, pixels, np.asarray([sample.contents for sample in samples], np.int32))


def init_params(key: Array, config: ChatConfig) -> Params:
    """The model's parameters, and under "labels" the linear layer that reads labels off the visual tokens."""
    params = chat_model.init_params(key, config)
    # The published initial layer scale of 0.1 suits 48 layers; five learn faster with whole branches.
    for name in ("ls1", "ls2"):
        params["vision_model"]["layers"][name] *= 5
    width = config.text.hidden_size

    def linear(inputs: int, outputs: int) -> Params:
        return {"kernel": jnp.zeros((inputs, outputs)), "bias": jnp.zeros(outputs)}

    whole = config.tokens_per_image * width
    return {
        **params,
        "labels": {"cell": linear(width, sum(CELL_CLASSES)), "picture": linear(whole, sum(PICTURE_CLASSES))},
    }


def label_loss(params: Params, config: ChatConfig, features: Array, contents: Array) -> tuple[Array, Array]:
    """Cross-entropy of the labels read off the visual tokens, and the share of pictures read without a mistake.

    What stands in a cell of the pictures' 3x3 grid is read off the tokens that lie there, by the same weights in every
    cell: so that a token says the same thing in the same way wherever it is, which is what the language model's
    attention can read. Words and digits are read off all tokens in order: their mean says too little of them to learn
    from. The two means are added, so that three labels weigh as much as the eighteen of the cells.
    """
    cells = cell_means(features, config)
    local = cells @ params["labels"]["cell"]["kernel"] + params["labels"]["cell"]["bias"]
    whole = features.reshape(features.shape[0], -1)
    picture = whole @ params["labels"]["picture"]["kernel"] + params["labels"]["picture"]["bias"]
    shapes, colours = jnp.split(local, [CELL_CLASSES[0]], axis=-1)
    parts = [shapes[:, i] for i in range(9)] + [colours[:, i] for i in range(9)]
    parts += jnp.split(picture, np.cumsum(PICTURE_CLASSES)[:-1], axis=-1)
    losses = [optax.softmax_cross_entropy_with_integer_labels(p, contents[:, i]) for i, p in enumerate(parts)]
    right = [jnp.argmax(p, axis=-1) == contents[:, i] for i, p in enumerate(parts)]
    loss = jnp.mean(jnp.stack(losses[:18])) + jnp.mean(jnp.stack(losses[18:]))
    return loss, jnp.mean(jnp.all(jnp.stack(right), axis=0))


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


def loss_fn(
    trained: Params, frozen: Params, batch: Batch, config: ChatConfig, image_token_id: int, label_weight: float | None
) -> tuple[Array, Array]:
    """The loss, and what is right of it. label_weight None: first stage, labels only; else answers plus labels."""
    # As a loop over layers: on CPU a scan copies every layer's weights (see models.layers.run_layers).
    params = {**trained, **frozen}
    towers = ("vision_model", "language_model")
    params = {**params, **{name: {**params[name], "layers": unstack(params[name]["layers"])} for name in towers}}
    features, _ = chat_model.encode_images(params, config, batch.pixel_values)
    seen_loss, seen_right = label_loss(params, config, features, batch.contents)
    if label_weight is None:
        return seen_loss, seen_right
    language = params["language_model"]
    x = chat_model.embed_prompt(params, batch.input_ids, features, image_token_id, dtype=jnp.float32)
    positions = positions_from_valid(batch.valid)
    hidden, _, _ = llama.forward(language, config.text, x, positions, batch.valid)
    logits = llama.logits(language, config.text, hidden[:, :-1])
    targets, weights = batch.input_ids[:, 1:], batch.supervised[:, 1:].astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    right = (jnp.argmax(logits, axis=-1) == targets) * weights
    answers = jnp.sum(losses * weights) / jnp.sum(weights)
    return answers + label_weight * seen_loss, jnp.sum(right) / jnp.sum(weights)


FROZEN = {"see": ("language_model",), "answer": ("vision_model",), "together": ()}


def split(params: Params, stage: str) -> tuple[Params, Params]:
    """What the stage trains, and what it leaves alone."""
    frozen = {name: params[name] for name in FROZEN[stage]}
    return {name: part for name, part in params.items() if name not in frozen}, frozen


def make_optimizer(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    """AdamW for a stage of that many steps, with warm-up, cosine decay and clipping; matrices only are decayed."""
    peak = recipe.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, recipe.warmup, steps, 0.02 * peak)
    # Stacked vectors have two axes; layer scales are the only such leaves without "scale" or "bias" in their names.
    vectors = ("scale", "bias", "ls1", "ls2", "class_embedding", "position_embedding")

    def decayed(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in vectors, params)

    adamw = optax.adamw(schedule, b2=0.98, weight_decay=recipe.weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(recipe.clip), adamw)


@partial(
    jax.jit,
    static_argnames=("recipe", "config", "image_token_id", "stage"),
    donate_argnames=("trained", "opt_state"),
)
def train_step(
    trained: Params,
    frozen: Params,
    opt_state: Any,
    batch: Batch,
    *,
    recipe: Recipe,
    config: ChatConfig,
    image_token_id: int,
    stage: tuple[str, int],
) -> tuple[Params, Any, Array, Array]:
    """One optimizer step of a stage (name, steps). Returns trained, optimizer state, loss and accuracy."""
    name, steps = stage
    weight = None if name == "see" else recipe.label_weight
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, accuracy), grads = grad_fn(trained, frozen, batch, config, image_token_id, weight)
    updates, opt_state = make_optimizer(recipe, steps).update(grads, opt_state, trained)
    return optax.apply_updates(trained, updates), opt_state, loss, accuracy


def train(
    out: Path, recipe: Recipe, config: ChatConfig, *, seed: int = 0, stop_at: int | None = None, console: Console
) -> Params:
    """Train, from the last checkpoint in `out` if there is one; `stop_at` ends early, as a kill would."""
    tokenizer = load_tokenizer(out)
    image_token_id = tokenizer.token_to_id(IMG_CONTEXT)
    params = init_params(jax.random.key(seed), config)
    saved, first = out / "training.msgpack", 0
    if saved.exists():
        state = flax.serialization.msgpack_restore(saved.read_bytes())
        first = int(state["step"])
        console.print(f"resuming at step {first}")
        params = flax.serialization.from_state_dict(params, state["params"])
    stage, start_of_stage, steps = recipe.stage_at(first)
    trained, frozen = split(jax.tree.map(jnp.asarray, params), stage)
    opt_state = make_optimizer(recipe, steps).init(trained)
    if first != start_of_stage:  # each stage starts with a fresh optimizer
        opt_state = jax.tree.map(jnp.asarray, flax.serialization.from_state_dict(opt_state, state["opt_state"]))
    last = recipe.steps if stop_at is None else stop_at
    make = partial(make_batch, recipe=recipe, config=config, tokenizer=tokenizer)
    with ThreadPoolExecutor(1) as pool, _progress_bar(console) as bar:
        task = bar.add_task("training", total=recipe.steps, completed=first, figures="")
        coming = pool.submit(make, first)
        start = time.perf_counter()
        for step in range(first, last):
            if step == recipe.stage_at(step)[1] and step > first:
                stage, _, steps = recipe.stage_at(step)
                trained, frozen = split({**trained, **frozen}, stage)
                opt_state = make_optimizer(recipe, steps).init(trained)
            batch, coming = coming.result(), pool.submit(make, step + 1)
            trained, opt_state, loss, accuracy = train_step(
                trained,
                frozen,
                opt_state,
                batch,
                recipe=recipe,
                config=config,
                image_token_id=image_token_id,
                stage=(stage, steps),
            )
            if (step + 1) % 50 == 0 or step + 1 == last:
                rate = (step + 1 - first) * recipe.batch / (time.perf_counter() - start)
                what = "pictures" if stage == "see" else "answer tokens"
                figures = f"loss {float(loss):.3f}, {what} right {float(accuracy):.1%}, {rate:.0f} pictures/s"
                bar.update(task, figures=figures)
                if not console.is_terminal:
                    console.print(f"step {step + 1}/{recipe.steps}: {figures}")
            if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
                _save_state(saved, {"step": step + 1, "params": {**trained, **frozen}, "opt_state": opt_state})
            bar.update(task, completed=step + 1)
    return {name: part for name, part in {**trained, **frozen}.items() if name != "labels"}


def _save_state(path: Path, state: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(flax.serialization.to_bytes(jax.device_get(state)))
    temporary.replace(path)


def _progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
        disable=not console.is_terminal,
    )


def write_model(directory: Path, params: Params, config: ChatConfig) -> None:
    """Write the model that ships: bfloat16 weights, config.json and preprocessor_config.json beside the tokenizer."""
    preprocessor = {
        "crop_size": config.image_size, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": list(MEAN), "image_std": list(STD),
        "resample": 3, "size": config.image_size,
    }  # fmt: skip
    for name, value in (("config.json", config.to_hf()), ("preprocessor_config.json", preprocessor)):
        (directory / name).write_text(json.dumps(value, indent=2) + "\n")
    shutil.rmtree(directory / "params", ignore_errors=True)
    checkpoint.save(directory, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))


def main(argv: list[str] | None = None) -> None:
    """Parse arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the model's directory; holds the checkpoint too")
    args = parser.parse_args(argv)
    console = Console(stderr=True, highlight=False)
    if not (args.out / "tokenizer.model").exists():
        build_tokenizer.build(args.out)
    config = nano_config(args.out)
    params = train(args.out, Recipe(), config, console=console)
    write_model(args.out, params, config)
    console.print(f"wrote {args.out}: {chat_model.count_params(params):,} parameters")


def nano_config(directory: Path) -> ChatConfig:
    """The nano preset with the vocabulary of the tokenizer in `directory`."""
    config = PRESETS["nano"]()
    return replace(config, text=replace(config.text, vocab_size=load_tokenizer(directory).vocab_size))


if __name__ == "__main__":
    main()
