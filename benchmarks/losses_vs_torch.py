"""The losses of a training run through PyTorch and through this project: same weights, batches, AdamW and schedule.

    python benchmarks/losses_vs_torch.py [--recipe full] [--steps 20] [--plot docs/images/losses_vs_torch.svg] [--json]

The model is the tiny InternVL-Chat-V1-1 of the tests; its first loss was recorded from the original code
(tests/data/internvl_chat_v1_1). The PyTorch side is transformers' modules as assembled by
checkpoints_convert/parity/reference.py, with transformers' loss and schedule and torch's optimizer; our side is the
trainer's step. Both run in float32 without stochastic depth. The recipe says what is trained: full (everything),
stage1 or stage2.

Two correct programs do not stay equal: float32 rounds, and AdamW takes full steps along gradients that are rounding
errors only. So PyTorch also runs from weights that are each perturbed by one unit in the last place: the difference of
these two runs of one program is the scale to compare with.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from checkpoints_convert.convert import load_hf
from checkpoints_convert.parity.reference import Reference
from checkpoints_convert.readers import open_checkpoint
from internvl_jax.config import load_config
from internvl_jax.data.batch import IGNORED, Batch
from internvl_jax.inference.loading import abstract_for_running
from internvl_jax.processing.conversation import image_token_index
from internvl_jax.training.context import TrainContext, TrainSettings
from internvl_jax.training.initialization import init_state
from internvl_jax.training.mesh_placement import MeshPlacement
from internvl_jax.training.recipes import Recipe, override, recipe_of
from internvl_jax.training.step import make_step, put_batch, stack_batches

BUNDLE = Path(__file__).resolve().parents[1] / "tests" / "data" / "internvl_chat_v1_1"
LEARNING_RATE, WARMUP = 5e-4, 2  # at the recipes' own rates a model this small would hardly change
NUM_BATCHES = 4  # repeated, so that there is something to learn
MAX_DIFFERENCE = 1e-3  # of two losses, which are 4 to 12

# PyTorch's names of parameters without weight decay: biases, the projector's LayerNorm and LLaMA's norms.
NO_DECAY = r"bias$|^projector\.0\.|^language\..*norm"
PARTS = {"vision_model": r"^(embeddings|layers)\.", "mlp1": r"^projector\.", "language_model": r"^language\."}


@dataclass(frozen=True)
class Run:
    """Losses by step.

    Attributes:
        torch: PyTorch's.
        ours: this project's.
        perturbed: PyTorch's from perturbed weights.
        original: the original code's loss of the first step.
    """

    torch: list[float]
    ours: list[float]
    perturbed: list[float]
    original: float

    @property
    def difference(self) -> float:
        """The largest difference between both losses of a step; NaN if a loss is NaN."""
        return float(np.abs(np.subtract(self.torch, self.ours)).max())

    @property
    def rounding(self) -> float:
        """The largest difference between PyTorch's losses with and without perturbed weights."""
        return float(np.abs(np.subtract(self.torch, self.perturbed)).max())


def batches(steps: int, image_token_id: int, vocabulary: int) -> list[Batch]:
    """The golden batch and others of its shape, with other words and brighter or darker images, for `steps` steps."""
    arrays = np.load(BUNDLE / "goldens.npz")
    ids, labels = arrays["train/input_ids"], arrays["train/labels"]
    real = arrays["train/attention_mask"].astype(np.int32)
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32)
    pixels = np.stack([arrays["images/rgb/eval"], arrays["images/gray/eval"]])
    index = image_token_index((ids == image_token_id) & (real > 0))
    made = [Batch(ids, labels, real, positions, index, pixels)]
    for number in range(1, NUM_BATCHES):
        rng = np.random.default_rng(number)
        words = rng.integers(3, vocabulary - 9, ids.shape).astype(np.int32)  # the last nine mark images and boxes
        other = np.where((ids == image_token_id) | (real == 0), ids, words)
        shifted = pixels + rng.standard_normal((len(pixels), 1, 1, 1), dtype=np.float32)
        other_labels = np.where(labels == IGNORED, IGNORED, other)
        made.append(made[0].replace(input_ids=other, labels=other_labels, pixel_values=shifted))
    return [made[step % NUM_BATCHES] for step in range(steps)]


def torch_losses(recipe: Recipe, made: list[Batch], image_token_id: int, *, perturb: bool = False) -> list[float]:
    """Train through PyTorch. perturb: start from weights that are one unit in the last place higher or lower."""
    with open_checkpoint(BUNDLE / "checkpoint") as weights:
        model = Reference(BUNDLE / "checkpoint", list(weights.weight_map), weights.read).whole(image_token_id).train()
    if perturb:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                up = torch.rand(parameter.shape, generator=generator) < 0.5
                parameter.copy_(torch.nextafter(parameter, torch.where(up, torch.inf, -torch.inf)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(re.search(PARTS[part], name) for part in recipe.train)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    settings = recipe.optimizer
    adamw = torch.optim.AdamW(
        [
            {"params": [p for n, p in trained.items() if not re.search(NO_DECAY, n)]},
            {"params": [p for n, p in trained.items() if re.search(NO_DECAY, n)], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    schedule = transformers.get_cosine_schedule_with_warmup(adamw, settings.warmup_steps(len(made)), len(made))
    losses = []
    for batch in made:
        loss = model(
            torch.from_numpy(batch.pixel_values),
            torch.from_numpy(batch.input_ids).long(),
            torch.from_numpy(batch.segment_ids),
            torch.from_numpy(batch.labels).long(),
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), settings.max_grad_norm)
        adamw.step()
        schedule.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses


def our_losses(recipe: Recipe, made: list[Batch]) -> list[float]:
    """Train through the trainer's step."""
    config = load_config(BUNDLE / "checkpoint")
    context = TrainContext(recipe, TrainSettings(len(made), remat="none"), MeshPlacement(config))
    params = load_hf(BUNDLE / "checkpoint", abstract_for_running(config, jnp.float32))
    state, frozen = init_state(params, context)
    step = make_step(context)
    losses = []
    for batch in made:
        state, metrics = step(state, frozen, put_batch(stack_batches([batch]), context.placement))
        losses.append(float(metrics["loss"]))
    return losses


def run(name: str = "full", steps: int = 20) -> Run:
    """Run a recipe on both sides."""
    recipe = override(recipe_of(name), optimizer={"learning_rate": LEARNING_RATE, "warmup": WARMUP}, drop_path=0.0)
    facts = json.loads((BUNDLE / "goldens.json").read_text(encoding="utf-8"))
    image_token_id = facts["config"]["token_ids"]["<IMG_CONTEXT>"]
    vocabulary = load_config(BUNDLE / "checkpoint").text.vocab_size
    made = batches(steps, image_token_id, vocabulary)
    original = float(np.load(BUNDLE / "goldens.npz")["train/loss"])
    ours = our_losses(recipe, made)
    theirs, perturbed = (torch_losses(recipe, made, image_token_id, perturb=perturb) for perturb in (False, True))
    return Run(theirs, ours, perturbed, original)


def plot(result: Run, name: str, path: Path) -> None:
    """Plot both curves, and their difference below them."""
    from matplotlib import rc_context  # the extra `report`
    from matplotlib.figure import Figure

    steps = np.arange(1, len(result.ours) + 1)
    difference = np.abs(np.subtract(result.torch, result.ours))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    losses, differences = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    losses.plot(steps, result.torch, color="#d95f02", linewidth=4, alpha=0.6, label="PyTorch", gid="torch")
    losses.plot(steps, result.ours, color="#1f4e9c", linestyle="--", label="internvl-jax", gid="ours")
    losses.set(title=f"{name}, float32: loss of each step", ylabel="loss")
    losses.legend()
    for step, bar in zip(steps, differences.bar(steps, difference, width=0.3, color="#777")):
        bar.set_gid(f"difference-{step}")
    rounding = f"PyTorch with perturbed weights: {result.rounding:.1e}"
    differences.set_title(f"difference, at most {difference.max():.1e}; {rounding}", fontsize="medium")
    differences.set(xlabel="step", ylabel="difference")
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "losses"}
    ):  # small, and the same bytes for the same losses
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Run, print and draw; exit code 1 if the losses do not agree."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", default="full", choices=["stage1", "stage2", "full"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--plot", type=Path, metavar="SVG", help="also plot both curves")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}: it must be at least 1")
    result = run(args.recipe, args.steps)
    if args.plot is not None:
        plot(result, args.recipe, args.plot)
    if args.json:
        print(json.dumps({"recipe": args.recipe, "largest_difference": result.difference, **asdict(result)}))
    else:
        print(f"{args.recipe}; the original code's loss of step 1: {result.original:.6f}")
        print("step     torch      ours   difference   torch, perturbed weights")
        for number, (theirs, ours, perturbed) in enumerate(zip(result.torch, result.ours, result.perturbed), 1):
            print(f"{number:4}{theirs:10.6f}{ours:10.6f}{ours - theirs:13.1e}{perturbed - theirs:13.1e}")
        print(f"largest difference: {result.difference:.1e}; of torch from perturbed weights: {result.rounding:.1e}")
        print(f"torch {torch.__version__}, transformers {transformers.__version__}, jax {jax.__version__}")
    if not result.difference <= MAX_DIFFERENCE:
        sys.exit(f"LOSSES DO NOT AGREE: {result.difference:.1e}, more than {MAX_DIFFERENCE:.0e}")


if __name__ == "__main__":
    main()
