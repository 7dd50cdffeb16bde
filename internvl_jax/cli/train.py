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


def add_parser(commands: options.Commands) -> None:
    """Add `train` to the commands."""
    parser = commands.add_parser(
        "train",
        help="fine-tune a model on conversations about images",
        description="Fine-tunes a model with a recipe, on conversations in InternVL's meta files, JSONL or LLaVA's "
        "JSON. Saves checkpoints while it runs, and writes OUTPUT/model at the end. Needs the extra 'train'. Exit code "
        "1: the run was stopped, and the same command resumes it.",
        epilog=EXAMPLES,
        add_help=False,
    )
    parser.add_argument(
        "-h", "--help", action=_Help, nargs=0, help="show this help, with a RECIPE's numbers as defaults, and exit"
    )
    parser.add_argument("recipe", metavar="RECIPE", help=RECIPES)
    parser.add_argument(
        "--data",
        type=options.path,
        required=True,
        metavar="META",
        help="meta JSON, JSONL of conversations, or LLaVA's JSON",
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
    """Prints the help; `train RECIPE --help` shows the recipe's numbers as defaults."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        if namespace.recipe is not None:
            numbers = _numbers_of(namespace.recipe)
            for action in parser._actions:
                text = action.help or ""
                if text.endswith(OF_RECIPE):
                    value = numbers.get(action.dest)
                    shown = "none" if value in (None, (), "") else value
                    action.help = text.removesuffix(OF_RECIPE) + f" (default: {shown})"
        parser.print_help()
        parser.exit()


def _numbers_of(name: str) -> dict[str, Any]:
    """Return a recipe's numbers by the names of their options."""
    from internvl_jax.training.recipes import recipe_of

    recipe = recipe_of(name)
    lora = next(iter(recipe.lora.values()), None)
    return {
        "learning_rate": recipe.optimizer.learning_rate,
        "weight_decay": recipe.optimizer.weight_decay,
        "warmup": recipe.optimizer.warmup,
        "max_grad_norm": recipe.optimizer.max_grad_norm,
        "epochs": recipe.epochs,
        "global_batch_size": recipe.global_batch_size,
        "max_seq_length": recipe.max_seq_length,
        "loss_mean": recipe.loss_mean,
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
        "--weight-decay", type=float, metavar="X", help="weight decay of matrices and embeddings" + OF_RECIPE
    )
    group.add_argument(
        "--warmup", type=float, metavar="X", help="warmup steps; below 1, a fraction of all steps" + OF_RECIPE
    )
    group.add_argument(
        "--max-grad-norm", type=float, metavar="X", help="global norm that gradients are clipped to" + OF_RECIPE
    )
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, metavar="N", help="passes over the data" + OF_RECIPE)
    length.add_argument("--steps", type=int, metavar="N", help="optimizer steps (default: from --epochs)")
    group.add_argument(
        "--global-batch-size", type=int, metavar="N", help="rows per optimizer step, over all devices" + OF_RECIPE
    )
    group.add_argument("--max-seq-length", type=int, metavar="T", help="tokens per row" + OF_RECIPE)
    group.add_argument(
        "--loss-mean", choices=["token", "device"], help="mean over tokens, or over means of devices" + OF_RECIPE
    )
    group.add_argument("--z-loss", type=float, metavar="X", help="weight of the squared log-normalizer" + OF_RECIPE)
    group.add_argument(
        "--drop-path", type=float, metavar="X", help="stochastic depth of a trained vision tower" + OF_RECIPE
    )
    group.add_argument(
        "--train",
        nargs="+",
        metavar="PART",
        help="parts to train: vision_model, mlp1, language_model; with adapters, in addition to them" + OF_RECIPE,
    )
    group.add_argument(
        "--lora-rank", type=int, metavar="R", help="rank of the adapters; sets alpha to twice the rank" + OF_RECIPE
    )
    group.add_argument("--lora-alpha", type=float, metavar="X", help="adapters are scaled by alpha / rank" + OF_RECIPE)
    group.add_argument("--lora-dropout", type=float, metavar="X", help="dropout of the adapters' inputs" + OF_RECIPE)
    group.add_argument(
        "--lora-targets", nargs="+", metavar="LAYER", help="adapted layers, such as q_proj v_proj" + OF_RECIPE
    )
    group.add_argument(
        "--image-size",
        type=int,
        metavar="S",
        help="image size to resize the position embeddings to (default: the checkpoint's size)",
    )
    group.add_argument(
        "--augmentation",
        choices=["crop", "jpeg", "none"],
        default="crop",
        help="image augmentation, for data sets with data_augment in META",
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
        "--image-slots",
        type=options.natural,
        metavar="N",
        help="image slots in a process's batch (default: from the data)",
    )
    group.add_argument(
        "--workers", type=options.natural, default=0, metavar="N", help="processes that load data; 0 uses threads"
    )


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
        "--from-scratch", action="store_true", help="start again at step 1; checkpoints in OUTPUT are set aside"
    )
    group.add_argument("--tensorboard", action="store_true", help="write OUTPUT/tensorboard")
    group.add_argument(
        "--profile", action="store_true", help="write a trace of a few steps to OUTPUT/profile, for xprof"
    )


# Options that are fields of training.runs.prepare.RunOptions.
RUN_OPTIONS = (
    "data output checkpoint root steps max_seq_length image_slots gradient_accumulation_steps image_size mesh "
    "vision dtype param_dtype remat seed workers save_every keep eval_data eval_every eval_batches answers profile "
    "from_scratch"
).split()


def _run(args: argparse.Namespace) -> int:
    recipe = _recipe(args)
    if importlib.util.find_spec("grain") is None:
        raise ImportError("training reads its data with grain: pip install 'internvl-jax[train]'")

    from internvl_jax.parallel import distributed
    from internvl_jax.training import saving
    from internvl_jax.training.runs import prepare, reporting, summary
    from internvl_jax.training.runs import run as training_run

    if args.tensorboard:
        reporting.require_board()
    options.start_processes(args)
    run_options = prepare.RunOptions(
        recipe,
        **{name: getattr(args, name) for name in RUN_OPTIONS},
        buckets=tuple(args.buckets),
        packed=not args.no_packing,
        fatal=args.data_errors == "fatal",
        augmentation=None if args.augmentation == "none" else args.augmentation,
    )
    skipped = reporting.Skipped()
    with saving.claimed(args.output):
        with counting() as progress:
            run = prepare.prepare(run_options, report=skipped, progress=progress if err.is_terminal else None)
        with training_run.log_file(run):
            is_process_0 = distributed.is_process_0()
            _log_lines(summary.summarize(run) if is_process_0 else [])
            board = args.output / training_run.TENSORBOARD if args.tensorboard else None
            outcome = None
            if not run.is_done:
                _log_lines(["compiling the training step"] if is_process_0 else [])
                with reporting.reporting(run.context.settings.steps, args.log_every, board) as reporter:
                    outcome = training_run.start(
                        run, log=reporter.log, on_answer=reporter.answer, progress=reporter.progress
                    )
            _log_lines([*skipped.lines(), *summary.summarize_result(run, outcome)] if is_process_0 else [])
    return 0 if outcome is None or outcome.finished else 1


def _log_lines(lines: list[str]) -> None:
    for line in lines:
        logger.info("%s", line)


def _recipe(args: argparse.Namespace) -> Any:
    """Return the recipe with the numbers of the command line."""
    from internvl_jax.training.recipes import override, recipe_of

    return override(
        recipe_of(args.recipe),
        optimizer={
            "learning_rate": args.learning_rate,
            "weight_decay": args.weight_decay,
            "warmup": args.warmup,
            "max_grad_norm": args.max_grad_norm,
        },
        lora={
            "rank": args.lora_rank,
            "alpha": args.lora_alpha,
            "dropout": args.lora_dropout,
            "targets": args.lora_targets,
        },
        epochs=args.epochs,
        global_batch_size=args.global_batch_size,
        loss_mean=args.loss_mean,
        z_loss=args.z_loss,
        drop_path=args.drop_path,
        train=None if args.train is None else tuple(args.train),
    )
