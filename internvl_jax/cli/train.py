"""The `train` command."""

from __future__ import annotations

import argparse
import importlib.util
import logging
from typing import Any

from internvl_jax.cli import options
from internvl_jax.utils.progress import counting, err

logger = logging.getLogger(__name__)

RECIPES = "stage1, stage2, full, lora, lora-both, llava-pretrain or llava-finetune"  # recipes.RECIPES needs jax
EXAMPLES = """\
examples:
  internvl-jax train stage2 --help                    the recipe's own numbers
  internvl-jax train lora --data meta.json --output runs/mine
  internvl-jax train stage2 --checkpoint InternVL-Chat-V1-1-jax --data meta.json --output runs/stage2 \\
      --mesh fsdp=16 --global-batch-size 128 --gradient-accumulation-steps 2

An interrupted run resumes with the same command. docs/training.md explains recipes, data and meshes."""

OF_RECIPE = " (default: the recipe's)"

# Options whose values are fields of training.run.Options with another name.
OPTIONS = {
    "root": "base",
    "max_seq_length": "length",
    "gradient_accumulation_steps": "accumulate",
    "image_slots": "images",
}


def add_parser(commands: options.Commands) -> None:
    """Add `train` to the commands."""
    parser = commands.add_parser(
        "train",
        help="fine-tune a model on conversations about images",
        description="Trains the parts that RECIPE names, on InternVL's meta files, JSONL or LLaVA's JSON, saves "
        "checkpoints, and writes OUTPUT/model. Needs the extra 'train'. Exit code 1: the run was stopped, and the same "
        "command resumes it.",
        epilog=EXAMPLES,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action=_Help, nargs=0, help="show this text, with RECIPE its numbers, and exit")
    parser.add_argument("recipe", metavar="RECIPE", help=RECIPES)
    parser.add_argument(
        "--data", type=options.path, required=True, metavar="META", help="meta JSON, JSONL, or LLaVA's JSON"
    )
    options.add_output(parser, "directory of the run, new or to resume", required=True)
    options.add_checkpoint(parser, "converted checkpoint to start from")
    parser.add_argument(
        "--root",
        type=options.path,
        metavar="DIR",
        help="directory that relative paths in META start from (default: that of META)",
    )
    _add_recipe(parser.add_argument_group("recipe"))
    _add_machine(parser.add_argument_group("devices"))
    _add_run(parser.add_argument_group("run"))
    options.add_processes(parser)
    parser.set_defaults(run=_run)


class _Help(argparse.Action):
    """`train RECIPE --help` shows the recipe's numbers as defaults."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        if namespace.recipe is not None:
            numbers = _numbers_of(namespace.recipe)
            for action in parser._actions:
                if (action.help or "").endswith(OF_RECIPE):
                    value = numbers.get(action.dest)
                    shown = "none" if value in (None, (), "") else value
                    action.help = action.help.removesuffix(OF_RECIPE) + f" (default: {shown})"
        parser.print_help()
        parser.exit()


def _numbers_of(name: str) -> dict[str, Any]:
    """A recipe's numbers, by the options that change them."""
    from internvl_jax.training.recipes import recipe_of

    recipe = recipe_of(name)
    lora = next(iter(recipe.lora.values()), None)
    return {
        "learning_rate": recipe.optimizer.learning_rate,
        "weight_decay": recipe.optimizer.weight_decay,
        "warmup": recipe.optimizer.warmup,
        "max_grad_norm": recipe.optimizer.clip,
        "epochs": recipe.epochs,
        "global_batch_size": recipe.rows,
        "max_seq_length": recipe.length,
        "loss_mean": recipe.mean,
        "z_loss": recipe.z_loss,
        "drop_path": recipe.drop_path,
        "train": " ".join(recipe.train),
        "lora_rank": lora and lora.rank,
        "lora_alpha": lora and lora.alpha,
        "lora_dropout": lora and lora.dropout,
        "lora_targets": lora and (" ".join(lora.targets) if lora.targets else "all linear layers"),
    }


def _add_recipe(group: Any) -> None:
    group.add_argument("--learning-rate", type=float, metavar="X", help="peak learning rate" + OF_RECIPE)
    group.add_argument(
        "--weight-decay", type=float, metavar="X", help="AdamW's, for matrices and embeddings" + OF_RECIPE
    )
    group.add_argument(
        "--warmup", type=float, metavar="X", help="warmup steps; below 1 a fraction of all steps" + OF_RECIPE
    )
    group.add_argument("--max-grad-norm", type=float, metavar="X", help="gradient clipping" + OF_RECIPE)
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, metavar="N", help="passes over the data" + OF_RECIPE)
    length.add_argument("--steps", type=int, metavar="N", help="optimizer steps (default: from --epochs)")
    group.add_argument(
        "--global-batch-size", type=int, metavar="N", help="rows per optimizer step, over all devices" + OF_RECIPE
    )
    group.add_argument("--max-seq-length", type=int, metavar="T", help="tokens per row" + OF_RECIPE)
    group.add_argument(
        "--loss-mean", choices=["token", "device"], help="mean over tokens, or over devices' means" + OF_RECIPE
    )
    group.add_argument("--z-loss", type=float, metavar="X", help="weight of the squared log-normalizer" + OF_RECIPE)
    group.add_argument(
        "--drop-path", type=float, metavar="X", help="stochastic depth of a trained vision encoder" + OF_RECIPE
    )
    group.add_argument(
        "--train",
        nargs="+",
        metavar="PART",
        help="trained parts, among vision_model, mlp1, language_model; beside adapters" + OF_RECIPE,
    )
    group.add_argument("--lora-rank", type=int, metavar="R", help="rank; sets alpha to twice as much" + OF_RECIPE)
    group.add_argument("--lora-alpha", type=float, metavar="X", help="adapters are scaled by alpha / rank" + OF_RECIPE)
    group.add_argument("--lora-dropout", type=float, metavar="X", help="dropout of the adapters' inputs" + OF_RECIPE)
    group.add_argument(
        "--lora-targets", nargs="+", metavar="LAYER", help="adapted layers, such as q_proj v_proj" + OF_RECIPE
    )
    group.add_argument(
        "--image-size",
        type=int,
        metavar="S",
        help="resize the position embeddings to images of S pixels first (default: the checkpoint's size)",
    )
    group.add_argument(
        "--augmentation", choices=["crop", "jpeg", "none"], default="crop", help="for data sets that META marks"
    )
    group.add_argument("--no-packing", action="store_true", help="one conversation per row")
    group.add_argument(
        "--buckets",
        type=int,
        nargs="+",
        default=[],
        metavar="T",
        help="shorter row lengths; turns packing off",
    )


def _add_machine(group: Any) -> None:
    options.add_mesh(group)
    options.add_vision_mode(group)
    options.add_dtype(group)
    group.add_argument("--param-dtype", choices=options.DTYPES, default="float32", help="dtype of trained parameters")
    group.add_argument("--remat", choices=["full", "dots", "none"], default="full", help="rematerialization policy")
    group.add_argument(
        "--gradient-accumulation-steps", type=int, default=1, metavar="N", help="micro-batches per optimizer step"
    )
    group.add_argument(
        "--image-slots", type=options.natural, metavar="N", help="images in a process's batch (default: from the data)"
    )
    group.add_argument("--workers", type=options.natural, default=0, metavar="N", help="data processes; 0 uses threads")


def _add_run(group: Any) -> None:
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of data order, dropout and adapters")
    group.add_argument("--save-every", type=int, default=500, metavar="N", help="steps between checkpoints")
    group.add_argument("--keep", type=int, default=3, metavar="N", help="checkpoints to keep")
    group.add_argument("--log-every", type=options.count, default=10, metavar="N", help="steps between log lines")
    group.add_argument(
        "--eval-data",
        type=options.path,
        metavar="META",
        help="held-out data: loss, accuracy and a few answers (default: none)",
    )
    group.add_argument("--eval-every", type=int, default=500, metavar="N", help="steps between held-out evaluations")
    group.add_argument("--eval-batches", type=options.count, default=16, metavar="N", help="held-out batches, at most")
    group.add_argument("--answers", type=options.natural, default=3, metavar="N", help="held-out answers to print")
    group.add_argument(
        "--data-errors", choices=["skip", "fatal"], default="skip", help="what to do with invalid conversations"
    )
    group.add_argument(
        "--from-scratch", action="store_true", help="start at step 1 although OUTPUT has checkpoints, which are kept"
    )
    group.add_argument("--tensorboard", action="store_true", help="write OUTPUT/tensorboard")
    group.add_argument(
        "--profile", action="store_true", help="write a trace of a few steps to OUTPUT/profile, for xprof"
    )


def _run(args: argparse.Namespace) -> int:
    recipe = _recipe(args)
    if importlib.util.find_spec("grain") is None:
        raise ImportError("training reads its data with grain: pip install 'internvl-jax[train]'")

    from internvl_jax.parallel import distributed
    from internvl_jax.training import reporting, run, saving

    if args.tensorboard:
        reporting.require_board()
    options.start_processes(args)
    names = (
        "data output checkpoint root steps max_seq_length image_slots gradient_accumulation_steps image_size mesh "
        "vision dtype param_dtype remat seed workers save_every keep eval_data eval_every eval_batches answers profile "
        "from_scratch"
    ).split()
    values: dict[str, Any] = {OPTIONS.get(name, name): getattr(args, name) for name in names}
    asked = run.Options(
        recipe,
        **values,
        buckets=tuple(args.buckets),
        packed=not args.no_packing,
        fatal=args.data_errors == "fatal",
        augmentation=None if args.augmentation == "none" else args.augmentation,
    )
    skipped = reporting.Skipped()
    with saving.claimed(args.output):
        with counting() as progress:
            made = run.prepare(asked, report=skipped, progress=progress if err.is_terminal else None)
        with run.log_file(made):
            if distributed.is_process_0():
                for line in run.summary(made):
                    logger.info("%s", line)
            board = args.output / run.TENSORBOARD if args.tensorboard else None
            outcome = None
            if not made.done:
                if distributed.is_process_0():
                    logger.info("compiling the training step")
                with reporting.reporting(made.settings.steps, args.log_every, board) as reporter:
                    outcome = run.start(made, log=reporter.log, tell=reporter.answer, progress=reporter.progress)
            if distributed.is_process_0():
                for line in (*skipped.lines(), *run.result(made, outcome)):
                    logger.info("%s", line)
    return 0 if outcome is None or outcome.finished else 1


def _recipe(args: argparse.Namespace) -> Any:
    """The recipe with the numbers that were given."""
    from internvl_jax.training.recipes import override, recipe_of

    return override(
        recipe_of(args.recipe),
        optimizer={
            "learning_rate": args.learning_rate,
            "weight_decay": args.weight_decay,
            "warmup": args.warmup,
            "clip": args.max_grad_norm,
        },
        lora_rank=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        lora_targets=args.lora_targets,
        epochs=args.epochs,
        rows=args.global_batch_size,
        mean=args.loss_mean,
        z_loss=args.z_loss,
        drop_path=args.drop_path,
        train=None if args.train is None else tuple(args.train),
    )
