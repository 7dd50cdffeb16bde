"""A small training run, for tests and for the processes that they start: model, data, recipe.

python training_cases.py DIRECTORY STEPS [die|fill NUMBER]    trains in DIRECTORY and prints each step's exact loss

Before batch NUMBER the process dies as after kill -9, or the file system becomes full.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from support.tiny_model import IMAGE, batch_of, random_params, tiny

from internvl_jax.lora import Lora
from internvl_jax.models import param_sharding
from internvl_jax.processing.conversation import image_token_index
from internvl_jax.training import trainer
from internvl_jax.training.context import TrainContext, TrainSettings
from internvl_jax.training.mesh_placement import MeshPlacement
from internvl_jax.training.optimizer import AdamW
from internvl_jax.training.recipes import Recipe
from internvl_jax.training.trainer import TrainHooks, train

RECIPES = {
    "stage1": Recipe("stage1", ("vision_model", "mlp1"), AdamW(1e-3, warmup=2), 2, 48, drop_path=0.3),
    "stage2": Recipe("stage2", ("mlp1", "language_model"), AdamW(1e-3, warmup=2), 2, 48),
    "lora": Recipe("lora", ("mlp1",), AdamW(1e-3, warmup=2), 2, 48, lora={"language_model": Lora(4, dropout=0.1)}),
}


class Batches:
    """Batch i depends on i only; some have longer rows. `before` is called with i before the batch is made."""

    def __init__(self, config, rows=2, before=lambda number: None):
        self.config, self.rows, self.before, self.next = config, rows, before, 0

    def __next__(self):
        self.before(self.next)
        number, self.next = self.next, self.next + 1
        return self.make(number)

    def make(self, number):
        batch = batch_of(self.config, [[40]] * self.rows, 64 if number % 4 == 3 else 48)
        rng = np.random.default_rng(number)
        words = rng.integers(4, 61, batch.input_ids.shape).astype(np.int32)
        ids = np.where((batch.input_ids == IMAGE) | (batch.segment_ids == 0), batch.input_ids, words)
        labels = np.where(batch.labels == -100, -100, ids)
        return batch.replace(input_ids=ids, labels=labels, pixel_values=batch.pixel_values + rng.random() - 0.5)

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]


class Shares(Batches):
    """The rows that one of two processes loads of batches of 8 rows, which have one image or two.

    share: the process. None for all rows. stop_at: SIGTERM is sent before that batch.
    """

    def __init__(self, config, share=None, stop_at=None):
        super().__init__(config, rows=8)
        self.share, self.stop_at = share, stop_at

    def make(self, number):
        if number == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        mine = slice(None) if self.share is None else slice(self.share, None, 2)
        rows = [[40], [20, 20], [20, 20], [40], [40], [40], [20, 20], [40]]  # of samples of an image each
        batch = batch_of(self.config, rows, 48)
        first = np.cumsum([0, *map(len, rows)])
        images = [image for row in range(8)[mine] for image in range(first[row], first[row + 1])]
        pixels = batch.pixel_values[images] + np.random.default_rng(number).random() - 0.5
        empty = np.zeros((7 - len(images) if self.share is not None else 0, *pixels.shape[1:]), np.float32)
        rows = jax.tree.map(lambda leaf: leaf[mine], batch.replace(pixel_values=None))
        pixels = np.concatenate([pixels, empty]).astype(np.float32)
        return rows.replace(image_index=image_token_index(rows.input_ids == IMAGE), pixel_values=pixels)


compiled = {}  # steps that several tests share: tracing and compiling is most of a short run


def make_step(context, make=trainer.make_step):
    settings, placement = context.settings, context.placement
    where = (placement.config, placement.mesh, placement.vision)
    key = (context.recipe.name, *settings.identity().values(), settings.remat, settings.chunk, where)
    if key not in compiled:
        compiled[key] = make(context)
    return compiled[key]


def run(
    directory,
    steps,
    name="lora",
    *,
    batches=None,
    placement=None,
    own_step=False,
    hooks=None,
    **settings,
):
    """Train for some steps.

    name: key of RECIPES, or a recipe. own_step: compile the step for this run alone, so that its compiles are counted.
    settings: fields of TrainSettings, and from_scratch of train.
    """
    if not own_step:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "make_step", make_step)
            options = {"batches": batches, "placement": placement, "hooks": hooks}
            return run(directory, steps, name, own_step=True, **options, **settings)
    placement = MeshPlacement(tiny()) if placement is None else placement
    config = placement.config
    params = jax.tree.map(jax.numpy.asarray, random_params(config))
    if placement.mesh is not None:
        params = param_sharding.place_params(params, config, placement.mesh, vision=placement.vision)
    from_scratch = settings.pop("from_scratch", False)
    settings = TrainSettings(**{"steps": steps, "save_every": 2, "log_every": 1, "remat": "none", **settings})
    batches = Batches(config) if batches is None else batches
    context = TrainContext(RECIPES[name] if isinstance(name, str) else name, settings, placement)
    return train(directory, context, params, batches, hooks=hooks, from_scratch=from_scratch)


def steps_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def main(directory, steps, what=None, at=None):
    def die(number):
        time.sleep(0.05)
        if what == "die" and number == int(at):
            os._exit(9)  # nothing is cleaned up

    def fill(number):
        if number == int(at):
            while not (directory / "steps" / str(number - 1)).exists():
                time.sleep(0.01)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)  # other tests read that cache
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    done = run(
        directory,
        int(steps),
        batches=Batches(tiny(), before=fill if what == "fill" else die),
        hooks=TrainHooks(
            log=lambda entry: print(entry["step"], entry["loss"].hex(), entry["grad_norm"].hex(), flush=True)
        ),
    )
    print("finished" if done.finished else f"stopped at {done.step}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
