"""Train nano from scratch on the CPU.

    python -m internvl_jax.nano.train --out DIR [--steps N]

Two stages. First the tower and the projector alone, against labels of what is in the picture, read off the visual
tokens by one linear layer: learning to see through the language model's few answer tokens takes many times as long.
Then everything together on questions and answers, the labels still helping. The linear layer is not part of the model.

Deterministic: a batch is a function of its step's number. Resumable: a run that is killed goes on from its last
checkpoint when the same command is given again, with the same result.
"""

from __future__ import annotations

import argparse
import json
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
from internvl_jax.nano.render import CONTENTS, Sample, make_sample
from internvl_jax.processing.conversation import IMG_CONTEXT, TEMPLATES, build_prompt, place_images, prepare_prompt
from internvl_jax.processing.images import ImageProcessor
from internvl_jax.processing.tokenizer import Tokenizer, load_tokenizer

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in the published preprocessor_config.json


@dataclass(frozen=True)
class Recipe:
    """Settings of a run; the defaults made the shipped model."""

    vision_steps: int = 1200  # of the first stage
    steps: int = 2200  # of both
    batch: int = 64
    length: int = 84  # tokens per row; four questions about a picture take at most 82
    learning_rate: float = 1.5e-3
    warmup: int = 100
    label_weight: float = 1.0  # of the first stage's loss in the second
    weight_decay: float = 0.05
    clip: float = 1.0
    checkpoint_every: int = 100


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
    """The model's parameters, and under "labels" the linear layer of the first stage."""
    params = chat_model.init_params(key, config)
    # The published initial layer scale of 0.1 suits 48 layers; five learn faster with whole branches.
    for name in ("ls1", "ls2"):
        params["vision_model"]["layers"][name] *= 5
    width = config.tokens_per_image * config.text.hidden_size
    return {**params, "labels": {"kernel": jnp.zeros((width, sum(CONTENTS))), "bias": jnp.zeros(sum(CONTENTS))}}


def label_loss(params: Params, features: Array, contents: Array) -> tuple[Array, Array]:
    """Mean cross-entropy of the labels read off the visual tokens, and the share of pictures read without a mistake."""
    flat = features.reshape(len(features), -1)
    logits = flat @ params["labels"]["kernel"] + params["labels"]["bias"]
    parts = jnp.split(logits, np.cumsum(CONTENTS)[:-1], axis=-1)
    losses = [optax.softmax_cross_entropy_with_integer_labels(p, contents[:, i]) for i, p in enumerate(parts)]
    right = [jnp.argmax(p, axis=-1) == contents[:, i] for i, p in enumerate(parts)]
    return jnp.mean(jnp.stack(losses)), jnp.mean(jnp.all(jnp.stack(right), axis=0))


def loss_fn(
    params: Params, batch: Batch, config: ChatConfig, image_token_id: int, label_weight: float | None
) -> tuple[Array, Array]:
    """The loss, and what is right of it. label_weight None: first stage, labels only; else answers plus labels."""
    # As a loop over layers: on CPU a scan copies every layer's weights (see models.layers.run_layers).
    towers = ("vision_model", "language_model")
    params = {**params, **{name: {**params[name], "layers": unstack(params[name]["layers"])} for name in towers}}
    features, _ = chat_model.encode_images(params, config, batch.pixel_values)
    seen_loss, seen_right = label_loss(params, features, batch.contents)
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


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine decay and clipping; matrices only are decayed."""
    first, second = (
        optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, recipe.warmup, steps, 0.1 * recipe.learning_rate)
        for steps in (recipe.vision_steps, recipe.steps - recipe.vision_steps)
    )
    schedule = optax.join_schedules([first, second], [recipe.vision_steps])
    # Stacked vectors have two axes; layer scales are the only such leaves without "scale" or "bias" in their names.
    vectors = ("scale", "bias", "ls1", "ls2", "class_embedding", "position_embedding")

    def decayed(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in vectors, params)

    adamw = optax.adamw(schedule, b2=0.98, weight_decay=recipe.weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(recipe.clip), adamw)


@partial(
    jax.jit,
    static_argnames=("recipe", "config", "image_token_id", "answers"),
    donate_argnames=("params", "opt_state"),
)
def train_step(
    params: Params,
    opt_state: Any,
    batch: Batch,
    *,
    recipe: Recipe,
    config: ChatConfig,
    image_token_id: int,
    answers: bool,
) -> tuple[Params, Any, Array, Array]:
    """One optimizer step; `answers`: of the second stage. Returns parameters, optimizer state, loss and accuracy."""
    weight = recipe.label_weight if answers else None
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, accuracy), grads = grad_fn(params, batch, config, image_token_id, weight)
    updates, opt_state = make_optimizer(recipe).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss, accuracy


def train(
    out: Path, recipe: Recipe, config: ChatConfig, *, seed: int = 0, stop_at: int | None = None, console: Console
) -> Params:
    """Train, from the last checkpoint in `out` if there is one; `stop_at` ends early, as a kill would."""
    tokenizer = load_tokenizer(out)
    image_token_id = tokenizer.token_to_id(IMG_CONTEXT)
    params = init_params(jax.random.key(seed), config)
    state = {"step": 0, "params": params, "opt_state": make_optimizer(recipe).init(params)}
    saved = out / "training.msgpack"
    if saved.exists():
        state = flax.serialization.from_bytes(state, saved.read_bytes())
        console.print(f"resuming at step {state['step']}")
    first, last = int(state["step"]), recipe.steps if stop_at is None else stop_at
    params, opt_state = jax.tree.map(jnp.asarray, (state["params"], state["opt_state"]))
    make = partial(make_batch, recipe=recipe, config=config, tokenizer=tokenizer)
    with ThreadPoolExecutor(1) as pool, _progress_bar(console) as bar:
        task = bar.add_task("training", total=recipe.steps, completed=first, figures="")
        coming = pool.submit(make, first)
        start = time.perf_counter()
        for step in range(first, last):
            batch, coming = coming.result(), pool.submit(make, step + 1)
            params, opt_state, loss, accuracy = train_step(
                params,
                opt_state,
                batch,
                recipe=recipe,
                config=config,
                image_token_id=image_token_id,
                answers=step >= recipe.vision_steps,
            )
            if (step + 1) % 50 == 0 or step + 1 == last:
                rate = (step + 1 - first) * recipe.batch / (time.perf_counter() - start)
                what = "answer tokens" if step >= recipe.vision_steps else "pictures"
                figures = f"loss {float(loss):.3f}, {what} right {float(accuracy):.1%}, {rate:.0f} pictures/s"
                bar.update(task, figures=figures)
                if not console.is_terminal:
                    console.print(f"step {step + 1}/{recipe.steps}: {figures}")
            if (step + 1) % recipe.checkpoint_every == 0:
                _save_state(saved, {"step": step + 1, "params": params, "opt_state": opt_state})
            bar.update(task, completed=step + 1)
    return {name: part for name, part in params.items() if name != "labels"}


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
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    args = parser.parse_args(argv)
    console = Console(stderr=True, highlight=False)
    if not (args.out / "tokenizer.model").exists():
        build_tokenizer.build(args.out)
    config = nano_config(args.out)
    params = train(args.out, replace(Recipe(), steps=args.steps), config, console=console)
    write_model(args.out, params, config)
    console.print(f"wrote {args.out}: {chat_model.count_params(params):,} parameters")


def nano_config(directory: Path) -> ChatConfig:
    """The nano preset with the vocabulary of the tokenizer in `directory`."""
    config = PRESETS["nano"]()
    return replace(config, text=replace(config.text, vocab_size=load_tokenizer(directory).vocab_size))


if __name__ == "__main__":
    main()
