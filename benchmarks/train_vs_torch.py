"""One training step of the same weights, batch and recipe through transformers/torch and through this project.

    python benchmarks/train_vs_torch.py [--recipe stage2] [--remat none full] [--batch-size 2]
        [--max-seq-length 512] [--json]

The model is that of vs_torch.py: 249M parameters in transformers' InternVL layout with random weights. The recipe says
what is trained: stage2 projector and language model, stage1 tower and projector, full everything (without stochastic
depth, which transformers' module does not have). Both sides train in float32 with AdamW, no decay of biases and norms,
a cosine schedule, and gradients clipped to norm 1. PyTorch runs as its users write it: transformers' model with its own
loss and default attention (sdpa), requires_grad only for trained parameters, clip_grad_norm_, torch.optim.AdamW, and no
gradient checkpointing. Our side is the trainer's step, once for each --remat ("none" keeps all activations as PyTorch
does, "full" recomputes them).

Each program runs in a process of its own, alternating, `--rounds` times. Seconds are the median over the steps after
the first two, and the fastest step, which is more reliable on a machine that others use. Memory is the peak of the
process (getrusage) with its imports, which are also shown alone. The ratio is PyTorch's figure over ours: above 1, ours
is faster or smaller. The losses of all steps must agree, or the script fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from internvl_jax.utils import formats

# Libraries are imported where they are used, so that a process holds those of one side only.

IMAGE_TOKEN = 5
SUPERVISED = 0.4  # share of a row, at its end
LEARNING_RATE = 1e-4
WARMUP_STEPS = 2  # not timed
MAX_DIFFERENCE = 2e-4  # of two losses, which are about 10

# PyTorch's names of parameters without weight decay: biases, the projector's LayerNorm and LLaMA's norms. The tower's
# RMSNorms decay, as in the reference's Trainer (optimizer.decayed).
NO_DECAY = r"bias$|multi_modal_projector\.layer_norm|language_model\..*norm"
PARTS = {
    "vision_model": r"\bvision_tower\.",
    "mlp1": r"\bmulti_modal_projector\.",
    "language_model": r"\blanguage_model\.|\blm_head\.",
}


def build(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Write the model (published layout and ours) and a batch; returns facts about the machine."""
    import numpy as np
    import torch
    import transformers
    import vs_torch

    from checkpoints_convert.convert import convert
    from internvl_jax.training.recipes import recipe_of

    recipe = recipe_of(args.recipe)
    plan = {"train": recipe.train, "optimizer": dataclasses.asdict(recipe.optimizer)}
    (directory / "recipe.json").write_text(json.dumps(plan), encoding="utf-8")
    model = vs_torch.build(seed=0)
    model.save_pretrained(directory / "torch")
    convert(directory / "torch", directory / "ours")
    rng = np.random.default_rng(0)
    rows, tokens, images = args.batch_size, args.max_seq_length, args.batch_size
    per_image = model.config.image_seq_length
    ids = rng.integers(10, model.config.text_config.vocab_size, (rows, tokens)).astype(np.int32)
    ids[:, 4 : 4 + per_image] = IMAGE_TOKEN
    labels = np.where(np.arange(tokens) >= tokens * (1 - SUPERVISED), ids, -100).astype(np.int32)
    size = model.config.vision_config.image_size
    pixels = rng.standard_normal((images, 3, *size), dtype=np.float32)
    np.savez(directory / "batch.npz", input_ids=ids, labels=labels, pixel_values=pixels)
    return {
        "processor": vs_torch.processor_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "transformers": transformers.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def run_torch(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train through transformers' module and torch's optimizer."""
    import re

    import numpy as np
    import torch
    import transformers

    imports = peak()
    recipe = json.loads((directory / "recipe.json").read_text(encoding="utf-8"))
    parts, settings = [PARTS[part] for part in recipe["train"]], recipe["optimizer"]
    model = transformers.InternVLForConditionalGeneration.from_pretrained(directory / "torch", dtype=torch.float32)
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = bool(re.search("|".join(parts), name))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [p for name, p in trained.items() if not re.search(NO_DECAY, name)]
    exempt = [p for name, p in trained.items() if re.search(NO_DECAY, name)]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings["weight_decay"]}, {"params": exempt, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(settings["beta1"], settings["beta2"]),
        eps=settings["eps"],
    )
    schedule = transformers.get_cosine_schedule_with_warmup(adamw, 0, args.steps)
    with np.load(directory / "batch.npz") as file:
        batch = {name: torch.from_numpy(file[name]) for name in file.files}
    batch = {name: x.long() if x.dtype == torch.int32 else x for name, x in batch.items()}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])

    def step() -> float:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), settings["max_grad_norm"])
        adamw.step()
        schedule.step()
        adamw.zero_grad()
        return loss.item()

    return measure(step, args.steps, imports)


def run_ours(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train through the trainer's step."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from internvl_jax.config import load_config
    from internvl_jax.data.batch import Batch
    from internvl_jax.processing.conversation import image_token_index
    from internvl_jax.training.context import TrainContext, TrainSettings
    from internvl_jax.training.initialization import init_state, read_params
    from internvl_jax.training.mesh_placement import MeshPlacement
    from internvl_jax.training.recipes import override, recipe_of
    from internvl_jax.training.step import make_step, put_batch, stack_batches

    jax.devices()
    imports = peak()
    recipe = override(recipe_of(args.recipe), optimizer={"learning_rate": LEARNING_RATE, "warmup": 0.0}, drop_path=0.0)
    config = load_config(directory / "ours")
    context = TrainContext(recipe, TrainSettings(args.steps, remat=args.remat), MeshPlacement(config))
    params = read_params(directory / "ours", context, param_dtype=jnp.float32)
    state, frozen = init_state(params, context)
    del params
    with np.load(directory / "batch.npz") as file:
        ids = file["input_ids"]
        places = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
        index = image_token_index(ids == IMAGE_TOKEN)
        batch = Batch(ids, file["labels"], np.ones_like(ids), places, index, file["pixel_values"])
    batch = put_batch(stack_batches([batch]), context.placement)
    run = make_step(context)

    def step() -> float:
        nonlocal state
        state, metrics = run(state, frozen, batch)
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    return {**measure(step, args.steps, imports), "jax": jax.__version__}


def measure(step: Callable[[], float], steps: int, imports: float) -> dict[str, Any]:
    """Run the steps; returns the loss and seconds of each, and the process's memory in MiB."""
    losses, seconds, loaded = [], [], peak()
    for _ in range(steps):
        began = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - began)
    return {"losses": losses, "seconds": seconds, "imports": imports, "loaded": loaded, "peak": peak()}


def peak() -> float:
    """The peak memory of this process so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


SIDES = {"build": build, "torch": run_torch, "ours": run_ours}


def child(side: str, directory: Path, args: argparse.Namespace, remat: str = "none") -> dict[str, Any]:
    """Run one side in a process of its own; returns its measurements."""
    options = ["--side", side, "--directory", str(directory), "--remat", remat, "--recipe", args.recipe]
    options += ["--batch-size", str(args.batch_size), "--max-seq-length", str(args.max_seq_length)]
    options += ["--steps", str(args.steps)]
    done = subprocess.run(
        [sys.executable, __file__, *options],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare(directory: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one dict per program: PyTorch, and ours under each remat policy."""
    programs = [("torch", "none"), *(("ours", remat) for remat in args.remat)]
    results: dict[tuple[str, str], list[dict[str, Any]]] = {program: [] for program in programs}
    for _ in range(args.rounds):
        for side, remat in programs:
            results[side, remat].append(child(side, directory, args, remat))
    expected = results[programs[0]][0]["losses"]
    for (side, remat), runs in results.items():
        differences = [abs(a - b) for one in runs for a, b in zip(one["losses"], expected, strict=True)]
        yield {
            "program": side if side == "torch" else f"ours, remat {remat}",
            "seconds": statistics.median(s for one in runs for s in one["seconds"][WARMUP_STEPS:]),
            "fastest": min(s for one in runs for s in one["seconds"][WARMUP_STEPS:]),
            "first_step": runs[0]["seconds"][0],
            "losses": runs[0]["losses"],
            "loss_difference": max(differences) if all(d == d for d in differences) else float("nan"),
            **{name: max(one[name] for one in runs) for name in ("imports", "loaded", "peak")},
        }


def main() -> None:
    """Run and print; exit code 1 if the losses do not agree."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", default="stage2", choices=["stage1", "stage2", "full"])
    parser.add_argument("--remat", nargs="+", default=["none", "full"], choices=["none", "dots", "full"])
    parser.add_argument("--batch-size", type=int, default=2, metavar="N", help="rows, each with one image (2)")
    parser.add_argument(
        "--max-seq-length", type=int, default=512, metavar="N", help="tokens per row, 256 of them visual (512)"
    )
    parser.add_argument("--steps", type=int, default=7, help=f"the first {WARMUP_STEPS} are not timed (7)")
    parser.add_argument("--rounds", type=int, default=1, help="how often each program runs (1)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=sorted(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps <= WARMUP_STEPS:
        parser.error(f"--steps is {args.steps}: the first {WARMUP_STEPS} are not timed")
    if args.side:
        args.remat = args.remat[0]
        print(json.dumps(SIDES[args.side](args.directory, args)))
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        machine = child("build", directory, args)
        rows = list(compare(directory, args))
    torch = rows[0]
    for row in rows:
        for what in ("seconds", "fastest", "peak"):
            row[f"{what}_ratio"] = torch[what] / row[what]
    if args.json:
        print(json.dumps({"machine": machine, "recipe": args.recipe, "rows": rows}))
    else:
        show(rows, machine, args)
    apart = [row["program"] for row in rows if not row["loss_difference"] <= MAX_DIFFERENCE]
    if apart:
        sys.exit(f"LOSSES DO NOT AGREE: {', '.join(apart)}; the ratios above mean nothing")


COLUMNS = (  # title, key and width
    ("s/step", "seconds", 8),
    ("ratio", "seconds_ratio", 7),
    ("fastest", "fastest", 9),
    ("ratio", "fastest_ratio", 7),
    ("MiB", "peak", 7),
    ("ratio", "peak_ratio", 7),
    ("imports", "imports", 9),
    ("loaded", "loaded", 8),
    ("1st step", "first_step", 10),
)


def show(rows: list[dict[str, Any]], machine: dict[str, Any], args: argparse.Namespace) -> None:
    print(
        f"{args.recipe}, {args.batch_size} rows of {args.max_seq_length} tokens and one image, "
        f"{formats.parameters(machine['parameters'])} parameters, float32, {machine['cores']} cores, "
        f"{machine['processor']}"
    )
    print(" " * 18 + "".join(f"{title:>{width}}" for title, _, width in COLUMNS) + f"{'loss diff':>11}")
    for row in rows:
        cells = "".join(f"{formats.number(row[key]):>{width}}" for _, key, width in COLUMNS)
        print(f"{row['program']:18}{cells}{row['loss_difference']:11.1e}")
    for row in rows:
        print(f"losses, {row['program']}: " + " ".join(f"{loss:.5f}" for loss in row["losses"]))
    print(f"torch {machine['torch']}, {machine['torch_threads']} threads, transformers {machine['transformers']}")


if __name__ == "__main__":
    main()
